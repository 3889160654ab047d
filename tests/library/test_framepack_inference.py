"""The video script of FramePack through its command line, on a tiny base: sections with their texts and pictures, F1,
single frames, MagCache, LoRAs, decoding, refusals."""

from __future__ import annotations

import logging
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from library.core.errors import ConfigError
from library.generation import framepack_inference
from library.generation.framepack_pipeline import FramePackPipeline
from library.generation.framepack_requests import FramePackRequest
from library.safetensors_utils import save_file_atomic
from library.tiny_models import build_tiny
from library.tiny_models.framepack_tiny import build_tiny_framepack
from tests.library.generation.made_again import check_made_again, lines_file
from tests.tiny import video_words

SMALL = ("--video_size", "32", "32", "--latent_window_size=2", "--infer_steps=3")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return build_tiny_framepack(tmp_path_factory.mktemp("tiny"), depth=2, depth_single=4)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> list[str]:
    folder, paths = tmp_path_factory.mktemp("pictures"), []
    for number in range(3):
        pixels = np.random.RandomState(number).randint(0, 255, (40, 60, 3), dtype=np.uint8)
        paths.append(str(folder / f"{number}.png"))
        Image.fromarray(pixels).save(paths[-1])
    return paths


def run(tiny, folder: Path, *more: str, prompt: str = "a red cat") -> list[Path]:
    types = [f"--{name}_dtype=float32" for name in ("dit", "vae", "text_encoder")]
    given = [*video_words(tiny), *types, *SMALL, f"--save_path={folder}", "--seed=7"]
    return framepack_inference.run([*given, *([f"--prompt={prompt}"] if prompt else []), *more])


def latent(tiny, folder: Path, *more: str, prompt: str = "a red cat") -> torch.Tensor:
    (path,) = run(tiny, folder, "--output_type=latent", *more, prompt=prompt)
    return load_file(path)["latent"]


def test_a_video_has_the_asked_size_rate_and_frames_and_its_seed_the_same_bytes(tiny, pictures, tmp_path):
    asked = ["--video_sections=2", f"--image_path={pictures[0]}", "--fps=24"]
    made = [run(tiny, tmp_path / name, *asked)[0] for name in "ab"]
    assert made[0].read_bytes() == made[1].read_bytes()
    names = (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT, cv2.CAP_PROP_FPS, cv2.CAP_PROP_FRAME_COUNT)
    assert [cv2.VideoCapture(str(made[0])).get(name) for name in names] == [32, 32, 24, 2 * 2 * 4 + 1]
    (both,) = run(tiny, tmp_path / "c", *asked, "--output_type=latent")
    with safe_open(both, "pt") as file:
        assert file.get_tensor("latent").shape == (16, 5, 4, 4)
        assert file.metadata()["video_length"] == "17" and file.metadata()["seeds"] == "7"
    decode = [f"--vae={tiny.vae}", "--vae_dtype=float32", "--latent_window_size=2", f"--latent_path={both}", "--fps=24"]
    (decoded,) = framepack_inference.run([*decode, f"--save_path={tmp_path / 'd'}"])
    assert decoded.read_bytes() == made[0].read_bytes()
    (bulk,) = framepack_inference.run([*decode, f"--save_path={tmp_path / 'e'}", "--bulk_decode"])
    assert cv2.VideoCapture(str(bulk)).get(cv2.CAP_PROP_FRAME_COUNT) == 17


@pytest.mark.parametrize(
    ("words", "sections"),
    [(["--video_seconds=1"], 4), (["--video_seconds=0.1"], 1), (["--video_sections=3"], 3)],
)
def test_the_length_is_that_of_whole_sections(tiny, tmp_path, words, sections):
    made = latent(tiny, tmp_path, *words, "--infer_steps=1")
    assert made.shape[1] == 1 + 2 * sections


