"""FLUX.1 and Anima by their known calls, against our own objects."""

import argparse
import dataclasses
import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from library import anima_utils, flux_train_utils, flux_utils
from library.chroma_utils import load_chroma
from library.components.control_nets import control_nets_of
from library.core.errors import CheckpointError, ConfigError
from library.flux_control_net_models import FluxControlNet
from library.safetensors_utils import load_safetensors, read_header
from library.tiny_models.chroma_tiny import build_tiny_chroma
from library.training.objective import clean_estimate
from library.training.timesteps import density, flow_weights, shift_sigmas
from library.utils import str_to_dtype
from tests.library.test_flux_train_utils import tiny_denoiser
from tests.tiny import build_tiny_anima, build_tiny_flux


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    return build_tiny_flux(tmp_path_factory.mktemp("flux"))


@pytest.fixture(scope="module")
def anima(tmp_path_factory):
    return build_tiny_anima(tmp_path_factory.mktemp("anima"))


def same(model, other) -> bool:
    state = other.state_dict()
    return all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())


def test_loading_flux(flux):
    is_schnell, model = flux_utils.load_flow_model(str(flux.flux), torch.float32, "cpu")
    own = flux_utils.load_flux(flux.flux, torch.float32, "cpu")
    assert is_schnell == (not own.params.guidance_embed) and same(model, own)
    state = flux_utils.analyze_checkpoint_state(str(flux.flux))
    assert tuple(state) == (False, is_schnell, (own.params.depth, own.params.depth_single_blocks), [str(flux.flux)])
    vae = flux_utils.load_ae(ckpt_path=str(flux.ae), dtype=torch.float32, device="cpu")
    clip_l = flux_utils.load_clip_l(ckpt_path=str(flux.clip_l), dtype=torch.float32, device="cpu")
    t5xxl = flux_utils.load_t5xxl(ckpt_path=str(flux.t5xxl), dtype=torch.bfloat16, device="cpu")
    assert flux_utils.get_t5xxl_actual_dtype(t5xxl) == torch.bfloat16 and vae is not None and clip_l is not None
    with pytest.raises(ConfigError, match="model_type is sd3"):
        flux_utils.load_flow_model(str(flux.flux), None, "cpu", model_type="sd3")
    with pytest.raises(CheckpointError, match="does not exist"):
        flux_utils.load_controlnet("c.safetensors", False, None, "cpu")


def test_loading_chroma(tmp_path):
    tiny = build_tiny_chroma(tmp_path)
    is_schnell, model = flux_utils.load_flow_model(str(tiny.chroma), torch.float32, "cpu", model_type="chroma")
    assert not is_schnell and same(model, load_chroma(tiny.chroma, torch.float32, "cpu"))


def test_packing(flux):
    latents = torch.randn(2, 16, 4, 6)
    packed = flux_utils.pack_latents(latents)
    assert packed.shape == (2, 6, 64) and torch.equal(flux_utils.unpack_latents(packed, 2, 3), latents)
    assert flux_utils.prepare_img_ids(2, 2, 3)[1, 4].tolist() == [0, 1, 1]
    state = load_safetensors(flux.flux)
    assert set(flux_utils.convert_diffusers_sd_to_bfl(flux_utils.convert_bfl_sd_to_diffusers(state))) == set(state)


def test_schedules():
    line = flux_train_utils.get_lin_function()
    assert line(256) == pytest.approx(0.5) and line(4096) == pytest.approx(1.15)
    times = torch.linspace(0.1, 0.9, 5)
    torch.testing.assert_close(flux_train_utils.time_shift(0.8, 1.0, times), shift_sigmas(times, math.exp(0.8)))
    schedule = flux_train_utils.get_schedule(4, 1024, shift=True)
    assert schedule[0] == 1 and schedule[-1] == 0 and len(schedule) == 5
    torch.manual_seed(2)
    drawn = flux_train_utils.compute_density_for_timestep_sampling("logit_normal", 6, 0.5, 0.7)
    torch.manual_seed(2)
    torch.testing.assert_close(
        drawn, density("logit_normal", torch.rand(6), logit_mean=0.5, logit_std=0.7, mode_scale=1.29)
    )
    assert torch.equal(flux_train_utils.compute_loss_weighting_for_sd3("cosmap", times), flow_weights("cosmap", times))
    assert flux_train_utils.get_sigmas(None, torch.tensor([250.0]), torch.device("cpu"), 4).tolist() == [[[[0.25]]]]


