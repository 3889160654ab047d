"""The layers of Stable Diffusion and SDXL U-Nets under both of their names, for adapter files."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from networks.files.file_names import LayerNames

RESNETS = 2
"""residual blocks of a level on the way down, in every released model; one more on the way up"""
_RESNET = ("norm1", "conv1", "time_emb_proj", "norm2", "conv2", "conv_shortcut")
_TRANSFORMER = (
    "norm", "proj_in", "proj_out",
    *(f"transformer_blocks.{{i}}.attn{n}.{leaf}" for n in (1, 2) for leaf in ("to_q", "to_k", "to_v", "to_out.0")),
    *(f"transformer_blocks.{{i}}.{leaf}" for leaf in ("ff.net.0.proj", "ff.net.2", "norm1", "norm2", "norm3")),
)  # fmt: skip
_TOP = (
    "conv_in", "conv_norm_out", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2",
    "add_embedding.linear_1",
    "add_embedding.linear_2",
)  # fmt: skip


def unet_layers(
    levels: int, attention_levels: Collection[int], *, tree_is_diffusers: bool, resnets: int = RESNETS
) -> tuple[LayerNames, ...]:
    """Every layer of a U-Net with so many levels, of which those in `attention_levels` (counted on the way down) have
    transformers, and so many residual blocks a level on the way down. `tree_is_diffusers` says which of the two namings
    our module tree carries."""
    from library.checkpoints.unet_convert import diffusers_to_original

    theirs = list(_diffusers_paths(levels, attention_levels, resnets))
    pairs = diffusers_to_original({f"{path}.weight": path for path in theirs})
    originals = {path: key.removesuffix(".weight") for key, path in pairs.items()}
    if tree_is_diffusers:
        return tuple(LayerNames(path, (path,), model="unet", original=originals[path]) for path in theirs)
    return tuple(LayerNames(originals[path], (path,), model="unet") for path in theirs)


def _diffusers_paths(levels: int, attention_levels: Collection[int], resnets: int) -> Iterator[str]:
    yield from _TOP
    yield from (f"mid_block.resnets.{number}.{leaf}" for number in range(2) for leaf in _RESNET)
    yield from (f"mid_block.attentions.0.{leaf}" for leaf in _TRANSFORMER)
    for side, count, sampler in (("down", resnets, "downsamplers"), ("up", resnets + 1, "upsamplers")):
        for level in range(levels):
            place = f"{side}_blocks.{level}"
            has_attention = (level if side == "down" else levels - 1 - level) in attention_levels
            for number in range(count):
                yield from (f"{place}.resnets.{number}.{leaf}" for leaf in _RESNET)
                if has_attention:
                    yield from (f"{place}.attentions.{number}.{leaf}" for leaf in _TRANSFORMER)
            if level < levels - 1:
                yield f"{place}.{sampler}.0.conv"
