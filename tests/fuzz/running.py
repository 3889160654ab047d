"""How the fuzz tests run a case: a message or success, within a time; everything else names the case and is kept as a
file."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

from library.core.errors import AtelierError

SECONDS = 20
SEED = int(os.environ.get("FUZZ_SEED", "0"))
CORPUS = Path(__file__).parent / "corpus"


class Hang(BaseException):
    """A case that took too long."""


def outcome(case: Callable[[], object]) -> str:
    """"success" or "message"; everything else that a case raises comes through."""

    def stop(*_: object) -> None:
        raise Hang(f"not finished after {SECONDS} seconds")

    has_timer = hasattr(signal, "setitimer")
    if has_timer:
        before = signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        return "message" if case() in (1, 2) else "success"
    except AtelierError as error:
        assert str(error).strip(), "an empty message"
        return "message"
    except SystemExit as ended:
        assert ended.code in (0, 1, 2), ended.code
        return "message" if ended.code else "success"
    finally:
        if has_timer:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


class Finds:
    """What went wrong in a test, case by case."""

    def __init__(self) -> None:
        self.counts = {"success": 0, "message": 0}
        self.found: list[str] = []
        self.seconds = 0.0

    def run(self, name: str, case: Callable[[], object]) -> None:
        started = time.perf_counter()
        try:
            self.counts[outcome(case)] += 1
        except (KeyboardInterrupt, GeneratorExit):
            raise
        except BaseException as error:
            place = error.__traceback__
            while place is not None and place.tb_next is not None:
                place = place.tb_next
            where = f"{Path(place.tb_frame.f_code.co_filename).name}:{place.tb_lineno}" if place else "?"
            self.found.append(f"{type(error).__name__} at {where}: {str(error)[:200]!a}; {name}")
        self.seconds += time.perf_counter() - started

    def assert_none(self) -> None:
        assert not self.found, f"{len(self.found)} cases:\n" + "\n".join(self.found[:40])


def generator(target: str, number: int) -> random.Random:
    return random.Random(f"{target}/{SEED}/{number}")


def corpus(target: str) -> list[Path]:
    """Inputs that were found once, kept as they were."""
    return sorted((CORPUS / target).glob("*"))
