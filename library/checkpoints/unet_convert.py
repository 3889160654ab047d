"""Key names of the Stable Diffusion and SDXL U-Nets: the original layout of files and the one of diffusers, both
ways."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

from library.checkpoints.loading import count_blocks

T = TypeVar("T")

_RESNET = {
    "in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj", "out_layers.0": "norm2",
    "out_layers.3": "conv2", "skip_connection": "conv_shortcut",
}  # fmt: skip
_TOP = {
    "time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1", "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in", "out.0": "conv_norm_out", "out.2": "conv_out",
}  # fmt: skip
_RESNET_BACK = {other: original for original, other in _RESNET.items()}
_TOP_BACK = {other: original for original, other in _TOP.items()}


def is_diffusers_unet(keys: Iterable[str]) -> bool:
    return any(key.startswith("down_blocks.0.resnets.0.") for key in keys)


def original_to_diffusers(state: Mapping[str, T]) -> dict[str, T]:
    """Entries under their diffusers names; names outside the table stay as they are."""
    per_level = blocks_per_level(state)
    return {_renamed(key, lambda name: _diffusers_name(name, per_level)): value for key, value in state.items()}


def diffusers_to_original(state: Mapping[str, T]) -> dict[str, T]:
    """Entries under the names of files; the inverse of `original_to_diffusers`."""
    count = count_blocks(state, "down_blocks.0.resnets.")
    levels = {int(match[1]) for match in (re.match(r"up_blocks\.(\d+)\.attentions\.", key) for key in state) if match}
    return {_renamed(key, lambda name: _original_name(name, count, levels)): value for key, value in state.items()}


def blocks_per_level(keys: Iterable[str]) -> int:
    """Residual blocks of one level on the way down, from keys in the original layout: the first downsampling follows
    them."""
    keys = list(keys)
    downsamples = [int(match[1]) for match in (re.match(r"input_blocks\.(\d+)\.0\.op\.", key) for key in keys) if match]
    return (min(downsamples) if downsamples else count_blocks(keys, "input_blocks.")) - 1


def _renamed(key: str, rename: Callable[[str], str | None]) -> str:
    """`rename` sees the module path; weight and bias stay."""
    path, _, kind = key.rpartition(".")
    name = rename(path)
    return key if name is None else f"{name}.{kind}"


def _diffusers_name(path: str, count: int) -> str | None:
    if path in _TOP:
        return _TOP[path]
    match = re.match(r"(input_blocks|output_blocks)\.(\d+)\.(\d+)\.(.*)$", path)
    if match:
        number, place, rest = int(match[2]), int(match[3]), match[4]
        is_down = match[1] == "input_blocks"
        level, block = divmod(number - 1, count + 1) if is_down else divmod(number, count + 1)
        side = f"{'down' if is_down else 'up'}_blocks.{level}"
        if rest == "op":
            return f"{side}.downsamplers.0.conv"
        if not is_down and place > 0 and rest == "conv":
            return f"{side}.upsamplers.0.conv"
        if place == 0:
            return f"{side}.resnets.{block}.{_RESNET.get(rest, rest)}"
        return f"{side}.attentions.{block}.{rest}"
    match = re.match(r"middle_block\.([012])\.(.*)$", path)
    if match:
        place, rest = int(match[1]), match[2]
        return (
            f"mid_block.attentions.0.{rest}"
            if place == 1
            else f"mid_block.resnets.{place // 2}.{_RESNET.get(rest, rest)}"
        )
    return None


def _original_name(path: str, count: int, levels_with_attention: set[int]) -> str | None:
    if path in _TOP_BACK:
        return _TOP_BACK[path]
    match = re.match(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.*)$", path)
    if match:
        level, part, block, rest = int(match[2]), match[3], int(match[4]), match[5]
        if part == "downsamplers":
            return f"input_blocks.{(count + 1) * (level + 1)}.0.op"
        if part == "upsamplers":
            return f"output_blocks.{(count + 1) * level + count}.{2 if level in levels_with_attention else 1}.conv"
        number = (count + 1) * level + block
        side = f"input_blocks.{number + 1}" if match[1] == "down" else f"output_blocks.{number}"
        return f"{side}.0.{_RESNET_BACK.get(rest, rest)}" if part == "resnets" else f"{side}.1.{rest}"
    match = re.match(r"mid_block\.(resnets|attentions)\.(\d+)\.(.*)$", path)
    if match:
        rest = match[3]
        return (
            f"middle_block.1.{rest}"
            if match[1] == "attentions"
            else f"middle_block.{2 * int(match[2])}.{_RESNET_BACK.get(rest, rest)}"
        )
    return None
