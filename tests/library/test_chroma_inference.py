"""The image script with `--model_type chroma`: guidance by a negative prompt alone, what means nothing there,
adapters."""

from __future__ import annotations

import io
import logging
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from library.core.errors import ConfigError
from library.generation import chroma_pipeline, flux_inference
from library.generation.chroma_options import ChromaModelOptions, ChromaRequest
from library.generation.sampling_utils import start_noise
from library.safetensors_utils import save_file_atomic
from library.tiny_models.chroma_tiny import TinyChroma, build_tiny_chroma
from tests.library.generation.made_again import check_made_again, lines_file


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> TinyChroma:
    return build_tiny_chroma(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def adapter(tiny: TinyChroma) -> Path:
    """A LoRA with weights that show, for the denoiser and for T5."""
    generator, tensors = torch.Generator().manual_seed(4), {}
    for name, size_in, size_out in (
        ("lora_unet_double_blocks_0_img_attn_qkv", 32, 96), ("lora_unet_single_blocks_0_linear2", 160, 32),
        ("lora_te3_encoder_block_0_layer_0_SelfAttention_q", 24, 16),
    ):  # fmt: skip
        tensors[f"{name}.lora_down.weight"] = torch.randn(4, size_in, generator=generator)
        tensors[f"{name}.lora_up.weight"] = torch.randn(size_out, 4, generator=generator)
        tensors[f"{name}.alpha"] = torch.tensor(4.0)
    save_file_atomic(tensors, tiny.folder / "adapter.safetensors")
    return tiny.folder / "adapter.safetensors"


def arguments(tiny: TinyChroma, folder: Path, *more: str) -> list[str]:
    return [
        "--model_type=chroma", f"--ckpt_path={tiny.chroma}", f"--ae={tiny.ae}", f"--t5xxl={tiny.t5xxl}",
        "--t5xxl_max_token_length=16", "--dtype=float32", "--width=64", "--height=32", "--steps=2", "--seed=5",
        f"--output_dir={folder}", *more,
    ]  # fmt: skip


def pictures(tiny: TinyChroma, folder: Path, *more: str) -> list[bytes]:
    return [Image.open(path).tobytes() for path in flux_inference.run(arguments(tiny, folder, *more))]


def picture(tiny: TinyChroma, folder: Path, *more: str) -> bytes:
    (only,) = pictures(tiny, folder, *more)
    return only


def test_guidance_leads_away_from_the_negative_prompt(tiny: TinyChroma, tmp_path: Path) -> None:
    plain, guided = picture(tiny, tmp_path), picture(tiny, tmp_path, "--cfg_scale=4")
    assert plain == picture(tiny, tmp_path, "--negative_prompt=blue")  # a scale of 1 is none
    assert guided == picture(tiny, tmp_path, "--cfg_scale=4", "--negative_prompt=")
    others = [picture(tiny, tmp_path, *more) for more in (["--cfg_scale=4", "--negative_prompt=blue"], ["--steps=3"])]
    assert len({plain, guided, *others}) == 4


def test_both_prompts_in_one_batch_are_each_alone(tiny: TinyChroma) -> None:
    """The steps of the guided picture, written out: two forwards per step along the schedule of the tokens."""
    options = ChromaModelOptions(
        ckpt_path=str(tiny.chroma), t5xxl=str(tiny.t5xxl), ae=str(tiny.ae), dtype="float32", t5xxl_max_token_length=16
    )
    maker = chroma_pipeline.load_pipeline(options)
    request = ChromaRequest(
        prompt="a red cat", negative_prompt="the", width=64, height=32, steps=3, seed=3, cfg_scale=3.5
    )
    made = maker.generate(request)
    with torch.no_grad():
        positive, negative = (
            maker.strategies.encode(maker.text_encoders, maker.strategies.tokenize.tokenize(text))
            for text in ("a red cat", "the")
        )
    latents, sigmas = start_noise(3, 16, 4, 8), maker.pipeline.sigmas(request)
    assert sigmas[0] == 1 and sigmas[-1] == 0 and len(sigmas) == 4
    with torch.no_grad():
        for now, after in zip(sigmas[:-1], sigmas[1:]):
            toward, away = (
                maker.pipeline.velocity(latents, 1000 * now[None], given, request) for given in (positive, negative)
            )
            latents = latents + (after - now) * (away + 3.5 * (toward - away))
    assert torch.allclose(made, latents, atol=1e-5)


def test_what_means_nothing_is_told_and_changes_nothing(tiny: TinyChroma, tmp_path: Path, caplog) -> None:
    plain = picture(tiny, tmp_path)
    with caplog.at_level(logging.INFO):
        idle = ("--guidance=7", "--clip_l=/no/such/file", "--clip_l_dtype=fp16", "--apply_t5_attn_mask")
        assert picture(tiny, tmp_path, *idle) == plain
    told = "\n".join(caplog.messages)
    assert "--guidance 7.0 is ignored: Chroma has no embedded guidance" in told and "never attends to padding" in told
    assert "--clip_l /no/such/file is ignored: Chroma reads prompts through T5 alone" in told


def test_adapters_are_hooked_or_merged(tiny: TinyChroma, adapter: Path, tmp_path: Path) -> None:
    base = picture(tiny, tmp_path)
    hooked = picture(tiny, tmp_path, "--lora_weights", f"{adapter};0.8")
    merged = picture(tiny, tmp_path, "--lora_weights", f"{adapter};0.8", "--merge_lora_weights")
    assert picture(tiny, tmp_path, "--lora_weights", f"{adapter};0") == base != hooked
    assert max(abs(a - b) for a, b in zip(hooked, merged)) <= 1


def test_lines_are_typed_or_in_a_file(tiny: TinyChroma, tmp_path: Path, monkeypatch, capsys) -> None:
    lines = ["the dog --d 9 --c 3 --n blue", "a cat --w 32 --s 1"]
    (tmp_path / "prompts.txt").write_text("\n".join(lines), encoding="utf-8")
    from_file = pictures(tiny, tmp_path / "a", f"--from_file={tmp_path / 'prompts.txt'}")
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join([lines[0], "a cat --x 3", lines[1], "", ""])))
    assert pictures(tiny, tmp_path / "b", "--interactive") == from_file and len(set(from_file)) == 2
    assert "unknown option --x" in capsys.readouterr().err


