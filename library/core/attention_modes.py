"""Which packages and kernels compute attention, by the values of --attn_mode: what each needs, and what is said where
it is not there. `library/components/attention_backends.py` calls them."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass

TORCH = "torch"
"""torch's scaled_dot_product_attention, with the kernel that torch takes"""


@dataclass(frozen=True)
class AttentionMode:
    """`says`: what it is called. `package`: to install, with its `module`; "" = torch alone. `instead`: the nearest
    that every torch has."""

    says: str
    package: str = ""
    module: str = ""
    halves_only: bool = False
    """whether it takes numbers of 16 bits alone"""
    gpu_only: bool = False
    gpu_trains_only: bool = False
    """whether it has no backward pass on the CPU"""
    trains: bool = True
    instead: str = TORCH


ATTENTION_MODES: Mapping[str, AttentionMode] = {
    TORCH: AttentionMode("the kernel of torch that fits"),
    "torch_flash": AttentionMode("torch's FlashAttention, without masks"),
    "torch_efficient": AttentionMode("torch's memory-efficient kernel"),
    "torch_cudnn": AttentionMode("the kernel of cuDNN"),
    "torch_math": AttentionMode("plain products of matrices"),
    "flash": AttentionMode(
        "flash-attn 2", "flash-attn", "flash_attn", halves_only=True, gpu_only=True, instead="torch_flash"
    ),
    "flash3": AttentionMode(
        "flash-attn 3", "flash-attn 3 (folder hopper of its repository)", "flash_attn_interface",
        halves_only=True, gpu_only=True, instead="torch_flash",
    ),
    "xformers": AttentionMode(
        "xformers' memory_efficient_attention", "xformers", "xformers", gpu_only=True, instead="torch_efficient"
    ),
    "sageattn": AttentionMode(
        "SageAttention", "sageattention", "sageattention", halves_only=True, gpu_only=True, trains=False,
        instead="torch_flash",
    ),
    "flex": AttentionMode("torch's flex_attention", gpu_trains_only=True),
}
ALIASES: Mapping[str, str] = {"sdpa": TORCH, "flash2": "flash"}
"""further names -> those of ATTENTION_MODES"""
MODE_NAMES: tuple[str, ...] = (*ATTENTION_MODES, *ALIASES)


@dataclass(frozen=True)
class AttentionChoice:
    """How the attention of a denoiser is computed. `split`: one call for each sample, over the keys that its mask
    leaves."""

    mode: str = TORCH
    split: bool = False

    def __str__(self) -> str:
        text = ATTENTION_MODES[self.mode].says
        return f"{text}, one call for each sample" if self.split else text


@dataclass(frozen=True)
class Place:
    """Where attention computes. `device`: "cuda", "cpu" ...; `in_halves`: in numbers of 16 bits, for which the option
    `halves` asks."""

    device: str
    in_halves: bool
    training: bool = False
    halves: str = "--mixed_precision bf16"


def lacking(mode: str, place: Place) -> str | None:
    """Why a mode cannot compute there, in words, or None."""
    about = ATTENTION_MODES[mode]
    if place.training and not about.trains:
        return f"{about.package} has no backward pass"
    if about.module and importlib.util.find_spec(about.module) is None:
        return f"the package {about.package} is not installed"
    if about.gpu_only and place.device != "cuda":
        return f"{about.package} runs on CUDA devices, and here it would be {place.device}"
    if place.training and about.gpu_trains_only and place.device == "cpu":
        return "flex_attention has no backward pass on the CPU"
    if about.halves_only and not place.in_halves:
        return f"{about.package} takes numbers of 16 bits alone; add {place.halves}"
    return None


def mode_problems(flag: str, mode: str, place: Place) -> list[str]:
    """A message for the option `flag`, with its dashes, that asks for a mode which cannot compute there."""
    reason = lacking(mode, place)
    if reason is None:
        return []
    about = ATTENTION_MODES[mode]
    return [f"{flag} asks for {about.says}: {reason}; the nearest that works is --attn_mode {about.instead}"]
