"""Laws of noise levels of video models against the reference file video_timesteps.json."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from library.core.keyed_random import StepDraws, keyed_generator
from library.training import timesteps
from library.training.objective import FlowMatchingObjective
from library.training.timestep_samplers import TimestepOptions, build
from library.training.timestep_samplers.baseline import sigmas_from_draws
from library.training.timestep_samplers.laws import laws_of, sigmas_from_uniform, stratified
from library.training.wiring.video_options import DEFAULTS
from tests.golden_dir import behaviour_cases

FILE = "video_timesteps.json"
NUM_DRAWS = 100_000


def options_of(case) -> TimestepOptions:
    return TimestepOptions(**{**DEFAULTS, **case["input"]["options"]})


class ManyDraws(StepDraws):
    """One generator for many samples: keyed draws of 100000 samples one by one would take long."""

    def normal(self, purpose, shape=(), *keys):
        return torch.randn(NUM_DRAWS, generator=keyed_generator(1, purpose))

    def uniform(self, purpose, shape=(), *keys):
        return torch.rand(NUM_DRAWS, generator=keyed_generator(1, purpose))


@pytest.mark.parametrize("case", behaviour_cases(FILE, "maps"))
def test_map_of_the_pool(case):
    """Uniform numbers to sigmas, and the ends of the law; the shift in use is that of the law's inverse at 0.5."""
    options, latent_hw = options_of(case), tuple(case["input"]["latent_hw"])
    u = torch.tensor([*case["input"]["u"], 0.0, 1.0], dtype=torch.float64)
    sigmas = sigmas_from_uniform(options, u, torch.zeros_like(u), latent_hw)
    expected = torch.tensor(case["expected"]["sigma"], dtype=torch.float64)
    torch.testing.assert_close(sigmas[:-2], expected, rtol=0, atol=1e-5)
    ends = torch.tensor(case["expected"]["sigma_at_0_and_1"], dtype=torch.float64)
    torch.testing.assert_close(sigmas[-2:], ends, rtol=0, atol=0.01)
    if "shift" in case["expected"]:
        middle = float(laws_of(options, latent_hw)[0][1].quantile(torch.tensor(0.5, dtype=torch.float64)))
        assert middle / (1 - middle) == pytest.approx(case["expected"]["shift"], rel=1e-5)


@pytest.mark.parametrize("case", behaviour_cases(FILE, "laws"))
def test_law_of_the_sampler(case):
    """Also with stratified numbers, whose law is the same."""
    height, width = case["input"]["latent_hw"]
    expected = case["expected"]
    for buckets in (None, 8):
        options = TimestepOptions(**{**DEFAULTS, **case["input"]["options"], "num_timestep_buckets": buckets})
        sampler = build(options)
        sampler.know_epochs(1, NUM_DRAWS)
        sigmas = sampler.sample((NUM_DRAWS, 16, 9, height, width), ManyDraws(0, 0, range(NUM_DRAWS))).double()
        low, high = expected["range"]
        assert low - 1e-6 <= sigmas.min() and sigmas.max() <= high + 1e-6
        wanted = torch.tensor([float(q) for q in expected["quantiles"]], dtype=torch.float64)
        values = torch.tensor(list(expected["quantiles"].values()), dtype=torch.float64)
        torch.testing.assert_close(torch.quantile(sigmas, wanted), values, rtol=0, atol=0.01)
        tenths = torch.histc(sigmas, 10, low, high) / NUM_DRAWS
        torch.testing.assert_close(tenths, torch.tensor(expected["tenths"], dtype=torch.float64), rtol=0, atol=0.01)


@pytest.mark.parametrize("case", behaviour_cases(FILE, "sigma"))
def test_sigma_sampling(case):
    """`draw` z: standard normal numbers, whose uniform ones the density turns back into them."""
    options, draws = options_of(case), torch.tensor(case["input"]["draws"], dtype=torch.float64)
    u = torch.special.ndtr(draws) if case["input"]["draw"] == "z" else draws
    scheme = {name: getattr(options, name) for name in ("logit_mean", "logit_std", "mode_scale")}
    density = timesteps.density(options.weighting_scheme, u, **scheme)
    torch.testing.assert_close(density, torch.tensor(case["expected"]["density"]).double(), rtol=0, atol=1e-6)
    sigmas = sigmas_from_draws(options, u, (64, 64))
    assert (sigmas * 1000).round().int().tolist() == case["expected"]["timesteps"]
    torch.testing.assert_close(sigmas, torch.tensor(case["expected"]["sigma"]).double(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("case", behaviour_cases(FILE, "weights"))
def test_weights(case):
    times = torch.tensor(case["input"]["timesteps"], dtype=torch.float64)
    used = torch.tensor(case["expected"]["sigma_used"], dtype=torch.float64)
    torch.testing.assert_close(timesteps.nearest_table_sigmas(times), used, rtol=0, atol=1e-9)
    scheme, expected = case["input"]["weighting_scheme"], torch.tensor(case["expected"]["weights"], dtype=torch.float64)
    torch.testing.assert_close(timesteps.flow_weights(scheme, used), expected, rtol=2e-5, atol=0)
    objective = FlowMatchingObjective(TimestepOptions(weighting_scheme=scheme), weigh=True, by_table=True)
    between = times % 1 != 0.5  # of two that are as near, rounding of times / 1000 decides
    torch.testing.assert_close(objective.weights_at(times)[between], expected[between], rtol=2e-5, atol=0)


@pytest.mark.parametrize("case", behaviour_cases(FILE, "pools"))
def test_pool_of_an_epoch(case):
    """The numbers that the samples of an epoch draw lie in every part as often as recorded."""
    given, expected = case["input"], case["expected"]
    buckets, size = given["num_timestep_buckets"], given["batch_size"]
    kept = expected["batches"] * size
    assert kept == expected["kept"] and expected["batches"] == -(-given["items"] // size)
    numbers = stratified(kept, buckets, torch.Generator().manual_seed(3))
    assert len(numbers) == kept and numbers.unique().numel() == kept
    assert max(Counter((numbers * buckets).long().tolist()).values()) == expected["most_kept_per_slice"]
    sampler = build(TimestepOptions(timestep_sampling="uniform", num_timestep_buckets=buckets))
    sampler.know_epochs(expected["batches"], size)
    steps = [StepDraws(7, step, range(size)) for step in range(2 * expected["batches"])]
    drawn = torch.cat([sampler.sample((size, 16, 8, 8), step) for step in steps]).double().view(2, kept)
    for epoch in drawn:
        counts = Counter((epoch * buckets).long().tolist())
        assert max(counts.values()) <= expected["drawn_per_slice"] and sum(counts.values()) == kept
        assert kept < expected["drawn"] or set(counts.values()) == {expected["drawn_per_slice"]}
    assert not torch.equal(*drawn)