def test_a_denoiser_in_eight_bits(tiny: TinyChroma, tmp_path: Path) -> None:
    narrow = picture(tiny, tmp_path, "--dtype=bfloat16", "--flux_dtype=fp8", "--offload")
    assert narrow != picture(tiny, tmp_path, "--dtype=bfloat16")


def test_wrong_files_are_named_with_the_way_out(tiny: TinyChroma, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        flux_inference.run(["--model_type=chroma", f"--ckpt_path={tiny.ae}", f"--t5xxl={tmp_path / 'none'}"])
    ckpt, t5, ae = sorted(
        caught.value.problems, key=lambda text: ("--ckpt_path", "--t5xxl", "--ae").index(text.split()[0])
    )
    assert "autoencoder" in ckpt and "needed: a Chroma denoiser" in ckpt and "no such file" in t5 and "not given" in ae
    with pytest.raises(
        ConfigError, match="flux_minimal_inference.py --model_type chroma makes images with such a model"
    ):
        flux_inference.run([f"--ckpt_path={tiny.chroma}"])
    with pytest.raises(ConfigError, match="--model_type is flux; needed for Chroma"):
        ChromaModelOptions(model_type="flux")


def test_files_are_made_again_of_what_they_tell(tiny, tmp_path):
    lines = lines_file(tmp_path, "a cat", "a dog --s 1 --l 2 --n blue")
    made = flux_inference.run(arguments(tiny, tmp_path / "first", lines))
    check_made_again(flux_inference.run, made, "output_dir")
