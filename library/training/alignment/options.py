"""Options of losses that align a denoiser with itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from library.core.errors import Problems
from library.core.options import option

DECAYS: Mapping[str, Callable[[float], float]] = {
    "constant": lambda place: 1.0,
    "cosine": lambda place: (1 + math.cos(math.pi * place)) / 2,
    "linear": lambda place: 1 - place,
    "rex": lambda place: (1 - place) / (0.1 + 0.9 * (1 - place)),
}
"""factor of the share of steps with a wrong time, at the place 0 to 1 of its steps"""
SRA_DECAYS = ("none", "linear", "cosine", "jump")
LEAP_VARIANTS = ("original", "bridge", "sparse", "lagrange")
HEADS = ("gelu", "silu")


@dataclass(frozen=True, kw_only=True)
class SelfFlowOptions:
    """Self-Flow: the model learns from its own moving average, which sees a cleaner sample."""

    self_flow: bool = option(False, help="train with Self-Flow (arXiv 2603.06507); for flow models")
    self_flow_gamma: float = option(0.8, help="weight of the loss on features; 0 = none")
    self_flow_gamma_warmup_steps: int = option(0, help="steps over which the weight grows from 0")
    mask_ratio: float = option(0.25, help="share of the tokens that get the second noise level, 0 to 0.5")
    self_flow_ema_decay: float | None = option(
        None, help="share of the teacher, the moving average, that an optimizer step leaves (default: --ema_decay where"
        " that is written, else 0.999)",
    )  # fmt: skip
    student_feature_layer: int | None = option(
        None, help="block whose tokens the student projects, from 0; 0.3 of the depth when not given"
    )
    teacher_feature_layer: int | None = option(
        None, help="later block whose tokens the teacher shows; 0.7 of the depth when not given"
    )
    self_flow_head: str = option(
        "gelu", choices=HEADS, help="what projects the student's tokens: gelu, two layers of the same width, or silu, with"
        " a middle of twice the width",
    )  # fmt: skip
    network_weights_ema: str | None = option(
        None, help="NAME-ema.safetensors of an earlier run: the teacher begins with it (with --network_weights)"
    )
    network_weights_proj: str | None = option(
        None, help="NAME-proj.safetensors of an earlier run: the head begins with it"
    )
    self_flow_teacher_coupling_prob: float = option(
        0.0, help="share of the steps in which the teacher is told a wrong time for some tokens"
    )
    self_flow_teacher_mismatch_ratio: float = option(
        1.0, help="in those steps: share of the tokens at the cleaner level that it is told the noisier one for"
    )
    self_flow_teacher_coupling_decay: str = option(
        "constant", choices=tuple(DECAYS), help="how the share of such steps falls to 0"
    )
    self_flow_teacher_coupling_decay_steps: int | None = option(
        None, help="steps until it is 0; all of the run when not given"
    )

    def __post_init__(self) -> None:
        problems = Problems()
        for name in ("self_flow_teacher_coupling_prob", "self_flow_teacher_mismatch_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                problems.add(f"--{name} is {getattr(self, name)}; needed: a number from 0 to 1")
        if (self.self_flow_teacher_coupling_decay_steps or 1) < 1:
            problems.add("--self_flow_teacher_coupling_decay_steps is below 1; needed: 1 or more")
        if not 0 <= self.mask_ratio <= 0.5:
            problems.add(f"--mask_ratio is {self.mask_ratio}; needed: a number from 0 to 0.5")
        if self.self_flow_ema_decay is not None and not 0 <= self.self_flow_ema_decay < 1:
            problems.add(f"--self_flow_ema_decay is {self.self_flow_ema_decay}; needed: a number from 0, below 1")
        for name in (
            "self_flow_gamma", "self_flow_gamma_warmup_steps", "student_feature_layer", "teacher_feature_layer",
        ):  # fmt: skip
            if not (getattr(self, name) or 0) >= 0:
                problems.add(f"--{name} is {getattr(self, name)}; needed: 0 or more")
        problems.raise_if_any()


@dataclass(frozen=True, kw_only=True)
class SraOptions:
    """SRA: tokens from the middle of the denoiser are aligned with the clean latents."""

    sra_enabled: bool = option(
        False, help="SRA: a small network learns to tell the clean latents from tokens of an early block; for flow models"
    )
    sra_block: int | None = option(None, help="that block, from 0; 4 when not given, or the middle one of fewer than 9")
    sra_weight: float = option(0.2, help="weight of that loss")
    sra_decay: str = option(
        "linear", choices=SRA_DECAYS, help="how the weight goes to 0 between --sra_decay_start and --sra_decay_end; jump:"
        " at the first of them, none: never",
    )  # fmt: skip
    sra_decay_start: float = option(0.2, help="share of the run after which the weight falls, 0 to 1")
    sra_decay_end: float = option(0.3, help="share of the run after which it is 0, 0 to 1")

    def __post_init__(self) -> None:
        problems = Problems()
        if not (math.isfinite(self.sra_weight) and self.sra_weight >= 0):
            problems.add(f"--sra_weight is {self.sra_weight}; needed: 0 or more")
        if (self.sra_block or 0) < 0:
            problems.add(f"--sra_block is {self.sra_block}; needed: 0 or more")
        if not 0 <= self.sra_decay_start <= self.sra_decay_end <= 1:
            problems.add(
                f"--sra_decay_start is {self.sra_decay_start} and --sra_decay_end is {self.sra_decay_end}; needed: 0 <= start"
                " <= end <= 1"
            )
        problems.raise_if_any()


@dataclass(frozen=True, kw_only=True)
class LeapOptions:
    """Leap: the model learns to reach the clean latents in few large steps."""

    leap_enabled: bool = option(
        False, help="Leap: in a share of the steps the loss is that of the clean latents which a few large steps reach; for"
        " flow models",
    )  # fmt: skip
    leap_ratio: float = option(0.6, help="share of the optimizer steps that are trained so, 0 to 1")
    leap_variant: str = option(
        "original", choices=LEAP_VARIANTS, help="original: two steps, the second from where it should begin; bridge: from"
        " where the first one came; sparse: three steps from true places; lagrange: two steps by Simpson's rule, six"
        " forwards",
    )  # fmt: skip
    leap_nested_grad_coe: float = option(0.3, help="how much of the gradient goes from the second step into the first")
    leap_min_gap: float = option(0.1, help="least distance of the noise levels of the two steps, above 0 and below 1")
    leap_distance_weighting: bool = option(
        False, help="divide the loss of a sample by how far off its two steps are, each counted as 0.1 at least"
    )

    def __post_init__(self) -> None:
        problems = Problems()
        for name in ("leap_ratio", "leap_nested_grad_coe"):
            if not 0 <= getattr(self, name) <= 1:
                problems.add(f"--{name} is {getattr(self, name)}; needed: a number from 0 to 1")
        if not 0 < self.leap_min_gap < 1:
            problems.add(f"--leap_min_gap is {self.leap_min_gap}; needed: a number above 0 and below 1")
        problems.raise_if_any()
