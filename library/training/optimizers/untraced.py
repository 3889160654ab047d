"""Optimizers without torch's compiler.

The methods of torch's optimizers tell torch._dynamo that it is not to trace them, and import it to do so: a second and
a half of Python that a run without torch.compile never needs. As long as nothing has imported it nothing is traced, so
these methods run without it; from the moment on at which something does, they do what torch wrote.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from library.components import deferred_compiler
from library.components.deferred_compiler import KEPT_BY_TORCH, plain_until_compiling

METHODS = ("add_param_group", "zero_grad", "state_dict", "load_state_dict")
"""those of torch.optim.Optimizer that are marked not to be traced"""


def leave_compiler_out(optimizer_class: type) -> None:
    """Let the methods of this class, as torch brings them, run without the compiler. Call it before the class is
    instantiated. Versions of torch that mark them in another way import the compiler, as without this."""
    import torch

    if deferred_compiler.is_imported() or not issubclass(optimizer_class, torch.optim.Optimizer):
        return
    for name in METHODS:
        method = getattr(torch.optim.Optimizer, name)
        marked = getattr(method, "__wrapped__", None)
        if marked is not None and not hasattr(marked, KEPT_BY_TORCH):
            setattr(marked, KEPT_BY_TORCH, plain_until_compiling(marked, lambda method=method: method))
    for owner in optimizer_class.__mro__:
        step = vars(owner).get("step")
        if getattr(getattr(step, "__code__", None), "co_name", "") == "_use_grad" and hasattr(step, "__wrapped__"):
            owner.step = _step_without_compiler(step)


def _step_without_compiler(step: Callable[..., Any]) -> Callable[..., Any]:
    """A `step` that torch wraps to set whether gradients are recorded, with the same setting."""
    import torch

    plain = step.__wrapped__  # type: ignore[attr-defined]

    @functools.wraps(step)
    def call(self: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        if deferred_compiler.is_imported():
            return step(self, *args, **kwargs)
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            return plain(self, *args, **kwargs)

    return call
