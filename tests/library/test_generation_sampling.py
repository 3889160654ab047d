"""Formulas of guidance and img2img, growth of latents, start noise."""

import pytest
import torch

from library.core.errors import ConfigError
from library.generation.gen_img.plan import GradualLatentSettings
from library.generation.unet_sampling import (
    NoiseSettings,
    SamplingRun,
    blended,
    branches_of,
    first_step,
    growth,
    guided,
    guided_predictor,
    sharpened,
)


def test_two_and_three_branches():
    c, u, e = (torch.full((1, 4, 2, 2), value) for value in (1.0, 0.25, 0.5))
    torch.testing.assert_close(guided(c, u, None, 4.0, None), torch.full_like(c, 0.25 + 4 * 0.75))
    torch.testing.assert_close(guided(c, u, e, 4.0, 2.0), torch.full_like(c, 0.5 + 4 * 0.5 - 2 * (0.25 - 0.5)))
    assert branches_of(1.0, 2.0) == ("positive",)
    assert branches_of(7.5, None) == ("negative", "positive")


def test_branches_reach_the_formula_in_their_places():
    """Rows of the batch: negative, positive, empty, each for all pictures."""
    values = {"negative": 0.25, "positive": 1.0, "empty": 0.5}
    branches = branches_of(4.0, 2.0)

    def predict(latents, timestep):
        rows = torch.tensor([values[branch] for branch in branches]).repeat_interleave(len(latents) // len(branches))
        return latents + rows[:, None, None, None]

    result = guided_predictor(predict, branches, 4.0, 2.0)(torch.zeros(2, 4, 2, 2), torch.tensor(5.0))
    torch.testing.assert_close(result, torch.full((2, 4, 2, 2), 0.5 + 2.0 + 0.5))


@pytest.mark.parametrize(
    ("steps", "strength", "offset", "expected"),
    [
        (50, 0.8, 1, (9, 10)),
        (50, 0.8, 0, (10, 10)),
        (50, 1.0, 1, (0, 1)),
        (50, 1.0, 0, (0, 0)),
        (50, 0.0, 1, (49, 50)),
        (28, 0.5, 1, (13, 14)),
    ],
)
def test_where_img2img_begins(steps, strength, offset, expected):
    """k = min(int(steps strength) + offset, steps); noise of time -k, first step max(steps - k + offset, 0)."""
    assert first_step(steps, strength, offset) == expected


def run(**how) -> SamplingRun:
    given = {
        "sampler": "euler",
        "steps": 5,
        "seeds": [1, 2],
        "prediction_type": "epsilon",
        "zero_terminal_snr": False,
        "size": (8, 8),
    }
    return SamplingRun(**{**given, **how})


def test_an_exact_prediction_of_the_noise_gives_the_source_back():
    """With timesteps from 0 the noise that is added is the noise that the first step expects."""
    source = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    from library.training.inference_samplers.discrete import model_sigmas, schedule_of, sigmas_at

    told = []

    def predict(latents, timestep):
        told.append(float(timestep))
        sigma = float(sigmas_at(model_sigmas(), timestep.reshape(1).double()))
        return (latents * (1 + sigma**2) ** 0.5 - source) / sigma

    for sampler in ("euler", "ddim", "dpmsolver++"):
        result = run(sampler=sampler, source=source, strength=0.6, steps_offset=0, steps=10).sample(
            predict, torch.device("cpu")
        )
        torch.testing.assert_close(result, source, atol=1e-4, rtol=1e-4)
        schedule = schedule_of(sampler, 10, steps_offset=0)
        assert told == pytest.approx(schedule.timesteps[4:].tolist())
        told.clear()


def test_strength_0_is_the_source_itself():
    source = torch.randn(2, 4, 8, 8)
    assert torch.equal(run(source=source, strength=0.0).sample(None, torch.device("cpu")), source)


def test_growth_is_planned_from_times():
    settings = GradualLatentSettings(750, 0.5, 0.25, 2, 1.0, None)
    times = [900, 800, 700, 600, 500, 400]
    assert growth(times, settings, (32, 16)) == [None, None, (24, 8), None, (32, 16), None]
    with pytest.raises(ConfigError, match="ends at 0.75"):
        growth(times[:4], settings, (32, 16))


def test_a_sharpened_plane_stays_and_an_edge_grows():
    flat = torch.ones(1, 4, 8, 8)
    torch.testing.assert_close(sharpened(flat, 3, 0.5, 0.5), flat)
    edge = flat.clone()
    edge[..., 4:] = 2
    assert float(sharpened(edge, 3, 0.5, 0.5).max()) > 2


def test_regions_weigh_predictions_and_what_is_outside_counts_alike():
    regions = torch.zeros(2, 8, 8)
    regions[0, :, :4], regions[1, :4, 4:] = 1, 1
    constant = [lambda latents, timestep, value=value: torch.full_like(latents, value) for value in (1.0, 3.0)]
    result = blended(constant, regions)(torch.zeros(1, 4, 8, 8), torch.tensor(1.0))
    assert result[0, 0, 0, 0] == 1 and result[0, 0, 0, 7] == 3 and result[0, 0, 7, 7] == 2


def test_start_noise_is_that_of_training_samples_and_its_kinds_are_keyed_by_the_seed():
    from library.generation.sampling_utils import start_noise

    assert torch.equal(NoiseSettings().start(5, 8, 8), start_noise(5, 4, 8, 8))
    pyramid = NoiseSettings(pyramid_prob=1.0)
    assert torch.equal(pyramid.start(5, 8, 8), pyramid.start(5, 8, 8))
    assert abs(float(pyramid.start(5, 32, 32).std()) - 1) < 1e-5
    assert torch.equal(NoiseSettings(pyramid_prob=0.0, offset_prob=0.0).start(5, 8, 8), start_noise(5, 4, 8, 8))
