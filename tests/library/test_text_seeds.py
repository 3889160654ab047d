"""Texts as seeds: the numbers that the known scripts make of them."""

from __future__ import annotations

import pytest

from library.core.text_seeds import seed_of, string_to_seed
from library.generation.gen_img.prompts import GENERATION_LINE_OPTIONS
from library.training.option_groups import LoopOptions
from library.training.sampling_prompts import read_seed
from tests.runs.conftest import Work, fingerprint, tiny, work  # noqa: F401


@pytest.mark.parametrize(("text", "seed"), [
    ("a", 2951628890), ("cat", 2933283709), ("blissful", 408225803), ("hello world", 3807366404), ("日本語", 779165735),
])  # fmt: skip
def test_known_numbers(text: str, seed: int) -> None:
    assert string_to_seed(text) == seed == seed_of(text) == read_seed(text)
    assert GENERATION_LINE_OPTIONS["d"].convert(f"{text},7") == (seed, 7)


def test_numbers_are_numbers_and_walks_without_end_have_a_seed() -> None:
    assert [seed_of(text) for text in ("42", " 7 ", "-1", 9)] == [42, 7, -1, 9] and read_seed("-1") is None
    assert 0 <= string_to_seed(chr(0x10FFFF) * 2000) < 2**32 and 0 <= string_to_seed("\x00" * 2000) < 2**32
    assert string_to_seed("cat", bits=63) % 2**32 == string_to_seed("cat")
    with pytest.raises(ValueError, match="a number or a text"):
        seed_of("  ")


def test_a_run_with_a_text_is_that_with_its_number(work: Work) -> None:
    words = ("--max_train_steps=1",)
    assert fingerprint(work.train("text", *words, "--seed=cat")) == fingerprint(work.train("number", *words, "--seed=2933283709"))
    assert LoopOptions(seed=3).seed == 3


def test_a_blank_seed_is_told_in_words(capsys: pytest.CaptureFixture) -> None:
    from library.generation import flux_inference

    with pytest.raises(SystemExit):
        flux_inference.main(["--seed", ""])
    told = capsys.readouterr().err
    assert "a number or a text is needed" in told and "seed_of" not in told
