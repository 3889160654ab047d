"""Sigma tables of SD models against levels computed by hand, and with every sampler."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from library.core.errors import ConfigError
from library.training.inference_samplers import INFERENCE_SAMPLERS, SAMPLER_NAMES, SD_SIGMA_TABLES, check_sd_table
from library.training.inference_samplers.common import noise_of
from library.training.inference_samplers.discrete import network_denoiser, network_latents, sampler_of, schedule_of
from library.training.inference_samplers.flow import observed

OWN_END = ("pndm", "dpmsolver")
"""samplers that go with no table"""


def levels() -> np.ndarray:
    """sqrt((1 - ac) / ac) of betas that are squares of evenly spaced numbers."""
    cumprod = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    return np.sqrt((1 - cumprod) / cumprod)


@pytest.mark.parametrize("steps", [1, 7, 50, 1000])
def test_levels_and_times(steps: int) -> None:
    table = levels()
    times = np.linspace(999, 0, steps + 1)[:-1]
    share = np.arange(steps) / max(steps - 1, 1)
    expected = {
        "simple": table[[999 - int(i * 1000 / steps) for i in range(steps)]],
        "sgm_uniform": np.interp(times, np.arange(1000), table),
        "karras": (table[-1] ** (1 / 7) + share * (table[0] ** (1 / 7) - table[-1] ** (1 / 7))) ** 7,
    }
    for name, sigmas in expected.items():
        schedule = schedule_of("euler", steps, table=name)
        np.testing.assert_allclose(schedule.sigmas.numpy(), [*sigmas, 0], rtol=1e-9)
        told = np.interp(schedule.timesteps.numpy(), np.arange(1000), np.log(table))
        np.testing.assert_allclose(told, np.log(sigmas), atol=2e-3)  # of fractions sigma is linear, not its logarithm
        whole = schedule_of("dpmsolver++", steps, table=name).timesteps
        assert torch.equal(whole, schedule.timesteps.round()) or steps == 1000
    stats = pytest.importorskip("scipy.stats", reason="the quantiles of scipy are the reference")
    places = np.rint(stats.beta.ppf(1 - np.arange(steps) / steps, 0.6, 0.6) * 999).astype(int)
    schedule = schedule_of("euler", steps, table="beta")
    places = list(dict.fromkeys(places.tolist()))
    np.testing.assert_allclose(schedule.sigmas.numpy(), [*table[places], 0], rtol=1e-9)
    assert schedule.timesteps.tolist() == places


@pytest.mark.parametrize("name", [name for name in SAMPLER_NAMES if name not in OWN_END])
@pytest.mark.parametrize("table", SD_SIGMA_TABLES)
@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_every_sampler_reaches_data_that_the_model_knows(name: str, table: str, zero_terminal_snr: bool) -> None:
    """And is seen in each step, without another result."""
    schedule = schedule_of(name, 8, table=table, zero_terminal_snr=zero_terminal_snr)
    assert float(schedule.sigmas[0]) == pytest.approx(float(schedule.model_sigmas[-1]))
    assert (schedule.sigmas.diff() < 0).all()
    data = torch.full((1, 4, 2, 2), 0.25)
    start = torch.randn(1, 4, 2, 2, generator=torch.Generator().manual_seed(0)) * schedule.start_scale

    def denoise(latents: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return (latents - data) / float(sigma)

    seen = []

    def observe(step: int, steps: int, clean: torch.Tensor) -> None:
        seen.append((step, steps))
        torch.testing.assert_close(clean, data, atol=2e-3, rtol=0)  # of latents up to 4096

    made = [
        sampler_of(name, schedule)(each, start, schedule.sigmas, noise_of([torch.Generator().manual_seed(1)], start))
        for each in (denoise, observed(denoise, schedule.sigmas, observe))
    ]
    assert torch.equal(*made) and seen == [(step, 8) for step in range(1, 9)]
    torch.testing.assert_close(network_latents(made[0], 0.0), data, atol=2e-3, rtol=0)


def test_what_does_not_go_together_is_told() -> None:
    assert {name for name in SAMPLER_NAMES if INFERENCE_SAMPLERS.entry(name).info["final"] != "zero"} == set(OWN_END)
    for name in OWN_END:
        with pytest.raises(ConfigError, match=f"--sigma_table is karras with the sampler {name}, whose times are its"):
            check_sd_table("karras", "--sigma_table", name)
    with pytest.raises(ConfigError, match="did you mean 'karras'"):
        check_sd_table("karas", "--sigma_table", "euler")
    with pytest.raises(ConfigError, match="a table for flow models; SD models have simple"):
        check_sd_table("library.training.inference_samplers.sigma_tables:karras", "--sigma_table")
    check_sd_table(None, "--sigma_table", "pndm")


def test_the_network_is_told_the_times_of_a_table() -> None:
    schedule, told = schedule_of("euler", 5, table="simple"), []

    def network(latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        told.append(float(timestep))
        return torch.zeros_like(latents)

    denoise = network_denoiser(network, schedule, "epsilon")
    sampler_of("euler", schedule)(denoise, torch.ones(1, 4, 1, 1), schedule.sigmas)
    assert told == [999.0, 799.0, 599.0, 399.0, 199.0]
