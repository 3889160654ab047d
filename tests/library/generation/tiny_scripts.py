"""Every image and video script on a tiny model of its family, through its command line."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy
import torch
from PIL import Image
from safetensors.torch import load_file

from library.generation.gen_img import script as gen_img
from library.safetensors_utils import load_safetensors, read_header, save_file_atomic
from library.tiny_models import build_tiny
from tests.library import (
    test_anima_inference,
    test_chroma_inference,
    test_flux_inference,
    test_framepack_inference,
    test_hunyuan_image_inference,
    test_lumina_inference,
    test_sd3_inference,
    test_sdxl_inference,
    test_unet_inference,
)
from tests.tiny import video_words

PICTURES = {
    "flux": test_flux_inference.arguments, "chroma": test_chroma_inference.arguments,
    "sd3": test_sd3_inference.arguments, "anima": test_anima_inference.arguments,
    "lumina": test_lumina_inference.arguments, "hunyuan_image": test_hunyuan_image_inference.arguments,
    "sdxl": test_sdxl_inference.arguments,
}  # fmt: skip
"""family -> command line of its image script: (tiny model, folder, further words)"""
VIDEOS = ("hunyuan_video", "wan", "framepack")
TRANSFORMERS = (*(name for name in PICTURES if name != "sdxl"), *VIDEOS)
SCRIPTS = (*TRANSFORMERS, "sdxl", "gen_img")


def build(name: str, folder: Path) -> Any:
    """The tiny model of a script."""
    of_family = {"gen_img": "sd1"}.get(name, name)
    more = {"hunyuan_video": dict(depth=2, depth_single=4)}.get(name, {})
    return build_tiny(of_family, folder, **more)


def words(name: str, tiny: Any, folder: Path, *more: str) -> list[str]:
    """A command line of two steps in float32."""
    if name == "gen_img":
        return test_unet_inference.arguments(tiny, folder, "--prompt=a red cat", "--seed=5", *more)
    if name in PICTURES:
        return PICTURES[name](tiny, folder, *more)
    small = test_framepack_inference.SMALL if name == "framepack" else ("--video_size", "32", "48", "--infer_steps=2")
    length = ["--video_sections=1"] if name == "framepack" else ["--video_length=5"]
    text = [] if name == "wan" else ["--text_encoder_dtype=float32"]
    return [
        *video_words(tiny), "--dit_dtype=float32", "--vae_dtype=float32", *text, *small, *length, "--seed=7",
        "--prompt=a red cat", "--output_type=latent", f"--save_path={folder}", *more,
    ]  # fmt: skip


def script_of(name: str) -> Any:
    """The module with `run`."""
    of_script = {"chroma": "flux"}.get(name, name)  # an option of which chooses it
    return gen_img if name == "gen_img" else importlib.import_module(f"library.generation.{of_script}_inference")


def made(name: str, tiny: Any, folder: Path, *more: str) -> torch.Tensor:
    """The picture, or latents of the clip, as numbers."""
    (path,) = script_of(name).run(words(name, tiny, folder, *more))
    if path.suffix == ".safetensors":
        return load_file(path)["latent"]
    return torch.from_numpy(numpy.asarray(Image.open(path).convert("RGB")).astype("float32"))


MODEL_OPTIONS = ("--ckpt_path=", "--dit=", "--pretrained_model_name_or_path=")


def denoiser_file(name: str, tiny: Any) -> Path:
    """That of the denoiser in a command line."""
    (word,) = (word for word in words(name, tiny, Path(".")) if word.startswith(MODEL_OPTIONS))
    return Path(word.partition("=")[2])


def with_denoiser(name: str, tiny: Any, path: Path) -> str:
    """The word that names another file."""
    (word,) = (word for word in words(name, tiny, Path(".")) if word.startswith(MODEL_OPTIONS))
    return f"{word.partition('=')[0]}={path}"


def rewritten(source: Path, target: Path, kind: torch.dtype, *, only_matrices: bool) -> None:
    """A denoiser file of another type, all of it or its matrices."""
    tensors, (_, metadata) = load_safetensors(source, "cpu"), read_header(source)
    told = {name: text for name, text in (metadata or {}).items() if name == "model_config"}
    chosen = {name for name, tensor in tensors.items() if not only_matrices or tensor.ndim == 2}
    written = {name: tensor.to(kind) if name in chosen else tensor for name, tensor in tensors.items()}
    save_file_atomic(written, target, told)
