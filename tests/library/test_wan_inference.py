"""The video script of Wan through its command line, on tiny bases: tasks, two experts, guidance, solvers, LoRAs, single
frames, refusals."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from library.core.errors import ConfigError
from library.generation import wan_inference
from library.safetensors_utils import save_file_atomic
from library.tiny_models.wan_tiny import build_tiny_wan
from tests.library.generation.made_again import check_made_again, lines_file
from tests.tiny import video_words

SIZE = ("--video_size", "32", "48")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return build_tiny_wan(tmp_path_factory.mktemp("t2v"), num_blocks=3)


@pytest.fixture(scope="module")
def i2v(tmp_path_factory):
    return build_tiny_wan(tmp_path_factory.mktemp("i2v"), task="i2v-14B")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return build_tiny_wan(tmp_path_factory.mktemp("pair"), task="t2v-A14B")


@pytest.fixture(scope="module")
def adapter(tiny) -> Path:
    generator, tensors = torch.Generator().manual_seed(4), {}
    for name in ("blocks_0_self_attn_q", "blocks_1_cross_attn_k"):
        tensors[f"lora_unet_{name}.lora_down.weight"] = torch.randn(4, 48, generator=generator) / 2
        tensors[f"lora_unet_{name}.lora_up.weight"] = torch.randn(48, 4, generator=generator) / 2
        tensors[f"lora_unet_{name}.alpha"] = torch.tensor(4.0)
    save_file_atomic(tensors, tiny.folder / "lora.safetensors")
    return tiny.folder / "lora.safetensors"


@pytest.fixture
def picture(tmp_path) -> str:
    pixels = np.random.RandomState(2).randint(0, 255, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "first.png")
    return str(tmp_path / "first.png")


def run(tiny, folder: Path, *more: str) -> list[Path]:
    given = [
        *video_words(tiny), "--dit_dtype=float32", "--vae_dtype=float32", "--infer_steps=2", "--video_length=5", *SIZE,
        f"--save_path={folder}", "--seed=7", "--prompt=a red cat",
    ]  # fmt: skip
    return wan_inference.run([*given, *more])


def latent(tiny, folder: Path, *more: str) -> torch.Tensor:
    (path,) = run(tiny, folder, "--output_type=latent", *more)
    return load_file(path)["latent"]


def test_a_video_has_the_asked_size_rate_and_frames_and_its_seed_the_same_bytes(tiny, tmp_path):
    made = [run(tiny, tmp_path / name)[0] for name in "ab"]
    assert made[0].read_bytes() == made[1].read_bytes()
    names = (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT, cv2.CAP_PROP_FPS, cv2.CAP_PROP_FRAME_COUNT)
    assert [cv2.VideoCapture(str(made[0])).get(name) for name in names] == [48, 32, 16, 5]
    (trimmed,) = run(tiny, tmp_path / "c", "--trim_tail_frames=2")
    assert cv2.VideoCapture(str(trimmed)).get(cv2.CAP_PROP_FRAME_COUNT) == 3


def test_settings_change_the_video(tiny, picture, tmp_path, caplog):
    ways = {
        "plain": [], "unguided": ["--guidance_scale=1"], "text": ["--negative_prompt=a dog"],
        "shift": ["--flow_shift=1"], "dpm": ["--sample_solver=dpm++"], "vanilla": ["--sample_solver=vanilla"],
        "some": ["--cfg_skip_mode=late", "--cfg_apply_ratio=0.5"],
        "layers": ["--slg_layers=1", "--slg_mode=original", "--slg_end=1"],
    }  # fmt: skip
    made = [latent(tiny, tmp_path / name, *words) for name, words in ways.items()]
    assert all(not torch.equal(a, b) for n, a in enumerate(made) for b in made[:n])
    assert "has no effect" not in caplog.text
    idle = ["--lazy_loading", f"--image_path={picture}", f"--control_image_path={picture}"]
    assert torch.equal(made[0], latent(tiny, tmp_path / "swap", "--blocks_to_swap=1", "--vae_cache_cpu", *idle))
    assert "--lazy_loading has no effect without --dit_high_noise" in caplog.text
    assert "--control_image_path has no effect without --one_frame_inference" in caplog.text
    assert f"image_path {picture} has no effect: the task t2v-" in caplog.text
    together = latent(tiny, tmp_path / "together", "--no-split_uncond")
    assert torch.allclose(together, made[0], atol=1e-3)


def test_a_first_frame_gives_the_clip_its_shape_and_is_needed(i2v, picture, tmp_path):
    made = latent(i2v, tmp_path / "a", f"--image_path={picture}", "--video_size", "64", "32")
    assert made.shape == (16, 2, 4, 6), "the shape of 60x40 at the area of 32x64, on the grid of 16"
    ended = latent(i2v, tmp_path / "b", f"--image_path={picture}", f"--end_image_path={picture}")
    assert ended.shape[1] == 3, "a last frame is one more"
    with pytest.raises(ConfigError, match="the task i2v-14B begins with a picture"):
        run(i2v, tmp_path / "x")
    with pytest.raises(ConfigError, match="--clip is not given"):
        given = [word for word in video_words(i2v) if not word.startswith("--clip=")]
        wan_inference.run([*given, f"--save_path={tmp_path}", "--prompt=a", f"--image_path={picture}"])
    single = latent(
        i2v, tmp_path / "c", "--one_frame_inference=control_index=0,target_index=1", f"--control_image_path={picture}"
    )
    assert single.shape[1] == 1


def test_two_experts_share_the_steps_and_have_their_own_adapters(pair, adapter, tmp_path):
    made = latent(pair, tmp_path / "a", "--infer_steps=4")
    offloaded = latent(pair, tmp_path / "b", "--infer_steps=4", "--offload_inactive_dit")
    assert torch.equal(made, offloaded)
    low, high = (f"--{name}={adapter}" for name in ("lora_weight", "lora_weight_high_noise"))
    each = [latent(pair, tmp_path / "c", "--infer_steps=4", *words) for words in ([low], [high], [low, high])]
    assert all(not torch.equal(a, b) for n, a in enumerate([made, *each]) for b in [made, *each][:n])
    other = latent(pair, tmp_path / "d", "--infer_steps=4", "--timestep_boundary=500")
    assert not torch.equal(made, other)
    stronger = latent(pair, tmp_path / "e", "--infer_steps=4", "--guidance_scale_high_noise=9")
    assert not torch.equal(made, stronger)


def test_an_expert_is_written_with_its_adapters(tiny, adapter, tmp_path):
    lora, target = f"--lora_weight={adapter}", tmp_path / "merged.safetensors"
    words = [f"--dit={tiny.denoiser}", "--dit_dtype=float32", lora, f"--save_merged_model={target}"]
    assert wan_inference.run(words) == [target]
    made = latent(tiny, tmp_path / "a", lora)
    tiny = dataclasses.replace(tiny, denoiser=target)
    # equal weights; a file that is mapped elsewhere into memory has other vector kernels, which round otherwise
    assert torch.allclose(latent(tiny, tmp_path / "b"), made, atol=1e-3)
    with pytest.raises(ConfigError, match="for the other expert give its file as --dit"):
        wan_inference.run([*words[:3], f"--lora_weight_high_noise={adapter}", f"--save_merged_model={tmp_path / 'x'}"])


def test_files_of_an_official_folder_are_found(tiny, tmp_path):
    folder = tmp_path / "release"
    folder.mkdir()
    for name, path in (
        ("diffusion_pytorch_model.safetensors", tiny.denoiser), ("Wan2.1_VAE.pth", tiny.vae),
        ("models_t5_umt5-xxl-enc-bf16.pth", tiny.t5),
    ):  # fmt: skip
        (folder / name).symlink_to(path)
    options = wan_inference.WanModelOptions(ckpt_dir=str(folder), vae="mine.safetensors")
    assert options.dit == str(folder / "diffusion_pytorch_model.safetensors") and options.vae == "mine.safetensors"
    assert options.t5 == str(folder / "models_t5_umt5-xxl-enc-bf16.pth") and options.dit_high_noise is None


def test_what_does_not_fit_is_told_at_once(tiny, pair, adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(type(wan_inference.SCRIPT), "load_encoders", lambda *_: pytest.fail("a model is loaded"))
    with pytest.raises(ConfigError, match="--task is t2v-14B-FC; the denoiser .* has 16 input channels"):
        run(tiny, tmp_path, "--task=t2v-14B-FC", f"--control_path={tmp_path}")
    with pytest.raises(ConfigError, match="--clip is .*: this is a Wan or Qwen-Image autoencoder"):
        run(tiny, tmp_path, "--task=i2v-14B", f"--clip={tiny.vae}", f"--image_path={tiny.vae}")
    with pytest.raises(ConfigError, match="--slg_layers names 3, 77; the model has 3 blocks, numbered from 0 on"):
        run(tiny, tmp_path, "--slg_layers=1,3,77", "--slg_mode=uncond", "--guidance_scale=2")
    with pytest.raises(ConfigError, match="without --dit_high_noise"):
        run(tiny, tmp_path, f"--lora_weight_high_noise={adapter}")
    with pytest.raises(ConfigError, match="--dit_high_noise is given with the task t2v-14B"):
        run(tiny, tmp_path, f"--dit_high_noise={pair.high}")
    with pytest.raises(ConfigError) as caught:
        run(tiny, tmp_path, "--one_frame_inference=target=1", "--timestep_boundary=2000", "--ckpt_dir=none")
    told = "\n".join(caught.value.problems)
    for part in ("--one_frame_inference is 'target=1'", "--timestep_boundary is 2000", "--ckpt_dir is none"):
        assert part in told, part


def test_files_are_made_again_of_what_they_tell(tiny, tmp_path):
    made = run(tiny, tmp_path / "first", lines_file(tmp_path, "a cat", "a dog --w 32 --s 1 --f 1 --fs 2 --l 1"))
    check_made_again(wan_inference.run, made, "save_path")
