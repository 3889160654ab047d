"""torch's compiler, imported when something is compiled and not because a library marks functions for it.

transformers tells torch._dynamo of functions that it is not to trace, and imports it to do so, with sympy and
torch.distributed: more than a second of Python that a run without torch.compile never needs. What is marked meanwhile is
remembered, and the compiler hears of it when it is imported.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import FunctionType, ModuleType
from typing import Any

COMPILER = "torch._dynamo"
MASKS = f"{COMPILER}._trace_wrapped_higher_order_op"
"""the one part of the compiler that transformers imports by name, for masks that are functions"""

KEPT_BY_TORCH = "__dynamo_disable"
"""attribute of a function in which torch keeps its untraced form"""

Marks = list[tuple[str, Callable[..., Any]]]


def is_imported() -> bool:
    """Whether the compiler itself is there."""
    return not isinstance(sys.modules.get(COMPILER), (_StandIn, type(None)))


@contextmanager
def compiler_deferred(importing: Callable[[], AbstractContextManager[Any]] = nullcontext) -> Iterator[None]:
    """Let what is imported in here mark functions for the compiler without importing it. What asks more of it than that
    gets it, imported inside `importing()`."""
    if COMPILER in sys.modules:
        yield
        return
    marks: Marks = []
    stand_in, masks = _StandIn(marks), ModuleType(MASKS)
    masks.TransformGetItemToIndex = _transform_get_item_to_index  # type: ignore[attr-defined]
    sys.modules.update({COMPILER: stand_in, MASKS: masks})
    finder = TellsMarks(marks, importing)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        stand_in.leave()
        if not marks and finder in sys.meta_path:
            sys.meta_path.remove(finder)


class _StandIn(ModuleType):
    """Takes the place of the compiler while functions are marked."""

    def __init__(self, marks: Marks) -> None:
        super().__init__(COMPILER)
        self._marks = marks

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # no package: inspect and import look for such names in every module
            raise AttributeError(name)
        self.leave()
        return getattr(importlib.import_module(COMPILER), name)

    def leave(self) -> None:
        if sys.modules.get(COMPILER) is self:
            del sys.modules[COMPILER], sys.modules[MASKS]

    def allow_in_graph(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return self._mark("allow_in_graph", function)

    def assume_constant_result(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return self._mark("assume_constant_result", function)

    def _mark(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        self._marks.append((name, function))
        return function

    def disable(
        self, function: Callable[..., Any] | None = None, recursive: bool = True, *, wrapping: bool = True,
        **how: Any,
    ) -> Any:  # fmt: skip
        if function is not None and not isinstance(function, FunctionType):  # a class or a model
            self.leave()
            return importlib.import_module(COMPILER).disable(function, recursive, wrapping=wrapping, **how)
        if wrapping:
            import torch  # optimizers' options import this file, and help is shown without torch

            return torch._disable_dynamo(function, recursive)
        return plain_until_compiling(
            function, lambda: sys.modules[COMPILER].disable(function, recursive, wrapping=False)
        )


def plain_until_compiling(function: Callable[..., Any], traced: Callable[[], Callable[..., Any]]) -> Callable[..., Any]:
    """`function`, where torch keeps the untraced form of it (`torch._compile`); forgotten once there is a compiler, so
    that torch makes the real one. `traced` gives what is called then."""

    def call(*args: Any, **kwargs: Any) -> Any:
        if not is_imported():
            return function(*args, **kwargs)
        if getattr(function, KEPT_BY_TORCH, None) is call:
            delattr(function, KEPT_BY_TORCH)
        return traced()(*args, **kwargs)

    return call


def _transform_get_item_to_index() -> Any:
    return importlib.import_module(MASKS).TransformGetItemToIndex()


class TellsMarks(importlib.abc.MetaPathFinder):
    """Waits for the import of the compiler, and marks then what has been marked before."""

    def __init__(self, marks: Marks, importing: Callable[[], AbstractContextManager[Any]]) -> None:
        self.marks, self.importing = marks, importing

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> Any:
        if name != COMPILER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(COMPILER)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_mark(module: ModuleType) -> None:
            with self.importing():
                execute(module)
            for mark, function in self.marks:
                getattr(module, mark)(function)

        spec.loader.exec_module = execute_and_mark  # type: ignore[method-assign]
        return spec
