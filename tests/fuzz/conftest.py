"""Fixtures of the fuzz tests."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator

import pytest

from tests.fuzz.running import Finds


@pytest.fixture
def cases(request) -> Callable[[int], range]:
    """Numbers of the cases to run: `count` of them, with --full twenty times as many; FUZZ_CASES=n and FUZZ_SEED=n
    choose others."""

    def numbers(count: int) -> range:
        full = request.config.getoption("--full", default=False)
        return range(int(os.environ.get("FUZZ_CASES", count * 20 if full else count)))

    return numbers


@pytest.fixture
def finds() -> Iterator[Finds]:
    """Without the log and the warnings of other packages, which thousands of damaged files would fill."""
    logging.disable(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield Finds()
    logging.disable(logging.NOTSET)
