"""The video script of HunyuanVideo through its command line, on a tiny base: videos, guidance, pictures and clips to
start from, LoRAs, latents, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from library.core.errors import ConfigError
from library.generation import hunyuan_video_inference
from library.generation.recorded_requests import ENTRY
from library.hunyuan_video_utils import load_hunyuan_video
from library.safetensors_utils import save_file_atomic
from library.tiny_models.hunyuan_video_tiny import build_tiny_hunyuan_video
from tests.library.generation.made_again import check_made_again, lines_file
from tests.tiny import video_words

SIZE = ("--video_size", "32", "48")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return build_tiny_hunyuan_video(tmp_path_factory.mktemp("tiny"), depth=2, depth_single=4)


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """From image to video, not distilled, as SkyReels V1."""
    return build_tiny_hunyuan_video(tmp_path_factory.mktemp("shown"), shown=True, guidance=False)


@pytest.fixture(scope="module")
def adapter(tiny) -> Path:
    generator, tensors = torch.Generator().manual_seed(4), {}
    for name, rows in (("double_blocks_0_img_attn_qkv", 96), ("single_blocks_1_modulation_linear", 96)):
        tensors[f"lora_unet_{name}.lora_down.weight"] = torch.randn(4, 32, generator=generator) / 2
        tensors[f"lora_unet_{name}.lora_up.weight"] = torch.randn(rows, 4, generator=generator) / 2
        tensors[f"lora_unet_{name}.alpha"] = torch.tensor(4.0)
    save_file_atomic(tensors, tiny.folder / "lora.safetensors")
    return tiny.folder / "lora.safetensors"


def run(tiny, folder: Path, *more: str) -> list[Path]:
    given = [
        *video_words(tiny), "--dit_dtype=float32", "--vae_dtype=float32", "--text_encoder_dtype=float32",
        "--infer_steps=2", "--video_length=5", *SIZE, f"--save_path={folder}", "--seed=7", "--prompt=a red cat",
    ]  # fmt: skip
    return hunyuan_video_inference.run([*given, *more])


def latent(tiny, folder: Path, *more: str) -> torch.Tensor:
    (path,) = run(tiny, folder, "--output_type=latent", *more)
    return load_file(path)["latent"]


def test_a_video_has_the_asked_size_rate_and_frames_and_its_seed_the_same_bytes(tiny, tmp_path):
    made = [run(tiny, tmp_path / name)[0] for name in "ab"]
    assert made[0].read_bytes() == made[1].read_bytes()
    capture = cv2.VideoCapture(str(made[0]))
    names = (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT, cv2.CAP_PROP_FPS, cv2.CAP_PROP_FRAME_COUNT)
    assert [capture.get(name) for name in names] == [48, 32, 24, 5]
    (latents,) = run(tiny, tmp_path / "c", "--output_type=latent")
    assert load_file(latents)["latent"].shape == (16, 2, 4, 6)
    decode = [f"--vae={tiny.vae}", "--vae_dtype=float32", f"--latent_path={latents}"]
    (decoded,) = hunyuan_video_inference.run([*decode, f"--save_path={tmp_path / 'd'}"])
    assert decoded.read_bytes() == made[0].read_bytes(), "latents are those of the denoiser"


def test_settings_change_the_video_and_equal_ones_do_not(tiny, tmp_path):
    ways = {
        "plain": [], "guided": ["--guidance_scale=3", "--negative_prompt=a dog"],
        "embedded": ["--embedded_cfg_scale=1"],
        "shift": ["--flow_shift=1"], "tiles": ["--vae_spatial_tile_sample_min_size=32"],
    }  # fmt: skip
    made = {name: latent(tiny, tmp_path / name, *words) for name, words in ways.items()}
    assert torch.equal(made["plain"], made["tiles"])
    different = [made[name] for name in ("plain", "guided", "embedded", "shift")]
    assert all(not torch.equal(a, b) for n, a in enumerate(different) for b in different[:n])
    apart = latent(tiny, tmp_path / "apart", *ways["guided"], "--split_uncond")
    assert torch.allclose(apart, made["guided"], atol=1e-4)
    swapped = latent(tiny, tmp_path / "swapped", "--blocks_to_swap=1", "--img_in_txt_in_offloading", "--fp8_llm=false")
    assert torch.equal(swapped, made["plain"])
    for name in ("fp8", "fp8_scaled", "fp8_llm", "fp8_fast"):
        eight = latent(tiny, tmp_path / name, f"--{name}", *(["--fp8_scaled"] if name == "fp8_fast" else []))
        made[name] = eight
        difference = float((eight - made["plain"]).std() / made["plain"].std())
        assert 0 < difference < 0.2, name
    assert not torch.equal(made["fp8_fast"], made["fp8_scaled"])


def test_each_line_has_its_letters(tiny, tmp_path):
    lines = tmp_path / "lines.txt"
    lines.write_text(
        "a red cat --d 7\na dog --w 32 --h 32 --f 1 --s 1 --d 9 --g 2 --e 3 --fs 4 --n a cat\n", encoding="utf-8"
    )
    given = ["--dit_dtype=float32", "--vae_dtype=float32", "--infer_steps=2", "--video_length=5", *SIZE]
    first, second = hunyuan_video_inference.run(
        [*video_words(tiny), *given, "--output_type=latent", f"--from_file={lines}", f"--save_path={tmp_path / 'made'}"]
    )
    assert load_file(first)["latent"].shape == (16, 2, 4, 6) and load_file(second)["latent"].shape == (16, 1, 4, 4)


def test_a_picture_is_the_first_frame_of_models_that_are_shown_one(tiny, shown, tmp_path):
    pictures = []
    for level in (30, 220):
        Image.fromarray(np.full((40, 60, 3), level, np.uint8)).save(tmp_path / f"{level}.png")
        pictures.append(str(tmp_path / f"{level}.png"))
    made = [latent(shown, tmp_path / "shown", f"--image_path={path}", "--guidance_scale=2") for path in pictures]
    assert made[0].shape == (16, 2, 4, 6) and not torch.equal(*made)
    with pytest.raises(ConfigError, match="--image_path is not given, and .* is a model from image to video"):
        run(shown, tmp_path / "x")
    with pytest.raises(ConfigError, match="is a model from text to video, which is shown no picture"):
        run(tiny, tmp_path / "x", f"--image_path={pictures[0]}")
    with pytest.raises(ConfigError, match="--dit_in_channels is 16"):
        run(shown, tmp_path / "x", f"--image_path={pictures[0]}", "--dit_in_channels=16")


def test_a_video_starts_from_another(tiny, tmp_path):
    (source,) = run(tiny, tmp_path / "source")
    kept, changed = (latent(tiny, tmp_path / s, f"--video_path={source}", f"--strength={s}") for s in ("0.4", "0.6"))
    assert kept.shape == changed.shape and not torch.equal(kept, changed)
    longer = latent(tiny, tmp_path / "longer", f"--video_path={source}", "--strength=0", "--video_length=9")
    assert torch.equal(longer[:, :2], kept) and torch.equal(longer[:, 2], kept[:, 1]), "filled up at the end"


def test_adapters_are_merged_hooked_left_out_and_written(tiny, adapter, tmp_path):
    plain, lora = latent(tiny, tmp_path / "plain"), ["--lora_weight", str(adapter)]
    made = latent(tiny, tmp_path / "merged", *lora)
    assert not torch.equal(plain, made)
    assert torch.allclose(made, latent(tiny, tmp_path / "hooked", *lora, "--no-merge_lora_weights"), atol=1e-4)
    assert torch.allclose(made, latent(tiny, tmp_path / "lycoris", *lora, "--lycoris"), atol=1e-4)
    assert torch.allclose(plain, latent(tiny, tmp_path / "none", *lora, "--lora_multiplier=0"), atol=1e-5)
    double = latent(tiny, tmp_path / "double", *lora, "--exclude_single_blocks")
    assert torch.equal(double, latent(tiny, tmp_path / "pattern", *lora, "--include_patterns", "double"))
    assert not torch.equal(double, made)
    both = latent(tiny, tmp_path / "both", *lora, str(adapter), "--include_patterns", "double", "single")
    assert torch.allclose(both, made, atol=1e-4), "each file has its own pattern"
    target = tmp_path / "merged.safetensors"
    assert hunyuan_video_inference.run(
        [f"--dit={tiny.denoiser}", "--dit_dtype=float32", *lora, f"--save_merged_model={target}"]
    ) == [target]
    name = "double_blocks.0.img_attn_qkv.weight"
    models = (load_hunyuan_video(path, torch.float32, "cpu") for path in (tiny.denoiser, target))
    before, after = (model.state_dict()[name] for model in models)
    tensors = load_file(adapter)
    part = "lora_unet_double_blocks_0_img_attn_qkv"
    change = tensors[f"{part}.lora_up.weight"] @ tensors[f"{part}.lora_down.weight"]
    assert torch.allclose(after - before, change, atol=1e-5)


def test_what_is_missing_or_wrong_is_told_at_once(tiny, tmp_path, monkeypatch):
    script = type(hunyuan_video_inference.SCRIPT)
    monkeypatch.setattr(script, "load_encoders", lambda *_: pytest.fail("a model is loaded"))
    with pytest.raises(ConfigError) as caught:
        hunyuan_video_inference.run([f"--dit={tiny.vae}", f"--text_encoder1={tiny.denoiser}", "--video_path=no.mp4"])
    told = "\n".join(caught.value.problems)
    for part in (
        "--save_path is not given", "--prompt is not given", f"--dit is {tiny.vae}",
        f"--text_encoder1 is {tiny.denoiser}", "--text_encoder2", "--vae", "--video_path is no.mp4",
    ):
        assert part in told, part
    with pytest.raises(ConfigError, match="--compile_args has the mode 'fast'"):
        run(tiny, tmp_path, "--compile_args", "inductor", "fast", "auto", "False")
    with pytest.raises(ConfigError, match="--blocks_to_swap"):
        run(tiny, tmp_path, "--blocks_to_swap=9")


def test_files_are_made_again_of_what_they_tell(tiny, tmp_path):
    made = run(tiny, tmp_path / "first", lines_file(tmp_path, "a cat", "a dog --w 32 --s 1 --f 1 --fs 2"))
    check_made_again(hunyuan_video_inference.run, made, "save_path")


def test_the_second_prompt_is_read_by_clip_alone_and_recorded(tiny, tmp_path):
    def made(prompt: str, *more: str) -> torch.Tensor:
        return latent(tiny, tmp_path, f"--prompt={prompt}", *more)

    plain, both = made("a red cat"), made("a red cat", "--prompt_2=a red cat")
    assert torch.equal(plain, both)
    mixed = made("a red cat", "--prompt_2=the dog")
    assert not torch.equal(mixed, plain) and not torch.equal(mixed, made("the dog"))
    assert torch.equal(made("the dog", "--prompt_2=the dog"), made("the dog"))

    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "pet.txt").write_text("the dog\n", encoding="utf-8")
    drawn = ["--prompt_2=__pet__", f"--prompt_wildcards={tmp_path / 'words'}", "--output_type=latent"]
    (path,) = run(tiny, tmp_path / "drawn", *drawn)
    assert torch.equal(load_file(path)["latent"], mixed)
    with safe_open(path, "pt") as file:
        told = file.metadata()
    assert told["prompt_2"] == "the dog" and json.loads(told[ENTRY])["options"]["prompt_2"] == "the dog"
