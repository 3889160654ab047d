"""Samples of a training and pictures of image scripts come from one pipeline: equal settings give equal bytes."""

import pytest
from PIL import Image

from library.core.registry import import_target
from library.families.registry import record_of
from library.generation import (
    anima_inference,
    flux_inference,
    hunyuan_image_inference,
    lumina_inference,
    pipeline_class,
    sdxl_inference,
)
from library.generation.flux_options import FluxRequest
from library.generation.gen_img import script as gen_img
from library.generation.pipeline import PicturePipeline
from library.generation.requests import SAMPLE_NAMES, PictureRequest, SampledRequest, request_of
from library.tiny_models import build_tiny
from library.training.accelerator_setup import prepare_runtime
from library.training.hooks.sample import encode_sample_prompts
from library.training.parser_common import parse
from library.training.run import Models
from library.training.sampling_prompts import SamplePrompt

PROMPT = SamplePrompt(
    prompt="a red cat", negative_prompt="the dog", width=96, height=64, seed=5, sample_steps=3, scale=4.0
)


def sample_of(family_name: str, tiny, *options: str) -> bytes:
    """The pixels of a training's sample."""
    config = parse([*tiny.arguments(), "--network_module=networks.lora", *options], family_name, "network")
    family = import_target(record_of(family_name).family)(config)
    runtime, strategies = prepare_runtime(config), family.strategies()
    prompt = family.sample_defaults(PROMPT)
    texts = encode_sample_prompts(family, strategies, family.load_text_encoders(runtime), [prompt])
    models = Models(vae=family.load_vae(runtime), denoiser=family.load_denoiser(runtime))
    negative = texts[strategies.negative_key(prompt.negative_prompt)]
    return family.pipeline(models).sample(prompt, texts[prompt.prompt], negative).tobytes()


def picture_of(paths) -> bytes:
    (path,) = paths
    return Image.open(path).tobytes()


PICTURE = ("--prompt=a red cat", "--negative_prompt=the dog", "--seed=5", "--dtype=float32")
SIZE = ("--width=96", "--height=64", "--steps=3", "--cfg_scale=4")


def test_flux(tmp_path):
    tiny = build_tiny("flux", tmp_path / "tiny")
    files = (
        f"--ckpt_path={tiny.flux}",
        f"--ae={tiny.ae}",
        f"--clip_l={tiny.clip_l}",
        f"--t5xxl={tiny.t5xxl}",
        f"--clip_l_tokenizer={tiny.clip_l_tokenizer}",
    )
    length = "--t5xxl_max_token_length=16"
    made = flux_inference.run([*files, *PICTURE, *SIZE, length, f"--output_dir={tmp_path}"])
    assert picture_of(made) == sample_of("flux", tiny, length)


def test_chroma(tmp_path):
    tiny, length = build_tiny("chroma", tmp_path / "tiny"), "--t5xxl_max_token_length=16"
    files = ("--model_type=chroma", f"--ckpt_path={tiny.chroma}", f"--ae={tiny.ae}", f"--t5xxl={tiny.t5xxl}")
    made = flux_inference.run([*files, *PICTURE, *SIZE, length, f"--output_dir={tmp_path}"])
    assert picture_of(made) == sample_of("chroma", tiny, length)


def test_anima(tmp_path):
    tiny = build_tiny("anima", tmp_path / "tiny")
    made = anima_inference.run([
        f"--dit={tiny.anima}", f"--vae={tiny.vae}", f"--text_encoder={tiny.qwen3}",
        f"--qwen3_tokenizer={tiny.qwen3_tokenizer}",
        f"--t5_tokenizer_path={tiny.t5_tokenizer}", "--qwen3_max_token_length=24", "--t5_max_token_length=32", *PICTURE,
        "--infer_steps=3",
        "--guidance_scale=4", "--flow_shift=3", "--image_size", "64", "96", f"--save_path={tmp_path}",
    ])  # fmt: skip
    assert picture_of(made) == sample_of("anima", tiny, "--sample_sampler=euler")


