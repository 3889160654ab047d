"""Times per sample, per frame and per token give what each would give alone, through noise, losses and weights."""

from __future__ import annotations

import pytest
import torch

from library.core.errors import ConfigError
from library.core.keyed_random import StepDraws
from library.dataset.architectures import ARCHITECTURES
from library.training import loss_weights, losses
from library.training.alignment.self_flow import times_of_tokens
from library.training.loss_weights import LossWeightOptions
from library.training.losses import LossOptions
from library.training.losses.reduction import loss_mask, per_sample_loss
from library.training.objective import DdpmObjective, FlowMatchingObjective, clean_estimate, expand_like
from library.training.timestep_samplers import TimestepOptions, check_one_time
from library.training.timestep_samplers.baseline import sigmas_from_draws

B, C, F, H, W = 2, 3, 4, 6, 8
LATENTS = torch.randn(B, C, F, H, W, generator=torch.Generator().manual_seed(0))
NOISE = torch.randn(B, C, F, H, W, generator=torch.Generator().manual_seed(1))
DRAWS = StepDraws(seed=1, step=2, positions=(0, 1))


def flow(**options) -> FlowMatchingObjective:
    return FlowMatchingObjective(TimestepOptions(**options), weigh=True)


def test_times_of_frames_noise_each_frame_alone():
    times = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.9, 0.8, 0.7, 0.6]])
    for objective, unit in ((flow(), 1.0), (DdpmObjective(TimestepOptions()), 1000.0)):
        whole = objective.corrupt(LATENTS, NOISE, times * unit, DRAWS)
        assert whole.timesteps.shape == whole.sigmas.shape == (B, F)
        for frame in range(F):
            alone = objective.corrupt(LATENTS[:, :, frame], NOISE[:, :, frame], times[:, frame] * unit, DRAWS)
            assert torch.equal(whole.noisy_latents[:, :, frame], alone.noisy_latents)
            assert torch.equal(whole.sigmas[:, frame], alone.sigmas) and torch.equal(
                whole.target[:, :, frame], alone.target
            )


