"""What pipelines of clips share, on the toy family: clips that start from others, guidance in some steps, blocks that
are left out."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from library.core.errors import ConfigError
from library.generation.sampling_utils import start_noise
from library.generation.video_files import write_frames, write_video
from library.generation.video_pipeline import clip_pixels, fitted, read_clip_frames
from library.generation.video_requests import SkipLayers, VideoRequest
from tests.planted import plant
from tests.toy_video.models import MAX_LENGTH, WIDTH, ToyVideoDit, ToyVideoVae, seeded
from tests.toy_video.record import FAMILY

REQUEST = VideoRequest(prompt="a cat", width=32, height=32, frames=5, steps=4, seed=3)
TEXT, NEGATIVE = ({"states": torch.full((1, MAX_LENGTH, WIDTH), level)} for level in (0.3, -0.4))


@pytest.fixture
def pipeline(monkeypatch):
    from tests.toy_video.pipeline import ToyVideoPipeline

    plant(monkeypatch, FAMILY)
    return ToyVideoPipeline(seeded(ToyVideoDit(), 3), seeded(ToyVideoVae(), 1))


def frames(count: int) -> list[Image.Image]:
    random = np.random.RandomState(4)
    return [Image.fromarray(random.randint(0, 255, (32, 32, 3), dtype=np.uint8)) for _ in range(count)]


@torch.no_grad()
def made(pipeline, negative=None, **changes):
    return pipeline.latents(dataclasses.replace(REQUEST, **changes), TEXT, negative)


def by_hand(pipeline, latents, sigmas, combine):
    """Euler steps; `combine` makes the velocity of step number, and of a function (text, **how) -> velocity."""
    for number, (sigma, following) in enumerate(zip(sigmas[:-1], sigmas[1:])):

        def forward(text, **how):
            with torch.no_grad():
                return pipeline.velocity(latents, torch.tensor([float(sigma) * 1000]), text, REQUEST, **how)

        latents = latents + (following - sigma) * combine(number, forward)
    return latents


def test_a_clip_starts_from_another_as_strongly_as_asked(pipeline, tmp_path, caplog):
    clip = frames(5)
    folder = write_frames(clip, tmp_path / "clip")
    with torch.no_grad():
        encoded = pipeline.vae.encode(clip_pixels(clip, 32, 32), [3])
    untouched = made(pipeline, video_path=str(folder), strength=0.2)  # int(4 * 0.2) = 0 steps
    assert torch.equal(untouched, encoded) and "--strength 0.2 of 4 steps is none" in caplog.text
    sigmas = torch.tensor([0.5, 0.25, 0.0])
    start = 0.5 * start_noise(3, 4, 3, 4, 4) + 0.5 * encoded
    expected = by_hand(pipeline, start, sigmas, lambda number, forward: forward(TEXT))
    assert torch.allclose(made(pipeline, video_path=str(folder), strength=0.6), expected, atol=1e-5)
    assert torch.equal(made(pipeline, video_path=str(folder), strength=1.0), made(pipeline)), "nothing of it is left"


def test_a_clip_that_is_too_short_is_filled_up(pipeline, tmp_path):
    folder = str(write_frames(frames(4), tmp_path / "clip"))
    with torch.no_grad():
        encoded = pipeline.vae.encode(clip_pixels(frames(3), 32, 32), [3])  # of four frames the VAE takes three
    end, front = (
        made(pipeline, video_path=folder, strength=0.0, frames=9, pad_mode=mode) for mode in ("end", "front")
    )
    assert torch.equal(end[:, :, :2], encoded) and all(torch.equal(end[:, :, n], encoded[:, :, 1]) for n in (2, 3, 4))
    assert torch.equal(front[:, :, 3:], encoded) and all(torch.equal(front[:, :, n], encoded[:, :, 0]) for n in (0, 2))
    assert fitted(encoded, (4, 1, 4, 4), "end").shape == (1, 4, 1, 4, 4)
    assert fitted(encoded, (4, 4, 4), "end").shape == (1, 4, 4, 4), "a picture"


def test_some_steps_are_guided(pipeline):
    sigmas = torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0])

    def combine(number, forward):
        negative, positive = forward(NEGATIVE), forward(TEXT)
        return negative + 3 * (positive - negative) if number < 2 else positive

    expected = by_hand(pipeline, start_noise(3, 4, 3, 4, 4), sigmas, combine)
    late = made(pipeline, NEGATIVE, cfg_scale=3.0, cfg_skip_mode="late", cfg_apply_ratio=0.5)
    assert torch.allclose(late, expected, atol=1e-4)
    none = made(pipeline, NEGATIVE, cfg_scale=3.0, cfg_skip_mode="late", cfg_apply_ratio=0.0)
    assert torch.equal(none, made(pipeline))


@pytest.mark.parametrize("mode", ["original", "uncond"])
def test_blocks_are_left_out_in_some_steps(pipeline, mode):
    skip = SkipLayers(layers=(1,), mode=mode, scale=2.0, start=0.25, end=0.75)
    sigmas = torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0])

    def combine(number, forward):
        negative, positive = forward(NEGATIVE), forward(TEXT)
        plain = negative + 3 * (positive - negative)
        if number not in (1, 2):
            return plain
        skipped = forward(NEGATIVE, skip_layers=(1,))
        return plain + 2 * (positive - skipped) if mode == "original" else skipped + 3 * (positive - skipped)

    expected = by_hand(pipeline, start_noise(3, 4, 3, 4, 4), sigmas, combine)
    assert torch.allclose(made(pipeline, NEGATIVE, cfg_scale=3.0, skip_layers=skip), expected, atol=1e-4)


def test_clips_are_read_from_files_animations_and_folders(tmp_path):
    from library.generation.picture_files import write_picture

    clip = frames(4)
    folder, animation = write_frames(clip, tmp_path / "clip"), write_picture(clip, tmp_path / "clip.png")
    for path in (folder, animation):
        read = read_clip_frames(path, 3)
        assert [np.asarray(frame).tolist() for frame in read] == [np.asarray(frame).tolist() for frame in clip[:3]]
    assert len(read_clip_frames(write_video(clip, tmp_path / "clip.mp4", 8))) == 4
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="holds no pictures"):
        read_clip_frames(tmp_path / "empty")


def test_frames_cover_the_size_and_their_middle_is_taken():
    pixels = np.zeros((32, 96, 3), np.uint8)
    pixels[:, 32:64] = 255
    (made,) = clip_pixels([Image.fromarray(pixels)], 32, 32)
    assert made.shape == (3, 1, 32, 32) and torch.equal(made, torch.ones_like(made))
