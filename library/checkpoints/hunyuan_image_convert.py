"""HunyuanImage 2.1 key names of denoiser and autoencoder: the original layouts and those of diffusers folders, both
ways."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from library.checkpoints import layout_rules
from library.checkpoints.hunyuan_convert import DIFFUSERS_ROOTS, SHARED_TOP, StreamNames, embedder
from library.checkpoints.hunyuan_convert import ROOTS as SHARED_ROOTS
from library.checkpoints.layout_rules import Rule, with_kinds
from library.checkpoints.loading import count_blocks

_TIME = "time_guidance_embed"
NAMES = StreamNames(
    (
        *SHARED_TOP,
        *embedder("time_in.mlp", f"{_TIME}.timestep_embedder"),
        *embedder("time_r_in.mlp", f"{_TIME}.timestep_embedder_r"),
        *embedder("guidance_in.mlp", f"{_TIME}.guidance_embedder"),
        Rule("byt5_in.layernorm", ("context_embedder_2.norm",)),
        *(Rule(f"byt5_in.fc{n}", (f"context_embedder_2.linear_{n}",)) for n in (1, 2, 3)),
    ),
    is_diffusers=lambda keys: "context_embedder_2.linear_1.weight" in keys,
)
ROOTS = (
    "byt5_in", "time_r_in", "vision_in", "time_guidance_embed", "context_embedder_2", *SHARED_ROOTS, *DIFFUSERS_ROOTS,
)  # fmt: skip
"""first words of the denoiser's names in either layout"""


# -- the autoencoder ---------------------------------------------------------------------------------------------------

_RESNET = (
    *(Rule(name, (name,)) for name in ("norm1", "conv1", "norm2", "conv2")),
    Rule("nin_shortcut", ("conv_shortcut",)),
)
_ATTENTION = (
    Rule("norm", ("norm",)),
    *(Rule(name, (f"to_{name}",)) for name in "qkv"),
    Rule("proj_out", ("proj",)),
)
_ENDS = tuple(Rule(name, (name,)) for name in ("conv_in", "norm_out", "conv_out"))
_HALVES = (("encoder.", "down", 0), ("decoder.", "up", 1))
"""(half, which way its levels go, how many blocks more than the encoder's a level has)"""


def is_diffusers_autoencoder(keys: Mapping[str, object]) -> bool:
    return "encoder.down_blocks.0.conv1.weight" in keys


def autoencoder_rules(keys: Mapping[str, object]) -> Iterator[Rule]:
    """Every rule of an autoencoder with the levels of these keys, in either layout; names of weights and biases.

    In diffusers one list holds the blocks of all levels and what changes the size between them.
    """
    blocks, levels = _blocks_and_levels(keys)
    for half, way, more in _HALVES:
        yield from with_kinds(half, half, _ENDS)
        for number in (1, 2):
            yield from with_kinds(f"{half}mid.block_{number}.", f"{half}mid_block.resnets.{number - 1}.", _RESNET)
        yield from with_kinds(f"{half}mid.attn_1.", f"{half}mid_block.attentions.0.", _ATTENTION)
        per_level = blocks + more + 1
        for level in range(levels):
            ours, theirs = f"{half}{way}.{level}.", f"{half}{way}_blocks."
            for block in range(per_level - 1):
                yield from with_kinds(f"{ours}block.{block}.", f"{theirs}{level * per_level + block}.", _RESNET)
            if level < levels - 1:
                change = Rule(f"{way}sample.conv", ("conv",))
                yield from with_kinds(ours, f"{theirs}{(level + 1) * per_level - 1}.", (change,))


def _blocks_and_levels(keys: Mapping[str, object]) -> tuple[int, int]:
    """(residual blocks of a level of the encoder, levels)."""
    total = count_blocks(keys, "encoder.down_blocks.")
    if not total:
        return count_blocks(keys, "encoder.down.0.block."), count_blocks(keys, "encoder.down.")
    first = (number for number in range(total) if f"encoder.down_blocks.{number}.conv.weight" in keys)
    blocks = next(first, total)
    return blocks, (total + 1) // (blocks + 1)


def autoencoder_to_original(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Autoencoder weights from diffusers names to the original ones. Names outside the table stay as they are."""
    return layout_rules.to_original(state, autoencoder_rules(state))
