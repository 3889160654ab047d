"""The models of transformers, imported once, without what no text encoder uses, and beside other work where there is
some."""

from __future__ import annotations

import importlib
import os
import sys
import threading
from contextlib import suppress
from typing import Any

import torch

from library.components.deferred_compiler import compiler_deferred
from library.core.garbage import in_own_program, records_stay

MODELS = "transformers.modeling_utils"
_importing = threading.RLock()
_background: list[threading.Thread] = []


def import_transformers_models() -> None:
    """Import what every model class of transformers stands on (`MODELS`). Call it before such a class is imported: it
    waits for `import_in_background`, and leaves out scipy, torch's compiler and, in a program of our own, tensors that
    are spread over processes."""
    with _importing:
        if MODELS in sys.modules:
            return
        with records_stay():
            _import_losses()
            with suppress(ImportError), compiler_deferred():
                if in_own_program() and not _is_one_of_several():
                    _leave_spread_tensors_out()
                for name in (MODELS, "transformers.masking_utils"):
                    importlib.import_module(name)
            importlib.import_module(MODELS)  # with the compiler, where this transformers asks for more of it


def import_in_background() -> None:
    """Begin to import them in a thread while this one computes or waits for the disk. An import that fails does so again,
    with its message, where the classes are needed."""
    if MODELS in sys.modules:
        return

    def work() -> None:
        with suppress(Exception):
            import_transformers_models()

    thread = threading.Thread(target=work, name="import-transformers", daemon=True)
    _background.append(thread)
    thread.start()


def finish_background() -> None:
    """Wait for what `import_in_background` has begun."""
    while _background:
        _background.pop().join()


def _import_losses() -> None:
    """The losses of transformers, which `modeling_utils` imports, would import scipy.optimize (a quarter of a second)
    for matching the boxes of detectors. They get it when such a loss is computed."""
    from transformers import utils

    available = getattr(utils, "is_scipy_available", None)
    if available is None or "scipy.optimize" in sys.modules or not available():
        return
    utils.is_scipy_available = lambda: False
    try:
        importlib.import_module("transformers.loss.loss_utils")
    finally:
        utils.is_scipy_available = available
    for name, module in list(sys.modules.items()):
        if name.startswith("transformers.loss.") and hasattr(module, "is_scipy_available"):
            module.is_scipy_available = available  # type: ignore[attr-defined]
            module.linear_sum_assignment = _linear_sum_assignment  # type: ignore[attr-defined]


def _linear_sum_assignment(*args: Any, **kwargs: Any) -> Any:
    from scipy.optimize import linear_sum_assignment

    return linear_sum_assignment(*args, **kwargs)


def _is_one_of_several() -> bool:
    """Whether this process shares its run with others, or a launcher says that it will."""
    distributed = torch.distributed
    return "RANK" in os.environ or (distributed.is_available() and distributed.is_initialized())


def _leave_spread_tensors_out() -> None:
    """transformers imports torch.distributed.tensor (half a second, with sympy) for models that are spread over processes.
    Tell it that this process is alone, for as long as it runs: so all its modules agree."""
    importlib.import_module("transformers.utils")
    for name, module in list(sys.modules.items()):
        if name.startswith("transformers.") and "is_torch_distributed_available" in vars(module):
            module.is_torch_distributed_available = _not_spread  # type: ignore[attr-defined]


def _not_spread() -> bool:
    return False
