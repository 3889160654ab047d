"""Noise levels from random numbers: densities, shifts and weightings as pure functions.

Convention of flow matching here: sigma 0 is data, sigma 1 is noise, and a larger number is always a noisier sample.
The functions keep the dtype of what they get; call them with float64 where an integer is cut from the result.
`u` stands for numbers uniform in [0, 1), `z` for standard normal numbers, both of shape [B].
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch

NUM_TIMESTEPS = 1000
UNIFORM_MARGIN = 1e-7
"""distance kept from 0 and 1 where a logarithm or a quantile of `u` is taken"""
SMALLEST_WEIGHTED_SIGMA = 1e-4
"""sigma^-2 is infinite at sigma 0; smaller sigmas get the weight of this one"""

MU_LINES: dict[str, tuple[tuple[float, float], tuple[float, float]]] = {
    "flux_shift": ((256, 0.5), (4096, 1.15)),
    "flux2_shift": ((256, 0.5), (4096, 1.15)),
    "nextdit_shift": ((256, 0.5), (4096, 1.15)),
    "qwen_shift": ((256, 0.5), (8192, 0.9)),
    "krea2_shift": ((256, 0.5), (6400, 1.15)),
}
"""resolution-dependent shifts: two points (tokens, mu) of the line on which mu lies"""


def normal_from_uniform(u: torch.Tensor) -> torch.Tensor:
    """Standard normal quantile of u (probit), u kept away from 0 and 1 so that the result is finite."""
    return torch.special.ndtri(u.double().clamp(UNIFORM_MARGIN, 1 - UNIFORM_MARGIN)).to(u.dtype)


def density(scheme: str, u: torch.Tensor, *, logit_mean: float, logit_std: float, mode_scale: float) -> torch.Tensor:
    """Numbers [B] in 0..1 that follow the density of `--weighting_scheme`, from uniform ones.

    logit_normal: sigmoid(logit_mean + logit_std * probit(u)); mode: 1 - u - mode_scale * (cos^2(pi u / 2) - 1 + u);
    every other scheme leaves u as it is (sigma_sqrt and cosmap only weigh the loss).
    Source: arXiv 2403.03206, section 3.1. A mode_scale above 1.75 leaves 0..1 and is clamped.
    """
    if scheme == "logit_normal":
        return torch.sigmoid(logit_mean + logit_std * normal_from_uniform(u))
    if scheme == "mode":
        return (1 - u - mode_scale * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u)).clamp(0, 1)
    return u


def shift_sigmas(sigmas: torch.Tensor, shift: float) -> torch.Tensor:
    """shift * s / (1 + (shift - 1) * s): more noise for shift > 1, the ends stay."""
    return sigmas if shift == 1 else shift * sigmas / (1 + (shift - 1) * sigmas)


def line_mu(tokens: float, line: tuple[tuple[float, float], tuple[float, float]]) -> float:
    """mu at `tokens` on the straight line through two points (tokens, mu), not clamped outside of them."""
    (x1, y1), (x2, y2) = line
    slope = (y2 - y1) / (x2 - x1)
    return slope * tokens + y1 - slope * x1


def packed_tokens(latent_hw: tuple[int, int]) -> int:
    """Number of 2x2 patches of latents of this height and width."""
    return (latent_hw[0] // 2) * (latent_hw[1] // 2)


def shift_of_mode(mode: str, latent_hw: tuple[int, int]) -> float:
    """exp(mu) of a resolution-dependent `--timestep_sampling` for latents of this height and width."""
    tokens = latent_hw[0] * latent_hw[1] if mode == "flux2_shift" else packed_tokens(latent_hw)
    return math.exp(line_mu(tokens, MU_LINES[mode]))


def at_parts(u: torch.Tensor, values: Sequence[float]) -> torch.Tensor:
    """[B]: the k-th value for numbers in the k-th of equally long parts of 0..1, in the type of u. Counted in Python, in
    float64: a step has few numbers, and each operation of torch takes longer than all of them."""
    count = len(values)
    return torch.tensor([values[min(int(number * count), count - 1)] for number in u.tolist()], dtype=u.dtype)


@functools.lru_cache(maxsize=8)
def table_sigmas(shift: float, min_timestep: int | None, max_timestep: int | None) -> tuple[float, ...]:
    """Sigmas of the 1000-entry schedule: (k + 1) / 1000, then the shift and the range."""
    sigmas = torch.arange(1, NUM_TIMESTEPS + 1, dtype=torch.float64) / NUM_TIMESTEPS
    return tuple(limit_range(shift_sigmas(sigmas, shift), min_timestep, max_timestep).tolist())


def falling_timesteps(u: torch.Tensor, min_timestep: int | None, max_timestep: int | None) -> torch.Tensor:
    """Whole timesteps [B] of the table 1000, 999 .. 1, of which the range leaves max, max - 1 .. min + 1: number
    floor(u * (max - min)) of these, so that a larger u is a cleaner sample. Give float64."""
    low, high = timestep_range(min_timestep, max_timestep)
    return high - (u * (high - low)).floor().clamp(0, high - low - 1)


def nearest_table_sigmas(timesteps: torch.Tensor) -> torch.Tensor:
    """Sigma of the nearest whole timestep from 1 to 1000, of timesteps of any shape; the larger one of two that are as
    near."""
    return (timesteps + 0.5).floor().clamp(1, NUM_TIMESTEPS) / NUM_TIMESTEPS


def ideogram4_mean(latent_hw: tuple[int, int]) -> float:
    """m = 0.5 ln(16h * 16w / 512^2)."""
    return 0.5 * math.log(16 * latent_hw[0] * 16 * latent_hw[1] / 512**2)


def ideogram4_sigmas(u: torch.Tensor, latent_hw: tuple[int, int]) -> torch.Tensor:
    """sigmoid(m + 1.5 * probit(u)) with m = `ideogram4_mean`, kept inside the sampler's log-SNR range."""
    sigmas = torch.sigmoid(ideogram4_mean(latent_hw) + 1.5 * normal_from_uniform(u))
    return sigmas.clamp(1 - 1 / (1 + math.exp(-7.5)), 1 - 1 / (1 + math.exp(9.0)))


