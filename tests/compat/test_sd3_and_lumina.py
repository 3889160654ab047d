"""Stable Diffusion 3 and Lumina-Image 2.0 by their known calls, against our own objects."""

import argparse
from types import SimpleNamespace

import pytest
import torch

from library import lumina_train_util, lumina_util, lumina_utils, sd3_models, sd3_train_utils, sd3_utils
from library.checkpoints import lumina_convert
from library.components.gemma_encoder_utils import load_gemma2
from library.components.ldm_models import AutoEncoder, AutoEncoderParams
from library.generation.lumina_options import LuminaRequest
from library.generation.lumina_pipeline import LuminaPipeline
from library.generation.sampling_utils import start_noise
from library.generation.sd3_options import Sd3Request
from library.generation.sd3_pipeline import Sd3Pipeline
from library.safetensors_utils import load_safetensors, read_header
from library.tiny_models.lumina_tiny import build_tiny_lumina
from library.tiny_models.sd3_tiny import build_tiny_sd3
from library.tiny_models.weights import clip_state
from networks import lora, lora_lumina, lora_sd3
from tests.compat.test_networks_and_metadata import described


@pytest.fixture(scope="module")
def sd3(tmp_path_factory):
    return build_tiny_sd3(tmp_path_factory.mktemp("sd3"), with_whole=True)


@pytest.fixture(scope="module")
def lumina(tmp_path_factory):
    return build_tiny_lumina(tmp_path_factory.mktemp("lumina"))


@pytest.fixture(scope="module")
def mmdit(sd3):
    return sd3_utils.load_sd3(sd3.model, torch.float32, "cpu")


@pytest.fixture(scope="module")
def nextdit(lumina):
    return lumina_utils.load_lumina(lumina.lumina, torch.float32, "cpu")


def same(model, other) -> bool:
    state = other.state_dict()
    return all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())


# -- Stable Diffusion 3 ------------------------------------------------------------------------------------------------


def test_a_denoiser_of_tensors_in_memory(sd3, mmdit):
    whole = load_safetensors(sd3.whole)
    assert same(sd3_utils.load_mmdit(whole, "float32", "cpu", attn_mode="sdpa"), mmdit)
    assert sd3_utils.load_mmdit(whole, torch.bfloat16, "cpu").dtype == torch.bfloat16
    prefix = "model.diffusion_model."
    assert sd3_utils.analyze_state_dict_state(whole, prefix) == sd3.params
    assert sd3_utils.analyze_checkpoint_state(sd3.whole) == sd3.params
    made = sd3_models.create_sd3_mmdit(sd3.params)
    assert made.state_dict().keys() == mmdit.state_dict().keys()


def test_parts_of_files_and_of_tensors_in_memory(sd3):
    assert sd3_utils.load_t5xxl(str(sd3.t5xxl), torch.bfloat16, "cpu").dtype == torch.bfloat16
    t5 = sd3_utils.load_t5xxl(None, None, "cpu", state_dict=load_safetensors(sd3.whole))
    assert same(t5, sd3_utils.load_t5xxl(str(sd3.t5xxl), None, "cpu"))
    assert same(sd3_utils.load_clip_g(clip_g_path=str(sd3.clip_g), dtype=None, device="cpu"),
                sd3_utils.load_clip_g(str(sd3.whole), None, "cpu"))
    generator = torch.Generator().manual_seed(1)  # of sizes that their shapes tell
    clip = clip_state(generator, width=128, layers=1, vocab=9)
    loaded = sd3_utils.load_clip_l(None, torch.float32, "cpu", False, clip)
    name = "text_model.embeddings.token_embedding.weight"
    assert torch.equal(loaded.state_dict()[name], clip[name])
    vae = AutoEncoder(AutoEncoderParams(ch=32, ch_mult=(1, 1), num_res_blocks=1))
    assert same(sd3_utils.load_vae(None, None, None, state_dict=vae.state_dict()), vae)
    own = sd3_utils.load_vae_sd3(sd3.model, None, "cpu")
    assert same(sd3_utils.load_vae(str(sd3.whole), torch.float32, "cpu"), own)


