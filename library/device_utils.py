"""The device to compute on, and giving its memory back."""

from __future__ import annotations

import functools
import gc

import torch

QUEUED_COPIES = ("cuda", "meta")
"""devices that copy from page-locked memory in the order of their work while the host goes on; elsewhere (MPS) such
a copy may be read before it is there. "meta" has no numbers: tests use it"""


def copies_are_queued(device: torch.device | str) -> bool:
    """Whether a copy to the device needs no waiting."""
    return torch.device(device).type in QUEUED_COPIES


def to_device(tensor: torch.Tensor, device: torch.device | str, dtype: torch.dtype | None = None) -> torch.Tensor:
    """`tensor` on `device` and, with `dtype`, of that type, converted there. The host does not wait: page-locked memory
    is between them, which torch keeps until the copy was made."""
    if tensor.device.type == "cpu" and copies_are_queued(device):
        source = tensor.pin_memory() if torch.device(device).type == "cuda" else tensor
        moved = source.to(device, non_blocking=True)
        return moved if dtype is None else moved.to(dtype)
    return tensor.to(device=device, dtype=dtype)


def to_like(tensor: torch.Tensor, example: torch.Tensor) -> torch.Tensor:
    """`tensor` on the device and in the type of `example`; see `to_device`."""
    return to_device(tensor, example.device, example.dtype)


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


def device_problem(name: str, value: str | None) -> str | None:
    """A message for a device that is not there, or is no device at all, or None. No value passes."""
    if value is None:
        return None
    try:
        device = torch.device(value)
    except (RuntimeError, ValueError, TypeError):
        return f"--{name} is '{value}', which is no device; here there are: {', '.join(_devices())}"
    try:
        torch.empty(1, device=device).cpu()  # what has no data ("meta") fails here too
    except (RuntimeError, AssertionError, NotImplementedError, ImportError):
        built = "; this torch is built without CUDA" if device.type == "cuda" and torch.version.cuda is None else ""
        return f"--{name} is '{value}', which is not there; here there are: {', '.join(_devices())}{built}"
    return None


def can_compute(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a device holds numbers of this format and computes with them; 8-bit ones are only stored."""
    try:
        numbers = torch.ones(8, 8, device=device).to(dtype)
        numbers = numbers.float() if numbers.element_size() == 1 else numbers @ numbers
        return float(numbers.float().sum()) > 0
    except (RuntimeError, TypeError, NotImplementedError):
        return False


def format_problem(flag: str, dtype: str, device: str | None, instead: str) -> str | None:
    """A message for a number format, by its name in torch, that the device cannot compute with (MPS has no 8-bit
    numbers, old GPUs no bfloat16), or None. `device`: None is the preferred one; one that is not there has a message of
    its own."""
    if dtype == "float32" or device_problem("device", device) is not None:
        return None
    place = get_preferred_device() if device is None else torch.device(device)
    if can_compute(place, getattr(torch, dtype)):
        return None
    return f"{flag} asks for {dtype}, which {described(place)} cannot compute with; {instead}"


def imitates_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 is computed in software, many times slower: CUDA devices of compute capability below 8.0 (RTX
    30) do so."""
    return device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)


def described(device: torch.device) -> str:
    """A device as people know it."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} ({device})"
    return {"mps": "the GPU of this Mac (mps)", "cpu": "the CPU"}.get(device.type, str(device))


def _devices() -> list[str]:
    """The devices that can be named, the best ones first."""
    kinds = {"cuda": torch.cuda.device_count() if torch.cuda.is_available() else 0}
    if hasattr(torch, "xpu"):
        kinds["xpu"] = torch.xpu.device_count() if torch.xpu.is_available() else 0
    numbered = [f"{kind}:{number}" for kind, count in kinds.items() for number in range(count)]
    return [*numbered, *(["mps"] if torch.backends.mps.is_available() else []), "cpu"]


FP16_SUMS = "allow_fp16_accumulation"
"""of torch.backends.cuda.matmul, from PyTorch 2.7 on"""


def sum_in_fp16(wanted: bool) -> None:
    """Whether NVIDIA GPUs add up products of float16 in float16 from now on; a setting of the process, which an earlier
    run may have left."""
    if hasattr(torch.backends.cuda.matmul, FP16_SUMS):
        setattr(torch.backends.cuda.matmul, FP16_SUMS, wanted)


def fp16_sums_lack(device: torch.device | str) -> str | None:
    """Why --fp16_accumulation has no effect on a device, in words, or None."""
    kind = torch.device(device).type
    if kind != "cuda":
        return f"the device is {kind}, and only GPUs can add up in float16"
    if not hasattr(torch.backends.cuda.matmul, FP16_SUMS):
        return f"PyTorch is {torch.__version__}; needed: 2.7 or later"
    return None


def clean_memory_on_device(device: torch.device | str | None = None) -> None:
    """Release what the allocator of the device (default: the preferred one) holds unused, after a collection: model
    classes have reference cycles, which live until then."""
    gc.collect()
    kind = get_preferred_device().type if device is None else torch.device(device).type
    if kind == "cuda":
        torch.cuda.empty_cache()
    elif kind == "xpu":
        torch.xpu.empty_cache()
    elif kind == "mps":
        torch.mps.empty_cache()
