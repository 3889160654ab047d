"""Wan key names of the denoiser: the original layout and the one of diffusers folders, both ways."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from library.checkpoints.layout_rules import Rule, placed, with_kinds
from library.checkpoints.loading import count_blocks

_EMBEDDER = "condition_embedder"
TOP = (
    Rule("patch_embedding", ("patch_embedding",)),
    *(
        Rule(f"{kind}_embedding.{mine}", (f"{_EMBEDDER}.{kind}_embedder.linear_{theirs}",))
        for kind in ("time", "text") for mine, theirs in ((0, 1), (2, 2))
    ),
    Rule("time_projection.1", (f"{_EMBEDDER}.time_proj",)),
    Rule("head.head", ("proj_out",)),
    *(
        Rule(f"img_emb.proj.{mine}", (f"{_EMBEDDER}.image_embedder.{theirs}",))
        for mine, theirs in ((0, "norm1"), (1, "ff.net.0.proj"), (3, "ff.net.2"), (4, "norm2"))
    ),
)  # fmt: skip
SINGLE = (
    Rule("head.modulation", ("scale_shift_table",)),
    Rule("img_emb.emb_pos", (f"{_EMBEDDER}.image_embedder.pos_embed",)),
)
"""tensors that are no weight or bias of a layer"""
BLOCK = (
    *(
        Rule(f"{mine}.{short}", (f"{theirs}.{long}",))
        for mine, theirs in (("self_attn", "attn1"), ("cross_attn", "attn2"))
        for short, long in (
            ("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0"), ("norm_q", "norm_q"), ("norm_k", "norm_k"),
        )
    ),
    Rule("cross_attn.k_img", ("attn2.add_k_proj",)),
    Rule("cross_attn.v_img", ("attn2.add_v_proj",)),
    Rule("cross_attn.norm_k_img", ("attn2.norm_added_k",)),
    Rule("norm3", ("norm2",)),
    Rule("ffn.0", ("ffn.net.0.proj",)),
    Rule("ffn.2", ("ffn.net.2",)),
)  # fmt: skip
BLOCK_SINGLE = (Rule("modulation", ("scale_shift_table",)),)
ROW = "blocks"
ROOTS = ("condition_embedder", "scale_shift_table", "proj_out")
"""first words of names in diffusers that the original layout has not"""


def denoiser_rules(keys: Mapping[str, object]) -> Iterator[Rule]:
    """Every rule of a denoiser with the blocks of these keys, in either layout."""
    yield from with_kinds("", "", TOP)
    yield from placed("", "", SINGLE)
    for number in range(count_blocks(keys, f"{ROW}.")):
        place = f"{ROW}.{number}."
        yield from with_kinds(place, place, BLOCK)
        yield from placed(place, place, BLOCK_SINGLE)


def is_diffusers_denoiser(keys: Mapping[str, object]) -> bool:
    """Whether names are those of diffusers."""
    return "condition_embedder.time_proj.weight" in keys
