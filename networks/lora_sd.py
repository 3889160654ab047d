"""Stable Diffusion 1 and 2: the layers that adapters train. Names are those of the module tree, in diffusers style."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from networks.kinds.targets import CLIP_CLASSES, CLIP_PATHS, BlockTable, NetworkTargets, TextEncoderTargets
from networks.lora import check_network_args, create_network, create_network_from_weights

if TYPE_CHECKING:
    from networks.files.file_names import LayerNames

__all__ = ["TARGETS", "check_network_args", "create_network", "create_network_from_weights"]

NUM_BLOCKS = 25


def block_index(path: str) -> int | None:
    """0..24: 1 + 3i + j on the way down, 12 the middle, 13 + 3i + j on the way up; 0 (no layer) and others None."""
    match = re.match(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)", path)
    if match:
        place = 2 if match[3].endswith("samplers") else int(match[4])
        return (1 if match[1] == "down" else 13) + 3 * int(match[2]) + place
    return 12 if path.startswith("mid_block.") else None


def file_layers() -> tuple[LayerNames, ...]:
    """The layers of the U-Net under their names in files of other programs."""
    from networks.files.unet_file_layers import unet_layers

    return unet_layers(4, {0, 1, 2}, tree_is_diffusers=True)


TARGETS = NetworkTargets(
    family="sd",
    file_state="library.components.unet_utils:sd_unet_state",
    classes=("Transformer2DModel",),
    attention_classes=("CrossAttention",),
    conv_classes=("ResnetBlock2D", "Downsample2D", "Upsample2D"),
    text_encoders=(
        TextEncoderTargets(
            "lora_te", CLIP_CLASSES, root="text_model", aliases=("lora_te1",), diffusers_name="text_encoder",
            paths=CLIP_PATHS,
            file_state="library.components.text_encoder_utils:sd_clip_state",
        ),
    ),
    blocks=BlockTable(NUM_BLOCKS, block_index, down=range(12), mid=range(12, 13), up=range(13, 25)),
)
