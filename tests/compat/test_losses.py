"""Noise and losses of the known calls against our own objects, and against formulas written out here."""

from types import SimpleNamespace

import pytest
import torch

from library import custom_train_functions, train_util
from library.core.errors import ConfigError
from library.training.loss_weights import LossWeightOptions
from library.training.loss_weights import build as build_factor
from library.training.losses import LossOptions
from library.training.losses import build as build_loss
from library.training.objective import DdpmObjective, FlowMatchingObjective, ddpm_alphas_cumprod

STEPS = torch.tensor([0, 250, 500, 999])


def scheduler() -> SimpleNamespace:
    return SimpleNamespace(alphas_cumprod=ddpm_alphas_cumprod(False).float())


def pair() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(4, 2, 3, 3, generator=generator), torch.randn(4, 2, 3, 3, generator=generator)


@pytest.mark.parametrize("schedule", ["constant", "exponential", "snr"])
@pytest.mark.parametrize("kind", ["l1", "l2", "huber", "smooth_l1"])
@pytest.mark.parametrize("is_flow", [False, True])
def test_a_loss_is_that_of_the_trainer(kind, schedule, is_flow):
    prediction, target = pair()
    options = SimpleNamespace(loss_type=kind, huber_schedule=schedule, huber_c=0.2, huber_scale=1.5)
    threshold = train_util.get_huber_threshold_if_needed(options, STEPS, SimpleNamespace() if is_flow else scheduler())
    assert (threshold is None) == (kind in ("l1", "l2"))
    own = build_loss(LossOptions(**vars(options)))
    expected = own(prediction, target, STEPS, FlowMatchingObjective(None) if is_flow else DdpmObjective(None))
    for reduction, value in (("none", expected), ("mean", expected.mean()), ("sum", expected.sum())):
        torch.testing.assert_close(train_util.conditional_loss(prediction, target, kind, reduction, threshold), value)


def test_a_loss_that_is_not_there_is_named():
    prediction, target = pair()
    with pytest.raises(ConfigError, match="did you mean 'huber'"):
        train_util.conditional_loss(prediction, target, "hubre", "mean")
    with pytest.raises(ValueError, match="reduction"):
        train_util.conditional_loss(prediction, target, "l2", "median")
    with pytest.raises(ValueError, match="huber_c"):
        train_util.conditional_loss(prediction, target, "huber", "mean")


@pytest.mark.parametrize("is_v", [False, True])
def test_weights_by_noise_level_are_those_of_the_trainer(is_v):
    losses, objective = torch.rand(4), DdpmObjective(None, prediction_type="v" if is_v else "epsilon")

    def own(**options):
        return losses * build_factor(LossWeightOptions(**options))(STEPS.float(), objective)

    calls = custom_train_functions
    torch.testing.assert_close(calls.apply_snr_weight(losses, STEPS, scheduler(), 5.0, is_v), own(min_snr_gamma=5.0))
    torch.testing.assert_close(
        calls.apply_debiased_estimation(losses, STEPS, scheduler(), is_v), own(debiased_estimation_loss=True)
    )
    torch.testing.assert_close(
        calls.scale_v_prediction_loss_like_noise_prediction(losses, STEPS, scheduler()),
        own(scale_v_pred_loss_like_noise_pred=True)
    )
    torch.testing.assert_close(
        calls.add_v_prediction_like_loss(losses, STEPS, scheduler(), 0.1), own(v_pred_like_loss=0.1)
    )
    snr = objective.snr(STEPS.float()).clamp(max=1000)
    torch.testing.assert_close(calls.get_snr_scale(STEPS, scheduler()), snr / (snr + 1))


def test_a_scheduler_is_prepared_and_ends_without_signal():
    noise_scheduler = scheduler()
    custom_train_functions.prepare_scheduler_for_custom_training(noise_scheduler, torch.device("cpu"))
    torch.testing.assert_close(noise_scheduler.all_snr[STEPS], DdpmObjective(None).snr(STEPS), rtol=1e-4, atol=0)
    custom_train_functions.fix_noise_scheduler_betas_for_zero_terminal_snr(noise_scheduler)
    torch.testing.assert_close(noise_scheduler.alphas_cumprod, ddpm_alphas_cumprod(True).float())
    torch.testing.assert_close(
        torch.cumprod(1 - noise_scheduler.betas.double(), 0), ddpm_alphas_cumprod(True), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("zero_terminal", [False, True])
def test_noise_of_a_table(zero_terminal):
    latents = torch.randn(64, 4, 2, 2)
    options = SimpleNamespace(min_timestep=200, max_timestep=300, noise_offset=0.1, zero_terminal_snr=zero_terminal)
    torch.manual_seed(1)
    noise, noisy, timesteps = train_util.get_noise_noisy_latents_and_timesteps(options, None, latents)
    assert timesteps.dtype == torch.int64 and 200 <= timesteps.min() < timesteps.max() < 300
    signal = ddpm_alphas_cumprod(zero_terminal).float()[timesteps].view(-1, 1, 1, 1)
    torch.testing.assert_close(noisy, signal.sqrt() * latents + (1 - signal).sqrt() * noise)
    torch.manual_seed(1)
    again = train_util.get_noise_noisy_latents_and_timesteps(options, None, latents)
    assert torch.equal(again[1], noisy)
    options.ip_noise_gamma = 0.5
    torch.manual_seed(1)
    perturbed = train_util.get_noise_noisy_latents_and_timesteps(options, None, latents)
    assert torch.equal(perturbed[0], noise) and not torch.equal(perturbed[1], noisy)


def test_coarse_noise_offsets_and_masks():
    torch.manual_seed(0)
    noise = torch.randn(3, 4, 8, 8)
    coarse = custom_train_functions.pyramid_noise_like(noise, torch.device("cpu"), iterations=3, discount=0.5)
    torch.testing.assert_close(coarse.flatten(1).std(dim=1), torch.ones(3))
    change = custom_train_functions.apply_noise_offset(torch.zeros(3, 4, 8, 8), noise, 0.1, None) - noise
    torch.testing.assert_close(change, change[..., :1, :1].expand_as(change), atol=1e-6, rtol=0)
    losses = torch.ones(2, 4, 2, 2)
    images = torch.full((2, 3, 16, 16), -1.0)
    images[:, :, :, 8:] = 1.0
    masked = custom_train_functions.apply_masked_loss(losses, {"conditioning_images": images})
    assert masked[..., 0].eq(0).all() and masked[..., 1].eq(1).all()
    assert torch.equal(custom_train_functions.apply_masked_loss(losses, {}), losses)
    assert custom_train_functions.parse_prompt_attention("a (red:1.5) ball") == [
        ["a ", 1.0],
        ["red", 1.5],
        [" ball", 1.0],
    ]
