"""The options that choose how the attention of a denoiser is computed, and what they come to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from library.core.attention_modes import (
    ALIASES,
    MODE_NAMES,
    TORCH,
    AttentionChoice,
    Place,
    lacking,
    mode_problems,
)
from library.core.options import Ignored, option

ATTENTION_SWITCHES: Mapping[str, str] = {"mem_eff_attn": "torch_efficient", "xformers": "xformers", "sdpa": TORCH}
"""switches that the scripts of all families take -> their modes; of several the first counts. Front ends write them
unasked: where one cannot be followed a line says so, and the run starts"""


@dataclass(frozen=True, kw_only=True)
class AttentionOptions:
    """Attention"""

    attn_mode: str | None = option(
        None,
        help="what computes the attention: torch (sdpa) takes the kernel that fits, torch_flash, torch_efficient,"
        " torch_cudnn and torch_math begin with one; flash (flash2), flash3, xformers and sageattn are packages,"
        " flex is torch's; before all switches",
        choices=(None, *MODE_NAMES),
    )
    split_attn: bool = option(
        False, help="one attention call for each sample, over the tokens that its mask leaves: less memory, and kernels"
        " that take no masks serve",
    )
    mem_eff_attn: bool = option(False, help="another name of --attn_mode torch_efficient")
    xformers: bool = option(False, help="another name of --attn_mode xformers; without the package torch's serves")
    sdpa: bool = option(False, help="another name of --attn_mode torch")


@dataclass(frozen=True)
class AttentionSettings:
    """What the options come to: the choice, what is wrong with it, what of them has no effect, and lines for the
    log."""

    choice: AttentionChoice
    problems: tuple[str, ...] = ()
    idle: tuple[Ignored, ...] = ()
    notes: tuple[str, ...] = ()


def attention_settings(switches: Mapping[str, str], given: Mapping[str, Any], place: Place) -> AttentionSettings:
    """`switches`: the options that are read beside --attn_mode and --split_attn -> their modes, the first that is set
    counts; `given`: every option by name, an `attn_mode` of None is none."""
    named, split = given.get("attn_mode"), bool(given.get("split_attn"))
    asked = [(f"--{name}", mode, name in ATTENTION_SWITCHES) for name, mode in switches.items() if given.get(name)]
    if named is not None:
        asked.insert(0, (f"--attn_mode {named}", ALIASES.get(named, named), False))
    if not asked:
        return AttentionSettings(AttentionChoice(split=split))
    flag, mode, is_wish = asked[0]
    idle = tuple(Ignored(other, f"has no effect beside {flag}") for other, its, _ in asked[1:] if its != mode)
    reason = lacking(mode, place)
    if reason is not None and is_wish:
        note = f"{flag}: {reason}; torch's attention computes the same"
        return AttentionSettings(AttentionChoice(split=split), idle=idle, notes=(note,))
    problems = mode_problems(flag, mode, place)
    return AttentionSettings(AttentionChoice(mode, split), tuple(problems), idle)
