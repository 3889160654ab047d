"""Lumina-Image 2.0 key names of the denoiser: the original layout and the one of diffusers folders, both ways."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from torch import Tensor

from library.checkpoints import layout_rules
from library.checkpoints.layout_rules import Rule, with_kinds
from library.checkpoints.loading import count_blocks

TOP = (
    Rule("x_embedder", ("x_embedder",)),
    Rule("t_embedder.mlp.0", ("time_caption_embed.timestep_embedder.linear_1",)),
    Rule("t_embedder.mlp.2", ("time_caption_embed.timestep_embedder.linear_2",)),
    Rule("cap_embedder.0", ("time_caption_embed.caption_embedder.0",)),
    Rule("cap_embedder.1", ("time_caption_embed.caption_embedder.1",)),
    Rule("final_layer.adaLN_modulation.1", ("norm_out.linear_1",)),
    Rule("final_layer.linear", ("norm_out.linear_2",)),
)
_BLOCK = (
    Rule("attention.qkv", ("attn.to_q", "attn.to_k", "attn.to_v")),
    Rule("attention.out", ("attn.to_out.0",)),
    Rule("attention.q_norm", ("attn.norm_q",)),
    Rule("attention.k_norm", ("attn.norm_k",)),
    *(Rule(f"feed_forward.w{number}", (f"feed_forward.linear_{number}",)) for number in (1, 2, 3)),
    Rule("attention_norm2", ("norm2",)),
    Rule("ffn_norm1", ("ffn_norm1",)),
    Rule("ffn_norm2", ("ffn_norm2",)),
)
_MODULATED = (*_BLOCK, Rule("attention_norm1", ("norm1.norm",)), Rule("adaLN_modulation.1", ("norm1.linear",)))
_PLAIN = (*_BLOCK, Rule("attention_norm1", ("norm1",)))
ROWS: Mapping[str, tuple[Rule, ...]] = {
    "noise_refiner": _MODULATED, "context_refiner": _PLAIN, "layers": _MODULATED,
}  # fmt: skip
"""rows of blocks, which have the same names in both layouts -> what is in a block"""
UNUSED = "norm_final.weight"
"""in original files alone, and nothing computes with it"""


def denoiser_rules(keys: Mapping[str, object]) -> Iterator[Rule]:
    """Every rule of a denoiser with the blocks of these keys, in either layout; names of weights and biases."""
    yield from with_kinds("", "", TOP)
    for row, rules in ROWS.items():
        for number in range(count_blocks(keys, f"{row}.")):
            place = f"{row}.{number}."
            yield from with_kinds(place, place, rules)


def is_diffusers_denoiser(keys: Mapping[str, object]) -> bool:
    return "noise_refiner.0.attn.to_q.weight" in keys


def to_original(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Denoiser weights from diffusers names to the original ones. Names outside the table stay as they are."""
    return layout_rules.to_original(state, denoiser_rules(state))


def to_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Denoiser weights from the original names to those of diffusers, without the norm that nothing uses."""
    kept = {key: tensor for key, tensor in state.items() if key != UNUSED}
    return layout_rules.from_original(kept, denoiser_rules(state), rows_of(state["x_embedder.weight"].shape[0]))


def rows_of(width: int) -> Callable[[Rule, int], list[int]]:
    """(rule, rows of its tensor) -> rows of each part, in a denoiser of this width: as many queries as it is wide."""
    return lambda rule, rows: [width, *[(rows - width) // 2] * 2]
