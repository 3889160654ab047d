"""HunyuanImage 2.1: the layers that adapters train, all of them in the double and single blocks. Its text encoders are
never trained.

sd-scripts names the layers after this module tree (`img_mlp_fc1`, `img_mod_linear`, `modulation_linear`); ComfyUI after
its own (`img_mlp_0`, `img_mod_lin`, `modulation_lin`), with the same prefix and parameters. Its dotted names
(`img_attn.qkv`, `img_mlp.0`, `norm.query_norm.scale`) are read as well.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from library.core.lazy_names import lazy_names
from networks.kinds.targets import NetworkTargets, SplitRule, linear1_rows, qkv_rows
from networks.lora import check_network_args, create_network, create_network_from_weights

if TYPE_CHECKING:
    from networks.files.file_names import LayerNames

__all__ = ["TARGETS", "check_network_args", "create_network", "create_network_from_weights", "file_layers"]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "HunyuanImageLoRANetwork": "library.compat.hunyuan_image_names:HunyuanImageLoRANetwork",
        "LoRAModule": "networks.lora:LoRAModule",
    },
)

def file_layers() -> tuple[LayerNames, ...]:
    """The layers under their names in files of other programs."""
    from networks.files.stream_layers import stream_layers

    return stream_layers()


TARGETS = NetworkTargets(
    family="hunyuan_image",
    file_state="library.hunyuan_image_utils:denoiser_state",
    classes=("MMDoubleStreamBlock", "MMSingleStreamBlock"),
    attention_paths=r"double_blocks\.\d+\.(img|txt)_attn_(qkv|proj)",
    splits=(
        SplitRule(r"double_blocks\.\d+\.(img|txt)_attn_qkv", qkv_rows),
        SplitRule(r"single_blocks\.\d+\.linear1", linear1_rows),
    ),
    comfy_is_kohya=True,
)
