"""Runs on video files: clips of several lengths beside pictures, with control clips, cached and live, in both kinds of
cache files; the clips of a held-out video are validated."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from PIL import Image
from safetensors import safe_open

from library.core.errors import ConfigError
from library.dataset.batch import CONDITIONING_IMAGES
from library.families.record import CacheNames, ClipFacts
from library.training import cli
from tests.forked import run_ranks
from tests.library.dataset.clips.videos import numbered_frame, write_frames, write_video
from tests.planted import plant
from tests.runs.conftest import fingerprint, largest_difference
from tests.runs.test_video import CACHES
from tests.toy_video import control
from tests.toy_video.family import FIRST_FRAME, ToyTextCaching

TRAINABLE = "tests.toy_video.control:PlainTrainable"
DATA = """
[general]
resolution = [64, 32]
caption_extension = ".txt"
batch_size = {batch_size}
enable_bucket = true
[[datasets]]
video_directory = '{folder}/videos'
control_directory = '{folder}/control'
cache_directory = '{folder}/cache'
target_frames = [3, 5]
frame_extraction = "chunk"
source_fps = "auto"
[[datasets]]
image_directory = '{folder}/pictures'
control_directory = '{folder}/control_pictures'
"""


FACTS = ClipFacts(short="toy", long="toy_video", fps=12)
RECORD = dataclasses.replace(
    control.RECORD, family="tests.runs.test_video_datasets:ClipControlFamily", clips=FACTS, caches=CacheNames(
        latents="_toy.safetensors", text="_toy_te.safetensors"
    )
)


class ClipControlCaching(control.ControlCaching):
    """A control clip has latents of all its frames."""

    architecture = RECORD.architecture

    def condition_shapes(self, bucket):
        return {**super().condition_shapes(bucket), control.CONTROL: self.architecture.latents.latent_shape(bucket)}


class ClipControlFamily(control.ControlFamily):
    record = RECORD

    def latents_caching(self):
        made = super().latents_caching()
        return ClipControlCaching(made.cache_to_disk, made.batch_size, made.skip_disk_cache_validity_check)

    def predict(self, models, sample, conditioning, batch, **inputs):
        found = dict(batch.conditions)
        shown = found[control.CONTROL]
        found[control.CONTROL] = shown if shown.ndim == 4 else shown.mean(dim=2)
        assert {FIRST_FRAME, control.CONTROL} == set(found) and CONDITIONING_IMAGES not in found
        return super().predict(models, sample, conditioning, dataclasses.replace(batch, conditions=found), **inputs)


class Work:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for number, fps in enumerate((12, 24, 12)):
            name = f"{number}.avi"
            write_video(folder / "videos" / name, 11 * (fps // 12), fps=fps, first=10 * number)
            write_video(folder / "control" / name, 11, fps=12, first=100 + 10 * number)
            (folder / "videos" / f"{number}.txt").write_text(f"a red cat runs, number {number}", encoding="utf-8")
        write_frames(folder / "videos" / "3", 5, first=60)
        write_frames(folder / "control" / "3", 2, first=160)
        (folder / "videos" / "3.txt").write_text("a blue dog", encoding="utf-8")
        for kind, first in (("pictures", 70), ("control_pictures", 170)):
            (folder / kind).mkdir()
            Image.fromarray(numbered_frame(first)).save(folder / kind / "p.png")
        (folder / "pictures" / "p.txt").write_text("a still cat", encoding="utf-8")

    def argv(self, out: str, *more: str, batch_size: int = 2) -> list[str]:
        data = self.folder / f"data{batch_size}.toml"
        data.write_text(DATA.format(folder=self.folder.as_posix(), batch_size=batch_size), encoding="utf-8")
        return [
            f"--dataset_config={data}", f"--output_dir={self.folder / out}", "--output_name=lora", "--seed=5",
            "--network_module=networks.lora", "--network_dim=4", "--network_train_unet_only", "--learning_rate=1e-2",
            "--max_train_steps=9", "--max_data_loader_n_workers=0", "--console_log_level=WARNING",
            "--optimizer_type=SGDNesterov", *more,
        ]  # fmt: skip

    def train(self, out: str, *more: str, **data) -> Path:
        cli.run("toy_video", TRAINABLE, self.argv(out, *more, **data))
        return self.folder / out / "lora.safetensors"

    @property
    def caches(self) -> list[Path]:
        return sorted((self.folder / "cache").glob("*_toy.safetensors"))


@pytest.fixture
def work(tmp_path, monkeypatch) -> Work:
    plant(monkeypatch, RECORD)
    monkeypatch.setattr(ToyTextCaching, "architecture", RECORD.architecture)
    return Work(tmp_path)


def test_clips_and_pictures_with_controls_cached_and_live(work):
    made = {name: work.train(name, *words) for name, words in CACHES.items()}
    for name in ("memory", "disk"):
        assert largest_difference(made["live"], made[name]) == 0, name
    assert {path.name.removesuffix("_0064x0032_toy.safetensors") for path in work.caches} == {
        *(f"{video}_{start:05d}-{length:03d}" for video in (0, 1, 2) for length, starts in ((3, (0, 3, 6)), (5, (0, 5)))
          for start in starts),
        "3_00000-003", "3_00000-005",
    }  # fmt: skip
    stamps = [path.stat().st_mtime_ns for path in work.caches]
    again = work.train("again", *CACHES["disk"])
    assert fingerprint(again) == fingerprint(made["disk"])
    assert [path.stat().st_mtime_ns for path in work.caches] == stamps, "they serve again"


def test_another_rate_or_control_makes_its_caches_anew(work):
    work.train("first", *CACHES["disk"])
    before = {path.name: path.stat().st_mtime_ns for path in work.caches}

    def renewed() -> set[str]:
        now = {path.name: path.stat().st_mtime_ns for path in work.caches}
        found = {name for name in now if now[name] != before.get(name)}
        before.update(now)
        return found

    write_video(work.folder / "control" / "0.avi", 11, fps=12, first=150)
    work.train("control", *CACHES["disk"])
    assert {name.split("_")[0] for name in renewed()} == {"0"}
    frame = work.folder / "videos" / "3" / "0001.png"
    Image.fromarray(numbered_frame(99)).save(frame)
    work.train("frame", *CACHES["disk"])
    assert {name.split("_")[0] for name in renewed()} == {"3"}
    text = DATA.replace('source_fps = "auto"', "source_fps = 24")
    (work.folder / "rate.toml").write_text(text.format(folder=work.folder.as_posix(), batch_size=2))
    argv = work.argv("rate2", *CACHES["disk"])
    cli.run("toy_video", TRAINABLE, [f"--dataset_config={work.folder / 'rate.toml'}", *argv[1:]])
    assert {name.split("_")[0] for name in renewed()} == {"0", "1", "2", "3"}


def test_two_processes_equal_one_with_twice_the_batch(work):
    argv = work.argv("two", "--max_train_epochs=1", batch_size=1)
    run_ranks(2, lambda: cli.run("toy_video", TRAINABLE, argv), work.folder / "told")
    one = work.train("one", "--max_train_epochs=1", batch_size=2)
    assert largest_difference(one, work.folder / "two" / "lora.safetensors") < 1e-5


def test_a_resumed_run_ends_in_the_bytes_of_an_uninterrupted_one(work):
    whole = work.train("whole", "--save_every_n_steps=4", "--save_state", "--max_data_loader_n_workers=1")
    state = whole.with_name("lora-step00000004-state")
    resumed = work.train("resumed", f"--resume={state}", "--max_data_loader_n_workers=1")
    assert fingerprint(resumed) == fingerprint(whole)


def test_the_record_of_the_run_names_clips(work):
    with safe_open(work.train("out"), "pt") as file:
        metadata = file.metadata()
    (clips, pictures) = json.loads(metadata["ss_datasets"])
    assert clips["num_train_images"] == 17 and pictures["num_train_images"] == 1
    buckets = [(entry["resolution"], entry["count"]) for entry in clips["bucket_info"]["buckets"].values()]
    assert buckets == [([64, 32, 3], 10), ([64, 32, 5], 7)]


def test_bad_files_are_refused_before_models_are_loaded(work, monkeypatch):
    monkeypatch.setattr(ClipControlFamily, "load_vae", lambda *_: pytest.fail("a model is loaded"))
    (work.folder / "videos" / "1.avi").write_bytes(b"")
    (work.folder / "control" / "2.avi").write_bytes(b"no video")
    with pytest.raises(ConfigError) as error:
        work.train("out")
    assert [name in str(error.value) for name in ("1.avi", "2.avi", "0.avi")] == [True, True, False]