@pytest.mark.parametrize("side", [1, 2])
def test_times_of_tokens_noise_each_patch_alone(side):
    """Tokens go through frames, rows and columns, as models pack them."""
    count = F * (H // side) * (W // side)
    times = torch.linspace(0.01, 0.99, B * count).reshape(B, count)
    noisy = flow().corrupt(LATENTS, NOISE, times, DRAWS).noisy_latents
    for frame, row, column in ((0, 0, 0), (2, H // side - 1, 1), (F - 1, 0, W // side - 1)):
        sigma = times[:, (frame * (H // side) + row) * (W // side) + column].reshape(B, 1, 1, 1)
        place = (
            slice(None),
            slice(None),
            frame,
            slice(row * side, (row + 1) * side),
            slice(column * side, (column + 1) * side),
        )
        assert torch.equal(noisy[place], (1 - sigma) * LATENTS[place] + sigma * NOISE[place])


def test_equal_times_are_one_time_whatever_their_shape():
    one = torch.tensor([0.3, 0.8])
    plain = flow().corrupt(LATENTS, NOISE, one, DRAWS)
    for count in (F, F * H * W // 4, F * H * W):
        many = flow().corrupt(LATENTS, NOISE, one[:, None].expand(B, count), DRAWS)
        assert torch.equal(many.noisy_latents, plain.noisy_latents)
        assert torch.equal(
            clean_estimate(many.target, many.noisy_latents, many.sigmas),
            clean_estimate(plain.target, plain.noisy_latents, plain.sigmas),
        )


def test_packed_latents_take_a_time_for_each_token():
    packed = torch.randn(B, 10, 5)
    assert expand_like(torch.rand(B, 10), packed).shape == (B, 10, 1)
    picture = LATENTS[:, :, 0]
    assert expand_like(torch.rand(B, H * W // 4), picture).shape == (B, 1, H, W)


def test_times_that_fit_nothing_are_refused():
    for shape in ((B, 7), (B, 5)):
        with pytest.raises(ValueError, match="fit neither frames nor tokens"):
            expand_like(torch.rand(shape), LATENTS)
    with pytest.raises(ValueError, match="fit neither"):
        expand_like(torch.rand(B, 9), torch.randn(B, 10, 5))


@pytest.mark.parametrize(
    "options",
    [{"loss_type": "huber"}, {"loss_type": "smooth_l1", "huber_schedule": "exponential"}, {"loss_type": "l2"}],
)
def test_losses_and_weights_of_frames_are_the_mean_of_those_of_each_frame(options):
    element = losses.build(LossOptions(**options))
    factors = loss_weights.build(LossWeightOptions(min_snr_gamma=5.0, debiased_estimation_loss=True))
    for objective, unit in ((flow(weighting_scheme="sigma_sqrt"), 1.0), (DdpmObjective(TimestepOptions()), 1000.0)):
        times = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.9, 0.8, 0.7, 0.6]]) * unit

        def loss(latents, noise, times):
            sample = objective.corrupt(latents, noise, times, DRAWS)
            elementwise = element(sample.noisy_latents, sample.target, sample.timesteps, objective)
            return per_sample_loss(
                elementwise, flow_weight=objective.loss_weight(sample), factors=factors(sample.timesteps, objective)
            )

        alone = torch.stack([loss(LATENTS[:, :, i], NOISE[:, :, i], times[:, i]) for i in range(F)])
        torch.testing.assert_close(loss(LATENTS, NOISE, times), alone.mean(dim=0), rtol=1e-5, atol=0)


def test_a_sampler_may_draw_a_number_for_each_frame():
    numbers = DRAWS.normal("timesteps", (F,))
    for options in (
        TimestepOptions(timestep_sampling="sigmoid"),
        TimestepOptions(timestep_sampling="flux_shift"),
        TimestepOptions(timestep_sampling="logsnr"),
    ):
        sigmas = sigmas_from_draws(options, numbers, (H, W))
        assert sigmas.shape == (B, F) and torch.equal(sigmas[:, 1], sigmas_from_draws(options, numbers[:, 1], (H, W)))


def test_masks_of_frames_follow_the_frames_of_the_latents():
    """Five frames are three of the latents: the first alone, then two and two."""
    masks = torch.rand(B, 5, 16, 16)
    mask = loss_mask(None, masks, torch.Size((B, C, 3, 2, 2)), masked_loss=False)
    assert mask.shape == (B, 1, 3, 2, 2)
    for place, frames in enumerate(((0,), (1, 2), (3, 4))):
        of_frames = [loss_mask(None, masks[:, i], torch.Size((B, C, 2, 2)), masked_loss=False) for i in frames]
        torch.testing.assert_close(mask[:, :, place], torch.stack(of_frames).mean(dim=0))
    control = loss_mask(torch.rand(B, 3, 16, 16), None, torch.Size((B, C, 3, 2, 2)), masked_loss=True)
    assert control.shape == (B, 1, 1, 2, 2), "one picture counts for all frames"


def test_times_of_frames_are_those_of_their_tokens():
    """For Self-Flow, whose samples have a time for each token: noised by either, latents are the same."""
    times = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.9, 0.8, 0.7, 0.6]])
    tokens = times_of_tokens(times, LATENTS, 2)
    assert tokens.shape == (B, F * (H // 2) * (W // 2)) and torch.equal(tokens, times_of_tokens(tokens, LATENTS, 2))
    by_frame, by_token = (flow().corrupt(LATENTS, NOISE, each, DRAWS) for each in (times, tokens))
    assert torch.equal(by_frame.noisy_latents, by_token.noisy_latents)
    assert torch.equal(times_of_tokens(times[:, 0], LATENTS, 2), times[:, 0])


class PerFrame:
    """A law with a time for each frame of a clip."""

    def __init__(self, options: TimestepOptions) -> None: ...

    def sample(self, latent_shape, draws):
        return draws.uniform("frames", latent_shape[2:-2]).float()


def test_what_needs_one_time_of_a_sample_refuses_laws_with_several():
    options = TimestepOptions(timestep_sampling=f"{__name__}:PerFrame")
    clips, pictures = (ARCHITECTURES[name].latents for name in ("wan", "flux"))
    check_one_time(options, clips, [])
    check_one_time(options, pictures, ["a reason"])
    check_one_time(TimestepOptions(), clips, ["a reason"])
    with pytest.raises(ConfigError, match="gives several noise levels for a sample; that does not go with a reason"):
        check_one_time(options, clips, ["a reason"])