def test_lumina(tmp_path):
    tiny = build_tiny("lumina", tmp_path / "tiny")
    system = "--system_prompt=the dog"
    made = lumina_inference.run([
        f"--pretrained_model_name_or_path={tiny.lumina}", f"--ae_path={tiny.ae}", f"--gemma2_path={tiny.gemma2}",
        "--gemma2_max_token_length=32", system, *PICTURE, "--gemma2_dtype=float32", "--ae_dtype=float32", "--steps=3",
        "--image_width=96", "--image_height=64", "--guidance_scale=4", f"--output_dir={tmp_path}",
    ])  # fmt: skip
    assert picture_of(made) == sample_of("lumina", tiny, system)


def test_hunyuan_image(tmp_path):
    tiny = build_tiny("hunyuan_image", tmp_path / "tiny")
    made = hunyuan_image_inference.run([
        f"--dit={tiny.denoiser}", f"--vae={tiny.vae}", f"--text_encoder={tiny.text_encoder}", f"--byt5={tiny.byt5}",
        f"--text_encoder_tokenizer={tiny.tokenizer}", *PICTURE, "--infer_steps=3", "--guidance_scale=4",
        "--image_size", "64", "96", f"--save_path={tmp_path}",
    ])  # fmt: skip
    assert picture_of(made) == sample_of("hunyuan_image", tiny)


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_a_unet(tmp_path, kind):
    tiny, family = build_tiny(kind, tmp_path / "tiny"), "sdxl" if kind == "sdxl" else "sd"
    is_v2 = kind == "sd2"
    flags = {"sd2": ["--v2", "--v_parameterization"], "sdxl": ["--sdxl"]}.get(kind, [])
    made = gen_img.run([
        f"--ckpt={tiny.model}", f"--clip_tokenizer={tiny.tokenizer}", *flags, "--W=96", "--H=64", "--steps=3",
        "--sampler=euler_a",
        "--prompt", "a red cat --n the dog --d 5 --l 4", f"--outdir={tmp_path / 'a'}",
    ])  # fmt: skip
    sample = sample_of(family, tiny, "--sample_sampler=euler_a", *(["--v_parameterization"] if is_v2 else []))
    assert picture_of(made) == sample
    if kind == "sdxl":
        files = (f"--ckpt_path={tiny.model}", f"--clip_tokenizer={tiny.tokenizer}", f"--output_dir={tmp_path / 'b'}")
        assert picture_of(sdxl_inference.run([*files, *PICTURE, *SIZE, "--sampler=euler_a"])) == sample


@pytest.mark.parametrize("name", ["flux", "sd", "sdxl", "anima", "lumina", "hunyuan_image"])
def test_the_record_names_the_pipeline(name):
    assert issubclass(pipeline_class(name), PicturePipeline)
    assert record_of(name).pipeline == f"library.generation.{name}_pipeline:{pipeline_class(name).__name__}"


def test_requests_take_what_they_know_of_a_sample_prompt():
    prompt = SamplePrompt(
        prompt="a", width=64, height=32, sample_steps=7, scale=2.0, sample_sampler="lms", flow_shift=3.0, cfg_scale=9.0
    )
    assert request_of(SampledRequest, prompt, SAMPLE_NAMES) == SampledRequest(
        prompt="a", width=64, height=32, steps=7, cfg_scale=2.0, sampler="lms"
    )
    assert request_of(PictureRequest, prompt, SAMPLE_NAMES).frames == 1
    assert (
        request_of(PictureRequest, SamplePrompt(prompt="a", width=8, height=8, frame_count=5), SAMPLE_NAMES).frames == 5
    )


def test_guidance_needs_a_scale_and_for_flux_a_text():
    settings = {"prompt": "a", "width": 8, "height": 8}
    assert (
        PictureRequest(**settings).negative_text is None
        and PictureRequest(**settings, cfg_scale=2.0).negative_text == ""
    )
    assert FluxRequest(**settings, cfg_scale=2.0).negative_text is None
    assert FluxRequest(**settings, cfg_scale=2.0, negative_prompt="b").negative_text == "b"
