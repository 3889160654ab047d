"""InfoNoise: the density that it learns against a closed form, when it begins, what it keeps, and what it refuses."""

from __future__ import annotations

import logging
import math
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch

from library.core.keyed_random import StepDraws
from library.training.hooks.info_noise import InfoNoiseHook
from library.training.objective import DdpmObjective, FlowMatchingObjective, clean_estimate
from library.training.show_timesteps import ManyDraws
from library.training.timestep_samplers import TimestepOptions, build
from library.training.timestep_samplers.info_noise import (
    InfoNoise,
    InfoNoiseSampler,
    data_factor,
    info_noise_sampler,
    log_ratios,
    times_as_timesteps,
)
from library.training.timestep_samplers.info_noise_options import InfoNoiseOptions
from library.wan_train_utils import OneSide

SHAPE = (4, 8, 8)


def made(law: str = "uniform", is_flow: bool = True, total: int = 1000, **options) -> InfoNoiseSampler:
    times = TimestepOptions(timestep_sampling=law)
    objective = FlowMatchingObjective(times) if is_flow else DdpmObjective(times)
    info = InfoNoise(InfoNoiseOptions(infonoise_enabled=True, **options), total)
    sampler = InfoNoiseSampler(build(times, is_flow=is_flow), info, times, objective)
    info.know_law(sampler.law, [SHAPE], objective)
    return sampler


def learned(sampler: InfoNoiseSampler, error, steps: int, batch: int = 2000, elements: int = 128) -> InfoNoise:
    """After steps whose samples have squared errors of mean error(ln s) with the spread of so many elements."""
    generator = torch.Generator().manual_seed(1)
    for step in range(1, steps + 1):
        times = sampler.sample((batch, *SHAPE), ManyDraws(3, step, tuple(range(batch)))).double()
        ratios = log_ratios(times_as_timesteps(times, sampler.objective), sampler.objective).double()
        spread = 1 + math.sqrt(2 / elements) * torch.randn(batch, generator=generator, dtype=torch.float64)
        sampler.info.record(ratios, error(ratios) * spread)
        if sampler.info.is_due(step):
            sampler.info.renew(step)
    return sampler.info


def best_error(ratios: torch.Tensor) -> torch.Tensor:
    """Of the clean latents, for data that are standard normal numbers: their variance where the mixture with noise is
    known, sigma^2 / (sigma^2 + (1 - sigma)^2)."""
    sigma = torch.sigmoid(ratios)
    return sigma**2 / (sigma**2 + (1 - sigma) ** 2)


@pytest.mark.parametrize("law", ["uniform", "sigmoid", "flux_shift"])
def test_the_learned_density_is_the_closed_form_to_five_percent(law: str) -> None:
    """Proportional to error / s^2 * s^3 / (s^3 + c^3) in ln s, over the parts that the law of the warm-up reaches."""
    sampler = made(law, infonoise_N_warm=100, infonoise_M=50)
    info = learned(sampler, best_error, steps=400)
    assert info.is_ready and info.last_status == "ok"
    s, c = info.sigmas, 0.15
    wanted = best_error(s.log()) / s**2 * s**3 / (s**3 + c**3)
    wanted = torch.where(info.in_reach, wanted, 0.0)
    wanted, found = wanted / wanted.sum(), info.cdf.diff()
    told = wanted > 1e-3 * wanted.max()
    assert told.sum() > 20
    torch.testing.assert_close(found[told] / found[told].sum(), wanted[told] / wanted[told].sum(), rtol=0.05, atol=0)


def test_draws_follow_the_density_whatever_the_batch_and_are_keyed() -> None:
    sampler = made(infonoise_N_warm=10, infonoise_M=10)
    info = learned(sampler, best_error, steps=250)
    positions = tuple(range(20_000))
    times = sampler.sample((20_000, *SHAPE), ManyDraws(7, 1, positions))
    shares = torch.histogram(times.double().logit(), bins=info.edges).hist / 20_000
    torch.testing.assert_close(shares, info.cdf.diff(), rtol=0, atol=0.01)
    batch = sampler.sample((3, *SHAPE), StepDraws(7, 1, (5, 9, 17)))
    assert torch.equal(batch[1:], sampler.sample((2, *SHAPE), StepDraws(7, 1, (9, 17))))
    assert not torch.equal(batch, sampler.sample((3, *SHAPE), StepDraws(7, 2, (5, 9, 17))))


