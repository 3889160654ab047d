"""DPM-Solver (arXiv 2206.00927) and DPM-Solver++ (arXiv 2211.01095) of order two, midpoint form."""

from __future__ import annotations

import math

import torch

from library.training.inference_samplers.common import Alpha, Denoise, NextNoise, alpha_ve, log_snr, needed, steps_of

FEW_STEPS = 15
"""below this number the last step is of order one: extrapolation over long steps overshoots"""


def dpmsolver(
    denoise: Denoise, latents: torch.Tensor, sigmas: torch.Tensor, noise: NextNoise | None = None
) -> torch.Tensor:
    """Multistep in the noise: x += (t - s) (d + (d - d_previous) h / (2 h_previous)), h = log(s / t); VE.

    `noise` is not used. The schedule ends at the smallest sigma of training, not at 0.
    """
    previous, previous_h = None, 0.0
    for index, sigma, following in steps_of(sigmas):
        slope = change = denoise(latents, sigmas[index])
        h = log_snr(following, alpha_ve) - log_snr(sigma, alpha_ve)
        if previous is not None and not _first_order_end(index, following, len(sigmas) - 1):
            change = slope + (slope - previous) * (h / (2 * previous_h))
        latents = latents + (following - sigma) * change
        previous, previous_h = slope, h
    return latents


def dpmsolver_pp(
    denoise: Denoise, latents: torch.Tensor, sigmas: torch.Tensor, noise: NextNoise | None = None, *,
    alpha: Alpha = alpha_ve
) -> torch.Tensor:
    """Multistep in the data: x = (t/s) x + alpha_t (1 - e^-h) (D + (D - D_previous) h / (2 h_previous)).

    h is the growth of log(alpha / sigma). `noise` is not used.
    """
    previous, previous_h = None, 0.0
    for index, sigma, following in steps_of(sigmas):
        clean = change = latents - sigma * denoise(latents, sigmas[index])
        h = log_snr(following, alpha) - log_snr(sigma, alpha)
        if previous is not None and not _first_order_end(index, following, len(sigmas) - 1):
            change = clean + (clean - previous) * (h / (2 * previous_h))
        latents = (following / sigma) * latents + alpha(following) * -math.expm1(-h) * change
        previous, previous_h = clean, h
    return latents


def dpmsolver_pp_sde(
    denoise: Denoise, latents: torch.Tensor, sigmas: torch.Tensor, noise: NextNoise | None = None, *,
    alpha: Alpha = alpha_ve
) -> torch.Tensor:
    """dpmsolver_pp of the stochastic equation: e^-2h in place of e^-h, and noise of t sqrt(1 - e^-2h) per step but the
    last."""
    noise = needed(noise, "dpmsolver++ (sde)")
    previous, previous_h = None, 0.0
    for index, sigma, following in steps_of(sigmas):
        clean = change = latents - sigma * denoise(latents, sigmas[index])
        h = log_snr(following, alpha) - log_snr(sigma, alpha)
        if previous is not None and not _first_order_end(index, following, len(sigmas) - 1):
            change = clean + (clean - previous) * (h / (2 * previous_h))
        growth = -math.expm1(-2 * h)
        latents = (following / sigma * math.exp(-h)) * latents + alpha(following) * growth * change
        if following > 0:
            latents = latents + following * math.sqrt(growth) * noise()
        previous, previous_h = clean, h
    return latents


def dpmsolver_pp_3m_sde(
    denoise: Denoise, latents: torch.Tensor, sigmas: torch.Tensor, noise: NextNoise | None = None, *,
    alpha: Alpha = alpha_ve, eta: float = 1.0, s_noise: float = 1.0,
) -> torch.Tensor:
    """Multistep of the stochastic equation of order three: x = (t/s) e^(-h eta) x + alpha_t ((1 - e^-g) D + phi_2 D' -
    phi_3 D'') with g = h (1 + eta), h the growth of log(alpha / sigma), and noise of t sqrt(1 - e^(-2 h eta)) s_noise.

    D' and D'' are differences of the last three estimates of the data. One noise tensor per step but the last, which
    gives D: each step's noise is drawn for itself, as its share of a Brownian path is independent of the others.
    """
    noise = needed(noise, "dpmpp_3m_sde") if eta and s_noise else None
    older: list[tuple[float, torch.Tensor]] = []  # (h of the step that led away from it, D), newest first
    for index, sigma, following in steps_of(sigmas):
        clean = latents - sigma * denoise(latents, sigmas[index])
        if following <= 0:
            return clean
        h = log_snr(following, alpha) - log_snr(sigma, alpha)
        growth = h * (1 + eta)
        phi_2 = math.expm1(-growth) / growth + 1
        change = -math.expm1(-growth) * clean
        if older:
            first = (clean - older[0][1]) * (h / older[0][0])
            if len(older) > 1:
                near, far = older[0][0] / h, older[1][0] / h
                bend = (first - (older[0][1] - older[1][1]) / far) / (near + far)
                change = change + phi_2 * (first + near * bend) - (phi_2 / growth - 0.5) * bend
            else:
                change = change + phi_2 * first
        latents = following / sigma * math.exp(-h * eta) * latents + alpha(following) * change
        if noise is not None:
            latents = latents + following * math.sqrt(-math.expm1(-2 * h * eta)) * s_noise * noise()
        older = [(h, clean), *older][:2]
    return latents


def dpmsingle(
    denoise: Denoise, latents: torch.Tensor, sigmas: torch.Tensor, noise: NextNoise | None = None
) -> torch.Tensor:
    """Singlestep in the data: pairs of a step of order one and one of order two from the same start; VE.

    The last step is of order one. `noise` is not used.
    """
    pair_start, pair_sigma, pair_clean = latents, 0.0, latents
    num_steps = len(sigmas) - 1
    for index, sigma, following in steps_of(sigmas):
        clean = latents - sigma * denoise(latents, sigmas[index])
        if index % 2 == 0 or index == num_steps - 1:
            pair_start, pair_sigma, pair_clean = latents, sigma, clean
            change = clean
        else:
            h = log_snr(following, alpha_ve) - log_snr(pair_sigma, alpha_ve)
            part = log_snr(sigma, alpha_ve) - log_snr(pair_sigma, alpha_ve)
            change = pair_clean + (clean - pair_clean) * (h / (2 * part))
        ratio = following / pair_sigma
        latents = ratio * pair_start + (1 - ratio) * change
    return latents


def _first_order_end(index: int, following: float, num_steps: int) -> bool:
    """Whether this is a last step that has to be of order one: towards sigma 0 h is infinite."""
    return index == num_steps - 1 and (following <= 0 or num_steps < FEW_STEPS)
