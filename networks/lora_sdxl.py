"""SDXL: the layers that adapters train. Names are those of the module tree, which are the original ones."""

from __future__ import annotations

import re

from networks.lora import check_network_args, create_network, create_network_from_weights
from networks.targets import BlockTable, NetworkTargets, TextEncoderTargets

__all__ = ["TARGETS", "check_network_args", "create_network", "create_network_from_weights"]

NUM_BLOCKS = 23
CLIP_CLASSES = ("CLIPAttention", "CLIPSdpaAttention", "CLIPFlashAttention2", "CLIPMLP")
_STARTS = {"input_blocks": 1, "middle_block": 10, "output_blocks": 13}


def block_index(path: str) -> int | None:
    """0..22: the embedders 0, input_blocks N 1 + N, middle_block N 10 + N, output_blocks N 13 + N, the output 22."""
    match = re.match(r"(input_blocks|middle_block|output_blocks)\.(\d+)\.", path)
    if match:
        return _STARTS[match[1]] + int(match[2])
    if path.startswith(("time_embed.", "label_emb.")):
        return 0
    return 22 if path.startswith("out.") else None


TARGETS = NetworkTargets(
    family="sdxl",
    classes=("Transformer2DModel",),
    conv_classes=("ResnetBlock2D", "Downsample2D", "Upsample2D"),
    text_encoders=(
        TextEncoderTargets("lora_te1", CLIP_CLASSES, root="text_model"),
        TextEncoderTargets("lora_te2", CLIP_CLASSES, root="text_model"),
    ),
    blocks=BlockTable(NUM_BLOCKS, block_index, down=range(1, 10), mid=range(10, 13), up=range(13, 22)),
)
