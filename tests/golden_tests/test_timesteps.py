"""Noise levels against the reference file timesteps.json."""

from __future__ import annotations

import pytest
import torch

from library.core.errors import ConfigError
from library.core.keyed_random import StepDraws
from library.training import timesteps
from library.training.objective import DdpmObjective, FlowMatchingObjective
from library.training.timestep_samplers import TimestepOptions, build
from library.training.timestep_samplers.baseline import draws_normal, sigmas_from_draws
from tests.golden_dir import behaviour_cases

FILE = "timesteps.json"
NUM_DRAWS = 100_000
LATENT_STRIDE = {"flux": 8, "chroma": 8, "sd3": 8, "lumina": 8, "anima": 8, "hunyuan_image": 32}


def options_of(case) -> TimestepOptions:
    known = {name: value for name, value in case["options"].items() if name != "training_shift"}
    return TimestepOptions(**known)


def quantiles_of(values: torch.Tensor, wanted: dict[str, float]) -> torch.Tensor:
    return torch.quantile(values.double(), torch.tensor([float(q) for q in wanted], dtype=torch.float64))


@pytest.mark.parametrize("case", behaviour_cases(FILE))
def test_sigmas(case):
    options = options_of(case)
    assert draws_normal(options.timestep_sampling) == (case["draw"] == "z")
    numbers = torch.tensor(case["draws"], dtype=torch.float64)
    sigmas = sigmas_from_draws(options, numbers, tuple(case.get("latent_hw", (64, 64))))
    torch.testing.assert_close(sigmas, torch.tensor(case["sigma"], dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize("case", behaviour_cases(FILE, where=lambda case: "quantiles" in case))
def test_law_of_the_sampler(case):
    generator = torch.Generator().manual_seed(1)

    class ManyDraws(StepDraws):
        """One generator for many samples: keyed draws of 100000 samples one by one would take long."""

        def normal(self, purpose, shape=(), *keys):
            return torch.randn(NUM_DRAWS, generator=generator)

        def uniform(self, purpose, shape=(), *keys):
            return torch.rand(NUM_DRAWS, generator=generator)

    height, width = case.get("latent_hw", (64, 64))
    sigmas = build(options_of(case)).sample((NUM_DRAWS, 16, height, width), ManyDraws(0, 0, ()))
    assert sigmas.dtype == torch.float32
    expected = torch.tensor(list(case["quantiles"].values()), dtype=torch.float64)
    torch.testing.assert_close(quantiles_of(sigmas, case["quantiles"]), expected, rtol=0, atol=0.01)


@pytest.mark.parametrize("case", behaviour_cases(FILE, "sd3"))
def test_sd3_timesteps(case):
    options = options_of(case)
    u = torch.tensor(case["draws"], dtype=torch.float64)
    u = timesteps.density(
        options.weighting_scheme, u,
        logit_mean=options.logit_mean, logit_std=options.logit_std, mode_scale=options.mode_scale,
    )
    result = timesteps.whole_flow_timesteps(
        u, case["options"].get("training_shift", 1.0), options.min_timestep, options.max_timestep
    )
    assert result.tolist() == case["timestep"]


@pytest.mark.parametrize("case", behaviour_cases(FILE, "ddpm"))
def test_ddpm_timesteps(case):
    u = torch.tensor(case["draws"], dtype=torch.float64)
    result = timesteps.ddpm_timesteps(u, case["min_timestep"], case["max_timestep"])
    assert result.tolist() == case["timestep"]
    many = torch.rand(NUM_DRAWS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    drawn = timesteps.ddpm_timesteps(many, case["min_timestep"], case["max_timestep"])
    expected = torch.tensor(list(case["quantiles"].values()), dtype=torch.float64)
    width = case["max_timestep"] - case["min_timestep"]
    torch.testing.assert_close(quantiles_of(drawn, case["quantiles"]), expected, rtol=0, atol=1 + 0.01 * width)


@pytest.mark.parametrize("case", behaviour_cases(FILE, "validation"))
def test_validation_levels(case):
    options = TimestepOptions(min_timestep=case["min_timestep"], max_timestep=case["max_timestep"])
    assert DdpmObjective(options).validation_times() == case["timesteps"]
    assert FlowMatchingObjective(options).validation_times() == pytest.approx(case["flow_sigmas"], abs=1e-12)


@pytest.mark.parametrize("case", behaviour_cases(FILE, "token_counts"))
def test_token_counts(case):
    stride = LATENT_STRIDE[case["family"]]
    width, height = case["image_wh"]
    latent_hw = (height // stride, width // stride)
    assert timesteps.packed_tokens(latent_hw) == case["tokens"]
    assert timesteps.line_mu(case["tokens"], timesteps.MU_LINES["flux_shift"]) == pytest.approx(case["mu"], rel=1e-9)
    assert timesteps.shift_of_mode("flux_shift", latent_hw) == pytest.approx(case["shift"], rel=1e-9)


@pytest.mark.parametrize("case", behaviour_cases(FILE, "errors"))
def test_refused_options(case):
    with pytest.raises(ConfigError) as error:
        options_of(case)
    assert any(name in str(error.value) for name in case["options"])