def test_noise_levels_of_a_shifted_flow():
    sampling = sd3_utils.ModelSamplingDiscreteFlow(3.0)
    first, last = sampling.timestep(sampling.sigma_max), sampling.timestep(sampling.sigma_min)
    levels = [float(sampling.sigma(time)) for time in torch.linspace(float(first), float(last), 7)]
    torch.testing.assert_close(sd3_train_utils.get_all_sigmas(sampling, 7), torch.tensor([*levels, 0.0]))
    assert float(sampling.sigma(torch.tensor(500.0))) == pytest.approx(0.75)
    assert sd3_train_utils.max_denoise(sampling, torch.tensor([1.0])) and not sd3_train_utils.max_denoise(
        sampling, torch.tensor([0.9])
    )
    clean, noise, sigma = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3), torch.tensor(0.25)
    noisy = sampling.noise_scaling(sigma, noise, clean)
    torch.testing.assert_close(sampling.calculate_denoised(sigma, noise - clean, noisy), clean)


def test_a_picture_is_that_of_the_pipeline(sd3, mmdit):
    texts = {
        "lg_out": torch.randn(2, 77, 40), "t5_out": torch.randn(2, 6, sd3.params.context_in),
        "lg_pooled": torch.randn(2, sd3.params.adm_in_channels),
    }  # fmt: skip
    one, other = ({name: rows[number : number + 1] for name, rows in texts.items()} for number in (0, 1))
    request = Sd3Request(prompt="", width=64, height=48, steps=3, seed=5, cfg_scale=4.0)
    with torch.no_grad():
        wanted = Sd3Pipeline(mmdit, None).latents(request, one, other)
    join = sd3_train_utils.joined_context
    given = [(join(text["lg_out"], text["t5_out"]), text["lg_pooled"]) for text in (one, other)]
    sampled = [48, 64, torch.ones(1, 16, 6, 8), 5, *given, mmdit, 3, 4.0, torch.float32, "cpu"]
    torch.testing.assert_close(sd3_train_utils.do_sample(*sampled), wanted)


def test_whole_timesteps_of_the_options():
    latents, noise = torch.randn(400, 4, 4, 4), torch.randn(400, 4, 4, 4)
    options = SimpleNamespace(training_shift=3.0, weighting_scheme="uniform", ip_noise_gamma=None)
    torch.manual_seed(1)
    noisy, timesteps, sigmas = sd3_train_utils.get_noisy_model_input_and_timesteps(
        options, latents, noise, torch.device("cpu"), torch.float32
    )
    torch.testing.assert_close(noisy, (1 - sigmas) * latents + sigmas * noise)
    assert 0.6 < float(sigmas.mean()) < 0.8, "shifted towards noise"
    torch.testing.assert_close(timesteps, timesteps.round(), atol=1e-3, rtol=0)
    assert timesteps.min() > 0 and len(timesteps.unique()) > 100


def test_saving_the_parts(sd3, mmdit, tmp_path):
    clip_l = sd3_utils.load_clip_l(str(sd3.clip_l), None, "cpu")
    t5xxl = sd3_utils.load_t5xxl(str(sd3.t5xxl), None, "cpu")
    vae = sd3_utils.load_vae_sd3(sd3.model, None, "cpu")
    path = tmp_path / "model.safetensors"
    sd3_train_utils.save_models(str(path), mmdit, vae, clip_l, None, t5xxl, {"modelspec.title": "x"}, torch.float32)
    assert same(sd3_utils.load_sd3(path, None, "cpu"), mmdit) and read_header(path)[1] == {"modelspec.title": "x"}
    wanted = {f"model{part}.safetensors" for part in ("", "_clip_l", "_t5xxl")}
    assert {file.name for file in tmp_path.iterdir()} == wanted
    assert same(sd3_utils.load_t5xxl(tmp_path / "model_t5xxl.safetensors", None, "cpu"), t5xxl)
    written = load_safetensors(tmp_path / "model_clip_l.safetensors")
    assert all(torch.equal(tensor, written[key]) for key, tensor in clip_l.state_dict().items())


def test_options_of_both():
    parser = argparse.ArgumentParser()
    sd3_train_utils.add_sd3_training_arguments(parser)
    assert parser.parse_args(["--training_shift", "2"]).training_shift == 2.0
    parser = argparse.ArgumentParser()
    lumina_train_util.add_lumina_train_arguments(parser)
    assert parser.parse_args(["--system_prompt", "a"]).system_prompt == "a"


