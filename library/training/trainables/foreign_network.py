"""Network modules of other packages, tried out before models are loaded: only they know what their arguments mean."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, redirect_stderr, redirect_stdout
from typing import Any

import torch

from library.core.keyed_random import isolated_rng


def try_arguments(
    make: Callable[[torch.nn.Module, bool], Any], class_names: Iterable[str],
    told: Callable[[], AbstractContextManager[None]],
) -> None:
    """Let a module make a network of a stand-in for the model: `make(model, with_arguments)`. What it raises goes
    through `told`. A module that makes none without arguments either says nothing of them."""
    names = list(class_names)

    def attempt(with_arguments: bool) -> None:
        with isolated_rng(0), _silence():
            make(_stand_in(names), with_arguments)

    try:
        attempt(True)
    except Exception:  # whatever a module of the user's raises
        try:
            attempt(False)
        except Exception:
            return
        with told():
            attempt(True)


def _stand_in(class_names: Iterable[str]) -> torch.nn.Module:
    """A model with small layers in a block of each of these classes."""
    return torch.nn.ModuleDict({
        name: type(name, (torch.nn.Sequential,), {})(torch.nn.Linear(8, 8), torch.nn.Conv2d(8, 8, 3))
        for name in class_names
    })


@contextmanager
def _silence() -> Iterator[None]:
    """Inside, what is logged or printed is not seen."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)