def test_sections_have_their_texts_and_pictures(tiny, pictures, tmp_path):
    two = ["--video_sections=2", f"--image_path={pictures[0]}"]
    plain = latent(tiny, tmp_path / "a", *two)
    last = latent(tiny, tmp_path / "b", *two, prompt="0:a red cat;;;-1:a blue dog")
    assert torch.equal(plain[:, :1], last[:, :1]) and not torch.equal(plain[:, 3:], last[:, 3:])
    first = latent(tiny, tmp_path / "c", *two, "--f1", prompt="0:a red cat;;;1:a blue dog")
    forward = latent(tiny, tmp_path / "d", *two, "--f1")
    assert torch.equal(first[:, :3], forward[:, :3]) and not torch.equal(first[:, 3:], forward[:, 3:])
    shown = latent(tiny, tmp_path / "e", "--video_sections=2", f"--image_path=0:{pictures[0]};;;1:{pictures[1]}")
    assert torch.equal(shown[:, :1], plain[:, :1]) and not torch.equal(shown[:, 3:], plain[:, 3:])
    ended = latent(tiny, tmp_path / "f", *two, f"--end_image_path={pictures[2]}")
    assert not torch.equal(ended[:, 3:], plain[:, 3:])
    told = latent(tiny, tmp_path / "g", *two, "--custom_system_prompt=Draw it")
    padded = latent(tiny, tmp_path / "h", *two, "--latent_paddings=3")
    assert all(not torch.equal(made, plain) for made in (told, padded))


def test_settings_change_the_video(tiny, tmp_path):
    one = ["--video_sections=1"]
    ways = {
        "plain": [], "guided": ["--guidance_scale=3", "--negative_prompt=a dog"],
        "rescaled": ["--guidance_scale=3", "--negative_prompt=a dog", "--guidance_rescale=0.7"],
        "embedded": ["--embedded_cfg_scale=1"], "shift": ["--flow_shift=1"],
        "rope": ["--rope_scaling_timestep_threshold=500"],
        "magcache": ["--magcache_mag_ratios=1", "--magcache_retention_ratio=0"],
    }  # fmt: skip
    made = [latent(tiny, tmp_path / name, *one, *words) for name, words in ways.items()]
    assert all(not torch.equal(a, b) for n, a in enumerate(made) for b in made[:n])
    assert torch.equal(made[0], latent(tiny, tmp_path / "swap", *one, "--blocks_to_swap=1"))
    assert torch.equal(made[0], latent(tiny, tmp_path / "k", *one, "--magcache_mag_ratios=0", "--magcache_k=0"))


def test_every_solver_and_table_makes_its_own_video(tiny, tmp_path):
    one = ["--video_sections=2"]
    ways = {
        "unipc": [], "dpm": ["--sample_solver=dpm++"], "euler": ["--sample_solver=vanilla"],
        "sde": ["--sample_solver=dpm++sde"], "er_sde": ["--sample_solver=er_sde"], "lcm": ["--sample_solver=lcm"],
        "karras": ["--sigma_table=karras"], "beta": ["--sigma_table=beta", "--sample_solver=dpmpp_3m_sde"],
        "schedule": ["--cfg_schedule=1-2:3", "--negative_prompt=a dog"],
    }  # fmt: skip
    made = [latent(tiny, tmp_path / name, *one, *words) for name, words in ways.items()]
    assert all(not torch.equal(a, b) for n, a in enumerate(made) for b in made[:n])
    again = latent(tiny, tmp_path / "again", *one, "--sample_solver=er_sde")
    assert torch.equal(again, made[list(ways).index("er_sde")])
    lines = lines_file(tmp_path, "a red cat --ss er_sde", "a red cat --sg karras", "a red cat")
    given = [*one, lines, "--output_type=latent"]
    paths = run(tiny, tmp_path / "lines", *given, prompt="")
    for path, name in zip(paths, ("er_sde", "karras", "unipc"), strict=True):
        assert torch.equal(load_file(path)["latent"], made[list(ways).index(name)]), name
    with pytest.raises(ConfigError, match="with the sampler heun, which asks the model twice"):
        run(tiny, tmp_path, lines_file(tmp_path, "a --ss heun"), "--magcache_mag_ratios=0", prompt="")