def test_networks_by_their_constructors(mmdit, nextdit):
    own = lora.create_network(
        0.5, 4, 2.0, None, [], mmdit, x_attn_dim=2, emb_dims="[1,1,1,1,0,0]", train_block_indices="1"
    )
    mine = lora_sd3.LoRANetwork(
        [], mmdit, 0.5, 4, 2.0, type_dims=[None, None, None, 2, None, None], emb_dims=[1, 1, 1, 1, 0, 0],
        train_block_indices=[False, True, False],
    )  # fmt: skip
    assert described(mine) == described(own) and {module.lora_dim for module in mine.loras} == {1, 2, 4}
    own = lora.create_network(1.0, 4, 1.0, None, [], nextdit, train_blocks="refiners", refiner_dim=3)
    mine = lora_lumina.LoRANetwork([], nextdit, train_blocks="refiners", type_dims=[None, None, None, 3])
    assert described(mine) == described(own) and {module.lora_dim for module in mine.loras} == {3}
    mine = lora_lumina.LoRANetwork([], nextdit, type_dims=[2, 0, 0, 0], embedder_dims=[5, 0, 0])
    assert {module.lora_dim for module in mine.loras} == {2, 4, 5}
    assert lora_sd3.LoRAModule is lora_lumina.LoRAModule is lora.LoRAModule


# -- Lumina-Image 2.0 --------------------------------------------------------------------------------------------------


def test_loading_and_saving_lumina(lumina, nextdit, tmp_path):
    assert same(lumina_util.load_lumina_model(str(lumina.lumina), torch.float32, "cpu", use_flash_attn=True), nextdit)
    assert same(lumina_util.load_gemma2(str(lumina.gemma2), None, "cpu"), load_gemma2(lumina.gemma2, None, "cpu"))
    other = lumina_convert.to_diffusers(nextdit.state_dict())
    names = lumina_util.convert_diffusers_sd_to_alpha_vllm(other, 3)
    assert all(torch.equal(tensor, nextdit.state_dict()[key]) for key, tensor in names.items()) and len(names) > 20
    assert lumina_util.convert_diffusers_sd_to_alpha_vllm(names, 3).keys() == names.keys()
    lumina_train_util.save_models(str(tmp_path / "a.safetensors"), nextdit, {"k": "v"}, torch.float32)
    assert same(lumina_utils.load_lumina(tmp_path / "a.safetensors", None, "cpu"), nextdit)
    assert lumina_train_util.get_lin_function(256, 4096, 0.5, 1.15)(4096) == pytest.approx(1.15)


def test_a_text_encoder_of_tensors_in_memory():
    from transformers import Gemma2Config, Gemma2Model

    config = Gemma2Config(
        vocab_size=11, hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=256,
    )  # fmt: skip
    model = Gemma2Model(config)
    assert same(lumina_util.load_gemma2(None, torch.float32, "cpu", state_dict=model.state_dict()), model)


class Euler:
    """A scheduler as diffusers has them."""

    def __init__(self, timesteps) -> None:
        self.after = dict(zip(timesteps.tolist(), [*timesteps.tolist()[1:], 0.0]))

    def step(self, velocity, timestep, latents, return_dict):
        return (latents + (self.after[float(timestep)] - float(timestep)) / 1000 * velocity,)


def test_guidance_is_that_of_the_pipeline(nextdit):
    rows = {"hidden_state": torch.randn(2, 5, nextdit.params.cap_feat_dim), "attention_mask": torch.ones(2, 5).long()}
    one, other = ({name: tensor[n : n + 1] for name, tensor in rows.items()} for n in (0, 1))
    request = LuminaRequest(
        prompt="", width=64, height=32, steps=4, seed=3, cfg_scale=3.0, cfg_trunc_ratio=0.4, renorm_cfg=0.9
    )
    pipeline = LuminaPipeline(nextdit, None)
    timesteps = pipeline.sigmas(request)[:-1] * 1000
    with torch.no_grad():
        wanted = pipeline.latents(request, one, other)
    made = lumina_train_util.denoise(
        Euler(timesteps), nextdit, start_noise(3, 16, 4, 8), *one.values(), *other.values(), timesteps, 3.0, 0.4, 0.9
    )
    torch.testing.assert_close(made, wanted)
