"""Packaging. `pip install -e .` in a clone; extras: [wandb], [sentencepiece], [onnx], [faces], [optimizers], [upscale], [video], [dev]."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).resolve().parent


def requirements(name: str) -> list[str]:
    """The lines of a list, and of those that it takes in with `-r`."""
    lines = [line.strip() for line in (HERE / name).read_text(encoding="utf-8").splitlines()]
    found = [line for line in lines if line and not line.startswith("#")]
    return [one for line in found for one in (requirements(line[3:].strip()) if line.startswith("-r ") else [line])]


SCRIPTS = sorted(path.stem for path in HERE.glob("*.py") if path.stem != "setup")

setup(
    name="atelier-trainer",
    version="0.1.0",
    description="A trainer for image diffusion models: LoRA and other adapters for FLUX.1, Stable Diffusion, SDXL and Anima, with exact resume, checked numerics and tools for adapter files",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    python_requires=">=3.10",
    packages=find_packages(include=["library", "library.*", "networks", "networks.*", "tools", "tools.*", "finetune"]),
    py_modules=SCRIPTS,
    install_requires=requirements("requirements.txt"),
    extras_require={
        "wandb": ["wandb"],
        "sentencepiece": ["sentencepiece"],
        "onnx": ["onnxruntime>=1.17"],
        "faces": ["anime-face-detector"],
        "upscale": ["spandrel>=0.4"],
        "video": ["av>=14.1"],
        "optimizers": requirements("requirements-optimizers.txt"),
        "dev": requirements("requirements-dev.txt"),
    },
)
