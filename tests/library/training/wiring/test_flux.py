"""The FLUX family: options, checks of files, prediction and loss through the real objective, metadata."""

import dataclasses

import pytest
import torch

from library.core.errors import ConfigError
from library.core.keyed_random import StepDraws
from library.core.options import Config
from library.dataset import CachingOptions
from library.training.accelerator_setup import prepare_runtime
from library.training.computing_options import MemoryOptions
from library.training.losses.reduction import per_sample_loss
from library.training.option_groups import SHARED_GROUPS
from library.training.parser_common import parse_command
from library.training.run import Models
from library.training.timestep_samplers import TimestepOptions
from library.training.wiring.flux import FluxFamily, FluxOptions
from tests.tiny import build_tiny_flux

GROUPS = [*SHARED_GROUPS, FluxOptions, CachingOptions, TimestepOptions]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return build_tiny_flux(tmp_path_factory.mktemp("tiny"))


def family_of(tiny, **options) -> FluxFamily:
    files = {
        "pretrained_model_name_or_path": str(tiny.flux), "clip_l": str(tiny.clip_l), "t5xxl": str(tiny.t5xxl),
        "ae": str(tiny.ae), "clip_l_tokenizer": str(tiny.clip_l_tokenizer), "t5xxl_max_token_length": 16,
    }
    return FluxFamily(Config.read({**files, **options}, GROUPS))


def loaded(family: FluxFamily) -> tuple[Models, dict[str, torch.Tensor]]:
    """Models with the denoiser and the conditioning of two captions."""
    runtime = prepare_runtime(family.config)
    strategies = family.strategies()
    encoders = family.load_text_encoders(runtime)
    with torch.no_grad():
        conditioning = strategies.encode(encoders, strategies.tokenize.tokenize(["a red cat", "the dog"]))
    return Models(vae=family.load_vae(runtime), denoiser=family.load_denoiser(runtime)), conditioning


def sample_of(family: FluxFamily):
    draws = StepDraws(1, 0, (0, 1))
    latents = draws.normal("latents", (16, 4, 4))
    return family.objective().corrupt(latents, draws.normal("noise", (16, 4, 4)), torch.tensor([0.3, 0.8]), draws)


def test_check_accepts_the_set_and_names_every_wrong_file(tiny, tmp_path):
    family_of(tiny).check()
    with pytest.raises(ConfigError) as caught:
        family_of(tiny, clip_l=None, t5xxl=str(tmp_path / "none.safetensors"), ae=str(tiny.flux)).check()
    text = str(caught.value)
    assert len(caught.value.problems) == 3
    assert (
        "--clip_l is not given" in text and "none.safetensors" in text and "--ae" in text and "FLUX.1 denoiser" in text
    )


def test_check_knows_sizes_that_do_not_belong_together(tiny, tmp_path):
    from library.safetensors_utils import load_safetensors, read_header, save_file_atomic

    weights, (_, metadata) = load_safetensors(tiny.t5xxl), read_header(tiny.t5xxl)
    weights["shared.weight"] = torch.randn(160, 26)
    save_file_atomic(weights, tmp_path / "t5.safetensors", metadata)
    with pytest.raises(ConfigError, match="26.*takes 24"):
        family_of(tiny, t5xxl=str(tmp_path / "t5.safetensors")).check()


def test_check_knows_the_block_swap_limit_and_the_timestep_modes(tiny):
    with pytest.raises(ConfigError) as caught:
        family_of(tiny, blocks_to_swap=3, timestep_sampling="tests.nowhere:Law").check()
    assert "--blocks_to_swap is 3" in str(caught.value) and "tests.nowhere" in str(caught.value)


def test_split_mode_is_a_number_of_swapped_blocks_where_none_is_given():
    """So that the plan of memory counts them, and `auto` and 0 mean what they say."""

    def swapped(*words: str) -> object:
        return parse_command(["--split_mode", *words], "flux", "network").config[MemoryOptions].blocks_to_swap

    assert swapped() == 18 and swapped("--blocks_to_swap=auto") == "auto" and swapped("--blocks_to_swap=0") == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"model_prediction_type": "additive"}, "use raw"),
        ({"t5xxl_max_token_length": 0}, "t5xxl_max_token_length is 0"),
        ({"guidance_scale": -1.0}, "guidance_scale is -1.0"),
    ],
)
def test_options_out_of_range_are_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        FluxOptions(**options)


