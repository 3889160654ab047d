"""Solver, schedule, left out blocks and decoding of FramePack against independent computations."""

from __future__ import annotations

import math

import pytest
import torch

from library.generation.framepack_requests import MAG_RATIOS, MagCacheSettings
from library.generation.framepack_sampling import (
    MagCache,
    decode_by_sections,
    joined_clips,
    ratios_of,
    section_sigmas,
    unipc_clean,
)

diffusers = pytest.importorskip("diffusers")


def velocity(latents: torch.Tensor, sigma: float) -> torch.Tensor:
    """Some model: neither linear nor the same at all times."""
    return torch.sin(latents) * (0.3 + sigma) - 0.2 * latents


@pytest.mark.parametrize(("steps", "shift"), [(8, 3.0), (25, 1.0), (3, 7.0), (2, 2.0), (1, 1.0)])
def test_the_solver_is_that_of_diffusers_along_the_logarithm_of_sigma(steps: int, shift: float) -> None:
    """UniPC of diffusers of order three with bh1, in which the factor of the data is 1 as along -log(sigma)."""
    sigmas = section_sigmas(steps, 100, shift)
    noise = torch.randn(1, 4, 3, 2, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    result = unipc_clean(lambda x, s: x - s * velocity(x, float(s)), noise, sigmas.double())
    theirs = diffusers.UniPCMultistepScheduler(
        solver_order=min(3, max(steps - 1, 1)), solver_type="bh1", prediction_type="flow_prediction",
        use_flow_sigmas=True, lower_order_final=False,
    )  # fmt: skip
    theirs._sigma_to_alpha_sigma_t = lambda sigma: (torch.ones_like(sigma), sigma)
    theirs.set_timesteps(steps)
    theirs.sigmas, theirs.timesteps = sigmas.double(), sigmas[:-1].double() * 1000
    latents = noise
    for index, sigma in enumerate(sigmas[:-2]):
        latents = theirs.step(velocity(latents, float(sigma)), theirs.timesteps[index], latents).prev_sample
    last = float(sigmas[-2])  # the step from here to sigma 0 is not taken: the result is the estimate of the data
    torch.testing.assert_close(result, latents - last * velocity(latents, last), rtol=1e-5, atol=1e-6)


def test_times_of_a_section() -> None:
    """sigma' = e^mu / (e^mu + 1 / sigma - 1); mu of the tokens lies on a line through (256, 0.5) and (4096, 1.15)."""
    for tokens, shift, mu in ((256, None, 0.5), (4096, None, 1.15), (90000, None, math.log(7)), (9, 3.0, math.log(3))):
        found = section_sigmas(4, tokens, shift)
        wanted = [math.exp(mu) / (math.exp(mu) + 1 / s - 1) if s else 0.0 for s in (1.0, 0.75, 0.5, 0.25, 0.0)]
        assert found.tolist() == pytest.approx(wanted, abs=1e-6)


def test_blocks_are_left_out_while_the_error_is_small() -> None:
    """Ten steps by hand: 0..1 are whole, then the ratio 1.1 adds 0.1, then 0.21 to the error of 0.24."""
    cache = MagCache(MagCacheSettings(ratios=(1.1,) * 10, threshold=0.24, most=6), 10)
    tokens, whole = torch.zeros(1, 3, 2), []
    for step in range(10):
        made = cache(tokens + step, lambda: whole.append(step) or torch.full((1, 3, 2), 100.0 + step))
        last = whole[-1]
        torch.testing.assert_close(made, tokens + step + 100.0 if step != last else tokens + 100.0 + last)
    assert whole == [0, 1, 3, 5, 7, 9]
    few = MagCache(MagCacheSettings(ratios=(1.0,) * 10, most=2), 10)
    done = []
    for step in range(10):
        few(tokens, lambda: done.append(step) or tokens)
    assert done == [0, 1, 4, 7, 9]


def test_ratios_are_measured_and_those_of_other_numbers_of_steps_are_taken_at_the_nearest_places() -> None:
    cache = MagCache(MagCacheSettings(calibrate=True), 3)
    for factor in (1.0, 2.0, 3.0):
        cache(torch.zeros(1, 2, 2), lambda: factor * torch.ones(1, 2, 2))
    assert cache.measured == [1.0, 2.0, 1.5]
    assert len(MAG_RATIOS) == 50 and ratios_of(MAG_RATIOS, 50) == list(MAG_RATIOS)
    assert ratios_of((1.0, 2.0, 3.0), 5) == [1.0, 1.0, 2.0, 3.0, 3.0]
    assert ratios_of((1.0, 2.0, 3.0, 4.0, 5.0), 3) == [1.0, 3.0, 5.0]


@pytest.mark.parametrize("is_f1", [False, True])
def test_sections_are_decoded_in_twos_and_faded(is_f1: bool) -> None:
    """A decoder that repeats every frame but the first four times, and notes what it is given. Where two parts meet
    they are equal here, so that the clip is what it is in one piece, and as long."""
    given: list[list[int]] = []

    def decode(latents: torch.Tensor) -> torch.Tensor:
        given.append(latents[0, 0, :, 0, 0].int().tolist())
        values = latents[:, :, :1] if latents.shape[2] == 1 else latents
        later = values[:, :, 1:].repeat_interleave(4, dim=2)
        return torch.cat((values[:, :, :1], later), dim=2)

    latents = torch.arange(10.0).view(1, 1, 10, 1, 1).repeat(1, 3, 1, 1, 1)
    made = decode_by_sections(decode, latents, 3, 4, is_f1=is_f1)
    assert made.shape[2] == 37
    if is_f1:
        assert given == [[0, 1, 2, 3], [1, 2, 3, 4, 5, 6], [4, 5, 6, 7, 8, 9]]
    else:
        assert given == [[7, 8, 9], [4, 5, 6, 7, 8, 9], [0, 1, 2, 3, 4, 5, 6]]
    one = decode_by_sections(decode, latents[:, :, :4], 3, 4, is_f1=is_f1)
    assert given[-1] == [0, 1, 2, 3] and one.shape[2] == 13


def test_clips_fade_into_each_other() -> None:
    first, second = torch.zeros(1, 1, 4, 1, 1), torch.ones(1, 1, 4, 1, 1)
    assert joined_clips(first, second, 3).flatten().tolist() == pytest.approx([0, 0, 0.5, 1, 1])
