"""Tiny random models for tests, by the names that tests use; they are made in library/tiny_models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from library.components.unet_models import UNetParams
from library.tiny_models import build_tiny, sd_tiny, sdxl_tiny
from library.tiny_models.anima_tiny import TinyAnima, build_tiny_anima
from library.tiny_models.flux_tiny import TinyFlux, build_tiny_flux
from library.tiny_models.unet_tiny import TinyUNet
from library.tiny_models.vocabularies import sentencepiece_model, write_clip_tokenizer
from library.tiny_models.weights import clip_state, random_state, random_weight, save_part, t5_state

KINDS = ("sd1", "sd2", "sdxl")
TinySd = TinyUNet

__all__ = [
    "KINDS", "TinyAnima", "TinyFlux", "TinySd", "build_tiny_anima", "build_tiny_flux", "build_tiny_sd", "clip_state",
    "random_state",
    "random_weight", "save_part", "sentencepiece_model", "t5_state", "tiny_params", "write_clip_tokenizer",
]  # fmt: skip


def build_tiny_sd(folder: str | Path, kind: str = "sd1", **settings: Any) -> TinySd:
    """A model of a kind (sd1, sd2, sdxl)."""
    return build_tiny(kind, folder, **settings)


def tiny_params(kind: str, num_res_blocks: int = 1) -> UNetParams:
    """Sizes of the U-Net of a kind."""
    return (
        sdxl_tiny.unet_params(num_res_blocks)
        if kind == "sdxl"
        else sd_tiny.unet_params(num_res_blocks, is_v2=kind == "sd2")
    )


def video_words(tiny) -> list[str]:
    """The files of a tiny set as options of the family's video script."""
    return [word.replace("--pretrained_model_name_or_path=", "--dit=") for word in tiny.arguments()]