def test_a_video_starts_from_another_one(tiny, pictures, tmp_path, monkeypatch):
    """Of two sections, made from either end: without steps it is that clip, with all of them a new one."""
    encodings, encoded_clip = [], FramePackPipeline.starting_clip
    monkeypatch.setattr(
        FramePackPipeline, "starting_clip", lambda *given: encodings.append(encoded_clip(*given)) or encodings[-1]
    )
    clip = tmp_path / "clip"
    clip.mkdir()
    for number in range(17):
        Image.open(pictures[number % 3]).save(clip / f"{number:02d}.png")
    two, start = ["--video_sections=2"], f"--video_path={clip}"
    for more in ([], ["--f1"]):
        kept = latent(tiny, tmp_path / "kept", *two, start, "--strength=0", *more)
        encoded = latent(tiny, tmp_path / "direct", *two, start, "--strength=0", "--noise_mode=direct", *more)
        assert torch.equal(kept, encoded) and kept.shape[1] == 5 and not torch.equal(kept[:, 1:3], kept[:, 3:])
        assert torch.equal(kept[:, 1:], encodings[-1][0, :, 1:]), "each section has its own part of the clip"
        half = latent(tiny, tmp_path / "half", *two, start, "--strength=0.67", *more)
        extra = latent(tiny, tmp_path / "extra", *two, start, "--strength=0.67", "--v2_extra_noise=0.1", *more)
        whole = latent(tiny, tmp_path / "whole", *two, start, "--strength=1", *more)
        assert torch.equal(kept[:, 0], half[:, 0]) and not torch.equal(half, extra)
        assert (half - kept).abs().mean() < (whole - kept).abs().mean()
        begun = latent(tiny, tmp_path / "begun", *two, f"--image_path={clip / '00.png'}", *more)
        # noise at sigma 1 covers the clip; pictures alone and in a row are encoded to within rounding
        torch.testing.assert_close(begun, whole, atol=1e-3, rtol=1e-3)
    short = tmp_path / "short"
    short.mkdir()
    Image.open(pictures[0]).save(short / "0.png")
    filled = latent(tiny, tmp_path / "filled", *two, f"--video_path={short}", "--strength=0")
    assert torch.equal(filled[:, 1:], filled[:, :1].expand(-1, 4, -1, -1))
    with pytest.raises(ConfigError, match="--video_path is given for a single frame"):
        run(tiny, tmp_path, start, "--one_frame_inference=default")


def test_a_clip_tells_what_it_is_made_without(caplog):
    request = FramePackRequest(width=32, height=32, prompt="0:a;;;7:b", image_path="2-3:none.png;;;0:first.png", sections=2)
    framepack_inference.tell_effects(request, 2)
    assert "--prompt: what is given for 7 has no effect, of 2 sections" in caplog.text
    assert "--image_path: what is given for 2, 3 has no effect" in caplog.text and "zeros" not in caplog.text
    caplog.clear()
    framepack_inference.tell_effects(FramePackRequest(width=32, height=32, prompt="-1:a;;;0-1:b"), 2)
    assert caplog.messages == ["there is no --image_path; the clip begins with zeros, in the place of a picture"]


