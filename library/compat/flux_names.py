"""FLUX.1 by its known calls: loading, options."""

from __future__ import annotations

import argparse
import os
from typing import Any

import torch

from library.compat.arguments import add_groups
from library.core.errors import UnsupportedCombination
from library.flux_models import StreamTransformer
from library.flux_utils import load_flux
from library.training.timestep_samplers import TimestepOptions


def load_flow_model(
    ckpt_path: str | os.PathLike, dtype: torch.dtype | None, device: str | torch.device, disable_mmap: bool = False,
    model_type: str = "flux"
) -> tuple[bool, StreamTransformer]:
    """(whether it is schnell, the denoiser). `model_type`: flux or chroma."""
    if model_type == "chroma":
        from library.chroma_utils import load_chroma

        return False, load_chroma(ckpt_path, dtype, device, disable_mmap)
    if model_type != "flux":
        raise UnsupportedCombination(
            f"model_type is {model_type}; this call loads flux and chroma, another model is a family of its own"
        )
    model = load_flux(ckpt_path, dtype, device, disable_mmap)
    return not model.params.guidance_embed, model


def load_controlnet(
    ckpt_path: str | os.PathLike, is_schnell: bool, dtype: torch.dtype | None, device: str | torch.device,
    disable_mmap: bool = False
) -> Any:
    """There are no ControlNets of FLUX.1 here."""
    raise UnsupportedCombination(
        f"{ckpt_path}: ControlNets of FLUX.1 are not there; load_flow_model loads the denoiser, which runs without one"
    )


def add_flux_train_arguments(parser: argparse.ArgumentParser) -> None:
    from library.core.registry import import_target
    from library.families.registry import record_of

    add_groups(parser, import_target(record_of("flux").family).options, TimestepOptions)
