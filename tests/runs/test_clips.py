"""Clips in the families that learn from any length of them: beside pictures in one run, live and cached, stopped and gone
on with, in two processes, and as a concept that is learned."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from library.families.registry import record_of
from library.tiny_models import build_tiny
from library.training import cli
from tests.families import CASES
from tests.forked import run_ranks
from tests.runs.clip_work import ClipWork
from tests.runs.conftest import draw_pictures, fingerprint, largest_difference, losses_of, read_parts
from tests.tiny_clips import write_moving_shapes

FAMILIES_OF_CLIPS = ("hunyuan_video", "wan")


@pytest.fixture(scope="module", params=FAMILIES_OF_CLIPS)
def tiny(request, tmp_path_factory: pytest.TempPathFactory):
    return request.param, build_tiny(request.param, tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def work(tmp_path: Path, tiny) -> ClipWork:
    name, model = tiny
    return ClipWork(tmp_path, model, draw_pictures(tmp_path / "images", 2), case=CASES[name])


def test_clips_and_pictures_of_one_run_live_and_cached_give_the_same_bytes(work: ClipWork) -> None:
    """Three lengths of clips and pictures; then from the caches alone, without autoencoder and text encoders."""
    data = work.clips()
    options = ["--max_train_epochs=1", "--max_train_steps=99"]
    live = read_parts(work.train("live", *options, dataset=data))[1]
    for name, on_disk in (("memory", False), ("disk", True)):
        cached = work.train(name, *options, *work.case.caches(on_disk=on_disk), dataset=data)
        assert read_parts(cached)[1] == live, name
    short = record_of(work.case.family).clips.short
    names = sorted(path.name for path in (work.folder / "videos").glob("*.safetensors"))
    lengths = [f"00_00000-{length:03d}_0064x0064_{short}.safetensors" for length in (1, 5, 9)]
    assert names[:4] == [*lengths, f"00_{short}_te.safetensors"]
    stored = load_file(work.folder / "videos" / names[2])
    assert {key: tuple(tensor.shape) for key, tensor in stored.items()} == {"latents_3x8x8_float32": (16, 3, 8, 8)}
    cli.run(work.case.family, "network", work.alone("alone", *options, dataset=data))
    assert read_parts(work.folder / "alone" / "lora.safetensors")[1] == live


def test_a_run_of_clips_goes_on_where_it_was_stopped(work: ClipWork) -> None:
    data, options = work.clips(), ["--max_train_steps=5", *work.case.caches(on_disk=False)]
    whole = work.train("whole", *options, "--save_every_n_steps=2", "--save_state", dataset=data)
    state = whole.with_name("lora-step00000002-state")
    assert fingerprint(work.train("resumed", *options, f"--resume={state}", dataset=data)) == fingerprint(whole)


def test_two_processes_equal_one_with_twice_the_batch(work: ClipWork) -> None:
    data = {size: work.clips(batch_size=size, name=f"clips{size}.toml") for size in (1, 2)}
    options = ["--max_train_epochs=1", "--max_train_steps=99", "--optimizer_type=SGDNesterov"]
    argv = work.argv("two", *options, dataset=data[1])
    run_ranks(2, lambda: cli.run(work.case.family, "network", argv), work.folder / "told")
    one = work.train("one", *options, dataset=data[2])
    assert largest_difference(one, work.folder / "two" / "lora.safetensors") < 1e-5


def test_the_loss_on_held_out_clips_of_a_moving_shape_falls(work: ClipWork) -> None:
    path = work.folder / "moving.toml"
    write_moving_shapes(work.folder / "moving", 8, frames=5)
    path.write_text(
        "[general]\ncaption_extension = '.txt'\nresolution = [64, 64]\nbatch_size = 3\n[[datasets]]\n"
        f"video_directory = '{work.folder / 'moving'}'\ntarget_frames = [5]\nvalidation_split = 0.25\n",
        encoding="utf-8",
    )  # fmt: skip
    options = ["--max_train_steps=24", "--validate_every_n_epochs=12", *work.case.caches(on_disk=False)]
    losses = losses_of(work.train("out", *options, dataset=path), "validation")
    assert losses[-1] < 0.9 * losses[0], losses
