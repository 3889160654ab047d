"""Packaging. `pip install -e .` in a clone; extras: [wandb], [sentencepiece], [onnx], [faces], [dev]."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).resolve().parent
REQUIREMENTS = [
    line for line in (HERE / "requirements.txt").read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")
]
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
    install_requires=REQUIREMENTS,
    extras_require={
        "wandb": ["wandb"],
        "sentencepiece": ["sentencepiece"],
        "onnx": ["onnxruntime>=1.17"],
        "faces": ["anime-face-detector"],
        "dev": ["pytest>=8", "pytest-xdist>=3.5", "diffusers>=0.34", "peft>=0.15", "sentencepiece>=0.2", "scipy>=1.11"],
    },
)
