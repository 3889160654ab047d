"""A family of videos, planted from outside, trains through the same trainer as pictures: clips and pictures in one run,
a condition beside the latents, a named part beside the VAE."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from library.core.registry import import_target
from library.families.record import CacheNames
from library.generation.video_files import read_video
from library.training import cli, parser_common
from library.training.trainables.network import NetworkTrainable
from library.training.trainer_base import Trainer
from tests.forked import run_ranks
from tests.planted import plant
from tests.runs.conftest import DATASET, fingerprint, largest_difference, sample_pictures
from tests.toy_video.clips import draw_clips
from tests.toy_video.family import ToyLatentsCaching, ToyTextCaching
from tests.toy_video.record import FAMILY

LENGTHS = (5, 6, 3, 1, 5, 5, 5)
"""frames of the files: four of five, one that is cut to five, one of three, and a picture"""
CACHES = {
    "live": [],
    "memory": ["--cache_latents", "--cache_text_encoder_outputs"],
    "disk": ["--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk"],
}


class VideoWork:
    def __init__(self, folder: Path, lengths=LENGTHS) -> None:
        self.folder, self.clips = folder, draw_clips(folder / "clips", lengths)

    def argv(self, out: str, *more: str, batch_size: int = 2, subset_keys: str = "") -> list[str]:
        data = self.folder / f"data{batch_size}.toml"
        text = DATASET.format(
            batch_size=batch_size, images=self.clips, dataset_keys="", subset_keys=subset_keys, bucket_step=16,
            min_bucket=16
        )
        data.write_text(text.replace("resolution = 64", "resolution = 32"), encoding="utf-8")
        return [
            f"--dataset_config={data}", f"--output_dir={self.folder / out}", "--output_name=lora",
            "--network_module=networks.lora",
            "--network_dim=4", "--max_train_steps=7", "--seed=5", "--learning_rate=1e-2",
            "--max_data_loader_n_workers=0",
            "--console_log_level=WARNING", "--optimizer_type=SGDNesterov", *more,
        ]

    def train(self, out: str, *more: str, **data) -> Path:
        cli.run("toy_video", "network", self.argv(out, *more, **data))
        return self.folder / out / "lora.safetensors"

    def start(self, out: str, *more: str, **data) -> Path:
        """Train in two processes."""
        argv = self.argv(out, *more, **data)
        run_ranks(2, lambda: cli.run("toy_video", "network", argv), self.folder / f"told-{out}")
        return self.folder / out / "lora.safetensors"


@pytest.fixture
def work(tmp_path, monkeypatch) -> VideoWork:
    plant(monkeypatch, FAMILY)
    return VideoWork(tmp_path)


def test_cached_and_live_give_the_same_adapter(work):
    """Bytes of weights; the metadata tell whether latents were cached."""
    made = {
        name: work.train(name, *options, "--network_train_unet_only", subset_keys="flip_aug = true")
        for name, options in CACHES.items()
    }
    again = work.train("again", *CACHES["disk"], "--network_train_unet_only", subset_keys="flip_aug = true")
    assert fingerprint(again) == fingerprint(made["disk"]), "caches that lie there are as good as those that were made"
    for name in ("memory", "disk"):
        assert largest_difference(made["live"], made[name]) == 0, name
    assert len(list(work.clips.glob("*_toy.npz"))) == len(LENGTHS)


def test_caches_in_tensor_files_give_the_adapter_of_a_run_without(tmp_path, monkeypatch):
    names = CacheNames(latents="_toy.safetensors", text="_toy_te.safetensors")
    record = dataclasses.replace(FAMILY, caches=names)
    plant(monkeypatch, record)
    for strategy in (ToyLatentsCaching, ToyTextCaching):
        monkeypatch.setattr(strategy, "architecture", record.architecture)
    work = VideoWork(tmp_path)
    made = [
        work.train(name, *CACHES[kind], "--network_train_unet_only", subset_keys="flip_aug = true")
        for name, kind in (("live", "live"), ("disk", "disk"), ("again", "disk"))
    ]
    assert fingerprint(made[1]) == fingerprint(made[2]), "caches that lie there are as good as those that were made"
    assert largest_difference(made[0], made[1]) == 0
    assert len(list(work.clips.glob("*_toy.safetensors"))) == len(list(work.clips.glob("*_toy_te.safetensors"))) == 7


def test_what_is_learned_depends_on_the_condition_and_on_every_frame(work, monkeypatch):
    """Another first frame, or other later ones, give another adapter: neither is lost on the way."""
    from tests.toy_video.family import ToyVideoFamily

    whole = work.train("whole", *CACHES["memory"], "--network_train_unet_only")
    predict = ToyVideoFamily.predict

    def blind(self, models, sample, conditioning, batch, **inputs):
        batch.conditions["first_frame"] = torch.zeros_like(batch.conditions["first_frame"])
        return predict(self, models, sample, conditioning, batch, **inputs)

    with monkeypatch.context() as patch:
        patch.setattr(ToyVideoFamily, "predict", blind)
        assert largest_difference(whole, work.train("blind", *CACHES["memory"], "--network_train_unet_only")) > 1e-6
    stills = VideoWork(work.folder / "stills", [1] * len(LENGTHS))
    assert largest_difference(whole, stills.train("out", *CACHES["memory"], "--network_train_unet_only")) > 1e-6


@pytest.mark.parametrize("caches", ["live", "disk"])
def test_a_resumed_run_ends_in_the_bytes_of_an_uninterrupted_one(work, caches):
    options = [*CACHES[caches], "--network_train_unet_only"]
    whole = work.train("whole", *options, "--save_every_n_steps=3", "--save_state")
    resumed = work.train("resumed", *options, f"--resume={whole.with_name('lora-step00000003-state')}")
    assert fingerprint(resumed) == fingerprint(whole)


@pytest.mark.parametrize("caches", ["live", "disk"])
def test_two_processes_equal_one_with_twice_the_batch(work, caches):
    options = [*CACHES[caches], "--network_train_unet_only", "--max_train_epochs=2"]
    two = work.start("two", *options, batch_size=1)
    assert largest_difference(work.train("one", *options, batch_size=2), two) < 1e-5


def test_times_may_differ_by_frame_in_a_step(work):
    argv = work.argv("out", *CACHES["memory"], "--network_train_unet_only")
    config = parser_common.parse_command(argv, "toy_video", "network").config
    run = Trainer(config, import_target(FAMILY.family)(config), NetworkTrainable(config)).prepare()
    batch = next(batch for batch in run.data.batches(1) if batch.latents.ndim == 5 and batch.latents.shape[2] == 3)
    once = run.step(batch, times=torch.full((len(batch),), 0.4)).loss_sum
    same = run.step(batch, times=torch.full((len(batch), 3), 0.4)).loss_sum
    other = run.step(batch, times=torch.tensor([[0.4, 0.5, 0.6]]).expand(len(batch), 3)).loss_sum
    assert torch.equal(once, same) and not torch.isclose(once, other)


def test_samples_have_their_frames(work):
    prompts = work.folder / "prompts.txt"
    lines = (
        "a red cat --f 6 --w 48 --d 9",
        "a red cat --f 1 --d 3",
        "a blue dog --d 4",
        "a red cat --f 6 --w 48 --d 9 --l 4 --n a dog",
    )
    prompts.write_text("\n".join(lines), encoding="utf-8")
    work.train(
        "out",
        "--network_train_unet_only",
        f"--sample_prompts={prompts}",
        "--sample_every_n_steps=4",
        "--logging_dir",
        str(work.folder / "logs"),
    )
    found = sample_pictures(work.folder / "out")
    assert len(found) == 4
    counts = {}
    for path in found:
        with Image.open(path) as image:
            assert getattr(image, "n_frames", 1) == 1, "a picture, or the contact sheet of a clip"
            told = image.text.get("frames")
            width, height = image.size
        clip = path.with_suffix(".mp4")
        if clip.is_file():
            capture = cv2.VideoCapture(str(clip))
            assert capture.get(cv2.CAP_PROP_FPS) == 16
            frames = read_video(clip)
            assert not np.array_equal(np.asarray(frames[0]), np.asarray(frames[1])), "frames differ"
            assert width > 2 * frames[0].width and height > 2 * frames[0].height
            counts[path.stem.split("_")[2]] = (len(frames), frames[0].size, told)
        else:
            counts[path.stem.split("_")[2]] = (1, (width, height), told)
    assert counts == {
        "00": (5, (48, 32), "5"),
        "01": (1, (32, 32), "1"),
        "02": (5, (32, 32), "5"),
        "03": (5, (48, 32), "5"),
    }
    first, guided = (found[number].with_suffix(".mp4").read_bytes() for number in (0, 3))
    assert first != guided, "guided by a negative prompt"
    sheets = sorted(path.name for path in (work.folder / "out" / "sample").glob("*sheet.png"))
    grids = list((work.folder / "out" / "sample").glob("*_grid.png"))
    assert sheets == ["lora_sheet.png"] and len(grids) == 1


def test_further_parts_are_armed_and_evaluated_like_the_denoiser(work, monkeypatch):
    from library.training import trainer_base
    from tests.toy_video.models import ToyVideoDit

    class Expert(ToyVideoDit):
        checkpointed = None

        def enable_gradient_checkpointing(self, cpu_offload: bool = False) -> None:
            self.checkpointed = cpu_offload

    class WithExpert(import_target(FAMILY.family)):
        def load_parts(self, runtime, beside):
            return {"expert": Expert()} if beside == "denoiser" else super().load_parts(runtime, beside)

    compiled = []
    monkeypatch.setattr(trainer_base, "compile_blocks", lambda part, backend, **how: compiled.append(part))
    words = ["--network_train_unet_only", "--gradient_checkpointing", "--cpu_offload_checkpointing", "--torch_compile"]
    config = parser_common.parse_command(work.argv("out", *words), "toy_video", "network").config
    run = Trainer(config, WithExpert(config), NetworkTrainable(config)).prepare()
    expert, vae = run.models.extra["expert"], run.models.extra["first_frame_vae"]
    assert expert.checkpointed is True and expert.training and run.models.denoiser.training and not vae.training
    assert compiled == [run.models.denoiser, expert]
    with run.weights_for_eval():
        assert not expert.training and not run.models.denoiser.training
    assert expert.training and run.models.denoiser.training and not vae.training


def test_image_scripts_write_every_frame(work):
    from tests.toy_video.script import ToyVideoScript

    lines = work.folder / "lines.txt"
    lines.write_text("a red cat --d 7\na red cat --d 7 --f 1\n", encoding="utf-8")
    clip, picture = ToyVideoScript().run([f"--from_file={lines}", f"--output_dir={work.folder / 'made'}"])
    with Image.open(clip) as image:
        assert (image.format, image.n_frames, image.size) == ("PNG", 5, (32, 32)) and image.text["frames"] == "5"
        frames = [np.asarray(frame.convert("RGB")).copy() for frame in ImageSequence.Iterator(image)]
    assert len(frames) == 5 and not np.array_equal(frames[0], frames[4])
    with Image.open(picture) as image:
        assert getattr(image, "n_frames", 1) == 1 and "frames" not in image.text
