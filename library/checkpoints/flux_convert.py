"""FLUX.1 key names of the denoiser and of its variants: the original layout and the one of diffusers folders, both
ways.

Each rule says how one original tensor is made of one or more others; both directions read the same table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from torch import Tensor

from library.checkpoints.layout_rules import Rule, from_original, placed, to_original, with_kinds
from library.checkpoints.loading import count_blocks


_TOP = (
    Rule("img_in", ("x_embedder",)),
    Rule("txt_in", ("context_embedder",)),
    *(
        Rule(f"{original}_in.{side}_layer", (f"time_text_embed.{other}_embedder.linear_{number}",))
        for original, other in (("time", "timestep"), ("guidance", "guidance"), ("vector", "text"))
        for number, side in ((1, "in"), (2, "out"))
    ),
    Rule("final_layer.linear", ("proj_out",)),
    # diffusers keeps (scale, shift), the original (shift, scale)
    Rule("final_layer.adaLN_modulation.1", ("norm_out.linear",), swap_halves=True),
)
_DOUBLE = (
    Rule("img_mod.lin", ("norm1.linear",)),
    Rule("txt_mod.lin", ("norm1_context.linear",)),
    Rule("img_attn.qkv", ("attn.to_q", "attn.to_k", "attn.to_v")),
    Rule("txt_attn.qkv", ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")),
    Rule("img_attn.proj", ("attn.to_out.0",)),
    Rule("txt_attn.proj", ("attn.to_add_out",)),
    Rule("img_mlp.0", ("ff.net.0.proj",)),
    Rule("img_mlp.2", ("ff.net.2",)),
    Rule("txt_mlp.0", ("ff_context.net.0.proj",)),
    Rule("txt_mlp.2", ("ff_context.net.2",)),
)
_DOUBLE_NORMS = (
    Rule("img_attn.norm.query_norm.scale", ("attn.norm_q.weight",)),
    Rule("img_attn.norm.key_norm.scale", ("attn.norm_k.weight",)),
    Rule("txt_attn.norm.query_norm.scale", ("attn.norm_added_q.weight",)),
    Rule("txt_attn.norm.key_norm.scale", ("attn.norm_added_k.weight",)),
)
_SINGLE = (
    Rule("modulation.lin", ("norm.linear",)),
    Rule("linear1", ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")),
    Rule("linear2", ("proj_out",)),
)
_SINGLE_NORMS = (
    Rule("norm.query_norm.scale", ("attn.norm_q.weight",)),
    Rule("norm.key_norm.scale", ("attn.norm_k.weight",)),
)

APPROXIMATOR = "distilled_guidance_layer."
"""of Chroma, which has it in the place of the modulation of the blocks"""
_APPROXIMATOR_ENDS = (Rule("in_proj", ("in_proj",)), Rule("out_proj", ("out_proj",)))
_APPROXIMATOR_LAYER = (Rule("in_layer", ("linear_1",)), Rule("out_layer", ("linear_2",)))


def denoiser_rules(depth: int, depth_single_blocks: int, approximator_depth: int = 0) -> Iterator[Rule]:
    """Every rule of a denoiser with these depths; names of weights, biases and scales."""
    yield from with_kinds("", "", _TOP)
    if approximator_depth:
        yield from with_kinds(APPROXIMATOR, APPROXIMATOR, _APPROXIMATOR_ENDS)
    for number in range(approximator_depth):
        layer = f"{APPROXIMATOR}layers.{number}."
        yield from with_kinds(layer, layer, _APPROXIMATOR_LAYER)
        yield Rule(f"{APPROXIMATOR}norms.{number}.scale", (f"{APPROXIMATOR}norms.{number}.weight",))
    for number in range(depth):
        places = (f"double_blocks.{number}.", f"transformer_blocks.{number}.")
        yield from with_kinds(*places, _DOUBLE)
        yield from placed(*places, _DOUBLE_NORMS)
    for number in range(depth_single_blocks):
        places = (f"single_blocks.{number}.", f"single_transformer_blocks.{number}.")
        yield from with_kinds(*places, _SINGLE)
        yield from placed(*places, _SINGLE_NORMS)


def is_diffusers_denoiser(keys: Mapping[str, object]) -> bool:
    return "transformer_blocks.0.attn.add_k_proj.weight" in keys


def rules_of(names: Mapping[str, object]) -> Iterator[Rule]:
    """Every rule of a denoiser with the blocks of these names, in either layout."""
    prefixes = ("double_blocks.", "transformer_blocks."), ("single_blocks.", "single_transformer_blocks.")
    depths = (max(count_blocks(names, prefix) for prefix in both) for both in prefixes)
    return denoiser_rules(*depths, count_blocks(names, f"{APPROXIMATOR}layers."))


def rows_of(hidden: int) -> Callable[[Rule, int], list[int]]:
    """(rule, rows of its tensor) -> rows of each part: query, key, value, and the feed-forward behind them."""
    return lambda rule, rows: [hidden] * 3 + [rows - 3 * hidden] * (len(rule.parts) == 4)


def convert_diffusers_sd_to_bfl(
    diffusers_sd: Mapping[str, Tensor], num_double_blocks: int | None = None, num_single_blocks: int | None = None
) -> dict[str, Tensor]:
    """Denoiser weights from diffusers names to the original ones, of that many blocks, None = all. Names outside the
    table stay as they are."""
    double, single = (count_blocks(diffusers_sd, f"{kind}transformer_blocks.") for kind in ("", "single_"))
    rules = denoiser_rules(
        double if num_double_blocks is None else num_double_blocks,
        single if num_single_blocks is None else num_single_blocks,
        count_blocks(diffusers_sd, f"{APPROXIMATOR}layers."),
    )
    return to_original(diffusers_sd, rules)


def convert_bfl_sd_to_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Denoiser weights from the original names to those of diffusers; the inverse of `convert_diffusers_sd_to_bfl`."""
    return from_original(state, rules_of(state), rows_of(state["img_in.weight"].shape[0]))


def is_diffusers_control_net(keys: Mapping[str, object]) -> bool:
    return "controlnet_x_embedder.weight" in keys


def control_net_rules(names: Mapping[str, object]) -> Iterator[Rule]:
    """Every rule of a ControlNet with the blocks of these names, in either layout. Between two convolutions of the
    original stands an activation, so that convolution n is at 2n."""
    yield from rules_of(names)
    rules = [Rule("pos_embed_input", ("controlnet_x_embedder",))]
    ends = (f"controlnet_blocks.{number}" for number in range(count_blocks(names, "controlnet_blocks.")))
    rules += [Rule(end, (end,)) for end in ends]
    last = max(count_blocks(names, "input_hint_block.") - 1, 2 * (count_blocks(names, "input_hint_block.blocks.") + 1))
    for number in range(0, last + 2, 2):
        place = "conv_in" if number == 0 else "conv_out" if number == last else f"blocks.{number // 2 - 1}"
        rules.append(Rule(f"input_hint_block.{number}", (f"input_hint_block.{place}",)))
    yield from with_kinds("", "", rules)


def control_net_to_original(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a ControlNet from diffusers names to the original ones."""
    return to_original(state, control_net_rules(state))


def control_net_to_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `control_net_to_original`."""
    return from_original(state, control_net_rules(state), rows_of(state["img_in.weight"].shape[0]))
