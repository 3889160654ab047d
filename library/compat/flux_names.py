"""FLUX.1 by its known calls: loading, options."""

from __future__ import annotations

import argparse
import os
import torch

from library.compat.arguments import add_groups
from library.components.control_nets import control_nets_of
from library.core.errors import CheckpointError, UnsupportedCombination
from library.flux_control_net_models import FluxControlNet
from library.flux_control_net_utils import inspect_control_net
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
) -> FluxControlNet:
    """The ControlNet of a file, for `denoise`. `is_schnell` is told by the file too."""
    params = inspect_control_net(ckpt_path).params.params
    if params.guidance_embed == is_schnell:
        kind = "schnell" if is_schnell else "dev"
        raise CheckpointError(f"{ckpt_path} is no ControlNet of FLUX.1 {kind}")
    return control_nets_of("flux").load(ckpt_path, params, dtype, device, disable_mmap)


def add_flux_train_arguments(parser: argparse.ArgumentParser) -> None:
    from library.core.registry import import_target
    from library.families.registry import record_of

    add_groups(parser, import_target(record_of("flux").family).options, TimestepOptions)
