"""Pictures that are larger than what a denoiser has positions for are told at start: buckets, samples, image scripts.
And the sampler of a user's own in every flow family."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from library.core.errors import AtelierError, ConfigError
from library.core.keyed_random import StepDraws
from library.core.registry import import_target
from library.families.registry import FAMILIES
from library.training import timestep_samplers
from tests.runs.families import Tinies, refused_run

SIDES = {"sd3": 384, "anima": 8192, "lumina": 8192}
"""pixels of the tiny models, of those that have a bound"""
IMAGE_OPTIONS = {
    "sd3": ("--ckpt_path", ["--width={0}", "--height={1}"]),
    "anima": ("--dit", ["--image_size", "{1}", "{0}", "--save_path=out", "--prompt=a cat"]),
    "lumina": ("--pretrained_model_name_or_path", ["--image_width={0}", "--image_height={1}"]),
}


@pytest.fixture(scope="module")
def tinies(tmp_path_factory) -> Tinies:
    return Tinies(tmp_path_factory)


def data_of(work, resolution: str, more: str = "") -> Path:
    path = work.dataset(dataset_keys=more)
    path.write_text(path.read_text().replace("resolution = 64", f"resolution = {resolution}"))
    return path


@pytest.mark.parametrize("family", SIDES)
def test_a_bucket_beyond_the_positions_is_refused_at_start(family, tinies, tmp_path, monkeypatch, capsys) -> None:
    work, side = tinies.work(family, tmp_path), SIDES[family]
    data = data_of(work, f"[64, {side + 32}]", "enable_bucket = false")
    told = refused_run(family, work.argv("out", "--resume=no_such_state", dataset=data), monkeypatch, capsys)
    assert f"the bucket of 4 images is 64x{side + 32}; the model has positions for {side} pixels a side" in told
    assert "or a lower resolution or max_bucket_reso" in told and "--resume" in told, "with everything else"
    assert ("--enable_scaled_pos_embed" in told) == (family == "sd3")


def test_what_fits_and_what_has_positions_for_any_size_starts(tinies, tmp_path) -> None:
    work = tinies.work("sd3", tmp_path)
    work.trainer("out", dataset=data_of(work, "[64, 384]", "enable_bucket = false")).check()
    large = data_of(work, "[64, 400]", "enable_bucket = false")
    work.trainer("out", "--enable_scaled_pos_embed", dataset=large).check()
    # the resolution of buckets that nothing is enlarged to says nothing of the pictures
    work.trainer("out", dataset=data_of(work, "1024", "bucket_no_upscale = true")).check()


def test_a_sample_beyond_the_positions_is_left_out_at_start(tinies, tmp_path, caplog) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one --w 512 --h 64\ntwo --w 391 --h 64\n", encoding="utf-8")  # made 384
    trainer = tinies.work("sd3", tmp_path).trainer("out", f"--sample_prompts={prompts}", "--sample_at_first")
    with caplog.at_level(logging.WARNING):
        assert [prompt.prompt for prompt in trainer.check()[1]] == ["two"]
    assert "'one': the picture is 512x64; the model has positions for 384 pixels a side" in caplog.text


@pytest.mark.parametrize("family", SIDES)
def test_image_scripts_refuse_such_a_picture_at_start(family, tinies, tmp_path, monkeypatch) -> None:
    model, side = tinies[family].arguments()[0].partition("=")[2], SIDES[family]
    script = import_target(FAMILIES[family].image_script or f"library.generation.{family}_inference:SCRIPT")
    monkeypatch.setattr(type(script), "check", lambda *_: None)
    monkeypatch.setattr(type(script), "load", lambda *_: pytest.fail("a model is loaded"))
    option, words = IMAGE_OPTIONS[family]
    given = [f"{option}={model}", *(word.format(side + 16, 64) for word in words)]
    with pytest.raises(ConfigError, match=f"the picture is {side + 16}x64; the model has positions for {side} pixels"):
        script.run(given)
    lines = tmp_path / "lines.txt"
    lines.write_text(f"one --w {side + 16}\n", encoding="utf-8")
    rest = [word for word in given if not word.startswith("--prompt=")]
    with pytest.raises(AtelierError, match=f"line 1: the picture is {side + 16}x64"):
        script.run([*rest, f"--from_file={lines}"])


class Early:
    """Always the same sigma."""

    def __init__(self, options) -> None:
        pass

    def sample(self, latent_shape, draws):
        return draws.uniform("early") * 0.1 + 0.2


FLOW = [name for name, record in FAMILIES.items() if hasattr(import_target(record.family), "timestep_modes")]


@pytest.mark.parametrize("family", FLOW)
def test_every_flow_family_takes_a_timestep_sampler_by_its_path(family, tinies, tmp_path) -> None:
    work = tinies.work(family, tmp_path)
    trainer = work.trainer("out", f"--timestep_sampling={__name__}:Early")
    trainer.check()
    options = trainer.config[timestep_samplers.TimestepOptions]
    times = timestep_samplers.build(options).sample((2, 16, 8, 8), StepDraws(0, 0, (0, 1)))
    assert options.timestep_sampling == f"{__name__}:Early" and ((0.2 <= times) & (times <= 0.3)).all()
