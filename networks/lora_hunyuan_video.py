"""HunyuanVideo (SkyReels V1 too): the layers that adapters train, those of the double and single blocks without their
modulations. Its text encoders are never trained.

Its blocks are those of HunyuanImage, and so are the names that other programs give their layers; musubi-tuner and
diffusion-pipe write the paths of this module tree behind a prefix (`diffusion_model.double_blocks.0.img_attn_qkv`).
LoRAs are made by networks.lora, which takes this table from the denoiser; this is another name of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from networks.kinds.targets import NetworkTargets, SplitRule, linear1_rows, qkv_rows
from networks.lora import check_network_args, create_network, create_network_from_weights

if TYPE_CHECKING:
    from networks.files.file_names import LayerNames

__all__ = [
    "TARGETS", "check_network_args", "create_network", "create_network_from_weights", "file_layers", "other_file_layers",
]  # fmt: skip


def file_layers() -> tuple[LayerNames, ...]:
    """The layers under their names in files of other programs."""
    from networks.files.stream_layers import stream_layers

    return stream_layers(originals=False)


def other_file_layers() -> tuple[tuple[LayerNames, ...], ...]:
    """ComfyUI's own names of the same layers (`double_blocks.0.img_attn.qkv`)."""
    from networks.files.stream_layers import stream_layers

    return (stream_layers(),)


TARGETS = NetworkTargets(
    family="hunyuan_video",
    file_state="library.hunyuan_video_utils:denoiser_state",
    classes=("MMDoubleStreamBlock", "MMSingleStreamBlock"),
    attention_paths=r"double_blocks\.\d+\.(img|txt)_attn_(qkv|proj)",
    default_excludes=(r".*(img_mod|txt_mod|modulation).*",),
    splits=(
        SplitRule(r"double_blocks\.\d+\.(img|txt)_attn_qkv", qkv_rows),
        SplitRule(r"single_blocks\.\d+\.linear1", linear1_rows),
    ),
    regex_on_path=True,
)
