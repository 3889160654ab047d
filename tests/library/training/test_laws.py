"""Laws of noise levels that a mixing, a further shift or a formula without an inverse makes: their distribution functions
by hand, whole and cut to a range."""

from __future__ import annotations

import math

import pytest
import torch

from library.core.errors import ConfigError
from library.training.show_timesteps import ManyDraws
from library.training.timestep_samplers import TimestepOptions, build, idle, notices
from library.training.timestep_samplers.baseline import sigmas_from_draws
from library.training.timestep_samplers.laws import laws_of, sigmas_from_uniform

NUM = 20_000
GRID = [0.05, 0.2, 0.4, 0.6, 0.8, 0.95]


def normal(z: float) -> float:
    return 0.5 * (1 + math.erf(z / math.sqrt(2)))


def below_logit_normal(sigma: float, shift: float, mean: float = 0.0, std: float = 1.0) -> float:
    """Probability of less than sigma = shift s / (1 + (shift - 1) s), s = sigmoid(mean + std z): odds are multiplied."""
    return normal((math.log(sigma / (1 - sigma)) - math.log(shift) - mean) / std)


def below_mode(sigma: float, scale: float) -> float:
    """1 - u, where the published formula gives sigma; by small steps of u."""
    u = torch.linspace(0, 1, 1_000_001, dtype=torch.float64)
    values = 1 - u - scale * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u)
    return float((values < sigma).double().mean())


CASES = {
    "logit_normal": ({}, lambda s: below_logit_normal(s, 3.0)),
    "logit_normal, moved": (
        {"timestep_sampling": "logit_normal", "logit_mean": 0.5, "logit_std": 0.7, "discrete_flow_shift": 1.0},
        lambda s: below_logit_normal(s, 1.0, 0.5, 0.7),
    ),
    "logit_normal_low": ({}, lambda s: below_logit_normal(s, 1 / 3)),
    "mode": ({}, lambda s: below_mode(s, 1.29)),
    "mode, down": ({"timestep_sampling": "mode", "mode_scale": -0.8}, lambda s: below_mode(s, -0.8)),
    "mixed_uniform_low": (
        {"timestep_mix_low_prob": 0.3}, lambda s: 0.3 * below_logit_normal(s, 1 / 3) + 0.7 * s,
    ),
    "mixed_uniform_logit": (
        {"timestep_mix_low_prob": 0.8, "discrete_flow_shift": 2.0}, lambda s: 0.8 * below_logit_normal(s, 2.0) + 0.2 * s,
    ),
    "uniform, shifted": (
        {"timestep_sampling": "uniform", "timestep_schedule_shift": 4.0}, lambda s: s / (4 - 3 * s),
    ),
    "logit_normal, shifted": (
        {"timestep_sampling": "logit_normal", "timestep_schedule_shift": 0.5}, lambda s: below_logit_normal(s, 1.5),
    ),
}  # fmt: skip


def options_of(name: str, **further) -> TimestepOptions:
    return TimestepOptions(**{"timestep_sampling": name.partition(",")[0], **CASES[name][0], **further})


@pytest.mark.parametrize("name", CASES)
def test_draws_follow_the_law(name):
    """Of the sampler as runs have it; then exactly, as a law that is cut to a range."""
    below = CASES[name][1]
    draws = ManyDraws(1, 0, tuple(range(NUM)))
    drawn = build(options_of(name)).sample((NUM, 16, 8, 8), draws)
    margin = 4 * math.sqrt(0.25 / NUM)  # four standard deviations of a share
    for sigma in GRID:
        assert float((drawn < sigma).double().mean()) == pytest.approx(below(sigma), abs=margin), sigma
    u = (torch.arange(NUM, dtype=torch.float64) + 0.5) / NUM
    cut = options_of(name, min_timestep=300, max_timestep=900, preserve_distribution_shape=True)
    whole, mass = laws_of(cut, (8, 8)), below(0.9) - below(0.3)
    assert sum(share * float(law.mass(0.3, 0.9)) for share, law in whole) == pytest.approx(mass, abs=1e-5)
    if len(whole) == 1:
        sigmas = sigmas_from_uniform(cut, u, torch.zeros_like(u), (8, 8))
        assert float((sigmas < 0.6).double().mean()) == pytest.approx((below(0.6) - below(0.3)) / mass, abs=1e-4)
        assert 0.3 <= float(sigmas.min()) and float(sigmas.max()) <= 0.9


def test_the_further_shift_is_the_last_rule_before_the_range():
    numbers = torch.tensor([0.25, 0.5])
    plain = TimestepOptions(timestep_sampling="uniform", timestep_schedule_shift=3.0, max_timestep=500)
    assert sigmas_from_draws(plain, numbers, (8, 8)).tolist() == pytest.approx([0.25, 0.375])


def test_what_is_out_of_range_or_has_no_effect_is_told():
    for values, told in (
        ({"timestep_mix_low_prob": 1.5}, "from 0 to 1"), ({"timestep_schedule_shift": 0.0}, "above 0"),
        ({"timestep_sampling": "mode", "mode_scale": 3.0}, "-1 to 1.75"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=told):
            TimestepOptions(**values)
    assert TimestepOptions(weighting_scheme="mode", mode_scale=3.0)  # as a density it is cut, as before
    given = TimestepOptions(timestep_sampling="sigma", timestep_mix_low_prob=0.3, timestep_schedule_shift=2.0)
    assert [item.written for item in idle(given)] == ["--timestep_schedule_shift", "--timestep_mix_low_prob"]
    assert idle(TimestepOptions(timestep_sampling="mixed_uniform_logit", timestep_mix_low_prob=0.3, logit_mean=1.0)) == []
    assert "--timestep_mix_low_prob of 0" in notices(TimestepOptions(timestep_sampling="mixed_uniform_low"))[0]
