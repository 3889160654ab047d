"""The tools that fill caches of clips, on a family planted from outside: their options, what they remove and what they
show."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from library.core.errors import ConfigError
from library.dataset import fill_caches
from library.dataset.tensor_cache_io import TensorFile
from library.families.record import CacheNames, ClipFacts
from library.generation.video_files import read_video
from library.safetensors_utils import save_file_atomic
from library.training import cache_tools, parser_common
from library.training.cache_preview import as_characters
from tests.musubi import known_options
from tests.planted import plant
from tests.toy_video.clips import draw_clips
from tests.toy_video.family import ToyLatentsCaching, ToyTextCaching, ToyVideoFamily
from tests.toy_video.record import FAMILY

RECORD = dataclasses.replace(
    FAMILY, caches=CacheNames(latents="_toy.safetensors", text="_toy_te.safetensors"),
    clips=ClipFacts(short="toy", long="toy_video_of_the_tests", fps=8.0),
)
DATA = """
[general]
resolution = 32
enable_bucket = true
min_bucket_reso = 16
bucket_reso_steps = 16
caption_extension = ".txt"
[[datasets]]
[[datasets.subsets]]
image_dir = '{images}'
{more}
"""


@pytest.fixture(autouse=True)
def planted(monkeypatch):
    plant(monkeypatch, RECORD)
    parts = {"vae": frozenset(), "text_encoders": frozenset()}
    monkeypatch.setattr(ToyVideoFamily, "part_options", parts, raising=False)
    monkeypatch.setattr(ToyVideoFamily, "record", RECORD)
    for holder in (ToyVideoFamily, ToyLatentsCaching, ToyTextCaching):
        monkeypatch.setattr(holder, "architecture", RECORD.architecture)


class Work:
    def __init__(self, folder: Path, lengths=(5, 3, 1)) -> None:
        self.folder, self.clips, self.caches = folder, draw_clips(folder / "clips", lengths), folder / "caches"
        self.written = 0

    def run(self, what: str, *options: str, more: str = "", has_caches: bool = True) -> None:
        if has_caches:
            more += f"\ncache_directory = '{self.caches}'"
        self.written += 1
        config = self.folder / f"data{self.written}.toml"
        config.write_text(DATA.format(images=self.clips, more=more), encoding="utf-8")
        cache_tools.run(what, ["--family=toy_video", f"--dataset_config={config}", *options])

    def names(self, ending: str = "safetensors") -> list[str]:
        return sorted(path.name for path in self.caches.glob(f"*.{ending}"))


@pytest.fixture
def work(tmp_path) -> Work:
    return Work(tmp_path)


def test_options_of_the_known_tools_work(work, monkeypatch, caplog):
    """Batches, threads, device and cuDNN are as they were asked for."""
    caplog.set_level(logging.INFO)
    seen, encode = {}, fill_caches.encode_latents

    def watched(jobs, strategy, vae, **settings):
        seen.update(
            batch=strategy.batch_size, threads=settings["num_threads"], cudnn=torch.backends.cudnn.enabled,
            device=next(vae.parameters()).device,
        )
        return encode(jobs, strategy, vae, **settings)

    monkeypatch.setattr(fill_caches, "encode_latents", watched)
    work.run(
        "latents", "--batch_size=3", "--num_workers=2", "--device=cpu", "--disable_cudnn_backend", "--skip_existing",
        "--console_width=40", "--console_back=red",
    )
    assert seen == {"batch": 3, "threads": 2, "cudnn": False, "device": torch.device("cpu")}
    assert torch.backends.cudnn.enabled
    assert "--console_width: it belongs to --debug_mode console" in caplog.text and "--console_back" in caplog.text
    assert work.names() == [f"{n:02d}_0032x0032_toy.safetensors" for n in range(3)]
    work.run("text", "--batch_size=2", "--num_workers=2", "--device=cpu", "--skip_existing", "--keep_cache")
    assert "captions are read at once" in caplog.text
    assert len(work.names()) == 6
    assert "the cache of 3 samples is complete" in caplog.text


@pytest.mark.parametrize("script, what", [("cache_latents.py", "latents"), ("cache_text_encoder_outputs.py", "text")])
def test_every_shared_option_of_the_known_tools_is_there(script, what):
    """Those that all of its families have; what a family has beside them is its own."""
    shared = {option["dest"] for option in known_options(f"wan_{script}")} & {
        option["dest"] for option in known_options(f"fpack_{script}")
    }
    assert {"dataset_config", "batch_size", "num_workers", "keep_cache"} <= shared
    tool = cache_tools.tool_script("toy_video", what)
    own = {"vae_dtype", "one_frame"}  # of the families
    lacking = [name for name in shared - own if name not in tool.owners or tool.status(name) in ("refused", "foreign")]
    assert lacking == []


def test_wrong_options_are_told_together_and_before_a_model_is_loaded(work, monkeypatch):
    monkeypatch.setattr(ToyVideoFamily, "load_vae", None)
    with pytest.raises(ConfigError) as caught:
        work.run("latents", "--device=cuda:77", more="random_crop = true")
    assert "--device is 'cuda:77'" in str(caught.value) and "random_crop" in str(caught.value)
    with pytest.raises(ConfigError, match="--debug_mode is 'film'"):
        work.run("latents", "--debug_mode=film")
    with pytest.raises(ConfigError, match="--batch_size is 0"):
        work.run("latents", "--batch_size=0")
    script = cache_tools.tool_script("flux", "latents")
    with pytest.raises(ConfigError, match="--keep_cache"):
        parser_common.parse_script(["--keep_cache"], script)


# ---- what is removed -------------------------------------------------------------------------------------------------

def known_file(path: Path, architecture: str = "toy_video_of_the_tests") -> Path:
    """A cache as the known trainer writes it."""
    save_file_atomic({"latents_1x4x4_float32": torch.zeros(4, 1, 4, 4)}, path, {"architecture": architecture})
    return path


@pytest.mark.parametrize("what", ["latents", "text"])
def test_what_the_data_set_no_longer_has_goes(work, caplog, what):
    caplog.set_level(logging.INFO)
    work.run(what)
    ending = "_toy_te.safetensors" if what == "text" else "_0032x0032_toy.safetensors"
    (work.clips / "01.png").unlink()
    work.run(what, "--keep_cache")
    assert len(work.names()) == 3
    work.run(what)
    assert work.names() == [f"00{ending}", f"02{ending}"]
    assert "1 cache files were removed" in caplog.text and f"01{ending}" in caplog.text


def test_only_what_is_surely_its_own_goes(work, tmp_path):
    """Other data sets, other architectures, other programs, damaged files and captions of another kind stay."""
    other = Work(tmp_path / "other", (5, 5, 5, 5))
    other.caches = work.caches
    for path in sorted(other.clips.iterdir()):
        path.rename(path.with_name(f"b{path.name}"))
    other.run("latents")
    work.run("text")
    work.caches.joinpath("damaged_0032x0032_toy.safetensors").write_bytes(b"x" * 50)
    save_file_atomic({"a": torch.zeros(1)}, work.caches / "bare_0032x0032_toy.safetensors")
    known_file(work.caches / "foreign_0032x0032_toy.safetensors", "another")
    known_file(work.caches / "z_0032x0032_other.safetensors")
    before = set(work.names())
    known_file(work.caches / "gone_0032x0032_toy.safetensors")
    work.run("latents")
    mine = {f"{n:02d}_0032x0032_toy.safetensors" for n in range(3)}
    assert set(work.names()) == before | mine, "all but what the known trainer made for a clip that is gone"


def test_a_file_under_another_name_is_the_same_file(work):
    """As one is whose name a file system lists in letters of another case."""
    work.run("latents")
    (work.caches / "A0_0032x0032_toy.safetensors").hardlink_to(work.caches / "00_0032x0032_toy.safetensors")
    work.run("latents")
    assert len(work.names()) == 4


def test_beside_the_files_that_are_learned_from_nothing_of_another_program_goes(work):
    known = known_file(work.clips / "gone_0032x0032_toy.safetensors")
    work.run("latents", has_caches=False)
    assert known.exists()
    (work.clips / "01.png").unlink()
    work.run("latents", has_caches=False)
    own = sorted(path.name for path in work.clips.glob("*_toy.safetensors"))
    assert own == ["00_0032x0032_toy.safetensors", "02_0032x0032_toy.safetensors", known.name]


def test_a_file_says_where_it_comes_from(work):
    work.run("latents")
    file = TensorFile.of(str(work.caches / "00_0032x0032_toy.safetensors"))
    record = file.record()
    assert (record["source"], record["listed_in"]) == ("../clips/00.png", "../clips")


# ---- what is shown ---------------------------------------------------------------------------------------------------

def test_samples_in_the_console(work, capsys, monkeypatch):
    answers = iter(["", "d"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(answers))
    monkeypatch.setattr(ToyVideoFamily, "load_vae", None)
    work.run("latents", "--debug_mode=console", "--console_width=12")
    shown = capsys.readouterr().out
    assert "d: next dataset, q: quit" in shown and "dataset 0: 3 samples" in shown
    assert "00.png: 32x32x5; caption: 'a red cat runs, number 0'" in shown and "02.png" not in shown
    rows = [line for line in shown.splitlines() if len(line) == 12]
    assert len(rows) == 2 * 2, "three frames of a clip are side by side"
    work.run("latents", "--debug_mode=console", "--console_num_images=1")
    assert "01.png" not in capsys.readouterr().out
    assert not work.caches.exists(), "nothing is encoded"


def test_characters_of_a_picture():
    picture = Image.fromarray(np.array([[[0, 0, 0], [255, 255, 255]]] * 2, dtype=np.uint8))
    assert as_characters(picture, 2, has_colours=False) == " @"
    assert as_characters(picture, 2, "blue") == "\x1b[44m\x1b[38;2;0;0;0m \x1b[38;2;255;255;255m@\x1b[0m"


def test_samples_as_files_beside_the_caches(work):
    work.run("latents", "--debug_mode=video")
    assert work.names("jpg") == ["02_0032x0032_toy.jpg"]
    frames = read_video(work.caches / "00_0032x0032_toy.mp4")
    assert len(frames) == 5 and frames[0].size == (32, 32)
    work.run("latents", "--debug_mode=video", has_caches=False)
    beside = work.clips / "previews"
    assert len(list(beside.glob("*.mp4"))) == 2, "not among what is learned from"


def test_samples_in_a_window_need_one(work, monkeypatch):
    shown = []
    monkeypatch.setattr(cv2, "imshow", lambda title, pixels: shown.append(pixels.shape))
    monkeypatch.setattr(cv2, "waitKey", lambda delay: ord("q"))
    monkeypatch.setattr(cv2, "destroyAllWindows", lambda: None)
    work.run("latents", "--debug_mode=image")
    assert shown == [(32, 96, 3)]

    def refuse(*_):
        raise cv2.error("no window")

    monkeypatch.setattr(cv2, "imshow", refuse)
    with pytest.raises(ConfigError, match="OpenCV can open no window"):
        work.run("latents", "--debug_mode=image")
