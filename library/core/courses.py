"""Computations that stop where others may join them: what they ask for is computed for one alone, or for several at
once. Without torch."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Sequence
from typing import Any

Course = Generator["Request", Any, Any]
"""yields what it asks for, is sent the answer, and returns its result"""


class Request(ABC):
    """What a course asks for."""

    @abstractmethod
    def alone(self) -> Any:
        """The answer, where no other course is beside it."""


def course(function: Callable[..., Course]) -> Callable[..., Any]:
    """A generator function as an ordinary one, in which every request is answered alone; `.course` is the generator
    function itself."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        return run_alone(function(*args, **kwargs))

    run.course = function
    return run


def run_alone(steps: Course) -> Any:
    """The result of a course whose requests are answered alone."""
    answer = None
    while True:
        try:
            request = steps.send(answer)
        except StopIteration as end:
            return end.value
        try:
            answer = request.alone()
        except BaseException:
            steps.close()
            raise


def run_together(courses: Sequence[Course], answer: Callable[[list[Any]], Sequence[Any]]) -> list[Any]:
    """The results of courses of one kind, whose requests are answered together: `answer` gets one of each and gives as
    many answers. RuntimeError when some end before others."""
    answers: Sequence[Any] = [None] * len(courses)
    try:
        while True:
            requests, results = [], []
            for steps, given in zip(courses, answers, strict=True):
                try:
                    requests.append(steps.send(given))
                except StopIteration as end:
                    results.append(end.value)
            if not requests:
                return results
            if results:
                raise RuntimeError(f"of {len(courses)} courses {len(results)} end before the others")
            answers = answer(requests)
    finally:
        for steps in courses:
            steps.close()
