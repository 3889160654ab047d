"""Schedules of SD models for inference, and their network as a denoiser of VE samplers.

VE latents are network latents times sqrt(1 + sigma^2), with sigma = sqrt((1 - ac) / ac) at a timestep. Latents are
never clipped: they exceed -1..1, and clipping them washes pictures out.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy
import torch

from library.training.inference_samplers import INFERENCE_SAMPLERS, check_sd_table
from library.training.inference_samplers.common import Denoise, NextNoise
from library.training.inference_samplers.level_places import beta_places, karras_sigmas, simple_places
from library.training.objective import PREDICTION_TYPES, ddpm_alphas_cumprod
from library.training.timesteps import NUM_TIMESTEPS

STEPS_OFFSET = 1
"""first timestep of "leading" spacing, in training samples and in generation scripts alike"""
SMALLEST_ALPHA_CUMPROD = 2.0**-24
"""stands for the 0 at the end of a zero-terminal schedule: sigma 4096 instead of infinity"""
SPACINGS = ("leading", "linspace", "linspace_inner")
FINAL_SIGMAS = ("zero", "sigma_min")

Predict = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(network latents [B, C, H, W], timestep [] float32 on 0..999, on the CPU) -> what the network predicts, noise or v"""


@dataclass(frozen=True)
class DiscreteSchedule:
    """Levels of one run. `sigmas` [n + 1] and `timesteps` [n] float64 run down; `midpoints` are those of `pndm`.

    Start latents are standard normal noise times `start_scale` (VE).
    """

    sigmas: torch.Tensor
    timesteps: torch.Tensor
    start_scale: float
    model_sigmas: torch.Tensor  # [1000] float64
    whole_timesteps: bool
    midpoints: tuple[tuple[float, float], ...] = ()

    def timestep_of(self, sigma: float) -> float:
        """The timestep that the network is told at this sigma: the table's own, or between two, evenly in log sigma."""
        levels = self.sigmas[:-1]
        nearest = int((levels - sigma).abs().argmin())
        if math.isclose(float(levels[nearest]), sigma, rel_tol=1e-9):
            return float(self.timesteps[nearest])
        timestep = timestep_at(self.model_sigmas, sigma)
        return float(round(timestep)) if self.whole_timesteps else timestep

    def from_step(self, first: int) -> DiscreteSchedule:
        """The schedule without its first steps (img2img). Start from clean latents plus noise times `start_scale`."""
        if not 0 <= first < len(self.timesteps):
            raise ValueError(
                f"the first step is {first}; the schedule has {len(self.timesteps)} steps, needed: 0 to "
                f"{len(self.timesteps) - 1}"
            )
        if first == 0:
            return self
        return dataclasses.replace(
            self, sigmas=self.sigmas[first:], timesteps=self.timesteps[first:], midpoints=self.midpoints[first:],
            start_scale=float(self.sigmas[first]),
        )


def model_sigmas(zero_terminal_snr: bool = False) -> torch.Tensor:
    """sqrt((1 - ac) / ac) [1000] float64 of the training schedule; the last one is 4096 with `zero_terminal_snr`."""
    cumprod = ddpm_alphas_cumprod(zero_terminal_snr).clamp_min(SMALLEST_ALPHA_CUMPROD)
    return ((1 - cumprod) / cumprod).sqrt()


def leading_timesteps(num_steps: int, steps_offset: int = STEPS_OFFSET) -> torch.Tensor:
    """Whole timesteps [n] float64: offset + i * (1000 // n), downwards; at most 999."""
    ratio = NUM_TIMESTEPS // num_steps
    timesteps = torch.arange(num_steps - 1, -1, -1, dtype=torch.float64) * ratio + steps_offset
    return timesteps.clamp_max(NUM_TIMESTEPS - 1)  # 1000 steps with offset 1 would begin after the last timestep


