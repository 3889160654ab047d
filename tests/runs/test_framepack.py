"""What is special to FramePack: sections of videos, single frames with control pictures, clips as samples."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from library.dataset.items import SampleFacts
from library.dataset.latent_cache import LatentCache
from library.families.framepack import FAMILY
from library.families.latents import SampleKind
from library.strategy_framepack import FramePackLatentEncoder
from library.tiny_models.framepack_tiny import TinyFramePack, build_tiny_framepack
from library.training import cli
from tests.library.dataset.clips.videos import write_video
from tests.runs.conftest import losses_of, read_parts
from tests.runs.families import refused_run
from tests.tiny_clips import write_moving_shapes

VIDEOS = """
[general]
resolution = [32, 32]
batch_size = 2
caption_extension = ".txt"
enable_bucket = true
[[datasets]]
video_directory = '{folder}'
cache_directory = '{caches}'
frame_extraction = "full"
max_frames = 200
fp_latent_window_size = 3
"""
PICTURES = """
[general]
resolution = [32, 32]
caption_extension = ".txt"
[[datasets]]
image_directory = '{folder}/after'
control_directory = '{folder}/before'
cache_directory = '{caches}'
fp_1f_clean_indices = [0, 10]
fp_1f_target_index = 1
"""


class SectionWork:
    """Videos of 30 and 14 frames, whose sections of three latent frames are two and one; pictures with two control
    pictures each."""

    def __init__(self, folder: Path, tiny: TinyFramePack) -> None:
        self.folder, self.tiny = folder, tiny
        for first, (name, frames) in enumerate({"a": 30, "b": 14}.items()):
            write_video(folder / "videos" / f"{name}.avi", frames, size=(64, 64), first=40 * first)
            (folder / "videos" / f"{name}.txt").write_text(f"a red cat {name}", encoding="utf-8")

    def pictures(self, alpha: int = 255) -> Path:
        draw = np.random.RandomState(1)
        for name, folder in (("x.png", "after"), ("x_0.png", "before"), ("x_1.png", "before")):
            (self.folder / folder).mkdir(exist_ok=True)
            pixels = draw.randint(0, 255, (48, 48, 4), dtype=np.uint8)
            pixels[..., 3] = alpha
            Image.fromarray(pixels if folder == "before" else pixels[..., :3]).save(self.folder / folder / name)
        (self.folder / "after" / "x.txt").write_text("a blue cat", encoding="utf-8")
        return self.folder

    def train(self, out: str, data: str, *options: str, files: bool = True) -> Path:
        cli.run("framepack", "network", self.argv(out, data, *options, files=files))
        return self.folder / out / "lora.safetensors"

    def argv(self, out: str, data: str, *options: str, files: bool = True) -> list[str]:
        path = self.folder / f"{out}.toml"
        caches = self.folder / "caches"
        videos = "video_directory" in data
        path.write_text(data.format(folder=self.folder / "videos" if videos else self.folder, caches=caches))
        models = self.tiny.arguments() if files else [f"--dit={self.tiny.denoiser}"]
        return [
            *models, f"--dataset_config={path}", f"--output_dir={self.folder / out}", "--output_name=lora",
            "--network_module=networks.lora_framepack", "--network_dim=2", "--max_train_steps=3", "--seed=5",
            "--max_data_loader_n_workers=0", "--learning_rate=1e-2", "--console_log_level=WARNING", *options,
        ]  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyFramePack:
    return build_tiny_framepack(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def work(tiny: TinyFramePack, tmp_path: Path) -> SectionWork:
    return SectionWork(tmp_path, tiny)


@pytest.mark.parametrize("slot", ["network_weights", "base_weights"])
def test_an_adapter_of_hunyuan_video_is_trained_further(work: SectionWork, slot: str) -> None:
    """Its fused layers are taken apart; one that is merged beforehand changes what is learned."""
    work.pictures()
    generator = torch.Generator().manual_seed(3)
    down, up = torch.randn(2, 64, generator=generator), torch.randn(192, 2, generator=generator)
    stem, path = "lora_unet_double_blocks_0_img_attn_qkv", work.folder / "other.safetensors"
    save_file(
        {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": torch.tensor(2.0)}, path
    )
    short = ["--max_train_steps=1", f"--{slot}={path}"]
    if slot == "base_weights":
        assert losses_of(work.train("further", PICTURES, *short)) != losses_of(work.train("plain", PICTURES, short[0]))
        return
    made = load_file(work.train("further", PICTURES, *short, "--learning_rate=1e-9"))
    for place, name in enumerate("qkv"):
        own = f"lora_unet_transformer_blocks_0_attn_to_{name}"
        assert torch.allclose(made[f"{own}.lora_up.weight"], up[64 * place : 64 * (place + 1)], atol=1e-6)
        assert torch.allclose(made[f"{own}.lora_down.weight"], down, atol=1e-6)


def test_sections_train_alike_from_the_step_from_new_caches_and_without_a_vae(work: SectionWork) -> None:
    """Two sections of one video in a batch, and one of the other; F1 makes caches anew, and trains otherwise."""
    live = read_parts(work.train("live", VIDEOS, "--live_encoding"))[1]
    assert read_parts(work.train("cached", VIDEOS))[1] == live
    names = sorted(path.name for path in (work.folder / "caches").glob("*_fp.safetensors"))
    assert names == [
        f"{name}_0064x0064_fp.safetensors" for name in ("a_00000-029-0000", "a_00000-029-0001", "b_00000-013-0000")
    ]
    stored = load_file(work.folder / "caches" / names[0])
    assert {key: list(tensor.shape) for key, tensor in stored.items()} == {
        "latents_3x4x4_float32": [16, 3, 4, 4], "latents_clean_3x4x4_float32": [16, 2, 4, 4],
        "latents_clean_2x_3x4x4_float32": [16, 2, 4, 4], "latents_clean_4x_3x4x4_float32": [16, 16, 4, 4],
        "latent_indices_int64": [3], "clean_latent_indices_int64": [2], "clean_latent_2x_indices_int64": [2],
        "clean_latent_4x_indices_int64": [16], "image_embeddings_float32": [4, 16],
    }  # fmt: skip
    # the frames behind the first section, as it sees them, are those that the second one makes
    second = load_file(work.folder / "caches" / names[1])
    seen = torch.cat((stored["latents_clean_3x4x4_float32"][:, 1:], stored["latents_clean_2x_3x4x4_float32"]), dim=1)
    assert torch.equal(seen, second["latents_3x4x4_float32"])
    assert read_parts(work.train("again", VIDEOS, files=False))[1] == live
    f1 = read_parts(work.train("f1", VIDEOS, "--f1"))[1]
    assert f1 != live
    made = load_file(work.folder / "caches" / names[1])
    assert torch.equal(
        made["latents_clean_2x_3x4x4_float32"], stored["latents_3x4x4_float32"][:, :2]
    ) and made["latent_indices_int64"].tolist() == [20, 21, 22]
    assert read_parts(work.train("live f1", VIDEOS, "--live_encoding", "--f1"))[1] == f1


def test_a_video_without_a_section_is_told(work: SectionWork, monkeypatch, capsys) -> None:
    data = VIDEOS.replace("fp_latent_window_size = 3", "")
    message = refused_run("framepack", work.argv("out", data), monkeypatch, capsys)
    assert "37" in message, message


def test_single_frames_with_their_control_pictures(work: SectionWork) -> None:
    """Alpha decides what of them is seen."""
    work.pictures()
    live = read_parts(work.train("live", PICTURES, "--live_encoding"))[1]
    assert read_parts(work.train("cached", PICTURES))[1] == live
    (path,) = (work.folder / "caches").glob("x_*_fp.safetensors")
    stored = load_file(path)
    assert sorted(stored) == [
        "clean_latent_2x_indices_int64", "clean_latent_4x_indices_int64", "clean_latent_indices_int64",
        "image_embeddings_float32", "latent_indices_int64", "latents_1x4x4_float32", "latents_clean_1x4x4_float32",
    ]  # fmt: skip
    assert stored["clean_latent_indices_int64"].tolist() == [0, 10, 10]
    assert stored["latent_indices_int64"].tolist() == [1]
    clean = stored["latents_clean_1x4x4_float32"]
    assert clean[:, 0].abs().sum() > 0 and clean[:, 1].abs().sum() > 0 and not clean[:, 2].any()
    work.pictures(alpha=0)
    hidden = read_parts(work.train("hidden", PICTURES))[1]
    assert hidden != live and not load_file(path)["latents_clean_1x4x4_float32"].any()
    work.pictures()
    less = read_parts(work.train("less", PICTURES, "--one_frame_no_2x", "--one_frame_no_4x"))[1]
    assert less not in (live, hidden) and "clean_latent_4x_indices_int64" not in load_file(path)


def test_control_pictures_of_another_size_are_told(work: SectionWork, monkeypatch, capsys) -> None:
    work.pictures()
    data = PICTURES + "control_resolution = [64, 64]\n"
    message = refused_run("framepack", work.argv("out", data), monkeypatch, capsys)
    assert "control pictures of 64x64 stand beside pictures of 32x32; FramePack needs both in one size" in message


def test_sections_that_the_known_tool_cached_train_by_themselves(work: SectionWork) -> None:
    """float16, under names of the size that frames are read in, without our records."""
    work.train("made", VIDEOS, "--max_train_steps=1")
    caches = work.folder / "caches"
    for path in list(caches.glob("*.safetensors")):
        state, is_text = load_file(path), path.name.endswith("_te.safetensors")
        known = {
            key.replace("float32", "float16"): tensor.half() if tensor.is_floating_point() else tensor
            for key, tensor in state.items()
        }
        more = {"caption1": f"a red cat {path.name[0]}"} if is_text else {"width": "32", "height": "32"}
        path.unlink()
        target = path.with_name(path.name.replace("0064x0064", "0032x0032"))
        save_file(known, target, {"architecture": "framepack", "format_version": "1.0.1", **more})
    before = {path: path.stat().st_mtime_ns for path in caches.glob("*.safetensors")}
    assert read_parts(work.train("known", VIDEOS, files=False))[1]
    assert before == {path: path.stat().st_mtime_ns for path in caches.glob("*.safetensors")}


def test_the_loss_on_held_out_sections_of_a_moving_shape_falls_beside_pictures(work: SectionWork) -> None:
    """Videos and pictures in one run. Noise and noise levels of the measurement are fixed, and its videos are not
    trained on."""
    work.pictures()
    write_moving_shapes(work.folder / "moving", 8, frames=13)
    data = VIDEOS.replace("{folder}", str(work.folder / "moving")) + "validation_split = 0.25\n"
    beside = PICTURES[PICTURES.index("[[datasets]]") :].replace("{caches}", "{caches}2")
    data += beside.replace("{folder}", str(work.folder))
    options = ["--max_train_steps=32", "--validate_every_n_epochs=8", "--network_dim=4"]
    losses = losses_of(work.train("out", data, *options), "validation")
    assert losses[-1] < 0.9 * losses[0], losses


def test_masks_of_sections_are_those_of_their_frames() -> None:
    """Nine frames in two sections of one latent frame each: the first frame is in neither."""
    cache = LatentCache(FAMILY.architecture, FramePackLatentEncoder(), to_disk=False)
    mask = np.arange(9, dtype=np.float32)[:, None, None]
    found = [
        cache.learned_mask(SimpleNamespace(facts=SampleFacts(SampleKind(section_frames=frames), section)), mask)
        for frames, section in ((1, 0), (1, 1), (2, 0))
    ]
    assert [part.ravel().tolist() for part in found] == [[2.5], [6.5], [2.5, 6.5]]


def test_clips_and_single_frames_as_samples(work: SectionWork, caplog: pytest.LogCaptureFixture) -> None:
    work.pictures()
    picture = work.folder / "after" / "x.png"
    lines = [
        f"a cat;;;-1:it sits --w 32 --h 32 --f 25 --s 2 --i {picture} --d 1",
        f"a cat --w 32 --h 32 --f 16 --s 2 --ei {picture} --l 2 --n grey --d 1",
        f"a cat --w 32 --h 48 --s 2 --ci {picture} --of target_index=2,no_4x --d 1",
        "too short --w 32 --h 32 --f 9 --s 2", "wrong --of no_5x",
    ]  # fmt: skip
    prompts = work.folder / "prompts.txt"
    prompts.write_text("\n".join(lines), encoding="utf-8")
    around = [f"--sample_prompts={prompts}", "--sample_every_n_steps=3", "--latent_window_size=3"]
    work.train("out", VIDEOS, *around, "--console_log_level=INFO")
    told = "\n".join(record.getMessage() for record in caplog.records if record.levelname in ("WARNING", "ERROR"))
    assert "could not be made" not in told
    assert "'too short': a clip has 9 frames; a section of 3 latent frames needs at least 13" in told
    assert "'wrong': --of has 'no_5x'" in told and "'a cat' has no picture (--i)" in told
    videos = sorted((work.folder / "out" / "sample").glob("*.mp4"))
    frames = [int(cv2.VideoCapture(str(path)).get(cv2.CAP_PROP_FRAME_COUNT)) for path in videos]
    assert frames == [25, 13]
    singles = [path for path in (work.folder / "out" / "sample").glob("lora_*_02_*.png")]
    assert [Image.open(path).size for path in singles] == [(32, 48)]
    again = work.folder / "again" / "sample"
    work.train("again", VIDEOS, *around, "--bulk_decode")
    assert [path.read_bytes() == other.read_bytes() for path, other in zip(sorted(again.glob("*.mp4")), videos)] == [
        False, True
    ]  # fmt: skip
