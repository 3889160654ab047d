"""FLUX.1 by its known calls: loading, options."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from library.compat.arguments import add_groups
from library.compat.networks import KnownNetwork, numbers, row, shared_pairs
from library.components.control_nets import control_nets_of
from library.core.errors import CheckpointError, UnsupportedCombination
from library.flux_control_net_models import FluxControlNet
from library.flux_control_net_utils import inspect_control_net
from library.flux_models import StreamTransformer
from library.flux_utils import load_flux
from library.training.timestep_samplers import TimestepOptions
from networks.lora import LoRAModule


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


class LoRANetwork(KnownNetwork):
    """LoRA of FLUX.1."""

    LORA_PREFIX_TEXT_ENCODER_CLIP = "lora_te1"
    LORA_PREFIX_TEXT_ENCODER_T5 = "lora_te3"
    PARTS = (
        "img_attn_dim", "txt_attn_dim", "img_mlp_dim", "txt_mlp_dim", "img_mod_dim", "txt_mod_dim", "single_dim",
        "single_mod_dim",
    )  # fmt: skip

    def __init__(
        self, text_encoders: Any, unet: nn.Module, multiplier: float = 1.0, lora_dim: int = 4, alpha: float | None = 1,
        dropout: float | None = None, rank_dropout: float | None = None, module_dropout: float | None = None,
        conv_lora_dim: int | None = None,
        conv_alpha: float | None = None, module_class: type = LoRAModule, modules_dim: Mapping[str, int] | None = None,
        modules_alpha: Mapping[str, float] | None = None, train_blocks: str | None = None, split_qkv: bool = False,
        train_t5xxl: bool = False,
        type_dims: Sequence[int | None] | None = None, in_dims: Sequence[int] | None = None,
        train_double_block_indices: Sequence[bool] | None = None,
        train_single_block_indices: Sequence[bool] | None = None,
        reg_dims: Mapping[str, int] | None = None, ggpo_beta: float | None = None, ggpo_sigma: float | None = None,
        reg_lrs: Mapping[str, float] | None = None, verbose: bool = False,
    ) -> None:
        """`type_dims` in the order of PARTS; block indices tell for each block whether it is trained."""
        pairs = {
            **shared_pairs(rank_dropout, module_dropout, conv_lora_dim, conv_alpha, verbose),
            "train_blocks": train_blocks, "split_qkv": split_qkv or None,
            "train_t5xxl": train_t5xxl or None, "in_dims": row(in_dims),
            "train_double_block_indices": numbers(train_double_block_indices),
            "train_single_block_indices": numbers(train_single_block_indices), "network_reg_dims": reg_dims,
            "network_reg_lrs": reg_lrs,
            "ggpo_beta": ggpo_beta, "ggpo_sigma": ggpo_sigma,
            **dict(zip(self.PARTS, type_dims or ())),
        }
        self.build(
            text_encoders, unet, multiplier, lora_dim, alpha, dropout, pairs, module_class, modules_dim, modules_alpha
        )


def add_flux_train_arguments(parser: argparse.ArgumentParser) -> None:
    from library.core.registry import import_target
    from library.families.registry import record_of

    add_groups(parser, import_target(record_of("flux").family).options, TimestepOptions)