def linspace_timesteps(num_steps: int) -> torch.Tensor:
    """Timesteps [n] float64 from 999 to 0, evenly spaced; a single step starts at 999."""
    return torch.linspace(NUM_TIMESTEPS - 1, 0, num_steps, dtype=torch.float64)


def linspace_inner_timesteps(num_steps: int) -> torch.Tensor:
    """Whole timesteps [n] float64: n + 1 evenly spaced ones from 999 to 0, without the last."""
    timesteps = torch.from_numpy(numpy.linspace(0, NUM_TIMESTEPS - 1, num_steps + 1)[:0:-1].copy())
    return timesteps.round() if num_steps < NUM_TIMESTEPS else timesteps  # rounded, 1000 steps would hold equal ones


def sigmas_at(table: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    """Sigmas at timesteps of any fraction, linear between the entries of `table` [1000]."""
    return torch.from_numpy(numpy.interp(timesteps.numpy(), numpy.arange(len(table)), table.numpy()))


def timestep_at(table: torch.Tensor, sigma: float) -> float:
    """The timestep of a sigma, linear in log sigma between the entries of `table` [1000], within 0..999."""
    return float(numpy.interp(math.log(max(sigma, 1e-10)), table.log().numpy(), numpy.arange(len(table))))


def table_levels(name: str, num_steps: int, table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(sigmas, timesteps), float64 and downwards, of a sigma table over the levels `table` [1000] of the training:
    [n] each, of "beta" a few less where there are many. ConfigError for one that SD models do not have."""
    if name == "karras":
        sigmas = karras_sigmas(num_steps, float(table[0]), float(table[-1]))
        return sigmas, torch.tensor([timestep_at(table, sigma) for sigma in sigmas.tolist()], dtype=torch.float64)
    if name == "sgm_uniform":
        timesteps = torch.linspace(NUM_TIMESTEPS - 1, 0, num_steps + 1, dtype=torch.float64)[:-1]
        return sigmas_at(table, timesteps), timesteps
    check_sd_table(name, "the table of noise levels")
    places = simple_places(num_steps) if name == "simple" else beta_places(num_steps)
    return table[places], torch.tensor(places, dtype=torch.float64)


def make_schedule(
    num_steps: int, spacing: str, *, final: str = "zero", steps_offset: int = STEPS_OFFSET,
    zero_terminal_snr: bool = False,
    table: str | None = None,
) -> DiscreteSchedule:
    """A schedule by its settings. `final`: the last sigma is 0 or that of timestep 0. `table`: the name of one that
    takes the place of the spacing. Raises ValueError for bad values.

    Start latents have the variance of the network's training ("leading", "linspace_inner") or, as k-diffusion samplers
    have it, plain sigma ("linspace").
    """
    if not 1 <= num_steps <= NUM_TIMESTEPS or spacing not in SPACINGS or final not in FINAL_SIGMAS:
        raise ValueError(
            f"num_steps is {num_steps}, spacing {spacing}, final {final}; needed: 1 to {NUM_TIMESTEPS}, one of "
            f"{', '.join(SPACINGS)}, one of"
            f" {', '.join(map(str, FINAL_SIGMAS))}"
        )
    trained = model_sigmas(zero_terminal_snr)
    if spacing == "leading":
        timesteps = leading_timesteps(num_steps, steps_offset)
    else:
        timesteps = linspace_timesteps(num_steps) if spacing == "linspace" else linspace_inner_timesteps(num_steps)
    sigmas = sigmas_at(trained, timesteps)
    if table is not None:
        sigmas, timesteps = table_levels(table, num_steps, trained)
        timesteps = timesteps if spacing == "linspace" else timesteps.round()
    last = trained[:1] if final == "sigma_min" else torch.zeros(1, dtype=torch.float64)
    first = float(sigmas[0])
    return DiscreteSchedule(
        sigmas=torch.cat([sigmas, last]), timesteps=timesteps, model_sigmas=trained,
        whole_timesteps=spacing != "linspace",
        start_scale=first if spacing == "linspace" else math.sqrt(1 + first**2),
    )


def schedule_of(
    name: str, num_steps: int, *, zero_terminal_snr: bool = False, steps_offset: int = STEPS_OFFSET,
    table: str | None = None,
) -> DiscreteSchedule:
    """The schedule that a sampler of the registry uses on SD models, with the levels of a sigma `table` where one is
    named. ConfigError for an unknown name, and for a sampler that goes with no table."""
    check_sd_table(table, "the table of noise levels", name)
    info = INFERENCE_SAMPLERS.entry(name).info
    schedule = make_schedule(
        num_steps, info["spacing"], final=info["final"], steps_offset=steps_offset,
        zero_terminal_snr=zero_terminal_snr, table=table,
    )
    return (
        dataclasses.replace(schedule, midpoints=_midpoints(schedule, num_steps)) if info.get("midpoints") else schedule
    )


def _midpoints(schedule: DiscreteSchedule, num_steps: int) -> tuple[tuple[float, float], ...]:
    """Per step but the last (sigma that the half step reaches, sigma told to the network): half a step's length below
    its start, and above its end."""
    half = NUM_TIMESTEPS // num_steps // 2
    pairs = zip(schedule.timesteps[:-1], schedule.timesteps[1:], strict=True)
    times = (
        torch.stack([torch.stack([start - half, end + half]) for start, end in pairs])
        if num_steps > 1
        else torch.empty(0, 2)
    )
    return tuple((reached, told) for reached, told in sigmas_at(schedule.model_sigmas, times).tolist())


def sampler_of(name: str, schedule: DiscreteSchedule) -> Callable[..., torch.Tensor]:
    """The sampler `(denoise, latents, sigmas, noise) -> latents` for `schedule.sigmas`. ConfigError for an unknown
    name."""
    sampler = INFERENCE_SAMPLERS.resolve(name)
    if INFERENCE_SAMPLERS.entry(name).info.get("midpoints"):
        return functools.partial(sampler, midpoints=schedule.midpoints)
    return sampler


def network_latents(latents: torch.Tensor, sigma: float) -> torch.Tensor:
    """VE latents at `sigma` in the scale of the network; at sigma 0 they are the same."""
    return latents / math.sqrt(1 + sigma**2)


def network_denoiser(predict: Predict, schedule: DiscreteSchedule, prediction_type: str) -> Denoise:
    """The derivative of VE latents, from a network that predicts "epsilon" or "v". Raises ValueError for other types.

    v = a * noise - s * data with a = 1 / sqrt(1 + sigma^2), s = sigma * a; hence noise = s * x + a * v for network
    latents x.
    """
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(f"prediction_type is {prediction_type!r}; one of {', '.join(PREDICTION_TYPES)} is needed")

    def denoise(latents: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        level = float(sigma)
        scale = 1 / math.sqrt(1 + level**2)
        inputs = latents * scale  # [B, C, H, W]
        prediction = predict(inputs, torch.tensor(schedule.timestep_of(level), dtype=torch.float32))
        return prediction if prediction_type == "epsilon" else level * scale * inputs + scale * prediction

    return denoise


def sample_latents(
    name: str, predict: Predict, start: torch.Tensor, num_steps: int, *, prediction_type: str,
    zero_terminal_snr: bool = False,
    noise: NextNoise | None = None,
) -> torch.Tensor:
    """Clean latents [B, C, H, W] of the network's scale from standard normal noise `start`, with a sampler of the
    registry.

    Raises ConfigError for an unknown name, ValueError for a prediction type or number of steps that there is not.
    """
    schedule = schedule_of(name, num_steps, zero_terminal_snr=zero_terminal_snr)
    denoise = network_denoiser(predict, schedule, prediction_type)
    latents = sampler_of(name, schedule)(denoise, start * schedule.start_scale, schedule.sigmas, noise)
    return network_latents(latents, float(schedule.sigmas[-1]))
