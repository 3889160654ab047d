"""Strength by U-Net block (`--lbws`): lists of 12, 17, 20 or 26 numbers, as known merge tools read them.

The slots of the 26 are BASE (text encoders), IN00-11, MID, OUT00-11; shorter lists name the slots that have attention.
A number multiplies the strength of its slot; layers of slots that are not listed keep theirs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from library.core.errors import ConfigError

BASE, FIRST_IN, MID, FIRST_OUT, COUNT = 0, 1, 13, 14, 26


def _slots(ins: Sequence[int], outs: Sequence[int]) -> tuple[int, ...]:
    return (BASE, *(FIRST_IN + i for i in ins), MID, *(FIRST_OUT + i for i in outs))


SLOTS: dict[str, dict[int, tuple[int, ...]]] = {
    "sdxl": {12: _slots((4, 5, 7, 8), range(6)), 20: _slots(range(9), range(9)), COUNT: tuple(range(COUNT))},
    "sd": {17: _slots((1, 2, 4, 5, 7, 8), range(3, 12)), COUNT: tuple(range(COUNT))},
}
"""family -> number of values -> the slot of each"""


def parse_block_weights(text: str, family: str) -> tuple[float, ...]:
    """A JSON list -> the 26 slots, 1.0 where the list says nothing. ConfigError for a family without such blocks or a
    list of another length."""
    if family not in SLOTS:
        raise ConfigError(f"--lbws: there are no block weights for {family}; they are for {', '.join(SLOTS)}")
    try:
        values: Any = json.loads(text)
        numbers = [float(value) for value in values]
    except (ValueError, TypeError, OverflowError, RecursionError):
        raise ConfigError(f"--lbws has '{text}'; needed: a JSON list of numbers, e.g. \"[1,0,0.5,...]\"") from None
    if len(numbers) not in SLOTS[family]:
        lengths = " or ".join(map(str, SLOTS[family]))
        raise ConfigError(f"--lbws has a list of {len(numbers)} numbers; {family} has {lengths}")
    weights = [1.0] * COUNT
    for slot, number in zip(SLOTS[family][len(numbers)], numbers, strict=True):
        weights[slot] = number
    return tuple(weights)


def slot_of(family: str, lora_name: str) -> int | None:
    """The slot of a layer by its name in the model; None outside all of them."""
    if not lora_name.startswith("lora_unet_"):
        return BASE
    return _sdxl_slot(lora_name) if family == "sdxl" else _sd_slot(lora_name)


def _sdxl_slot(name: str) -> int | None:
    match = re.match(r"lora_unet_(input_blocks|output_blocks)_(\d+)_", name)
    if match:
        return (FIRST_IN if match[1] == "input_blocks" else FIRST_OUT) + int(match[2])
    if name.startswith("lora_unet_middle_block_"):
        return MID
    if name.startswith(("lora_unet_time_embed_", "lora_unet_label_emb_")):
        return FIRST_IN
    return FIRST_OUT + 9 if name.startswith("lora_unet_out_") else None


def _sd_slot(name: str) -> int | None:
    match = re.match(r"lora_unet_(down|up)_blocks_(\d+)_(resnets|attentions|downsamplers|upsamplers)_(\d+)_", name)
    if match:
        level, place = int(match[2]), int(match[4])
        if match[1] == "down":
            return FIRST_IN + 3 * (level + 1) if match[3] == "downsamplers" else FIRST_IN + 3 * level + place + 1
        return FIRST_OUT + 3 * level + (2 if match[3] == "upsamplers" else place)
    return MID if name.startswith("lora_unet_mid_block_") else None


def multiplier_by_block(family: str, ratio: float, weights: Sequence[float] | None) -> float | Callable[[str], float]:
    """The strength of every layer of one adapter."""
    if weights is None:
        return ratio

    def multiplier(lora_name: str) -> float:
        slot = slot_of(family, lora_name)
        return ratio * (1.0 if slot is None else weights[slot])

    return multiplier
