"""HunyuanImage 2.1: names of its layers in adapter files. sd-scripts names them after its own module tree
(`img_mlp_fc1`, `img_mod_linear`, `modulation_linear`); ComfyUI after the checkpoint (`img_mlp_0`, `img_mod_lin`,
`modulation_lin`), with the same prefix and parameters."""

from __future__ import annotations

from networks.files.file_names import FileNames, LayerNames
from networks.kinds.targets import NetworkTargets

_DOUBLE = (
    ("attn_qkv", ""), ("attn_proj", ""), ("mlp.fc1", "mlp.0"), ("mlp.fc2", "mlp.2"), ("mod.linear", "mod.lin"),
)  # fmt: skip
_SINGLE = (("linear1", ""), ("linear2", ""), ("modulation.linear", "modulation.lin"))


def names() -> FileNames:
    """The table. There are no names of diffusers in it, so those files are refused."""
    double = [
        LayerNames(f"double_blocks.{{i}}.{side}_{ours}", (), original=f"double_blocks.{{i}}.{side}_{theirs}" if theirs else "")
        for side in ("img", "txt") for ours, theirs in _DOUBLE
    ]  # fmt: skip
    single = [
        LayerNames(f"single_blocks.{{i}}.{ours}", (), original=f"single_blocks.{{i}}.{theirs}" if theirs else "")
        for ours, theirs in _SINGLE
    ]
    return FileNames(NetworkTargets("hunyuan_image", ()), (*double, *single), comfy_is_kohya=True)
