"""Key names of ControlNets of the U-Nets: the original layout of files and the one of diffusers, both ways."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TypeVar

from library.checkpoints.layout_rules import Rule
from library.checkpoints.unet_convert import diffusers_to_original, original_to_diffusers

T = TypeVar("T")

PREFIX = "control_model."
_HINT = "controlnet_cond_embedding"


def control_net_to_diffusers(state: Mapping[str, T]) -> dict[str, T]:
    """Entries under their diffusers names; names outside the table stay as they are."""
    parts = {key.removeprefix(PREFIX): value for key, value in state.items()}
    numbers = [int(match[1]) for key in parts if (match := re.match(r"input_hint_block\.(\d+)\.", key))]
    last = max(numbers, default=0)
    return {_diffusers_name(key, last): value for key, value in original_to_diffusers(parts).items()}


def control_net_to_original(state: Mapping[str, T]) -> dict[str, T]:
    """Entries under the names of files, without a prefix; the inverse of `control_net_to_diffusers`."""
    numbers = [int(match[1]) for key in state if (match := re.match(rf"{_HINT}\.blocks\.(\d+)\.", key))]
    last = 2 * (max(numbers, default=-1) + 2)
    return {_original_name(key, last): value for key, value in diffusers_to_original(state).items()}


def is_diffusers_control_net(names: Iterable[str]) -> bool:
    return any(name.startswith(f"{_HINT}.") for name in names)


def control_net_rules(names: Iterable[str]) -> Iterator[Rule]:
    """Every rule between the layouts, of names without a prefix in either of them."""
    own = {name: name for name in names}
    if is_diffusers_control_net(own):
        yield from (Rule(original, (name,)) for original, name in control_net_to_original(own).items())
    else:
        yield from (Rule(original, (name,)) for name, original in control_net_to_diffusers(own).items())


def _diffusers_name(key: str, last: int) -> str:
    """Every second entry of the hint block is an activation, so that convolution n stands at 2n."""
    if match := re.match(r"input_hint_block\.(\d+)\.(.*)$", key):
        number = int(match[1])
        place = "conv_in" if number == 0 else "conv_out" if number == last else f"blocks.{number // 2 - 1}"
        return f"{_HINT}.{place}.{match[2]}"
    key = re.sub(r"^zero_convs\.(\d+)\.0\.", r"controlnet_down_blocks.\1.", key)
    return re.sub(r"^middle_block_out\.0\.", "controlnet_mid_block.", key)


def _original_name(key: str, last: int) -> str:
    if match := re.match(rf"{_HINT}\.(conv_in|conv_out|blocks\.(\d+))\.(.*)$", key):
        number = {"conv_in": 0, "conv_out": last}.get(match[1], 2 * (int(match[2] or 0) + 1))
        return f"input_hint_block.{number}.{match[3]}"
    key = re.sub(r"^controlnet_down_blocks\.(\d+)\.", r"zero_convs.\1.0.", key)
    return re.sub(r"^controlnet_mid_block\.", "middle_block_out.0.", key)
