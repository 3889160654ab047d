"""Weighted prompts, rows of token ids and joined rows against the reference file prompts.json."""

from __future__ import annotations

import pytest

from library.generation import prompt_weighting as pw
from tests.golden_dir import behaviour, behaviour_cases

FILE, BEGIN, END = "prompts.json", 49406, 49407


def runs(values) -> list:
    """A list of numbers written as runs: [value, count], or [first, last, 1]."""
    numbers: list = []
    for run in values:
        numbers += [run[0]] * run[1] if len(run) == 2 else list(range(run[0], run[1] + 1, run[2]))
    return numbers


def of_kind(kind: str):
    return behaviour_cases(FILE, where=lambda case: case["input"]["kind"] == kind)


@pytest.mark.parametrize("case", of_kind("weights"))
def test_weights(case):
    pieces = pw.parse_weights(case["input"]["prompt"])
    assert [text for text, _ in pieces] == [text for text, _ in case["expected"]]
    assert [weight for _, weight in pieces] == pytest.approx([weight for _, weight in case["expected"]], rel=1e-9)


@pytest.mark.parametrize("case", of_kind("chunks"))
def test_chunks(case):
    given = case["input"]
    first, count = given["token_ids"]["first"], given["token_ids"]["count"]
    rows = pw.token_rows(
        range(first, first + count), given["max_token_length"] // pw.PER_ROW, begin=BEGIN, end=END,
        pad=given["pad_token_id"]
    )
    assert rows == [runs(row) for row in case["expected"]["input_ids"]]


@pytest.mark.parametrize("case", of_kind("weighted_chunks"))
def test_weighted_chunks(case):
    given = case["input"]
    tokens = [(int(word), weight) for text, weight in pw.parse_weights(given["prompt"]) for word in text.split()]
    num_rows = given["max_token_length"] // pw.PER_ROW
    rows = pw.token_rows([token for token, _ in tokens], num_rows, begin=BEGIN, end=END, pad=given["pad_token_id"])
    assert rows == [runs(row) for row in case["expected"]["input_ids"]]
    weights = pw.weight_rows([weight for _, weight in tokens], num_rows)
    for row, expected in zip(weights, case["expected"]["weights"], strict=True):
        assert row == pytest.approx(runs(expected), rel=1e-5)


@pytest.mark.parametrize("case", of_kind("joined"))
def test_joined(case):
    positions = pw.joined_positions(case["input"]["num_chunks"])
    assert positions == runs(case["expected"]["positions_in_chunks"])
    assert len(positions) == case["expected"]["length"]


def test_every_recorded_kind_is_compared():
    kinds = {case["input"]["kind"] for case in behaviour(FILE)["cases"]}
    assert kinds <= {"weights", "chunks", "weighted_chunks", "joined"}
