"""How noise levels are drawn: the options, the table of modes and `build`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from library.core.errors import ConfigError, Problems, did_you_mean, foreign_errors
from library.core.options import LARGEST_SIDE, Ignored, count_or_none, option, without_effect
from library.core.registry import Registry, is_path
from library.dataset import parse_resolution
from library.training.timestep_samplers.modes import (
    DENSITY_MODES,
    FLOW_MODES,
    FREE_NORMAL_MODES,
    MIXED_WITH_UNIFORM,
    SHIFT_MODES,
    SIGMA_TABLES,
    SIGMOID_MODES,
    parts_of,
)

if TYPE_CHECKING:
    from collections.abc import Container, Sequence

    import torch

    from library.core.keyed_random import StepDraws
    from library.families.latents import LatentSpec

WEIGHTING_SCHEMES = ("sigma_sqrt", "logit_normal", "mode", "cosmap", "none", "uniform")

TIMESTEP_SAMPLERS: Registry[type] = Registry(
    "timestep sampling", option="timestep_sampling", group="timestep_samplers", takes=("options",), info={"flow": True},
    wanted="a class made from TimestepOptions, with a method sample(latent_shape, draws)",
    is_a=lambda found: hasattr(found, "sample"),
)
"""`flow`: it draws sigmas of flow models"""
for _name in FLOW_MODES:
    TIMESTEP_SAMPLERS.add(_name, "library.training.timestep_samplers.baseline:FlowTimestepSampler")

MODE_SCALES = (-1.0, 1.75)
"""for which the formula of mode falls from 1 to 0; the upper one is 2 / (pi - 2), rounded down"""
SHOWN_AS = ("image", "console")
MODES = tuple(TIMESTEP_SAMPLERS.names())
"""those of the project"""


class TimestepSampler(Protocol):
    """Draws times in the unit of the objective, [B], or one per frame or token (`objective.expand_like`); a pure
    function of the draws, so that a resumed run draws the same. One that has `know_epochs(steps_per_epoch,
    samples_per_step)` is told the length of an epoch, and how many samples a step has at most, before the first
    step."""

    def sample(self, latent_shape: Sequence[int], draws: StepDraws) -> torch.Tensor: ...


def buckets_or_none(text: str | int) -> int | None:
    """A number of parts; 0 and 1 are the same as none."""
    count = count_or_none(text)
    return None if count == 1 else count


@dataclass(frozen=True, kw_only=True)
class TimestepOptions:
    """Noise levels: how they are drawn and how the loss weighs them."""

    timestep_sampling: str = option(
        "sigma", help="how sigmas are drawn: " + ", ".join(TIMESTEP_SAMPLERS.names())
        + ", or a path package.module:class. sigma and whole follow the density of --weighting_scheme, whole at whole"
        " timesteps",
    )
    sigmoid_scale: float = option(1.0, help="factor of the normal number in sigmoid, shift and the *_shift modes")
    weighting_scheme: str = option(
        "uniform", choices=WEIGHTING_SCHEMES,
        help="density of the sigmas in mode sigma (logit_normal, mode) and weight of the loss (sigma_sqrt, cosmap)"
        " where the model family weighs it",
    )
    logit_mean: float = option(
        0.0, help="mean of logit_normal; a larger one gives noisier samples. Log-SNR mean of logsnr"
    )
    logit_std: float = option(1.0, help="standard deviation of logit_normal and logsnr")
    mode_scale: float = option(1.29, help="scale of the density mode")
    discrete_flow_shift: float = option(
        3.0, help="shift of the modes sigma, shift and logit_normal; logit_normal_low takes 1 / shift; 1 = none"
    )
    timestep_schedule_shift: float = option(1.0, help="a further shift, of what a mode without a table draws; 1 = none")
    timestep_mix_low_prob: float = option(
        0.0, help="share of the samples that mixed_uniform_low and mixed_uniform_logit do not draw evenly, 0 to 1"
    )
    sigma_table: str = option(
        "rising", choices=SIGMA_TABLES,
        help="how mode sigma reads its table of 1000 levels: rising, a larger number of the density is a noisier"
        " sample, as in the paper; falling, a cleaner one, at whole timesteps, as known trainers of video models do",
    )
    min_timestep: int | None = option(None, help="smallest timestep, 0 to 999 (default 0)")
    max_timestep: int | None = option(None, help="end of the range of timesteps, 1 to 1000 (default 1000)")
    preserve_distribution_shape: bool = option(
        False,
        help="cut the distribution to the range of --min_timestep and --max_timestep, where it is squeezed into it"
        " otherwise",
    )
    num_timestep_buckets: int | None = option(
        None, convert=buckets_or_none,
        help="draw the noise levels of an epoch evenly from this many equal parts of the distribution, 2 or more",
    )
    show_timesteps: str | None = option(
        None, choices=(None, *SHOWN_AS),
        help="show which noise levels would be drawn instead of training: console, as text, or image, a PNG in"
        " --output_dir",
    )
    show_timesteps_resolution: tuple[int, int] | None = option(
        None, convert=parse_resolution, metavar="W,H", most=LARGEST_SIDE,
        help="size of the samples for --show_timesteps: one number or width,height; 1024 when not given",
    )

    def __post_init__(self) -> None:
        problems = Problems()
        unknown = TIMESTEP_SAMPLERS.problem(self.timestep_sampling)
        if unknown is not None:
            problems.add(unknown)
        if min(self.show_timesteps_resolution or (1,)) < 1:
            problems.add(
                f"--show_timesteps_resolution is {self.show_timesteps_resolution}; both sides must be at least 1"
            )
        if self.num_timestep_buckets is not None and self.num_timestep_buckets < 2:
            problems.add(f"--num_timestep_buckets is {self.num_timestep_buckets}; needed: 2 or more, e.g. 10")
        if self.weighting_scheme not in WEIGHTING_SCHEMES:
            problems.add(
                f"--weighting_scheme is '{self.weighting_scheme}'"
                f"{did_you_mean(self.weighting_scheme, WEIGHTING_SCHEMES) or '.'} Known: {', '.join(WEIGHTING_SCHEMES)}"
            )
        for name in ("sigmoid_scale", "discrete_flow_shift", "timestep_schedule_shift"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                problems.add(f"--{name} is {value}; a number above 0 is needed")
        if not (math.isfinite(self.logit_std) and self.logit_std >= 0):
            problems.add(f"--logit_std is {self.logit_std}; a standard deviation is 0 or more")
        for name in ("logit_mean", "mode_scale"):
            if not math.isfinite(getattr(self, name)):
                problems.add(f"--{name} is {getattr(self, name)}; a finite number is needed")
        if not 0 <= self.timestep_mix_low_prob <= 1:
            problems.add(
                f"--timestep_mix_low_prob is {self.timestep_mix_low_prob}; a share from 0 to 1 is needed, e.g. 0.3"
            )
        lowest, highest = MODE_SCALES
        if self.timestep_sampling == "mode" and not lowest <= self.mode_scale <= highest:
            problems.add(
                f"--mode_scale is {self.mode_scale}; --timestep_sampling mode needs {lowest:g} to {highest:g}, outside of"
                " which its formula turns back"
            )
        low = 0 if self.min_timestep is None else self.min_timestep
        high = 1000 if self.max_timestep is None else self.max_timestep
        if not 0 <= low < high <= 1000:
            problems.add(
                f"--min_timestep is {low} and --max_timestep is {high}; 0 <= min < max <= 1000 is needed, e.g. 200 and 800"
            )
        problems.raise_if_any()


def build(options: TimestepOptions, *, is_flow: bool = True) -> TimestepSampler:
    """The sampler of a run. DDPM has one way of drawing, whole timesteps uniform in the range, beside those from
    outside."""
    if not is_flow and not is_own(options.timestep_sampling):
        from library.training.timestep_samplers.baseline import DdpmTimestepSampler

        return DdpmTimestepSampler(options)
    return TIMESTEP_SAMPLERS.resolve(options.timestep_sampling)(options)


def notices(options: TimestepOptions) -> list[str]:
    """Lines for the log at start: where numbers differ from what people know."""
    lines = []
    if options.timestep_sampling in MIXED_WITH_UNIFORM and not options.timestep_mix_low_prob:
        lines.append(
            f"--timestep_sampling {options.timestep_sampling} is uniform with a --timestep_mix_low_prob of 0, its default;"
            " 0.3, say, takes three tenths of the samples from its other law"
        )
    is_whole = options.timestep_sampling == "whole"
    if options.sigma_table == "falling":  # families whose known trainers do the same, but for the range
        if options.timestep_sampling == "sigma" and is_limited(options):
            lines.append(
                "--min_timestep/--max_timestep bound the noise levels of --timestep_sampling sigma (known trainers of"
                " videos bound places in a falling table: 200 and 900 train 101 to 800)"
            )
        return lines
    if options.timestep_sampling == "sigma" and options.weighting_scheme in ("logit_normal", "mode"):
        lines.append(
            f"--timestep_sampling sigma with --weighting_scheme {options.weighting_scheme}: a larger number is a noisier"
            " sample, as in the paper (known trainers mirror the distribution)"
        )
    if is_limited(options) and not is_whole and not options.preserve_distribution_shape:
        lines.append(
            "--min_timestep/--max_timestep: the sigmas of every mode are squeezed into the range"
            " (known trainers ignore the range for flow models)"
        )
    return lines


def is_limited(options: TimestepOptions) -> bool:
    """Whether --min_timestep and --max_timestep leave out a part of the noise levels."""
    return (options.min_timestep or 0, options.max_timestep or 1000) != (0, 1000)


def idle(options: TimestepOptions, explicit: Container[str] | None = None) -> list[Ignored]:
    """Settings away from their defaults that the chosen mode does not read.

    `explicit` names the options that the user wrote; without it, those that differ from the defaults of this class.
    """
    mode, scheme, default = options.timestep_sampling, options.weighting_scheme, TimestepOptions()
    if mode not in MODES:
        return []  # a sampler from outside may read them all
    parts = [part for _, part, _ in parts_of(mode, options.timestep_mix_low_prob)]
    falls = mode == "sigma" and options.sigma_table == "falling"
    used = {
        "sigmoid_scale": bool(SIGMOID_MODES.intersection(parts)),
        "discrete_flow_shift": bool(SHIFT_MODES.intersection(parts)) or (mode in DENSITY_MODES and not falls),
        "logit_mean": _is_free("logit_mean", mode) or (mode in DENSITY_MODES and scheme == "logit_normal"),
        "logit_std": _is_free("logit_std", mode) or (mode in DENSITY_MODES and scheme == "logit_normal"),
        "mode_scale": mode == "mode" or (mode in DENSITY_MODES and scheme == "mode"),
        "timestep_schedule_shift": mode not in DENSITY_MODES,
        "timestep_mix_low_prob": mode in MIXED_WITH_UNIFORM,
    }
    plain = {name: getattr(default, name) for name in used} | ({"discrete_flow_shift": 1.0} if falls else {})
    changed = [
        name
        for name, value in plain.items()
        if getattr(options, name) != value and (explicit is None or name in explicit)
    ]
    how = f"neither --timestep_sampling {mode} nor --weighting_scheme {scheme} uses it"
    reasons = {"discrete_flow_shift": "the falling table of --timestep_sampling sigma has no shift"} if falls else {}
    found = [
        item for name in changed if not used[name] for item in without_effect([name], reasons.get(name, how))
    ]
    if mode not in DENSITY_MODES and scheme in ("logit_normal", "mode"):
        found += without_effect(["weighting_scheme"], f"{scheme} shapes the sigmas only with --timestep_sampling sigma")
    return found + _idle_shapes(options, explicit)


def _is_free(name: str, mode: str) -> bool:
    """Whether a mode has a part with a normal law whose `name` the option says."""
    return any(
        part in FREE_NORMAL_MODES and name not in fixed for _, part, fixed in parts_of(mode, 1.0)
    )


def _idle_shapes(options: TimestepOptions, explicit: Container[str] | None) -> list[Ignored]:
    """Ways of drawing that modes with a table do not have."""
    mode, found = options.timestep_sampling, []
    if options.preserve_distribution_shape and (mode in DENSITY_MODES or not is_limited(options)):
        how = (
            f"--timestep_sampling {mode} draws from a table of the range" if mode in DENSITY_MODES
            else "neither --min_timestep nor --max_timestep is given, to which it would cut"
        )
        found += without_effect(["preserve_distribution_shape"], how)
    if options.num_timestep_buckets and mode in DENSITY_MODES:
        found += without_effect(["num_timestep_buckets"], f"--timestep_sampling {mode} draws from a table")
    is_written = options.sigma_table != "rising" if explicit is None else "sigma_table" in explicit
    if is_written and mode != "sigma":
        found += without_effect(["sigma_table"], f"--timestep_sampling {mode} has no table")
    if options.show_timesteps_resolution and not options.show_timesteps:
        found += without_effect(["show_timesteps_resolution"], "--show_timesteps, whose samples it is about, is not given")
    return found


def is_own(name: Any) -> bool:
    """Whether this is a sampler from outside: a path, or a name that a plug-in or a package gives."""
    return isinstance(name, str) and name.lower() not in MODES and (is_path(name) or name in TIMESTEP_SAMPLERS)


def _try_sampler(options: TimestepOptions, *, is_flow: bool = True) -> None:
    """Draw once with a sampler from outside: it checks its own settings, and gives sigmas from 0 to 1 whose first axis
    is the sample or, for a table of noise levels, one whole timestep for each sample."""
    import torch

    from library.core.keyed_random import StepDraws

    where = f"--timestep_sampling is {options.timestep_sampling}"
    cls = TIMESTEP_SAMPLERS.resolve(options.timestep_sampling)
    with foreign_errors(ConfigError, f"{where}, which fails on a batch of two"):
        times = cls(options).sample((2, 16, 8, 8), StepDraws(0, 0, (0, 1)))
    told = "a tensor with sigmas from 0 to 1, whose first axis is the sample"
    if not is_flow:
        told = "a tensor [2] of whole timesteps from 0 to 999"
    shape = times.shape if isinstance(times, torch.Tensor) else None
    if shape is None or shape[:1] != (2,) or not (is_flow or len(shape) == 1):
        given = type(times).__name__ if shape is None else shape
        raise ConfigError(f"{where}, whose sample() gives {given} for a batch of two; needed: {told}")
    fits = (0 <= times) & (times <= 1) if is_flow else (0 <= times) & (times <= 999) & (times == times.floor())
    if not fits.all():
        noise = 1 if is_flow else 999
        raise ConfigError(f"{where}, whose sample() gives {times.tolist()}; needed: {told} ({noise} = noise)")


def check_one_time(options: TimestepOptions, latents: LatentSpec, reasons: Sequence[str]) -> None:
    """ConfigError when a sampler from outside gives a sample a noise level for each of its frames or tokens, and a run
    needs one alone, for these reasons."""
    if not (reasons and is_own(options.timestep_sampling)):
        return
    from library.core.keyed_random import StepDraws

    name, law = options.timestep_sampling, TIMESTEP_SAMPLERS.resolve(options.timestep_sampling)(options)
    clip = (1024, 1024, 1 + 2 * (latents.temporal_stride or 1))
    shapes = [latents.latent_shape(size) for size in ((1024, 1024), *([clip] if latents.clips else []))]
    with foreign_errors(ConfigError, f"--timestep_sampling is {name}, which fails on a batch of two"):
        times = [law.sample((2, *shape), StepDraws(0, 0, (0, 1))) for shape in shapes]
    if any(one.ndim > 1 for one in times):
        raise ConfigError(
            f"--timestep_sampling is {name}, which gives several noise levels for a sample; that does not go with"
            f" {' and '.join(reasons)}: use a law with one for each sample"
        )


def check_table(options: TimestepOptions) -> None:
    """Raise ConfigError when a family with a table of noise levels cannot use a sampler from outside."""
    if is_own(options.timestep_sampling):
        _try_sampler(options, is_flow=False)


def check(options: TimestepOptions, known: Sequence[str]) -> None:
    """Raise ConfigError when a flow family has not the chosen mode: `known` are those of the project that it has.
    Samplers from outside serve every flow family, unless they say that they are not for flow models."""
    name = options.timestep_sampling
    if name in known:
        return
    entry = TIMESTEP_SAMPLERS.entry(name)
    if entry.is_outside:
        if not entry.info["flow"]:
            raise ConfigError(f"--timestep_sampling is {name}, which says that it is not for flow models (flow=False)")
        _try_sampler(options)
    else:
        raise ConfigError(
            f"--timestep_sampling is '{options.timestep_sampling}'; this model family has {', '.join(known)}"
        )
