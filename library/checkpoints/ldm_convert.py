"""Key names of the latent diffusion autoencoder: those of diffusers folders and the original ones."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from library.checkpoints.loading import count_blocks

_VAE_ATTENTION = {
    "group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out",
    "query": "q", "key": "k", "value": "v", "proj_attn": "proj_out",
}  # fmt: skip


def is_diffusers_autoencoder(keys: Mapping[str, object]) -> bool:
    return "encoder.down_blocks.0.resnets.0.norm1.weight" in keys


def convert_diffusers_vae_to_ldm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Autoencoder weights from diffusers names (old ones of the attention too) to the original ones."""
    levels = count_blocks(state, "decoder.up_blocks.")
    converted = {}
    for key, tensor in state.items():
        name = re.sub(r"^encoder\.down_blocks\.(\d+)\.resnets\.(\d+)\.", r"encoder.down.\1.block.\2.", key)
        name = re.sub(r"^encoder\.down_blocks\.(\d+)\.downsamplers\.0\.", r"encoder.down.\1.downsample.", name)
        match = re.match(r"decoder\.up_blocks\.(\d+)\.(resnets\.(\d+)|upsamplers\.0)\.", name)
        if match:
            place = f"block.{match[3]}" if match[3] else "upsample"
            name = f"decoder.up.{levels - 1 - int(match[1])}.{place}.{name[match.end():]}"
        match = re.match(r"(encoder|decoder)\.mid_block\.(resnets|attentions)\.(\d+)\.", name)
        if match:
            place = f"block_{int(match[3]) + 1}" if match[2] == "resnets" else "attn_1"
            name = f"{match[1]}.mid.{place}.{name[match.end():]}"
        if ".attn_1." in name:
            start, rest = name.split(".attn_1.")
            part, _, kind = rest.rpartition(".")
            name = f"{start}.attn_1.{_VAE_ATTENTION.get(part, part)}.{kind}"
        converted[name.replace(".conv_shortcut.", ".nin_shortcut.").replace(".conv_norm_out.", ".norm_out.")] = tensor
    return converted


def attention_as_convolution(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Attention projections of an autoencoder that are stored as (C, C) become 1x1 convolutions (C, C, 1, 1)."""
    return {
        key: tensor[:, :, None, None] if ".attn_1." in key and key.endswith(".weight") and tensor.ndim == 2 else tensor
        for key, tensor in state.items()
    }


def convert_ldm_vae_to_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Autoencoder weights from the original names to those of diffusers; the inverse of `convert_diffusers_vae_to_ldm`.
    The attention's 1x1 convolutions (C, C, 1, 1) are matrices (C, C) there."""
    levels = count_blocks(state, "decoder.up.")
    names = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
    converted = {}
    for key, tensor in state.items():
        name = re.sub(r"^encoder\.down\.(\d+)\.block\.(\d+)\.", r"encoder.down_blocks.\1.resnets.\2.", key)
        name = re.sub(r"^encoder\.down\.(\d+)\.downsample\.", r"encoder.down_blocks.\1.downsamplers.0.", name)
        match = re.match(r"decoder\.up\.(\d+)\.(block\.(\d+)|upsample)\.", name)
        if match:
            place = f"resnets.{match[3]}" if match[3] else "upsamplers.0"
            name = f"decoder.up_blocks.{levels - 1 - int(match[1])}.{place}.{name[match.end():]}"
        match = re.match(r"(encoder|decoder)\.mid\.(block_(\d+)|attn_1)\.", name)
        if match:
            place = f"resnets.{int(match[3]) - 1}" if match[3] else "attentions.0"
            name = f"{match[1]}.mid_block.{place}.{name[match.end():]}"
        if ".attentions.0." in name:
            start, rest = name.split(".attentions.0.")
            part, _, kind = rest.rpartition(".")
            name = f"{start}.attentions.0.{names.get(part, part)}.{kind}"
            tensor = tensor[:, :, 0, 0] if tensor.ndim == 4 else tensor
        converted[name.replace(".nin_shortcut.", ".conv_shortcut.").replace(".norm_out.", ".conv_norm_out.")] = tensor
    return converted
