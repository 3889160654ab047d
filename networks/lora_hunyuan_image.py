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

SIDES = (
    ("img", ("to_q", "to_k", "to_v"), "to_out.0", "ff", "norm1"),
    ("txt", ("add_q_proj", "add_k_proj", "add_v_proj"), "to_add_out", "ff_context", "norm1_context"),
)
"""(side of a double block; in diffusers its q, k and v, its output, its feed-forward, its modulation)"""
NORMS = ("query", "key")


def file_layers() -> tuple[LayerNames, ...]:
    """The layers under their names in files of other programs."""
    from networks.files.file_names import LayerNames

    double, layers = "double_blocks.{i}.", []
    theirs = "transformer_blocks.{i}."
    for side, qkv, out, mlp, norm in SIDES:
        layers += [
            LayerNames(
                f"{double}{side}_attn_qkv", tuple(f"{theirs}attn.{name}" for name in qkv),
                original=f"{double}{side}_attn.qkv",
            ),
            LayerNames(f"{double}{side}_attn_proj", (f"{theirs}attn.{out}",), original=f"{double}{side}_attn.proj"),
            LayerNames(f"{double}{side}_mlp.fc1", (f"{theirs}{mlp}.net.0.proj",), original=f"{double}{side}_mlp.0"),
            LayerNames(f"{double}{side}_mlp.fc2", (f"{theirs}{mlp}.net.2",), original=f"{double}{side}_mlp.2"),
            LayerNames(f"{double}{side}_mod.linear", (f"{theirs}{norm}.linear",), original=f"{double}{side}_mod.lin"),
        ]
        added = "added_" if side == "txt" else ""
        layers += [
            LayerNames(
                f"{double}{side}_attn_{name[0]}_norm", (f"{theirs}attn.norm_{added}{name[0]}",),
                original=f"{double}{side}_attn.norm.{name}_norm", parameter="scale",
            )
            for name in NORMS
        ]
    single, theirs = "single_blocks.{i}.", "single_transformer_blocks.{i}."
    parts = tuple(f"{theirs}{name}" for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"))
    layers += [
        LayerNames(f"{single}linear1", parts, "linear1"),
        LayerNames(f"{single}linear2", (f"{theirs}proj_out",)),
        LayerNames(f"{single}modulation.linear", (f"{theirs}norm.linear",), original=f"{single}modulation.lin"),
        *(
            LayerNames(
                f"{single}{name[0]}_norm", (f"{theirs}attn.norm_{name[0]}",), original=f"{single}norm.{name}_norm",
                parameter="scale",
            )
            for name in NORMS
        ),
    ]
    return tuple(layers)


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