@pytest.mark.parametrize("mode", ["sigma", "uniform", "sigmoid", "shift", "flux_shift"])
def test_noise_of_a_flow(mode):
    latents, noise = torch.randn(256, 4, 8, 8), torch.randn(256, 4, 8, 8)
    options = SimpleNamespace(
        timestep_sampling=mode, min_timestep=100, max_timestep=900, discrete_flow_shift=2.0, ip_noise_gamma=None
    )
    torch.manual_seed(4)
    noisy, timesteps, sigmas = flux_train_utils.get_noisy_model_input_and_timesteps(
        options, None, latents, noise, torch.device("cpu"), torch.float32
    )
    assert sigmas.shape == (256, 1, 1, 1) and torch.equal(timesteps, sigmas.flatten() * 1000)
    assert 100 <= timesteps.min() and timesteps.max() <= 900.01 and timesteps.std() > 50
    torch.testing.assert_close(noisy, (1 - sigmas) * latents + sigmas * noise)
    torch.manual_seed(4)
    again = flux_train_utils.get_noisy_model_input_and_timesteps(
        options, None, latents, noise, torch.device("cpu"), torch.bfloat16
    )
    assert torch.equal(again[1], timesteps) and again[0].dtype == torch.bfloat16


def test_prediction_types():
    velocity, noisy, sigmas = (
        torch.randn(2, 4, 3, 3),
        torch.randn(2, 4, 3, 3),
        torch.tensor([0.25, 0.75]).reshape(2, 1, 1, 1),
    )
    options = SimpleNamespace(model_prediction_type="raw", weighting_scheme="sigma_sqrt")
    prediction, weights = flux_train_utils.apply_model_prediction_type(options, velocity, noisy, sigmas)
    assert prediction is velocity and weights is None
    options.model_prediction_type = "sigma_scaled"
    prediction, weights = flux_train_utils.apply_model_prediction_type(options, velocity, noisy, sigmas)
    torch.testing.assert_close(prediction, clean_estimate(velocity, noisy, sigmas.flatten()))
    torch.testing.assert_close(weights, sigmas**-2)
    options.model_prediction_type = "additive"
    with pytest.raises(ConfigError, match="known: raw, sigma_scaled"):
        flux_train_utils.apply_model_prediction_type(options, velocity, noisy, sigmas)


def test_flux_options():
    parser = argparse.ArgumentParser()
    flux_train_utils.add_flux_train_arguments(parser)
    options = parser.parse_args(["--guidance_scale", "1"])
    assert (
        options.guidance_scale == 1.0 and options.model_prediction_type == "raw" and options.discrete_flow_shift == 3.0
    )


def test_loading_and_saving_anima(anima, tmp_path):
    own = anima_utils.load_anima(anima.anima, torch.float32, "cpu")
    model = anima_utils.load_anima_model("cpu", str(anima.anima), "torch", False, "cpu", torch.float32)
    assert same(model, own)
    path = tmp_path / "again.safetensors"
    anima_utils.save_anima_model(str(path), model.state_dict(), read_header(anima.anima)[1], torch.float32)
    assert same(anima_utils.load_anima(path, torch.float32, "cpu"), own) and all(
        key.startswith("net.") for key in read_header(path)[0]
    )
    small = anima_utils.load_anima_model("cpu", str(anima.anima), "torch", False, "cpu", None, fp8_scaled=True)
    assert any(parameter.dtype == str_to_dtype("fp8") for parameter in small.parameters())


def test_adapters_merged_into_anima(anima):
    from networks.lora import create_network

    own = anima_utils.load_anima(anima.anima, torch.float32, "cpu")
    network = create_network(1.0, 2, 2.0, None, [], own)
    for number, module in enumerate(network.loras):
        torch.nn.init.normal_(module.lora_up.weight, generator=torch.Generator().manual_seed(number))
    merged = anima_utils.load_anima_model(
        "cpu", str(anima.anima), "torch", False, "cpu", torch.float32, lora_weights_list=[network.file_state_dict()],
        lora_multipliers=[0.5]
    )
    network.set_multiplier(0.5)
    network.merge_to(None, own)
    for (name, tensor), (_, other) in zip(own.state_dict().items(), merged.state_dict().items(), strict=True):
        torch.testing.assert_close(other, tensor, msg=lambda text, name=name: f"{name}: {text}")


def test_text_side_of_anima(anima):
    tokenizer = anima_utils.load_qwen3_tokenizer(str(anima.qwen3_tokenizer))
    assert anima_utils.load_t5_tokenizer(str(anima.t5_tokenizer))("a cat").input_ids
    assert tokenizer("a cat").input_ids


def test_text_encoders_of_tensors_that_were_read_already(flux):
    for load, path in ((flux_utils.load_clip_l, flux.clip_l), (flux_utils.load_t5xxl, flux.t5xxl)):
        state, sizes = load_safetensors(path), json.loads(read_header(path)[1].get("model_config", "{}"))
        model = load(None, torch.float32, "cpu", state_dict=state, config=sizes)
        assert same(model, load(path, torch.float32, "cpu")) and model.dtype == torch.float32
        state = {f"further.{key}": tensor for key, tensor in state.items()}
        with pytest.raises(CheckpointError, match="the state dict"):
            load("not read", None, "cpu", False, state)