def test_parts_that_the_law_does_not_reach_do_not_hold_it_up() -> None:
    """A normal law in ln s leaves the outer parts out, where it would wait forever."""
    sampler = made("sigmoid", infonoise_N_warm=10, infonoise_M=10)
    assert 20 < int(sampler.info.in_reach.sum()) < 60
    share = 0.5 * (torch.erf(sampler.info.edges[1:] / math.sqrt(2)) - torch.erf(sampler.info.edges[:-1] / math.sqrt(2)))
    inner = torch.ones(len(share), dtype=torch.bool)
    inner[[0, -1]] = False  # these take what lies beyond as well
    assert torch.equal(sampler.info.in_reach[inner], (share >= 1e-4)[inner])
    assert 10 < int(sampler.info.waited_for.sum()) < 20 and (sampler.info.in_reach | ~sampler.info.waited_for).all()
    few = learned(sampler, best_error, steps=10, batch=400)
    assert few.is_ready and min(map(len, few.losses)) == 0
    assert ((few.cdf.diff() > 0) == few.in_reach).all()


def test_a_rare_part_borrows_from_those_beside_it() -> None:
    info = made(infonoise_N_min=4).info
    for part, losses in ((10, [1.0, 1.0]), (11, [2.0]), (12, [6.0, 6.0, 6.0]), (14, [9.0] * 4)):
        info.losses[part].extend(losses)
    assert info._mean_around(11) == 22 / 6 and info._mean_around(14) == 9.0 and info._mean_around(13) == 54 / 7


def test_it_draws_as_the_law_until_then_and_tells_when_that_takes_long(caplog: pytest.LogCaptureFixture) -> None:
    sampler = made(infonoise_N_warm=20, infonoise_M=10)
    draws = StepDraws(3, 1, (0, 1))
    assert torch.equal(sampler.sample((2, *SHAPE), draws), sampler.law.sample((2, *SHAPE), draws))
    with caplog.at_level(logging.WARNING):
        for step in range(1, 81):
            if sampler.info.is_due(step):
                assert sampler.info.renew(step) == "skipped_bins_not_full"
    assert [record.getMessage().startswith("InfoNoise still waits at step 40") for record in caplog.records] == [True]
    assert not sampler.info.is_ready and sampler.info.renewals == 0


def test_the_length_of_the_warm_up() -> None:
    assert InfoNoiseOptions().warm_up(500) == 200
    assert InfoNoiseOptions().warm_up(3000) == 600
    assert InfoNoiseOptions().warm_up(None) == 1000
    assert InfoNoiseOptions(infonoise_N_warm=7).warm_up(3000) == 7


def test_the_page_at_start_tells_when_it_can_begin_and_when_the_run_is_too_short() -> None:
    def told(total: int, **options) -> str:
        return " ".join(InfoNoiseOptions(infonoise_enabled=True, **options).notices(total))

    assert "after step 200, and the run has 200" in told(200)
    assert "from step 201 on" in told(201)
    assert "from step 21 on" in told(100, infonoise_N_warm=11, infonoise_M=10)
    assert InfoNoiseOptions().notices(4) == []


def test_losses_without_size_keep_the_density_and_a_pivot_of_zero_is_found() -> None:
    sampler = made(infonoise_N_warm=10, infonoise_M=10, infonoise_gate_pivot_c=0.0)
    info = learned(sampler, best_error, steps=250)
    information = info.means / info.sigmas**2
    pivot = info.sigmas[information >= 0.002 * information.max()].max()
    gated = information * info.sigmas**3 / (info.sigmas**3 + pivot**3)
    torch.testing.assert_close(info.cdf.diff(), gated / gated.sum())
    before = info.cdf.clone()
    for losses in info.losses:
        losses.extend([0.0] * info.options.infonoise_B)
    info._has_new[:] = True
    for _ in range(40):
        info._has_new[:] = True
        status = info.renew(1)
    assert status == "mse_collapsed" and info.degraded > 0 and torch.isfinite(info.cdf).all()
    assert before.shape == info.cdf.shape


def test_parts_without_new_losses_follow_the_others() -> None:
    info = made(infonoise_N_warm=1, infonoise_M=10, infonoise_beta=0.5).info
    info.means[:] = 4.0
    info._has_new[:] = True
    info._has_new[:10] = False
    for losses in info.losses:
        losses.append(2.0)
    info._renew_means()
    assert info.means[10:].tolist() == [3.0] * 54 and info.means[:10].tolist() == [3.0] * 10


