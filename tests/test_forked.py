"""Processes of one run that are forked from the one of the tests."""

from __future__ import annotations

import os
import time

import pytest

from tests.forked import run_ranks
from tests.waiting import PATIENCE


def test_each_process_has_its_rank_and_what_they_share(tmp_path) -> None:
    def note() -> None:
        told = (os.environ[name] for name in ("LOCAL_RANK", "WORLD_SIZE", "MORE"))
        (tmp_path / os.environ["RANK"]).write_text(" ".join(told))

    run_ranks(2, note, tmp_path / "told", {"MORE": "x"})
    assert [(tmp_path / rank).read_text() for rank in ("0", "1")] == ["0 2 x", "1 2 x"]
    assert "MORE" not in os.environ


def test_one_that_fails_ends_the_others_and_is_told(tmp_path) -> None:
    def fail() -> None:
        if os.environ["RANK"] == "1":
            raise ValueError("the second one")
        time.sleep(PATIENCE)

    with pytest.raises(AssertionError, match="ValueError: the second one"):
        run_ranks(2, fail, tmp_path / "told")
