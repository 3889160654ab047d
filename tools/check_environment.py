"""Tell the device that is used, and look for the known traps of an environment: missing packages, a torchvision that
does not fit torch, OpenCV without libGL, a GPU that the installed torch cannot use."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import platform
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

NEEDED = (
    "torch", "accelerate", "safetensors", "transformers", "tokenizers", "einops", "toml", "voluptuous", "imagesize",
    "cv2",
    "numpy", "PIL", "matplotlib",
)
SHOWN = ("torch", "transformers", "accelerate", "safetensors", "lycoris-lora", "bitsandbytes", "open-clip-torch")


def missing_packages() -> list[str]:
    """One line for each package that is not there."""
    return [f"{name} is not installed" for name in NEEDED if importlib.util.find_spec(name) is None]


def torchvision_problem() -> str | None:
    """A line when torchvision is there and cannot be imported: transformers, diffusers and peft would fail with it."""
    if importlib.util.find_spec("torchvision") is None:
        return None
    try:
        importlib.import_module("torchvision")
    except Exception as error:  # a build for another torch fails with RuntimeError, OSError or ImportError
        return (
            f"torchvision {_version('torchvision')} does not fit torch {_version('torch')} ({error}); transformers "
            "cannot be"
            " imported beside it. Atelier does not use it: pip uninstall torchvision"
        )
    return None


def opencv_problem() -> str | None:
    """A line when OpenCV is there and cannot be imported."""
    if importlib.util.find_spec("cv2") is None:
        return None
    try:
        importlib.import_module("cv2")
    except ImportError as error:
        return f"OpenCV cannot be imported ({error}); without a desktop: pip uninstall opencv-python, pip install opencv-python-headless"
    return None


def device_line() -> str:
    """The device that runs compute on, as torch sees it."""
    from library.device_utils import described, get_preferred_device, imitates_bfloat16

    device = get_preferred_device()
    if device.type != "cuda":
        return f"device: {described(device)}"
    import torch

    memory = torch.cuda.get_device_properties(device).total_memory / 2**30
    return f"device: {described(device)}, {memory:.0f} GiB, bf16 {'in software only: use fp16' if imitates_bfloat16(device) else 'yes'}"


def gpu_names() -> list[str]:
    """NVIDIA GPUs as their driver tells, without torch."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    try:
        told = subprocess.run([program, "-L"], capture_output=True, text=True, errors="replace", timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return []
    lines = told.stdout.splitlines() if told.returncode == 0 else []
    return [line.partition(": ")[2].partition(" (UUID")[0] for line in lines if line.startswith("GPU ")]


def unused_gpu_warning() -> str | None:
    """A line when there is a GPU and torch computes on the CPU all the same."""
    import torch

    if torch.cuda.is_available():
        return None
    found = gpu_names()
    if found and torch.version.cuda is None:
        return (
            f"{found[0]} is there, and torch {torch.__version__} is built without CUDA, so everything runs on the CPU. "
            "Install the CUDA"
            " build: the line that PyTorch's installation page shows for your system, which is `pip install torch` "
            "with --index-url and"
            " an address of PyTorch's own index; add --force-reinstall"
        )
    if found:
        return (
            f"{found[0]} is there, and torch {torch.__version__} cannot use it: its driver is probably older than CUDA"
            f" {torch.version.cuda} needs. Update the driver, or install a torch that is built for an older CUDA"
        )
    if Path("/dev/kfd").exists() and torch.version.hip is None:
        return f"an AMD GPU is there, and torch {torch.__version__} is built without ROCm: PyTorch's installation page shows the line for it"
    return None


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "-"


def main(argv: list[str] | None = None) -> None:
    argparse.ArgumentParser(description=__doc__).parse_args(argv)
    problems = [*missing_packages(), *filter(None, (torchvision_problem(), opencv_problem()))]
    print(f"python {platform.python_version()}, " + ", ".join(f"{name} {_version(name)}" for name in SHOWN))
    try:
        print(device_line())
        warning = unused_gpu_warning()
    except (ImportError, OSError) as error:  # a build for other libraries fails with OSError
        warning = f"torch cannot be imported ({error})"
    if warning:
        print(f"warning: {warning}", file=sys.stderr)
    for problem in problems:
        print(f"problem: {problem}", file=sys.stderr)
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