def test_prediction_has_the_shape_of_the_latents_and_the_velocity_as_target(tiny):
    family = family_of(tiny, guidance_scale=2.0)
    models, conditioning = loaded(family)
    sample = sample_of(family)
    output = family.predict(models, sample, conditioning, None)
    assert output.pred.shape == sample.latents.shape
    torch.testing.assert_close(output.target, sample.noise - sample.latents)


def test_sigma_scaled_with_sigma_sqrt_is_the_raw_loss(tiny):
    losses = []
    for options in ({}, {"model_prediction_type": "sigma_scaled", "weighting_scheme": "sigma_sqrt"}):
        family = family_of(tiny, **options)
        models, conditioning = loaded(family)
        sample = sample_of(family)
        output = family.predict(models, sample, conditioning, None)
        weight = family.objective().loss_weight(sample)
        losses.append(per_sample_loss((output.pred - output.target).square(), flow_weight=weight))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-6)


def test_the_mask_matters_only_with_its_flag(tiny):
    results = []
    for flag in (False, True):
        family = family_of(tiny, apply_t5_attn_mask=flag)
        models, conditioning = loaded(family)
        ones = {**conditioning, "t5_attn_mask": torch.ones_like(conditioning["t5_attn_mask"])}
        sample = sample_of(family)
        pair = [family.predict(models, sample, c, None).pred for c in (conditioning, ones)]
        results.append(torch.allclose(pair[0], pair[1]))
    assert results == [True, False]


def test_strategies_follow_the_caching_options(tiny):
    plain = family_of(tiny).strategies()
    assert plain.text_encoder_outputs_caching is None and plain.latents_caching is not None
    cached = family_of(tiny, cache_text_encoder_outputs=True, apply_t5_attn_mask=True).strategies(trained=[True, False])
    text = cached.text_encoder_outputs_caching
    assert (
        text.live == {"l_pooled"}
        and not text.cache_to_disk
        and text.max_token_length == 16
        and len(text.model_identity) == 32
    )
    assert plain.tokenize.tokenize("a cat")[1].shape == (1, 16)


def test_dev_and_schnell_are_told_apart_by_the_file(tiny, tmp_path):
    schnell = build_tiny_flux(tmp_path, guidance=False)
    family = family_of(schnell, t5xxl_max_token_length=None)
    assert family.modelspec()["architecture"] == "flux-1-schnell" and family.max_token_length == 256
    assert family_of(tiny).modelspec() == {
        "architecture": "flux-1-dev", "implementation": "https://github.com/black-forest-labs/flux",
    }
    assert family_of(tiny, t5xxl_max_token_length=None).max_token_length == 512


def test_metadata_holds_the_known_keys(tiny):
    metadata = family_of(tiny, timestep_sampling="shift", guidance_scale=1.0).metadata()
    assert metadata["ss_base_model_version"] == "flux1" and metadata["ss_model_prediction_type"] == "raw"
    assert metadata["ss_timestep_sampling"] == "shift" and metadata["ss_guidance_scale"] == 1.0
    assert len(metadata) == 12


def test_eight_bit_text_encoders_still_encode(tiny):
    family = family_of(tiny)
    runtime = dataclasses.replace(
        prepare_runtime(family.config), text_form="fp8", weight_dtype=torch.bfloat16
    )
    encoders = family.load_text_encoders(runtime)
    strategies = family.strategies()
    with torch.no_grad():
        outputs = strategies.text_encoding.encode_tokens(
            strategies.tokenize, encoders, strategies.tokenize.tokenize("a red cat")
        )
    assert encoders[1].encoder.block[0].layer[0].SelfAttention.q.weight.dtype == torch.float8_e4m3fn
    assert all(torch.isfinite(tensor).all() for tensor in outputs)


def test_an_image_of_the_family(tiny):
    from library.training.sampling_prompts import SamplePrompt

    family = family_of(tiny)
    models, conditioning = loaded(family)
    prompt = family.sample_defaults(SamplePrompt(prompt="a red cat", width=40, height=33, sample_steps=2, seed=3))
    assert (prompt.width, prompt.height, prompt.scale, prompt.guidance_scale) == (32, 32, 1.0, 3.5)
    one = {name: tensor[:1] for name, tensor in conditioning.items()}
    image = family.pipeline(models).sample(prompt, one, None)
    assert image.size == (32, 32)
    assert image.tobytes() == family.pipeline(models).sample(prompt, one, None).tobytes()
