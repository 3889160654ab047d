"""The steps of Leap for a velocity whose paths are known, and their gradients by hand."""

from __future__ import annotations

import math

import pytest
import torch

from library.core.errors import ConfigError
from library.core.keyed_random import StepDraws
from library.training.alignment.leap import Leaps, connected, distance, stratified_levels, two_levels, velocity_of
from library.training.alignment.options import LeapOptions
from library.training.objective import FlowMatchingObjective, clean_estimate
from library.training.run import DiTOutput
from library.training.timestep_samplers import TimestepOptions

DATA, NOISE = torch.tensor([[1.0], [-2.0]]), torch.tensor([[0.5], [3.0]])  # [B, 1]
K, J = torch.tensor([0.9, 0.6]), torch.tensor([0.3, 0.2])


def place(levels: torch.Tensor) -> torch.Tensor:
    return (1 - levels[:, None]) * DATA + levels[:, None] * NOISE


def test_the_true_velocity_reaches_the_data_in_every_variant() -> None:
    leaps = Leaps(lambda places, levels: NOISE - DATA, place, 0.3)
    for keeps_true in (True, False):
        reached, ended = leaps.two_steps(K, J, keeps_true=keeps_true)
        torch.testing.assert_close(reached, place(J))
        torch.testing.assert_close(ended, DATA)
    torch.testing.assert_close(leaps.telescope((K, J, J / 2)), DATA)
    for result, wanted in zip(leaps.simpson(K, J), (place(J), DATA)):
        torch.testing.assert_close(result, wanted)


def test_no_step_begins_where_clean_latents_tell_no_velocity() -> None:
    """Two draws near 0 were moved to 0.1 and 0: a model that predicts clean latents had a loss of NaN."""
    for gap in (0.1, 0.999):
        k, j = two_levels(torch.tensor([0.03, 0.001, 0.99]), torch.tensor([0.01, 0.001, 0.98]), gap)
        assert bool((j > 0).all()) and bool((k <= 1).all()), (gap, k, j)
        torch.testing.assert_close(k - j, torch.full((3,), gap))


@pytest.mark.parametrize("variant", ["original", "bridge"])
def test_two_steps_and_their_gradient_by_hand(variant: str) -> None:
    """v(x, t) = w x + c t. With begin = x_j (or x_j'), ended = begin (1 - j w) - j c j; what flows into the first step
    is coe * (1 - j w) * d x_j' / d w."""
    w, c, coe = torch.tensor(0.7, requires_grad=True), 0.4, 0.3
    leaps = Leaps(lambda x, t: w * x + c * t[:, None], place, coe)
    reached, ended = leaps.two_steps(K, J, keeps_true=variant == "original")
    for row in range(2):
        k, j = float(K[row]), float(J[row])
        xk, xj = float(place(K)[row]), float(place(J)[row])
        first = xk - (k - j) * (0.7 * xk + c * k)
        begin = xj if variant == "original" else first
        assert reached[row].item() == pytest.approx(first, rel=1e-5)
        assert ended[row].item() == pytest.approx(begin - j * (0.7 * begin + c * j), rel=1e-5)
        by_hand = -j * begin + (1 - j * 0.7) * coe * (-(k - j) * xk)
        (gradient,) = torch.autograd.grad(ended[row, 0], w, retain_graph=True)
        assert float(gradient) == pytest.approx(by_hand, rel=1e-5)


def test_simpson_is_exact_for_velocities_of_third_degree_in_time_and_asks_six_times() -> None:
    asked = []

    def velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        asked.append(t)
        return (4 * t**3 - t)[:, None].expand_as(x)

    reached, ended = Leaps(velocity, place, 0.3).simpson(K, J)
    integral = lambda a, b: (a**4 - a**2 / 2) - (b**4 - b**2 / 2)  # noqa: E731
    torch.testing.assert_close(reached, place(K) - integral(K, J)[:, None])
    torch.testing.assert_close(ended, place(J) - integral(J, torch.zeros(2))[:, None], rtol=0, atol=2e-3)
    assert len(asked) == 6


def test_the_telescope_goes_by_the_velocities_at_true_places() -> None:
    levels = (torch.tensor([0.9, 0.8]), torch.tensor([0.5, 0.4]), torch.tensor([0.2, 0.1]))
    found = Leaps(lambda x, t: x * t[:, None], place, 0.3).telescope(levels)
    for row in range(2):
        a, b, c = (float(level[row]) for level in levels)
        x = lambda t: (1 - t) * float(DATA[row]) + t * float(NOISE[row])  # noqa: E731
        by_hand = x(a) - (a - b) * x(a) * a - (b - c) * x(b) * b - c * x(c) * c
        assert float(found[row]) == pytest.approx(by_hand, rel=1e-5)


def test_levels_that_are_moved_apart_stay_in_the_range_of_the_run() -> None:
    k, j = two_levels(torch.tensor([0.51, 0.79, 0.65]), torch.tensor([0.5, 0.8, 0.66]), 0.2, (0.5, 0.8))
    assert k.tolist() == pytest.approx([0.7, 0.8, 0.755]) and j.tolist() == pytest.approx([0.5, 0.6, 0.555])


def test_levels_keep_their_gap_and_their_order() -> None:
    first, second = torch.tensor([0.2, 0.5, 0.02, 0.99, 0.3]), torch.tensor([0.9, 0.53, 0.01, 0.98, 0.3])
    k, j = two_levels(first, second, 0.1)
    assert (k - j >= 0.1 - 1e-6).all() and (j >= 0).all() and (k <= 1).all()
    assert (float(k[0]), float(j[0])) == (pytest.approx(0.9), pytest.approx(0.2))
    assert float((k[1] + j[1]) / 2) == pytest.approx(0.515) and float(j[2]) == pytest.approx(0.001, abs=1e-6)
    falling = stratified_levels(torch.tensor([[0.0, 0.5, 0.9]]))
    assert [float(level) for level in falling] == pytest.approx([2 / 3, 0.5, 0.3])


def test_a_connector_has_the_true_value_and_a_part_of_the_gradient() -> None:
    true, reached = torch.tensor([2.0]), torch.tensor([5.0], requires_grad=True)
    for keeps_true, value in ((True, 2.0), (False, 5.0)):
        found = connected(true, reached, 0.25, keeps_true=keeps_true)
        assert found.item() == value and torch.autograd.grad(found, reached)[0].item() == 0.25
    assert distance(torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[2.0, 4.0], [0.01, 0.0]])).tolist() == (
        pytest.approx([1.5, 0.1])
    )


@pytest.mark.parametrize("target", ["velocity", "reverse_velocity", "latents"])
def test_whatever_a_family_compares_becomes_the_velocity(target: str) -> None:
    objective = FlowMatchingObjective(TimestepOptions(), target=target)
    latents, noise, true = torch.randn(2, 4, 4, 4), torch.randn(2, 4, 4, 4), torch.randn(2, 4, 4, 4)
    sample = objective.corrupt(latents, noise, torch.tensor([0.3, 0.8]), StepDraws(0, 0, (0, 1)))
    given = {
        "velocity": true, "reverse_velocity": -true,
        "latents": clean_estimate(true, sample.noisy_latents, sample.sigmas),
    }[target]  # fmt: skip
    torch.testing.assert_close(velocity_of(DiTOutput(given, sample.target), sample, objective), true)
    assert math.isfinite(float(true.sum()))


@pytest.mark.parametrize("options", [{"leap_ratio": 1.5}, {"leap_min_gap": 0.0}, {"leap_nested_grad_coe": -0.1}])
def test_options_have_ranges(options: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        LeapOptions(**options)
