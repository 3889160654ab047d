"""Small helpers without a subject of their own: log set-up, names of types, threads."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from library.core.errors import ConfigError, did_you_mean
from library.core.lazy_names import homes, lazy_names

if TYPE_CHECKING:
    import argparse

    import numpy as np
    import torch

logger = logging.getLogger(__name__)
__getattr__, __dir__ = lazy_names(__name__, homes("library.compat.pictures", "pil_resize"))


def fire_in_thread(f: Callable[..., Any], *args: Any, **kwargs: Any) -> threading.Thread:
    """Start a function in a thread of its own and return the thread."""
    thread = threading.Thread(target=f, args=args, kwargs=kwargs)
    thread.start()
    return thread


def add_logging_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `setup_logging` for tools that have no option groups."""
    parser.add_argument(
        "--console_log_level",
        default=None,
        choices=("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"),
        help="least level shown",
    )
    parser.add_argument("--console_log_file", default=None, help="write the log to this file instead of the console")
    parser.add_argument("--console_log_simple", action="store_true", help="plain lines without colours")


def setup_logging(
    args: Any = None,
    log_level: str | None = None,
    reset: bool = False,
    *,
    log_file: str | None = None,
) -> None:
    """Give the root logger its one handler. With `reset` an earlier set-up is replaced, else it stays.

    `args`, where given, is any object with `console_log_level` and `console_log_file`. Lines go to the standard error
    output or to `log_file`.
    """
    root = logging.getLogger()
    if root.handlers and not reset:
        return
    level = getattr(args, "console_log_level", None) or log_level or "INFO"
    path = getattr(args, "console_log_file", None) or log_file
    handler = logging.FileHandler(path, encoding="utf-8") if path else logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(message)s", "%H:%M:%S"))
    for old in list(root.handlers):
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level)


_DTYPES = {
    "float32": "float32", "fp32": "float32", "float": "float32", "float16": "float16", "fp16": "float16",
    "half": "float16",
    "bfloat16": "bfloat16", "bf16": "bfloat16", "float64": "float64", "fp64": "float64", "fp8": "float8_e4m3fn",
    "fp8_e4m3": "float8_e4m3fn", "fp8_e4m3fn": "float8_e4m3fn", "float8_e4m3fn": "float8_e4m3fn",
    "fp8_e5m2": "float8_e5m2", "float8_e5m2": "float8_e5m2",
}  # fmt: skip


def str_to_dtype(s: str | None, default_dtype: torch.dtype | None = None) -> torch.dtype | None:
    """The torch type of a name such as bf16, float or fp8_e4m3fn; `default_dtype` for None. ConfigError for other
    names."""
    import torch

    if s is None:
        return default_dtype
    known = _DTYPES.get(s.lower().removeprefix("torch."))
    if known is None:
        raise ConfigError(f"unknown type '{s}'{did_you_mean(s, _DTYPES) or '.'} Known: {', '.join(_DTYPES)}")
    return getattr(torch, known)


def validate_interpolation_fn(interpolation_str: str) -> bool:
    """Whether `resize_image` knows this name."""
    from library.dataset import media_utils

    return interpolation_str in media_utils.OPENCV_FILTERS or interpolation_str in media_utils.PILLOW_FILTERS


def resize_image(
    image: np.ndarray, width: int, height: int, resized_width: int, resized_height: int,
    resize_interpolation: str | None = None
) -> np.ndarray:
    """Resize [height, width, C] to (resized_width, resized_height) as the datasets do; kept for callers of this
    name."""
    from library.dataset import media_utils

    if image.shape[:2] != (height, width):
        raise ValueError(f"the image is {image.shape[1]}x{image.shape[0]}, not {width}x{height} as given")
    return media_utils.resize_image(image, (resized_width, resized_height), resize_interpolation)
