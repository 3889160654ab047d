"""Options of InfoNoise, and what does not go with it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from library.core.errors import ConfigError, Problems
from library.core.options import option

if TYPE_CHECKING:
    from library.core.options import Config
    from library.training.hooks.base import Hook

SMALLEST_WARM_UP, SHARE_OF_WARM_UP, UNKNOWN_LENGTH = 200, 0.2, 5000


@dataclass(frozen=True, kw_only=True)
class InfoNoiseOptions:
    """Noise levels that follow what the model still has to learn."""

    infonoise_enabled: bool = option(
        False,
        help="InfoNoise: after a warm-up, draw noise levels by how much information the loss at each still holds; until"
        " then as the other options say",
    )
    infonoise_K: int = option(64, help="parts of equal length in ln(sigma / (1 - sigma)) from 0.001 to 0.999; 16 to 256")
    infonoise_N_warm: int = option(
        0, help="optimizer steps of the warm-up; 0 = a fifth of the run, at least 200"
    )
    infonoise_M: int = option(100, help="optimizer steps between two renewals of the density, 10 or more")
    infonoise_B: int = option(256, help="newest losses that are kept of each part, 32 or more")
    infonoise_beta: float = option(0.9, help="weight of the newer mean of a part at a renewal, 0.1 to 0.999")
    infonoise_N_min: int = option(
        50, help="losses that the likeliest parts must have before the first renewal; rarer ones borrow from those beside them"
    )
    infonoise_gate_pivot_c: float = option(
        0.15, help="sigma / (1 - sigma) below which levels are drawn less and less, 0 to 10; 0 = found from the losses"
    )

    def __post_init__(self) -> None:
        problems = Problems()
        ranges: Mapping[str, tuple[float, float]] = {
            "infonoise_K": (16, 256), "infonoise_N_warm": (0, math.inf), "infonoise_M": (10, math.inf),
            "infonoise_B": (32, math.inf), "infonoise_beta": (0.1, 0.999), "infonoise_N_min": (1, math.inf),
            "infonoise_gate_pivot_c": (0, 10),
        }  # fmt: skip
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if not low <= value <= high:
                wanted = f"{low} or more" if high == math.inf else f"{low} to {high}"
                problems.add(f"--{name} is {value}; needed: {wanted}")
        if self.infonoise_N_min > self.infonoise_B:
            problems.add(
                f"--infonoise_N_min is {self.infonoise_N_min} and --infonoise_B is {self.infonoise_B}: no part ever"
                " keeps so many losses; lower the first or raise the second"
            )
        problems.raise_if_any()

    def warm_up(self, total_steps: int | None) -> int:
        """Optimizer steps before the first renewal."""
        return self.infonoise_N_warm or max(SMALLEST_WARM_UP, int(SHARE_OF_WARM_UP * (total_steps or UNKNOWN_LENGTH)))

    def notices(self, total_steps: int) -> list[str]:
        """Lines for the log at start: when the levels change at the earliest, or that the run is too short for it."""
        if not self.infonoise_enabled:
            return []
        first = -(-self.warm_up(total_steps) // self.infonoise_M) * self.infonoise_M
        if first < total_steps:
            return [
                f"InfoNoise: noise levels can follow the losses from step {first + 1} on; until then they are drawn as the"
                " other options say"
            ]
        return [
            f"--infonoise_enabled: its first density would be made after step {first}, and the run has {total_steps}: noise"
            " levels are drawn as without it; lower --infonoise_N_warm and --infonoise_M, or train longer"
        ]


_WEIGHS = ("weighs the loss by noise level", "InfoNoise puts that weight into how often each level is drawn")
_NOISES = ("changes the noise", "the losses that InfoNoise compares are those of plain noise")
OTHER_WEIGHTS = ("min_snr_gamma", "scale_v_pred_loss_like_noise_pred", "v_pred_like_loss", "debiased_estimation_loss")
OTHER_NOISE = ("noise_offset", "multires_noise_iterations", "ip_noise_gamma")


def is_enabled(config: Config) -> bool:
    return InfoNoiseOptions in config and config[InfoNoiseOptions].infonoise_enabled


def check_hooks(config: Config, hooks: Iterable[Hook]) -> None:
    """ConfigError when a hook replaces the body of the step, whose losses InfoNoise would not know."""
    names = [type(hook).__name__ for hook in hooks if hook.process_batch is not None and hook.draws_own_times]
    if is_enabled(config) and names:
        raise ConfigError(
            f"--infonoise_enabled is set and {names[0]} has a step of its own, with noise levels of its own; use one of"
            " them"
        )


def check(config: Config, *, weighs: bool) -> None:
    """ConfigError with all of `problems_of`."""
    problems = Problems()
    for problem in problems_of(config, weighs=weighs) if is_enabled(config) else ():
        problems.add(problem)
    problems.raise_if_any()


def problems_of(config: Config, *, weighs: bool) -> list[str]:
    """Why a run cannot have InfoNoise with its other options, one line each. `weighs`: whether its objective weighs the
    loss by --weighting_scheme."""
    from library.training.loss_weights import LossWeightOptions
    from library.training.losses import LossOptions
    from library.training.option_groups import NoiseOptions
    from library.training.timestep_samplers import TimestepOptions

    times, weights, loss = config[TimestepOptions], config[LossWeightOptions], config[LossOptions].loss_type
    found = []
    if loss.lower() != "l2":
        found.append(f"--loss_type is {loss}: the losses that InfoNoise compares are squared errors; use l2")
    if times.num_timestep_buckets:
        found.append(
            f"--num_timestep_buckets is {times.num_timestep_buckets}: its parts are those of a fixed law; leave it out"
        )
    told = {name: (getattr(weights, name), *_WEIGHS) for name in OTHER_WEIGHTS}
    scheme = weights.loss_weighting
    told |= {"loss_weight": (weights.loss_weight, *_WEIGHS), "loss_weighting": (scheme != "none" and scheme, *_WEIGHS)}
    told |= {"weighting_scheme": (times.weighting_scheme if weighs else None, *_WEIGHS)}
    if NoiseOptions in config:
        told |= {name: (getattr(config[NoiseOptions], name, None), *_NOISES) for name in OTHER_NOISE}
    found += [
        f"--{name} is {value}: it {what}, and {why}; leave it out" for name, (value, what, why) in told.items() if value
    ]
    return [f"--infonoise_enabled is set and {line}" for line in found]