def logsnr_sigmas(z: torch.Tensor, logit_mean: float, logit_std: float) -> torch.Tensor:
    """sigmoid(-L / 2) with the log-SNR L = logit_mean + logit_std * z."""
    return torch.sigmoid(-(logit_mean + logit_std * z) / 2)


def limit_range(sigmas: torch.Tensor, min_timestep: int | None, max_timestep: int | None) -> torch.Tensor:
    """Squeeze sigmas into the range of timesteps: (min + s * (max - min)) / 1000. The last rule of every flow mode."""
    low, high = timestep_range(min_timestep, max_timestep)
    scaled = sigmas * (high - low)
    return (low + scaled if low else scaled) / NUM_TIMESTEPS


def timestep_range(min_timestep: int | None, max_timestep: int | None) -> tuple[int, int]:
    """The range with its defaults, 0 and 1000."""
    low = 0 if min_timestep is None else min_timestep
    high = NUM_TIMESTEPS if max_timestep is None else max_timestep
    return low, high


def ddpm_timesteps(u: torch.Tensor, min_timestep: int | None, max_timestep: int | None) -> torch.Tensor:
    """Whole timesteps [B], uniform in min..max-1."""
    return at_parts(u, range(*timestep_range(min_timestep, max_timestep)))


def whole_flow_timesteps(
    u: torch.Tensor, training_shift: float, min_timestep: int | None, max_timestep: int | None
) -> torch.Tensor:
    """Whole timesteps [B] of a flow model from numbers that follow the density: shift, range, cut.

    At least 1, because at 0 the sigma_sqrt weight is infinite and the loss 0 * inf.
    """
    low, high = timestep_range(min_timestep, max_timestep)
    return (shift_sigmas(u, training_shift) * (high - low) + low).floor().clamp(min=1)


def validation_timesteps(min_timestep: int | None, max_timestep: int | None) -> list[int]:
    """The four fixed levels of a validation pass: the inner ones of six even levels, 200, 400, 600, 800 by default."""
    low, high = timestep_range(min_timestep, max_timestep)
    return [low + (high - low) * i // 5 for i in range(1, 5)]


def flow_weights(scheme: str, sigmas: torch.Tensor) -> torch.Tensor:
    """Weight [B] of the loss for `--weighting_scheme`: sigma_sqrt s^-2, cosmap 2 / (pi (1 - 2s + 2s^2)), else 1."""
    if scheme == "sigma_sqrt":
        return sigmas.clamp(min=SMALLEST_WEIGHTED_SIGMA) ** -2
    if scheme == "cosmap":
        return 2 / (math.pi * (1 - 2 * sigmas + 2 * sigmas**2))
    return torch.ones_like(sigmas)