def test_a_state_goes_on_to_the_bit_and_that_of_other_parts_is_left() -> None:
    sampler = made(infonoise_N_warm=10, infonoise_M=10)
    info = learned(sampler, best_error, steps=120)
    again = InfoNoise(info.options, 1000)
    again.load_state_dict(info.state_dict())
    for one in (info, again):
        one.record(torch.tensor([0.1, -0.4]), torch.tensor([1.0, 2.0]))
        one.in_reach[:] = True
        one.renew(130)
    assert torch.equal(info.means, again.means) and info.losses == again.losses
    assert (info.cdf is None) == (again.cdf is None) and (info.cdf is None or torch.equal(info.cdf, again.cdf))
    other = InfoNoise(InfoNoiseOptions(infonoise_K=32), 1000)
    other.load_state_dict(info.state_dict())
    assert not other.is_ready and not any(other.losses)


@pytest.mark.parametrize("target", ["velocity", "reverse_velocity", "latents"])
def test_errors_of_flow_models_are_those_of_the_clean_latents(target: str) -> None:
    """Whatever the loss compares: a prediction that is off by 0.1 leaves the latents off by sigma times that."""
    objective = FlowMatchingObjective(TimestepOptions(), target=target)
    timesteps = torch.tensor([10.0, 300.0, 950.0])
    sigmas = timesteps / 1000
    off = torch.full_like(sigmas, 0.1)
    of_latents = clean_estimate(off[:, None, None], torch.zeros(3, 1, 1), sigmas).flatten()
    own = of_latents if target == "latents" else off
    factor = data_factor(log_ratios(timesteps, objective), objective)
    torch.testing.assert_close(own**2 * factor, of_latents**2)


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_tables_of_noise_levels_have_it_too(prediction: str) -> None:
    """Errors of the noise and of v stand for those of the clean latents; whole timesteps are drawn."""
    times = TimestepOptions()
    objective = DdpmObjective(times, prediction_type=prediction)
    off = torch.full((), 0.1, dtype=torch.float64)  # of the noise, at s: the data are x / signal - s * noise
    for step in (50.0, 400.0, 900.0):
        ratio = log_ratios(torch.tensor([step]), objective).double()
        s = ratio.exp()
        own = off if prediction == "epsilon" else off * (1 + s**2).sqrt()
        torch.testing.assert_close(own**2 * data_factor(ratio, objective), (s * off) ** 2)
    sampler = made(is_flow=False, infonoise_N_warm=10, infonoise_M=10)
    learned(sampler, best_error, steps=60)
    drawn = sampler.sample((500, *SHAPE), StepDraws(1, 1, tuple(range(500))))
    assert sampler.info.is_ready and torch.equal(drawn, drawn.floor()) and 0 <= drawn.min() and drawn.max() <= 999
    assert drawn.float().mean() < 480  # towards cleaner samples than all equally


def test_it_is_found_within_the_sides_of_two_experts() -> None:
    sampler = made()
    assert info_noise_sampler(OneSide(sampler, 0.9)) is sampler and info_noise_sampler(sampler.law) is None


@pytest.mark.parametrize(("options", "told"), [
    ({"infonoise_K": 8}, "--infonoise_K is 8; needed: 16 to 256"), ({"infonoise_M": 5}, "needed: 10 or more"),
    ({"infonoise_N_min": 300}, "lower the first or raise the second"), ({"infonoise_beta": 1.0}, "0.1 to 0.999"),
])  # fmt: skip
def test_options_have_ranges(options: dict, told: str) -> None:
    with pytest.raises(Exception, match=told.replace(".", r"\.")):
        InfoNoiseOptions(**options)


def test_regularisation_images_do_not_count_and_losses_come_in_the_order_of_their_places() -> None:
    objective = FlowMatchingObjective(TimestepOptions())
    hook, step = InfoNoiseHook(InfoNoiseOptions()), SimpleNamespace(objective=objective)
    hook.info = InfoNoise(InfoNoiseOptions(), 1000)
    errors, levels = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([500.0, 500.0, 500.0])
    for places, are_reg, numbers in (((4, 5, 6), [False, True, False], errors), ((0, 1, 2), [], errors + 10)):
        batch = MagicMock(are_reg=are_reg, request=SimpleNamespace(positions=places))
        batch.__len__.return_value = 3
        output = SimpleNamespace(pred=numbers.sqrt().view(3, 1, 1), target=torch.zeros(3, 1, 1))
        hook.on_prediction(step, output, SimpleNamespace(noisiest_timesteps=levels), batch)
    run = SimpleNamespace(runtime=SimpleNamespace(num_processes=1), progress=SimpleNamespace(global_step=1))
    hook.on_post_optimizer_step(run)
    hook.state_dict()
    kept = [list(losses) for losses in hook.info.losses if losses]
    assert [[round(4 * loss) for loss in losses] for losses in kept] == [[11, 12, 13, 1, 3]]  # a quarter, at sigma 0.5
