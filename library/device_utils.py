"""The device to compute on, and giving its memory back."""

from __future__ import annotations

import functools
import gc

import torch


@functools.lru_cache(maxsize=None)
def get_preferred_device() -> torch.device:
    """CUDA when it is there, then XPU, then MPS, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if hasattr(torch, "xpu") and torch.xpu.is_available():
        return torch.device("xpu")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def clean_memory_on_device(device: torch.device | str | None = None) -> None:
    """Release what the allocator of the device (default: the preferred one) holds unused, after a collection: model classes
    have reference cycles, which live until then."""
    gc.collect()
    kind = get_preferred_device().type if device is None else torch.device(device).type
    if kind == "cuda":
        torch.cuda.empty_cache()
    elif kind == "xpu":
        torch.xpu.empty_cache()
    elif kind == "mps":
        torch.mps.empty_cache()
