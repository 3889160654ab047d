"""er_sde, dpmpp_3m_sde and lcm of flow models, and their tables of noise levels, against float64 references by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from library.core.errors import ConfigError
from library.generation import step_options
from library.generation.requests import PictureRequest
from library.training.inference_samplers import FLOW_SAMPLER_NAMES, SIGMA_TABLES, common
from library.training.inference_samplers.flow import LARGEST_SIGMA, flow_sampler, flow_schedule
from library.training.inference_samplers.level_places import beta_quantile
from library.training.inference_samplers.sigma_tables import table_sigmas

SHAPE = (1, 2, 3, 4)
SHIFT = 3.0


def velocity(x, sigma):
    return np.cos(1.3 * x + sigma) - 0.4 * x + sigma


def torch_velocity(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    return (1.3 * x + float(sigma)).cos() - 0.4 * x + float(sigma)


def made(name: str, sigmas: torch.Tensor, seed: int = 6) -> torch.Tensor:
    start = torch.randn(SHAPE, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    noise = common.noise_of([torch.Generator().manual_seed(seed)], start)
    return flow_sampler(name)(torch_velocity, start, sigmas, noise)


def by_hand(rule, sigmas: torch.Tensor) -> np.ndarray:
    """`rule(x, estimates of the data so far, levels so far, next level, noise)` gives the next latents."""
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(5), dtype=torch.float64).numpy()
    draws = torch.Generator().manual_seed(6)
    levels = [min(level, float(np.float32(LARGEST_SIGMA))) for level in sigmas.tolist()]
    estimates: list[np.ndarray] = []
    for index, following in enumerate(levels[1:]):
        estimates.append(x - levels[index] * velocity(x, levels[index]))
        if following == 0:
            return estimates[-1]
        noise = torch.randn(SHAPE[1:], generator=draws)[None].double().numpy()
        x = rule(x, estimates, levels[: index + 1], following, noise)
    raise AssertionError("the levels end with 0")


def er_sde(x, estimates, levels, t, noise):
    """arXiv 2309.06169 in terms of lambda = sigma / (1 - sigma), its integrals as sums over 200 points."""
    lam = [s / (1 - s) for s in levels]
    lam_t, s = t / (1 - t), levels[-1]

    def f(value):
        return value * (np.exp(value**0.3) + 10)

    r = f(lam_t) / f(lam[-1])
    new = (1 - t) / (1 - s) * r * x + (1 - t) * (1 - r) * estimates[-1]
    step = lam_t - lam[-1]
    points = lam_t - np.arange(200) * step / 200
    if len(levels) > 1:
        slopes = [(b - a) / (v - u) for a, b, u, v in zip(estimates, estimates[1:], lam, lam[1:])]
        new = new + (1 - t) * (step + (1 / f(points)).sum() * (-step / 200) * f(lam_t)) * slopes[-1]
        if len(levels) > 2:
            bend = (slopes[-1] - slopes[-2]) / ((lam[-1] - lam[-3]) / 2)
            area = ((points - lam[-1]) / f(points)).sum() * (-step / 200)
            new = new + (1 - t) * (step**2 / 2 + area * f(lam_t)) * bend
    return new + (1 - t) * noise * np.sqrt(max(lam_t**2 - lam[-1] ** 2 * r**2, 0))


def dpmpp_3m_sde(x, estimates, levels, t, noise):
    """The exponential integral of the polynomial through the last three estimates, its square term at half weight, as
    the published solver has it; integrals by quadrature."""
    place = [np.log((1 - s) / s) for s in levels[-3:]]
    h = np.log((1 - t) / t) - place[-1]
    nodes = (np.array(place[::-1]) - place[-1]) / h
    values = np.stack([estimate.ravel() for estimate in estimates[-3:][::-1]])
    polynomial = np.linalg.solve(np.vander(nodes, increasing=True), values)
    u, weights = np.polynomial.legendre.leggauss(40)
    u, weights = (u + 1) / 2, weights / 2 * 2 * h * np.exp(-2 * h * (1 - (u + 1) / 2))
    areas = [(weights * u**power).sum() for power in range(3)]
    moved = areas[0] * polynomial[0]
    moved = moved + (areas[1] * polynomial[1] if len(polynomial) > 1 else 0)
    moved = moved + (areas[2] / 2 * polynomial[2] if len(polynomial) > 2 else 0)
    mean = t / levels[-1] * np.exp(-h) * x + (1 - t) * moved.reshape(x.shape)
    return mean + t * np.sqrt(1 - np.exp(-2 * h)) * noise


def lcm(x, estimates, levels, t, noise):
    return (1 - t) * estimates[-1] + t * noise


@pytest.mark.parametrize("steps", [1, 2, 9])
@pytest.mark.parametrize("rule", [er_sde, dpmpp_3m_sde, lcm])
def test_steps_are_those_of_the_reference(rule, steps):
    sigmas = flow_schedule(steps, SHIFT)
    found = made(rule.__name__, sigmas)
    np.testing.assert_allclose(found.numpy(), by_hand(rule, sigmas), rtol=1e-9, atol=1e-9)
    assert torch.equal(found, made(rule.__name__, sigmas))
    assert steps == 1 or not torch.equal(found, made(rule.__name__, sigmas, seed=7))


def shifted(times):
    return SHIFT * times / (1 + (SHIFT - 1) * times)


def test_tables_of_noise_levels():
    table = shifted(np.arange(1, 1001) / 1000)
    steps = 7
    expected = {
        "simple": [table[-(1 + int(i * 1000 / steps))] for i in range(steps)],
        "sgm_uniform": shifted(np.linspace(1000 * table[-1], 1000 * table[0], steps + 1)[:-1] / 1000),
        "karras": [(1 + i / (steps - 1) * (table[0] ** (1 / 7) - 1)) ** 7 for i in range(steps)],
    }
    for name, levels in expected.items():
        np.testing.assert_allclose(table_sigmas(name, steps, SHIFT).numpy(), [*levels, 0], rtol=1e-6, atol=1e-7)
    stats = pytest.importorskip("scipy.stats", reason="the quantiles of scipy are the reference")
    for steps in (1, 7, 30, 200):
        places = np.rint(stats.beta.ppf(1 - np.arange(steps) / steps, 0.6, 0.6) * 999).astype(int)
        levels = table[list(dict.fromkeys(places.tolist()))]
        np.testing.assert_allclose(table_sigmas("beta", steps, SHIFT).numpy(), [*levels, 0], rtol=1e-6, atol=1e-7)
    shares = np.linspace(0.001, 0.999, 37)
    np.testing.assert_allclose([beta_quantile(s) for s in shares], stats.beta.ppf(shares, 0.6, 0.6), rtol=1e-9)


@pytest.mark.parametrize("sampler", FLOW_SAMPLER_NAMES)
@pytest.mark.parametrize("table", SIGMA_TABLES.names())
def test_every_sampler_goes_down_every_table(sampler, table):
    sigmas = table_sigmas(table, 8, SHIFT)
    assert sigmas[0] > 0.99 and sigmas[-1] == 0 and bool((sigmas[1:] < sigmas[:-1]).all())
    assert torch.isfinite(made(sampler, sigmas)).all()


def test_options_and_lines_know_the_names():
    with pytest.raises(ConfigError) as told:
        step_options.SamplerStepOptions(sigma_table="simpel", sampler="euler_a")
    assert "did you mean 'simple'" in str(told.value) and "a sampler of SD models" in str(told.value)
    assert step_options.STEP_LINES["sg"].convert("-") is None
    with pytest.raises(ValueError, match="flow models have"):
        step_options.STEP_LINES["ss"].convert("ddpm")
    assert PictureRequest(prompt="", width=8, height=8).sampler is None
