"""Key names of the latent diffusion autoencoder: those of diffusers folders and the original ones."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from library.model_loading import count_blocks

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
