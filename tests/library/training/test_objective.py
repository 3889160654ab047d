"""Keyed noise: results do not depend on how a global batch is cut, and the modifiers do what their formulas say."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from library.core.keyed_random import StepDraws
from library.training.objective import DdpmObjective, FlowMatchingObjective
from library.training.timestep_samplers import TimestepOptions, build

NOISE_DEFAULTS = dict(
    noise_offset=None, noise_offset_random_strength=False, adaptive_noise_scale=None, multires_noise_iterations=None,
    multires_noise_discount=0.3, ip_noise_gamma=None, ip_noise_gamma_random_strength=False, zero_terminal_snr=False,
)
SHAPE = (4, 12, 20)


def noise_options(**values):
    return SimpleNamespace(**{**NOISE_DEFAULTS, **values})


def draws(*positions: int) -> StepDraws:
    return StepDraws(seed=7, step=3, positions=positions)


def corrupted(objective, sampler, *positions: int):
    """One micro-batch of the global batch whose sample i has latents made from i."""
    latents = torch.stack([torch.randn(SHAPE, generator=torch.Generator().manual_seed(i)) for i in positions])
    d = draws(*positions)
    return objective.corrupt(latents, d.normal("noise", SHAPE), sampler.sample(latents.shape, d), d)


EVERYTHING = noise_options(
    noise_offset=0.1, noise_offset_random_strength=True, adaptive_noise_scale=0.05, multires_noise_iterations=6,
    ip_noise_gamma=0.2, ip_noise_gamma_random_strength=True,
)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(
            lambda: (DdpmObjective(TimestepOptions(), EVERYTHING), build(TimestepOptions(), is_flow=False)), id="ddpm"
        ),
        pytest.param(
            lambda: (
                FlowMatchingObjective(TimestepOptions(), noise_options(ip_noise_gamma=0.2)),
                build(TimestepOptions()),
            ),
            id="flow",
        ),
    ],
)
def test_cutting_a_batch_in_two_gives_the_same_numbers(make):
    objective, sampler = make()
    whole = corrupted(objective, sampler, 0, 1, 2)
    first, second = corrupted(objective, sampler, 0, 1), corrupted(objective, sampler, 2)
    for name in ("noisy_latents", "noise", "timesteps", "sigmas", "target"):
        parts = torch.cat([getattr(first, name), getattr(second, name)])
        assert torch.equal(getattr(whole, name), parts), name


@pytest.mark.parametrize("mode", ["sigma", "uniform", "sigmoid", "shift", "flux_shift", "logsnr", "ideogram4_shift"])
def test_times_are_keyed_by_position(mode):
    sampler = build(TimestepOptions(timestep_sampling=mode))
    whole = sampler.sample((3, *SHAPE), draws(0, 1, 2))
    assert torch.equal(whole, torch.cat([sampler.sample((1, *SHAPE), draws(i)) for i in range(3)]))
    assert len(set(whole.tolist())) == 3
    assert whole.dtype == torch.float32 and bool(((whole > 0) & (whole <= 1)).all())


def test_an_empty_slice_of_a_batch_works():
    objective = DdpmObjective(TimestepOptions(), EVERYTHING)
    sampler, none = build(TimestepOptions(), is_flow=False), draws()
    empty = torch.empty(0, *SHAPE)
    sample = objective.corrupt(empty, none.normal("noise", SHAPE), sampler.sample(empty.shape, none), none)
    assert sample.noisy_latents.shape == sample.target.shape == (0, *SHAPE)


def test_multires_noise_has_unit_deviation_in_each_sample_and_is_smoother():
    objective = DdpmObjective(
        TimestepOptions(), noise_options(multires_noise_iterations=6, multires_noise_discount=0.8)
    )
    sample = corrupted(objective, build(TimestepOptions(), is_flow=False), 0, 1, 2)
    torch.testing.assert_close(sample.noise.flatten(1).std(dim=1), torch.ones(3))
    neighbours = (sample.noise[..., 1:] * sample.noise[..., :-1]).mean()
    assert neighbours > 0.2, "neighbouring values of plain noise are independent"


def test_noise_offset_adds_one_number_per_channel():
    d, latents = draws(0, 1), torch.randn(2, *SHAPE)
    plain = d.normal("noise", SHAPE)
    objective = DdpmObjective(TimestepOptions(), noise_options(noise_offset=0.5))
    difference = objective.corrupt(latents, plain, torch.tensor([10.0, 500.0]), d).noise - plain
    torch.testing.assert_close(difference, difference[..., :1, :1].expand_as(difference), atol=1e-6, rtol=0)
    torch.testing.assert_close(
        difference[..., 0, 0], 0.5 * d.normal("noise_offset", (4, 1, 1))[..., 0, 0], atol=1e-6, rtol=0
    )


def test_adaptive_noise_scale_follows_the_mean_of_the_latents():
    d = draws(0)
    latents = torch.full((1, *SHAPE), -2.0)
    objective = DdpmObjective(TimestepOptions(), noise_options(noise_offset=0.1, adaptive_noise_scale=0.3))
    plain = torch.zeros(1, *SHAPE)
    noise = objective.corrupt(latents, plain, torch.tensor([10.0]), d).noise
    torch.testing.assert_close(noise[..., :1, :1], (0.1 + 0.3 * 2) * d.normal("noise_offset", (4, 1, 1)))


@pytest.mark.parametrize("objective", [
    DdpmObjective(TimestepOptions(), noise_options(ip_noise_gamma=0.3)),
    FlowMatchingObjective(TimestepOptions(), noise_options(ip_noise_gamma=0.3)),
], ids=["ddpm", "flow"])
def test_ip_noise_reaches_the_input_and_not_the_target(objective):
    d, latents = draws(0), torch.randn(1, *SHAPE)
    noise = d.normal("noise", SHAPE)
    times = torch.tensor([0.5 if objective.is_flow else 500.0])
    sample = objective.corrupt(latents, noise, times, d)
    plain = type(objective)(TimestepOptions(), noise_options()).corrupt(latents, noise, times, d)
    assert torch.equal(sample.target, plain.target)
    assert not torch.allclose(sample.noisy_latents, plain.noisy_latents)


def test_reference_numbers_of_the_schedules():
    plain, zero = DdpmObjective(TimestepOptions()), DdpmObjective(TimestepOptions(), zero_terminal_snr=True)
    times = torch.tensor([0.0, 100.0, 500.0, 999.0])
    torch.testing.assert_close(
        plain.snr(times), torch.tensor([1175.4706, 8.45389, 0.381850, 0.00468192]), rtol=2e-6, atol=0
    )
    expected = torch.tensor([0.737059, 0.241019, 0.0176413, 1.96789e-7, 0.0], dtype=torch.float64)
    torch.testing.assert_close(zero.alphas_cumprod[[200, 500, 800, 998, 999]], expected, rtol=3e-5, atol=0)


def test_video_latents_take_the_same_path():
    d = draws(0, 1)
    latents = torch.randn(2, 4, 3, 8, 8)  # [B, C, F, H, W]
    noise = d.normal("noise", latents.shape[1:])
    sample = DdpmObjective(TimestepOptions(), EVERYTHING).corrupt(latents, noise, torch.tensor([1.0, 900.0]), d)
    assert sample.noisy_latents.shape == latents.shape
    flow = FlowMatchingObjective(TimestepOptions()).corrupt(latents, noise, torch.tensor([0.0, 1.0]), d)
    assert torch.equal(flow.noisy_latents[0], latents[0]) and torch.equal(flow.noisy_latents[1], noise[1])
