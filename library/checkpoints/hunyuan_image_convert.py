"""HunyuanImage 2.1 key names of denoiser and autoencoder: the original layouts and those of diffusers folders, both
ways; the denoiser's names inside of ComfyUI, which files have that were saved there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from torch import Tensor

from library.checkpoints import layout_rules
from library.checkpoints.layout_rules import Rule, placed, with_kinds
from library.checkpoints.loading import count_blocks


def _embedder(original: str, other: str) -> tuple[Rule, ...]:
    return tuple(Rule(f"{original}.{mine}", (f"{other}.linear_{theirs}",)) for mine, theirs in (("0", 1), ("2", 2)))


_TIME = "time_guidance_embed"
_TEXT_TIME = "context_embedder.time_text_embed"
TOP = (
    Rule("img_in.proj", ("x_embedder.proj",)),
    *_embedder("time_in.mlp", f"{_TIME}.timestep_embedder"),
    *_embedder("time_r_in.mlp", f"{_TIME}.timestep_embedder_r"),
    *_embedder("guidance_in.mlp", f"{_TIME}.guidance_embedder"),
    Rule("txt_in.input_embedder", ("context_embedder.proj_in",)),
    *_embedder("txt_in.t_embedder.mlp", f"{_TEXT_TIME}.timestep_embedder"),
    *(Rule(f"txt_in.c_embedder.linear_{n}", (f"{_TEXT_TIME}.text_embedder.linear_{n}",)) for n in (1, 2)),
    Rule("byt5_in.layernorm", ("context_embedder_2.norm",)),
    *(Rule(f"byt5_in.fc{n}", (f"context_embedder_2.linear_{n}",)) for n in (1, 2, 3)),
    Rule("final_layer.adaLN_modulation.1", ("norm_out.linear",), swap_halves=True),
    Rule("final_layer.linear", ("proj_out",)),
)
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
ROOTS = (
    "x_embedder", "time_guidance_embed", "context_embedder", "context_embedder_2", "transformer_blocks",
    "single_transformer_blocks", "norm_out", "proj_out",
)  # fmt: skip
"""first words of names in diffusers"""


def denoiser_rules(keys: Mapping[str, object]) -> Iterator[Rule]:
    """Every rule of a denoiser with the blocks of these keys, in either layout; names of weights and biases."""
    yield from with_kinds("", "", TOP)
    for original, other, rules in ROWS:
        for number in range(max(count_blocks(keys, f"{row}.") for row in (original, other))):
            yield from with_kinds(f"{original}.{number}.", f"{other}.{number}.", rules)


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


def is_diffusers_denoiser(keys: Mapping[str, object]) -> bool:
    return "context_embedder_2.linear_1.weight" in keys


def is_comfy_denoiser(keys: Mapping[str, object]) -> bool:
    return "double_blocks.0.img_attn.qkv.weight" in keys


def rules_of_names(keys: Mapping[str, object]) -> list[Rule]:
    """The rules by which these names become the original ones; none where they are."""
    if is_diffusers_denoiser(keys):
        return list(denoiser_rules(keys))
    return list(comfy_rules(keys))


def to_original(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Denoiser weights of any layout under the original names. Names outside the tables stay as they are."""
    return layout_rules.to_original(state, rules_of_names(state))


def to_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Denoiser weights from the original names to those of diffusers."""
    return layout_rules.from_original(state, denoiser_rules(state), rows_of(state["img_in.proj.weight"].shape[0]))


def rows_of(width: int) -> Callable[[Rule, int], list[int]]:
    """(rule, rows of its tensor) -> rows of each part, in a denoiser of this width: queries, keys and values are as
    wide as it, what a single block has beside them takes the rest."""
    return lambda rule, rows: [width] * 3 + ([rows - 3 * width] if len(rule.parts) > 3 else [])


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
