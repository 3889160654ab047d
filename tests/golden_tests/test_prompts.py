"""Weights in captions, rows of token ids and joined rows against the recorded cases."""

from __future__ import annotations

import pytest
import torch

from library.clip_prompt_utils import joined, parse_weights, token_rows, tokenize_rows
from tests.golden_dir import behaviour_cases

BEGIN, END = 49406, 49407
FILE = "prompts.json"


def expand(runs: list) -> list:
    """[value, count] repeats a value, [first, last, 1] counts up."""
    values = []
    for run in runs:
        values += [run[0]] * run[1] if len(run) == 2 else list(range(run[0], run[1] + 1))
    return values


def of_kind(kind: str) -> list:
    return behaviour_cases(FILE, where=lambda case: case["input"]["kind"] == kind)


@pytest.mark.parametrize("case", of_kind("weights"))
def test_weights(case) -> None:
    pieces = parse_weights(case["input"]["prompt"])
    assert [text for text, _ in pieces] == [text for text, _ in case["expected"]]
    assert [weight for _, weight in pieces] == pytest.approx([weight for _, weight in case["expected"]], rel=1e-9)


@pytest.mark.parametrize("case", of_kind("chunks"))
def test_rows_of_ids(case) -> None:
    given = case["input"]
    ids = [given["token_ids"]["first"] + number for number in range(given["token_ids"]["count"])]
    rows = token_rows(ids, given["max_token_length"] // 75, begin=BEGIN, end=END, pad=given["pad_token_id"])
    assert rows == [expand(row) for row in case["expected"]["input_ids"]]


class NumberTokenizer:
    """One token per number."""

    bos_token_id, eos_token_id = BEGIN, END

    def __init__(self, pad: int) -> None:
        self.pad_token_id = pad

    def __call__(self, text: str, **_: object):
        return type("Encoded", (), {"input_ids": [int(word) for word in text.split()]})


@pytest.mark.parametrize("case", of_kind("weighted_chunks"))
def test_weighted_rows(case) -> None:
    given, expected = case["input"], case["expected"]
    tokenizer = NumberTokenizer(given["pad_token_id"])
    ids, weights = tokenize_rows(tokenizer, [given["prompt"]], given["max_token_length"] // 75, is_weighted=True)
    assert ids[0].tolist() == [expand(row) for row in expected["input_ids"]]
    torch.testing.assert_close(weights[0], torch.tensor([expand(row) for row in expected["weights"]]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("case", of_kind("joined"))
def test_joined_rows(case) -> None:
    count = case["input"]["num_chunks"]
    positions = torch.arange(count * 77).view(1, count, 77)
    assert joined(positions)[0].tolist() == expand([[*run] for run in case["expected"]["positions_in_chunks"]])
    assert joined(positions).shape[1] == case["expected"]["length"]