def test_guided_steps_on_packed_latents():
    model, generator = tiny_denoiser(), torch.Generator().manual_seed(4)
    img, txt, other = (torch.randn(1, length, width, generator=generator) for length, width in ((6, 64), (5, 12), (3, 12)))
    vec, ids = torch.randn(1, 8, generator=generator), flux_utils.prepare_img_ids(1, 2, 3)
    about = (model, img, ids, txt, torch.zeros(1, 5, 3), vec)

    def velocity(text, pooled):
        return model(
            img, ids, text, torch.zeros(1, text.shape[1], 3), torch.tensor([1.0]), pooled, torch.tensor([2.0])
        )

    made = flux_train_utils.denoise(*about, [1.0, 0.5], 2.0, neg_txt=other, neg_vec=-vec, cfg_scale=3.0)
    negative = velocity(other, -vec)
    torch.testing.assert_close(made, img - 0.5 * (negative + 3 * (velocity(txt, vec) - negative)))
    plain = flux_train_utils.denoise(*about, [1.0, 0.5], 2.0, neg_txt=other, cfg_scale=1.0)
    assert torch.equal(plain, flux_train_utils.denoise(*about, [1.0, 0.5], 2.0))


def test_steps_that_a_control_net_guides(tmp_path):
    """The residuals of its file are added; a net of zeros changes nothing."""
    model, generator = tiny_denoiser(), torch.Generator().manual_seed(4)
    img, txt, vec = (torch.randn(1, *shape, generator=generator) for shape in ((6, 64), (5, 12), (8,)))
    about = (model, img, flux_utils.prepare_img_ids(1, 2, 3), txt, torch.zeros(1, 5, 3), vec, [1.0, 0.5], 2.0)
    picture = torch.rand(1, 3, 32, 48, generator=generator)
    plain = flux_train_utils.denoise(*about)
    net = FluxControlNet(dataclasses.replace(model.params, depth=1, depth_single_blocks=0))
    for scale in (0.0, 0.2):
        for layer in net.controlnet_blocks:
            torch.nn.init.constant_(layer.weight, scale)
            torch.nn.init.zeros_(layer.bias)
        metadata = control_nets_of("flux").file_metadata(net)
        save_file(net.state_dict(), tmp_path / "net.safetensors", metadata)
        loaded = flux_utils.load_controlnet(str(tmp_path / "net.safetensors"), False, torch.float32, "cpu")
        made = flux_train_utils.denoise(*about, controlnet=loaded, controlnet_img=picture)
        assert torch.equal(made, plain) == (scale == 0)
    with pytest.raises(CheckpointError, match="no ControlNet of FLUX.1 schnell"):
        flux_utils.load_controlnet(str(tmp_path / "net.safetensors"), True, None, "cpu")


@pytest.fixture(scope="module")
def qwen3(anima, tmp_path_factory):
    """A folder with the text encoder of Anima and its tokenizer."""
    folder = tmp_path_factory.mktemp("qwen3")
    shutil.copytree(anima.qwen3_tokenizer, folder, dirs_exist_ok=True)
    shutil.copy(anima.qwen3, folder / "model.safetensors")
    return str(folder)


def test_the_text_encoder_of_anima(anima, qwen3):
    from library.components.llm_encoder_utils import load_qwen3

    model, tokenizer = anima_utils.load_qwen3_text_encoder(qwen3, torch.float32, "cpu")
    assert same(model, load_qwen3(anima.qwen3, torch.float32, "cpu"))
    assert next(anima_utils.load_qwen3_text_encoder(qwen3)[0].parameters()).dtype == torch.bfloat16
    rows = model.get_input_embeddings().num_embeddings
    assert max(tokenizer("a cat").input_ids) < rows


def test_adapters_merged_into_the_text_encoder_of_anima(anima, qwen3):
    from networks.lora import create_network

    own = anima_utils.load_qwen3_text_encoder(qwen3, torch.float32)[0]
    denoiser = anima_utils.load_anima(anima.anima, torch.float32, "cpu")
    network = create_network(1.0, 2, 2.0, None, [own], denoiser)
    for number, module in enumerate(network.loras):
        torch.nn.init.normal_(module.lora_up.weight, generator=torch.Generator().manual_seed(number))
    merged = anima_utils.load_qwen3_text_encoder(
        qwen3, torch.float32, lora_weights=[network.file_state_dict()], lora_multipliers=[0.5]
    )[0]
    assert not same(merged, own)
    network.set_multiplier(0.5)
    network.merge_to([own], denoiser)
    for (name, tensor), (_, other) in zip(own.state_dict().items(), merged.state_dict().items(), strict=True):
        torch.testing.assert_close(other, tensor, msg=lambda text, name=name: f"{name}: {text}")
