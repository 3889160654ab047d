"""Key names of denoisers with double and single stream blocks that the families of Hunyuan share: the original layout
and that of diffusers folders, both ways; the names inside of ComfyUI, which files have that were saved there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from library.checkpoints import layout_rules
from library.checkpoints.layout_rules import Rule, placed, with_kinds
from library.checkpoints.loading import count_blocks


def embedder(original: str, other: str) -> tuple[Rule, ...]:
    """The two layers of an embedder of a number."""
    return tuple(Rule(f"{original}.{mine}", (f"{other}.linear_{theirs}",)) for mine, theirs in (("0", 1), ("2", 2)))


_TEXT_TIME = "context_embedder.time_text_embed"
SHARED_TOP = (
    Rule("img_in.proj", ("x_embedder.proj",)),
    Rule("txt_in.input_embedder", ("context_embedder.proj_in",)),
    *embedder("txt_in.t_embedder.mlp", f"{_TEXT_TIME}.timestep_embedder"),
    *(Rule(f"txt_in.c_embedder.linear_{n}", (f"{_TEXT_TIME}.text_embedder.linear_{n}",)) for n in (1, 2)),
    Rule("final_layer.adaLN_modulation.1", ("norm_out.linear",), swap_halves=True),
    Rule("final_layer.linear", ("proj_out",)),
)
"""outside of the blocks"""
_QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
_REFINER = (
    Rule("norm1", ("norm1",)),
    Rule("norm2", ("norm2",)),
    Rule("self_attn_qkv", _QKV),
    Rule("self_attn_proj", ("attn.to_out.0",)),
    Rule("mlp.fc1", ("ff.net.0.proj",)),
    Rule("mlp.fc2", ("ff.net.2",)),
    Rule("adaLN_modulation.1", ("norm_out.linear",)),
)
_DOUBLE = (
    Rule("img_mod.linear", ("norm1.linear",)),
    Rule("img_attn_qkv", _QKV),
    Rule("img_attn_q_norm", ("attn.norm_q",)),
    Rule("img_attn_k_norm", ("attn.norm_k",)),
    Rule("img_attn_proj", ("attn.to_out.0",)),
    Rule("img_mlp.fc1", ("ff.net.0.proj",)),
    Rule("img_mlp.fc2", ("ff.net.2",)),
    Rule("txt_mod.linear", ("norm1_context.linear",)),
    Rule("txt_attn_qkv", ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")),
    Rule("txt_attn_q_norm", ("attn.norm_added_q",)),
    Rule("txt_attn_k_norm", ("attn.norm_added_k",)),
    Rule("txt_attn_proj", ("attn.to_add_out",)),
    Rule("txt_mlp.fc1", ("ff_context.net.0.proj",)),
    Rule("txt_mlp.fc2", ("ff_context.net.2",)),
)
_SINGLE = (
    Rule("modulation.linear", ("norm.linear",)),
    Rule("linear1", (*_QKV, "proj_mlp")),
    Rule("q_norm", ("attn.norm_q",)),
    Rule("k_norm", ("attn.norm_k",)),
    Rule("linear2", ("proj_out",)),
)
ROWS = (
    ("txt_in.individual_token_refiner.blocks", "context_embedder.token_refiner.refiner_blocks", _REFINER),
    ("double_blocks", "transformer_blocks", _DOUBLE),
    ("single_blocks", "single_transformer_blocks", _SINGLE),
)
"""(a row of blocks, its name in diffusers, what is in a block)"""
_COMFY_TOP = tuple(
    Rule(f"{original}.{mine}", (f"{original.removesuffix('.mlp')}.{theirs}_layer",))
    for original, first, second in (
        *((f"{name}.mlp", "0", "2") for name in ("time_in", "time_r_in", "guidance_in", "txt_in.t_embedder")),
        ("txt_in.c_embedder", "linear_1", "linear_2"),
    )
    for mine, theirs in ((first, "in"), (second, "out"))
)
_COMFY_MLP = (("fc1", "0"), ("fc2", "2"))
_COMFY_ROWS = (
    ("txt_in.individual_token_refiner.blocks", (
        *(Rule(f"self_attn_{name}", (f"self_attn.{name}",)) for name in ("qkv", "proj")),
        *(Rule(f"mlp.{mine}", (f"mlp.{theirs}",)) for mine, theirs in _COMFY_MLP),
    )),
    ("double_blocks", tuple(rule for side in ("img", "txt") for rule in (
        Rule(f"{side}_mod.linear", (f"{side}_mod.lin",)),
        *(Rule(f"{side}_attn_{name}", (f"{side}_attn.{name}",)) for name in ("qkv", "proj")),
        *(Rule(f"{side}_mlp.{mine}", (f"{side}_mlp.{theirs}",)) for mine, theirs in _COMFY_MLP),
    ))),
    ("single_blocks", (Rule("modulation.linear", ("modulation.lin",)),)),
)  # fmt: skip
"""(a row of blocks, what is called otherwise in a block)"""
_COMFY_NORMS = (
    ("double_blocks", tuple(
        Rule(f"{side}_attn_{short}_norm.weight", (f"{side}_attn.norm.{long}_norm.scale",))
        for side in ("img", "txt") for short, long in (("q", "query"), ("k", "key"))
    )),
    ("single_blocks", tuple(
        Rule(f"{short}_norm.weight", (f"norm.{long}_norm.scale",)) for short, long in (("q", "query"), ("k", "key"))
    )),
)  # fmt: skip
ROOTS = ("img_in", "txt_in", "time_in", "guidance_in", "double_blocks", "single_blocks", "final_layer")
DIFFUSERS_ROOTS = (
    "x_embedder", "context_embedder", "transformer_blocks", "single_transformer_blocks", "norm_out", "proj_out",
)
"""first words of names in either layout"""


@dataclass(frozen=True)
class StreamNames:
    """Names of a family's denoiser. `top`: rules outside of the blocks; `is_diffusers`: whether names are those of
    diffusers."""

    top: tuple[Rule, ...]
    is_diffusers: Callable[[Mapping[str, object]], bool]

    def rules(self, keys: Mapping[str, object]) -> Iterator[Rule]:
        """Every rule of a denoiser with the blocks of these keys, in either layout; names of weights and biases."""
        yield from with_kinds("", "", self.top)
        for original, other, rules in ROWS:
            for number in range(max(count_blocks(keys, f"{row}.") for row in (original, other))):
                yield from with_kinds(f"{original}.{number}.", f"{other}.{number}.", rules)

    def rules_of_names(self, keys: Mapping[str, object]) -> list[Rule]:
        """The rules by which these names become the original ones; none where they are."""
        return list(self.rules(keys) if self.is_diffusers(keys) else comfy_rules(keys))

    def to_diffusers(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Denoiser weights from the original names to those of diffusers."""
        return layout_rules.from_original(state, self.rules(state), rows_of(state["img_in.proj.weight"].shape[0]))


def comfy_rules(keys: Mapping[str, object]) -> Iterator[Rule]:
    """Every tensor of a denoiser under ComfyUI's names that is called otherwise there; names alone differ. None of a
    denoiser in another layout."""
    if not is_comfy_denoiser(keys):
        return
    yield from with_kinds("", "", _COMFY_TOP)
    for row, rules in _COMFY_ROWS:
        for place in (f"{row}.{number}." for number in range(count_blocks(keys, f"{row}."))):
            yield from with_kinds(place, place, rules)
    for row, rules in _COMFY_NORMS:
        for place in (f"{row}.{number}." for number in range(count_blocks(keys, f"{row}."))):
            yield from placed(place, place, rules)


def is_comfy_denoiser(keys: Mapping[str, object]) -> bool:
    """Whether names are those inside of ComfyUI."""
    return "double_blocks.0.img_attn.qkv.weight" in keys


def rows_of(width: int) -> Callable[[Rule, int], list[int]]:
    """(rule, rows of its tensor) -> rows of each part, in a denoiser of this width: queries, keys and values are as
    wide as it, what a single block has beside them takes the rest."""
    return lambda rule, rows: [width] * 3 + ([rows - 3 * width] if len(rule.parts) > 3 else [])
