"""SDXL: the layers that adapters train. Names are those of the module tree, which are the original ones."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from networks.kinds.targets import CLIP_CLASSES, CLIP_PATHS, BlockTable, NetworkTargets, TextEncoderTargets
from networks.lora import check_network_args, create_network, create_network_from_weights

if TYPE_CHECKING:
    from networks.files.file_names import LayerNames

__all__ = ["TARGETS", "check_network_args", "create_network", "create_network_from_weights"]

NUM_BLOCKS = 23
_STARTS = {"input_blocks": 1, "middle_block": 10, "output_blocks": 13}


def block_index(path: str) -> int | None:
    """0..22: the embedders 0, input_blocks N 1 + N, middle_block N 10 + N, output_blocks N 13 + N, the output 22."""
    match = re.match(r"(input_blocks|middle_block|output_blocks)\.(\d+)\.", path)
    if match:
        return _STARTS[match[1]] + int(match[2])
    if path.startswith(("time_embed.", "label_emb.")):
        return 0
    return 22 if path.startswith("out.") else None


def file_layers() -> tuple[LayerNames, ...]:
    """The layers of the U-Net under their names in files of other programs."""
    from networks.files.unet_file_layers import unet_layers

    return unet_layers(3, {1, 2}, tree_is_diffusers=False)


def other_file_layers() -> tuple[tuple[LayerNames, ...], ...]:
    """The same for small models, with one residual block a level: the numbers of blocks are others."""
    from networks.files.unet_file_layers import unet_layers

    return (unet_layers(3, {1, 2}, tree_is_diffusers=False, resnets=1),)


TARGETS = NetworkTargets(
    family="sdxl",
    file_state="library.components.unet_utils:sdxl_unet_state",
    classes=("Transformer2DModel",),
    attention_classes=("CrossAttention",),
    conv_classes=("ResnetBlock2D", "Downsample2D", "Upsample2D"),
    text_encoders=(
        TextEncoderTargets(
            "lora_te1", CLIP_CLASSES, root="text_model", diffusers_name="text_encoder",
            comfy_name="text_encoders.clip_l.transformer", paths=CLIP_PATHS,
            file_state="library.components.text_encoder_utils:clip_l_state",
        ),
        TextEncoderTargets(
            "lora_te2", CLIP_CLASSES, root="text_model", diffusers_name="text_encoder_2",
            comfy_name="text_encoders.clip_g.transformer", paths=CLIP_PATHS,
            file_state="library.components.text_encoder_utils:clip_g_state",
        ),
    ),
    blocks=BlockTable(NUM_BLOCKS, block_index, down=range(1, 10), mid=range(10, 13), up=range(13, 22)),
)
