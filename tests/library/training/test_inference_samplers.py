"""Samplers of SD models against diffusers' schedulers on a fixed network, their schedules, noise and errors."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from library.core.errors import ConfigError
from library.training.inference_samplers import INFERENCE_SAMPLERS, SAMPLER_NAMES, common, discrete, sampler_notices
from library.training.inference_samplers.flow import LARGEST_SIGMA, flow_sampler, flow_schedule
from library.training.objective import ddpm_alphas_cumprod

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
MULTISTEP, OFFSET = "DPMSolverMultistepScheduler", {"steps_offset": 1, "timestep_spacing": "leading"}
REFERENCES = {
    "ddim": ("DDIMScheduler", {**OFFSET, "clip_sample": False}),
    "ddpm": ("DDPMScheduler", {**OFFSET, "clip_sample": False}),
    "pndm": ("PNDMScheduler", OFFSET),
    "lms": ("LMSDiscreteScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpm_2": ("KDPM2DiscreteScheduler", {}),
    "dpm_2_a": ("KDPM2AncestralDiscreteScheduler", {}),
    "dpmsolver": (MULTISTEP, {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}),
    "dpmsolver++": (MULTISTEP, {"algorithm_type": "dpmsolver++"}),
    "dpmsolver++_sde": (MULTISTEP, {"algorithm_type": "sde-dpmsolver++"}),
    "dpmsingle": ("DPMSolverSinglestepScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
}  # fmt: skip
SHAPE = (2, 4, 3, 5)
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # inside diffusers


def network(inputs: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """A smooth function of latents and time that is no exact solution of anything."""
    return torch.tanh(inputs * 0.7 + inputs.roll(1, dims=-1) * 0.2) * (0.9 + 0.1 * math.cos(float(timestep) / 250))


def noises(count: int = 200) -> list[torch.Tensor]:
    return list(torch.randn((count, *SHAPE), generator=torch.Generator().manual_seed(5)))


def ours(name: str, num_steps: int, prediction_type: str = "epsilon", **settings) -> torch.Tensor:
    start = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3))
    queue = iter(noises())
    return discrete.sample_latents(
        name, network, start, num_steps, prediction_type=prediction_type, noise=lambda: next(queue), **settings
    )


def theirs(name: str, num_steps: int, monkeypatch, prediction_type: str = "epsilon", **settings) -> torch.Tensor:
    import diffusers

    if name == "lms":
        pytest.importorskip("scipy", reason="diffusers' LMS integrates with scipy")
    kind, config = REFERENCES[name]
    scheduler = getattr(diffusers, kind)(**BETAS, **config, prediction_type=prediction_type, **settings)
    scheduler.set_timesteps(num_steps)
    queue = iter(noises())
    monkeypatch.setattr(f"{type(scheduler).__module__}.randn_tensor", lambda *_, **__: next(queue), raising=False)
    start = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3))
    latents = start * float(scheduler.init_noise_sigma)
    for timestep in scheduler.timesteps:
        prediction = network(scheduler.scale_model_input(latents, timestep), timestep)
        latents = scheduler.step(prediction, timestep, latents).prev_sample
    return latents.float()


@pytest.mark.parametrize("num_steps", [7, 16, 30])
@pytest.mark.parametrize("name", REFERENCES)
def test_every_sampler_agrees_with_diffusers(name, num_steps, monkeypatch):
    torch.testing.assert_close(ours(name, num_steps), theirs(name, num_steps, monkeypatch), rtol=1e-4, atol=1e-4)


# diffusers mixes v predictions of several times before it converts them (PNDM), so that one is left out
@pytest.mark.parametrize("name", [name for name in REFERENCES if name != "pndm"])
def test_v_prediction_agrees_with_diffusers(name, monkeypatch):
    torch.testing.assert_close(ours(name, 9, "v"), theirs(name, 9, monkeypatch, "v_prediction"), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["euler", "dpmsolver++", "ddim"])
def test_zero_terminal_snr_agrees_with_diffusers(name, monkeypatch):
    expected = theirs(name, 10, monkeypatch, "v_prediction", rescale_betas_zero_snr=True)
    torch.testing.assert_close(
        ours(name, 10, "v", zero_terminal_snr=True), expected, rtol=2e-3, atol=2e-3
    )  # starts at sigma 4096


@pytest.mark.parametrize("name", INFERENCE_SAMPLERS.names())
@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 1000])
def test_every_sampler_works_with_any_number_of_steps(name, num_steps):
    """A perfect network of data that are all 2.5: values beyond -1..1 come back unclipped."""
    schedule = discrete.schedule_of(name, num_steps)

    def denoise(latents: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        assert 0 <= schedule.timestep_of(float(sigma)) <= 999
        return (latents - 2.5) / float(sigma)

    generator = torch.Generator().manual_seed(1)
    start = 2.5 + torch.randn(SHAPE, generator=generator) * float(schedule.sigmas[0])
    noise = common.noise_of([generator, generator], start)
    result = discrete.sampler_of(name, schedule)(denoise, start, schedule.sigmas, noise)
    end = float(schedule.sigmas[-1])
    torch.testing.assert_close(result, torch.full(SHAPE, 2.5), rtol=0, atol=1e-3 + end * 5)


def test_names_with_k_are_the_same_samplers():
    for name in ("lms", "euler", "euler_a", "dpm_2", "dpm_2_a"):
        assert INFERENCE_SAMPLERS.resolve(f"k_{name}") is INFERENCE_SAMPLERS.resolve(name)
        assert torch.equal(discrete.schedule_of(f"k_{name}", 5).sigmas, discrete.schedule_of(name, 5).sigmas)


def test_the_documentation_names_every_sampler():
    page = (Path(__file__).parents[3] / "docs" / "samplers.md").read_text(encoding="utf-8")
    assert [name for name in SAMPLER_NAMES if f"`{name}`" not in page] == []


def test_samplers_that_other_tools_clip_are_told_about():
    assert "not clipped" in sampler_notices("ddim")[0]
    assert sampler_notices("euler") == sampler_notices("pndm") == []
    assert "velocity" in sampler_notices("pndm", is_v=True)[0]
    assert "zero-terminal" in sampler_notices("euler", zero_terminal_snr=True)[0]
    with pytest.raises(ConfigError, match="unknown sampler 'eulr'"):
        sampler_notices("eulr")


def test_pndm_of_a_network_that_predicts_velocity_is_exact_where_that_is_known():
    """Gaussian data: the path from noise to data has a closed form. Velocities combined as such miss it by 3 % at 50
    steps."""
    cumprod = discrete.ddpm_alphas_cumprod(False)

    def predict(latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        alpha = float(cumprod.sqrt()[int(timestep)])
        scale = math.sqrt(1 - alpha**2)
        clean = 0.3 + alpha * 0.25 / (alpha**2 * 0.25 + scale**2) * (latents - 0.3 * alpha)
        return alpha * (latents - alpha * clean) / scale - scale * clean

    start = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    result = discrete.sample_latents("pndm", predict, start, 50, prediction_type="v")
    first, last = float(cumprod[981]), float(cumprod[0])
    spread = math.sqrt((0.25 * last + 1 - last) / (0.25 * first + 1 - first))
    exact = 0.3 * math.sqrt(last) + spread * (start - 0.3 * math.sqrt(first))
    assert ((result - exact).norm() / exact.norm()).item() < 0.004


def test_leading_times_begin_at_the_offset_and_stay_in_range():
    assert discrete.leading_timesteps(4).tolist() == [751, 501, 251, 1]
    assert discrete.leading_timesteps(1000).max() == 999


def test_one_even_step_starts_at_the_last_timestep():
    assert discrete.linspace_timesteps(1).tolist() == [999]
    assert discrete.linspace_inner_timesteps(4).tolist() == [999, 749, 500, 250]


def test_zero_terminal_schedule_ends_at_a_finite_sigma():
    assert float(discrete.model_sigmas(True)[-1]) == pytest.approx(4096, rel=1e-6)
    plain = ddpm_alphas_cumprod(False)
    torch.testing.assert_close(discrete.model_sigmas()[500], ((1 - plain[500]) / plain[500]).sqrt())


def test_timesteps_between_levels_are_even_in_log_sigma():
    schedule = discrete.schedule_of("euler", 5)
    table = schedule.model_sigmas
    assert schedule.timestep_of(float(schedule.sigmas[2])) == float(schedule.timesteps[2])
    middle = math.sqrt(float(table[400]) * float(table[401]))
    assert schedule.timestep_of(middle) == pytest.approx(400.5)


@pytest.mark.parametrize("name", ["pndm", "euler", "dpmsolver++"])
def test_a_schedule_can_start_late(name):
    whole = discrete.schedule_of(name, 10)
    late = whole.from_step(6)
    assert late.sigmas.tolist() == whole.sigmas[6:].tolist()
    assert late.start_scale == float(whole.sigmas[6])
    result = discrete.sampler_of(name, late)(lambda x, s: (x - 2.5) / float(s), torch.ones(SHAPE), late.sigmas, None)
    torch.testing.assert_close(result, torch.full(SHAPE, 2.5), rtol=0, atol=0.1)
    with pytest.raises(ValueError, match="first step is 10"):
        whole.from_step(10)


def test_noise_of_a_sample_does_not_depend_on_its_batch():
    def generator(seed: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    both = common.noise_of([generator(1), generator(2)], torch.zeros(2, 4, 3, 3))
    alone = common.noise_of([generator(2)], torch.zeros(1, 4, 3, 3))
    for _ in range(3):
        assert torch.equal(both()[1:], alone())
    with pytest.raises(ValueError, match="one per sample"):
        common.noise_of([generator(1)], torch.zeros(2, 4, 3, 3))


@pytest.mark.parametrize("name", ["euler_a", "ddpm", "dpm_2_a", "dpmsolver++_sde", "er_sde"])
def test_samplers_that_add_noise_ask_for_it(name):
    schedule = discrete.schedule_of(name, 3)
    with pytest.raises(ValueError, match="noise function is needed"):
        discrete.sampler_of(name, schedule)(lambda x, s: x, torch.ones(SHAPE), schedule.sigmas)


@pytest.mark.parametrize("name", ["euler", "ddim", "heun", "lms", "dpmsolver++", "unipc", "er_sde", "dpmsolver++_sde"])
def test_flow_samplers_start_at_sigma_one(name):
    sigmas = flow_schedule(6, 3.0)
    start = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    seen: list[float] = []

    def velocity(latents: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        seen.append(float(sigma))
        return (latents - 2.5) / float(sigma)

    result = flow_sampler(name)(velocity, start, sigmas, lambda: torch.zeros(SHAPE))
    torch.testing.assert_close(result, torch.full(SHAPE, 2.5), rtol=0, atol=1e-4)
    assert seen[0] in (1.0, pytest.approx(LARGEST_SIGMA))


def test_samplers_of_sd_models_are_refused_for_flow():
    with pytest.raises(ConfigError, match="'pndm', a sampler of SD models; flow models have ddim, lms"):
        flow_sampler("pndm")


def test_bad_values_are_refused():
    with pytest.raises(ValueError, match="num_steps is 0"):
        discrete.make_schedule(0, "leading")
    with pytest.raises(ValueError, match="prediction_type is 'x'"):
        discrete.network_denoiser(network, discrete.schedule_of("ddim", 3), "x")
