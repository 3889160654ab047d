"""SD3 key names of the denoiser: the original layout and the one of diffusers folders, both ways."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor

from library.checkpoints.layout_rules import Rule, from_original, placed, to_original, with_kinds
from library.checkpoints.loading import count_blocks

_TOP = (
    Rule("x_embedder.proj", ("pos_embed.proj",)),
    Rule("context_embedder", ("context_embedder",)),
    *(
        Rule(f"{original}_embedder.mlp.{place}", (f"time_text_embed.{other}_embedder.linear_{number}",))
        for original, other in (("t", "timestep"), ("y", "text"))
        for number, place in ((1, 0), (2, 2))
    ),
    Rule("final_layer.linear", ("proj_out",)),
    # diffusers keeps (scale, shift), the original (shift, scale)
    Rule("final_layer.adaLN_modulation.1", ("norm_out.linear",), swap_halves=True),
)
_TABLE = Rule("pos_embed", ("pos_embed.pos_embed",))
_BLOCK = (
    Rule("x_block.adaLN_modulation.1", ("norm1.linear",)),
    Rule("x_block.attn.qkv", ("attn.to_q", "attn.to_k", "attn.to_v")),
    Rule("context_block.attn.qkv", ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")),
    Rule("x_block.attn.proj", ("attn.to_out.0",)),
    Rule("x_block.mlp.fc1", ("ff.net.0.proj",)),
    Rule("x_block.mlp.fc2", ("ff.net.2",)),
)
_TEXT_OUTPUT = (
    Rule("context_block.attn.proj", ("attn.to_add_out",)),
    Rule("context_block.mlp.fc1", ("ff_context.net.0.proj",)),
    Rule("context_block.mlp.fc2", ("ff_context.net.2",)),
)
_NORMS = (
    Rule("x_block.attn.ln_q.weight", ("attn.norm_q.weight",)),
    Rule("x_block.attn.ln_k.weight", ("attn.norm_k.weight",)),
    Rule("context_block.attn.ln_q.weight", ("attn.norm_added_q.weight",)),
    Rule("context_block.attn.ln_k.weight", ("attn.norm_added_k.weight",)),
)
_SECOND = (
    Rule("x_block.attn2.qkv", ("attn2.to_q", "attn2.to_k", "attn2.to_v")),
    Rule("x_block.attn2.proj", ("attn2.to_out.0",)),
)
_SECOND_NORMS = (
    Rule("x_block.attn2.ln_q.weight", ("attn2.norm_q.weight",)),
    Rule("x_block.attn2.ln_k.weight", ("attn2.norm_k.weight",)),
)


def denoiser_rules(depth: int) -> Iterator[Rule]:
    """Every rule of a denoiser of this depth. The text of the last block has no output and a modulation of two
    parts."""
    yield _TABLE
    yield from with_kinds("", "", _TOP)
    for number in range(depth):
        places = (f"joint_blocks.{number}.", f"transformer_blocks.{number}.")
        is_last = number == depth - 1
        text = Rule("context_block.adaLN_modulation.1", ("norm1_context.linear",), swap_halves=is_last)
        yield from with_kinds(*places, (*_BLOCK, text, *(() if is_last else _TEXT_OUTPUT), *_SECOND))
        yield from placed(*places, (*_NORMS, *_SECOND_NORMS))


def is_diffusers_denoiser(keys: Iterable[str]) -> bool:
    return "transformer_blocks.0.attn.add_k_proj.weight" in keys


def convert_diffusers_to_sd3(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Denoiser weights from diffusers names to the original ones. Names outside the table stay as they are."""
    return to_original(state, denoiser_rules(count_blocks(state, "transformer_blocks.")))


def convert_sd3_to_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Denoiser weights from the original names to those of diffusers; the inverse of `convert_diffusers_to_sd3`."""
    return from_original(state, denoiser_rules(count_blocks(state, "joint_blocks.")))
