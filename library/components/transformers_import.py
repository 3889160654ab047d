"""The models of transformers, imported once, without what no text encoder uses, and beside other work where there is
some."""

from __future__ import annotations

import importlib
import sys
import threading
from contextlib import suppress
from typing import Any

from library.core.garbage import records_stay

_importing = threading.RLock()


def import_transformers_models() -> None:
    """Import what every model class of transformers stands on (`transformers.modeling_utils`). Call it before such a
    class is imported: it waits for `import_in_background`, and leaves scipy out."""
    with _importing:
        if "transformers.modeling_utils" not in sys.modules:
            with records_stay():
                _import_losses()
                importlib.import_module("transformers.modeling_utils")


def import_in_background() -> None:
    """Begin to import them in a thread while this one computes or waits for the disk. An import that fails does so again, with
    its message, where the classes are needed."""
    if "transformers.modeling_utils" in sys.modules:
        return

    def work() -> None:
        with suppress(Exception):
            import_transformers_models()

    threading.Thread(target=work, name="import-transformers", daemon=True).start()


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
