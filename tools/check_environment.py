"""Look for the known traps of an environment: missing packages, a torchvision that does not fit torch, OpenCV without libGL."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

NEEDED = (
    "torch", "accelerate", "safetensors", "transformers", "tokenizers", "einops", "toml", "voluptuous", "imagesize", "cv2",
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
            f"torchvision {_version('torchvision')} does not fit torch {_version('torch')} ({error}); transformers cannot be"
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


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "-"


def main(argv: list[str] | None = None) -> None:
    argparse.ArgumentParser(description=__doc__).parse_args(argv)
    problems = [*missing_packages(), *filter(None, (torchvision_problem(), opencv_problem()))]
    print(f"python {platform.python_version()}, " + ", ".join(f"{name} {_version(name)}" for name in SHOWN))
    for problem in problems:
        print(f"problem: {problem}", file=sys.stderr)
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
