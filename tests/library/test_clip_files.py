"""Clips as files: an animated PNG tells what a picture's file tells, and trackers get what moves."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from PIL import Image

from library.generation.picture_files import frames_of, read_frames, read_texts, write_picture
from library.generation.video_files import write_video
from library.training.hooks.trackers import Point, TensorBoardTracker, WandbTracker

POINT = Point({}, "step", 3, 3, 1)


def frames(count: int = 4) -> list[Image.Image]:
    return [
        Image.fromarray(np.random.RandomState(i).randint(0, 255, (12, 20, 3), dtype=np.uint8)) for i in range(count)
    ]


def test_a_clip_is_an_animated_png_whose_first_frame_is_its_picture(tmp_path):
    made = frames()
    path = write_picture(made, tmp_path / "new" / "clip.png", {"prompt": "a cat", "seed": "3"})
    read = read_frames(path)
    assert [np.asarray(frame).tolist() for frame in read] == [np.asarray(frame).tolist() for frame in made]
    assert read_texts(path)["prompt"] == "a cat"
    with Image.open(path) as image:
        assert image.format == "PNG" and image.n_frames == 4
        assert np.array_equal(np.asarray(image.convert("RGB")), np.asarray(made[0]))


def test_a_picture_and_a_clip_of_one_frame_have_the_same_bytes(tmp_path):
    (picture,) = frames(1)
    assert frames_of(picture) == frames_of([picture]) == [picture]
    alone, listed = write_picture(picture, tmp_path / "a.png"), write_picture([picture], tmp_path / "b.png")
    assert alone.read_bytes() == listed.read_bytes() and len(read_frames(alone)) == 1


def test_tensorboard_shows_pictures_and_clips(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracker = TensorBoardTracker(tmp_path, "project", None)
    tracker.log_image("picture", frames(1)[0], "one", POINT)
    tracker.log_video("clip", write_video(frames(), tmp_path / "clip.mp4", 8), 8, "several", POINT)
    tracker.close()
    events = EventAccumulator(str(tracker.folder))
    events.Reload()
    counts = {}
    for name in ("picture", "clip"):
        (event,) = events.Images(name)
        assert (event.step, event.width, event.height) == (3, 20, 12)
        with Image.open(io.BytesIO(event.encoded_image_string)) as image:
            counts[name] = image.format, getattr(image, "n_frames", 1), image.info.get("duration")
    assert counts == {"picture": ("PNG", 1, None), "clip": ("GIF", 4, 120)}, "hundredths of a second, of 125 ms"


def test_weights_and_biases_gets_a_picture_or_a_video_file():
    logged = []
    tracker = WandbTracker.__new__(WandbTracker)
    tracker._wandb = SimpleNamespace(
        Image=lambda image, caption: ("image", caption), Video=lambda path, caption, format: (format, path)
    )
    tracker._run = SimpleNamespace(log=lambda values, commit: logged.append(values))
    tracker.log_image("sample_0", frames(1)[0], "one", POINT)
    tracker.log_video("sample_1", Path("a/clip.mp4"), 8, "several", POINT)
    assert logged[0]["sample_0"] == ("image", "one") and logged[1]["sample_1"] == ("mp4", str(Path("a/clip.mp4")))
