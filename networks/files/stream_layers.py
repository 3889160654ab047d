"""Names of the layers of double and single stream blocks as Tencent's Hunyuan models have them: those of our module tree,
of ComfyUI's (`img_attn.qkv`, `img_mlp.0`, `modulation.lin`) and, one for each part of a fused layer, of diffusers."""

from __future__ import annotations

from dataclasses import replace

from networks.files.file_names import LayerNames

SIDES = (
    ("img", ("to_q", "to_k", "to_v"), "to_out.0", "ff", "norm1"),
    ("txt", ("add_q_proj", "add_k_proj", "add_v_proj"), "to_add_out", "ff_context", "norm1_context"),
)
"""(side of a double block; in diffusers its q, k and v, its output, its feed-forward, its modulation)"""
NORMS = ("query", "key")


def stream_layers(*, originals: bool = True) -> tuple[LayerNames, ...]:
    """All layers of both kinds of blocks. `originals`: dotted names are those of the tree that ComfyUI has, not our own."""
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
    if originals:
        return tuple(layers)
    return tuple(layer if layer.parameter else replace(layer, original="") for layer in layers)