def test_calibration_prints_ratios_that_can_be_given(tiny, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        latent(tiny, tmp_path / "a", "--video_sections=1", "--magcache_calibration")
    (told,) = [line for line in caplog.messages if line.startswith("--magcache_mag_ratios ")]
    ratios = told.split(" ")[1]
    assert len(ratios.split(",")) == 3
    latent(tiny, tmp_path / "b", "--video_sections=1", f"--magcache_mag_ratios={ratios}")


def test_lines_have_their_letters(tiny, pictures, tmp_path):
    lines = tmp_path / "lines.txt"
    lines.write_text(
        f"a cat --vs 2 --w 48 --d 1 --s 2 --i {pictures[0]} --fs 3 --g 2 --n dull\n"
        "a cat --f 0.1 --d 2 --mcrr 0 --mct 9 --mck 1\n",
        encoding="utf-8",
    )
    words = ["--output_type=latent", f"--from_file={lines}", "--magcache_mag_ratios=0"]
    first, second = run(tiny, tmp_path / "made", *words, prompt="")
    assert load_file(first)["latent"].shape == (16, 5, 4, 6) and load_file(second)["latent"].shape == (16, 3, 4, 4)


def test_a_single_frame_is_made_beside_control_pictures(tiny, pictures, tmp_path):
    single = ["--one_frame_inference=target_index=1,control_index=0;10,no_post,no_2x,no_4x", "--control_image_path"]
    made = latent(tiny, tmp_path / "a", *single, pictures[0], pictures[1])
    assert made.shape == (16, 1, 4, 4)
    assert not torch.equal(made, latent(tiny, tmp_path / "b", *single, pictures[0], pictures[2]))
    Image.new("L", (60, 40)).save(tmp_path / "mask.png")
    masked = latent(
        tiny, tmp_path / "c", *single, pictures[0], pictures[1], "--control_image_mask_path", str(tmp_path / "mask.png")
    )
    assert not torch.equal(made, masked)
    words = [*single, pictures[0], "--one_frame_auto_resize", "--output_type=latent_images", "--video_size", "48", "64"]
    (folder,) = run(tiny, tmp_path / "d", *words)
    (picture,) = folder.iterdir()
    assert Image.open(picture).size == (64, 48), "the shape of 60x40 at this area"


def test_adapters_of_both_kinds_are_merged(tiny, tmp_path):
    """Also one that was trained on the model whose blocks these are."""
    plain, changed = latent(tiny, tmp_path / "a", "--video_sections=1"), {}
    generator = torch.Generator().manual_seed(4)
    for kind, name, rows in (
        ("own", "transformer_blocks_0_attn_to_q", 64), ("other", "double_blocks_0_img_attn_qkv", 192),
    ):  # fmt: skip
        tensors = {
            f"lora_unet_{name}.lora_down.weight": torch.randn(4, 64, generator=generator),
            f"lora_unet_{name}.lora_up.weight": torch.randn(rows, 4, generator=generator),
            f"lora_unet_{name}.alpha": torch.tensor(4.0),
        }
        save_file_atomic(tensors, tmp_path / f"{kind}.safetensors")
        words = ["--video_sections=1", f"--lora_weight={tmp_path / kind}.safetensors"]
        changed[kind] = latent(tiny, tmp_path / kind, *words)
        hooked = latent(tiny, tmp_path / f"{kind}_hooked", *words, "--no-merge_lora_weights")
        assert torch.allclose(changed[kind], hooked, atol=1e-3)
    assert not torch.equal(plain, changed["own"]) and not torch.equal(plain, changed["other"])


def test_what_is_missing_or_wrong_is_told_at_once(tiny, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(type(framepack_inference.SCRIPT), "load_encoders", lambda *_: pytest.fail("a model is loaded"))
    with pytest.raises(ConfigError) as caught:
        run(
            tiny, tmp_path, "--latent_paddings=a", "--magcache_mag_ratios=x", "--one_frame_inference=no_5x",
            "--control_image_mask_path", "m.png", "--video_sections=0",
        )  # fmt: skip
    told = "\n".join(caught.value.problems)
    for part in (
        "--latent_paddings is 'a'", "--magcache_mag_ratios is 'x'", "--one_frame_inference has 'no_5x'",
        "--control_image_mask_path has 1 files for 0", "--video_sections is 0",
    ):
        assert part in told, part
    with pytest.raises(ConfigError, match="needed: a SigLIP image encoder"):
        run(tiny, tmp_path, f"--image_encoder={tiny.vae}")
    with pytest.raises(ConfigError, match="hv_generate_video.py makes videos with such a model"):
        run(tiny, tmp_path, f"--dit={build_tiny('hunyuan_video', tmp_path / 'other').denoiser}")
    with pytest.raises(ConfigError, match="the sections 3-1 of a prompt run backwards"):
        run(tiny, tmp_path, prompt="3-1:x;;;0:y")
    with pytest.raises(ConfigError) as caught:
        run(tiny, tmp_path, "--image_path=0:none.png;;;1:other.png", "--riflex_index=4", "--image_encoder=no")
    told = "\n".join(caught.value.problems)
    for part in ("none.png", "other.png", "--riflex_index is 4", "--image_encoder is no"):
        assert part in told, part


def test_files_are_made_again_of_what_they_tell(tiny, tmp_path):
    lines = lines_file(tmp_path, "a cat --vs 1 --s 1 --d 3 --mct 0.3")
    made = run(tiny, tmp_path / "first", lines, prompt="")
    check_made_again(framepack_inference.run, made, "save_path")
