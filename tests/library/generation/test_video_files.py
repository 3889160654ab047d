"""Clips as files: rate, size and number of frames as asked, equal bytes, one message where nothing can be written."""

from __future__ import annotations

import errno

import cv2
import numpy as np
import pytest
from PIL import Image

from library.core.errors import AtelierError, ConfigError
from library.core.write_errors import WriteError
from library.generation import video_files
from library.generation.video_files import (
    CODINGS,
    CONTACT_CELLS,
    Encoder,
    contact_sheet,
    encoder_of,
    ending_problem,
    has_pyav,
    read_video,
    read_video_texts,
    write_frames,
    write_video,
)
from library.generation.video_requests import CODEC_ENDINGS

ENDINGS = (".mp4", ".mov", ".avi", ".mkv", ".webm") if has_pyav() else (".mp4", ".mov", ".avi")


def frames(count: int = 7, size: tuple[int, int] = (64, 48)) -> list[Image.Image]:
    """A white bar that moves to the right on grey."""
    made = []
    for number in range(count):
        pixels = np.full((size[1], size[0], 3), 60, np.uint8)
        pixels[:, number * 8 : number * 8 + 8] = 240
        made.append(Image.fromarray(pixels))
    return made


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_file_has_the_asked_size_rate_and_frames_and_the_same_bytes(tmp_path, ending):
    made = frames()
    path, again = (write_video(made, tmp_path / f"{name}{ending}", 24.0) for name in "ab")
    assert path.read_bytes() == again.read_bytes()
    capture = cv2.VideoCapture(str(path))
    asked = {
        cv2.CAP_PROP_FRAME_WIDTH: 64, cv2.CAP_PROP_FRAME_HEIGHT: 48, cv2.CAP_PROP_FPS: 24, cv2.CAP_PROP_FRAME_COUNT: 7
    }  # fmt: skip
    assert {name: capture.get(name) for name in asked} == asked
    capture.release()
    read = read_video(path)
    differences = [np.abs(np.asarray(a, float) - np.asarray(b, float)).mean() for a, b in zip(made, read, strict=True)]
    assert max(differences) < 6, "frames are in their order and colours"
    assert len(read_video(path, most=3)) == 3
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [f"a{ending}", f"b{ending}"], "nothing else is left"


def test_rates_that_are_no_whole_numbers_are_kept(tmp_path):
    capture = cv2.VideoCapture(str(write_video(frames(), tmp_path / "a.mp4", 24000 / 1001)))
    assert capture.get(cv2.CAP_PROP_FPS) == pytest.approx(24000 / 1001, abs=1e-3)


@pytest.mark.parametrize(
    ("made", "fps", "told"),
    [
        (lambda: [], 24, "there are no frames"),
        (lambda: frames(2, (63, 48)), 24, "63x48; video files have even sides"),
        (lambda: frames(1) + frames(1, (32, 48)), 24, "2 sizes"),
        (lambda: frames(2), 0, "rate is 0"),
    ],
)
def test_what_no_file_can_hold_is_refused(tmp_path, made, fps, told):
    with pytest.raises(ConfigError, match=told):
        write_video(made(), tmp_path / "a.mp4", fps)
    assert not list(tmp_path.iterdir())


def test_without_an_encoder_those_tried_are_named(tmp_path, monkeypatch):
    assert "not in '.gif'" in ending_problem(".gif") and ending_problem(".MP4") is None
    monkeypatch.setattr(video_files, "_works", lambda write, codec, ending, **more: False)
    encoder_of.cache_clear()
    try:
        with pytest.raises(ConfigError, match=r"tried: .*avc1 of OpenCV, mp4v of OpenCV.*pip install av"):
            write_video(frames(), tmp_path / "a.mp4", 24)
        monkeypatch.setattr(video_files, "has_pyav", lambda: False)
        encoder_of.cache_clear()
        assert "OpenCV writes none" in ending_problem(".webm")
    finally:
        encoder_of.cache_clear()


def test_the_notice_tells_what_was_not_there():
    assert Encoder("PyAV", "libx264").notice is None
    told = Encoder("OpenCV", "mp4v", ("avc1 of OpenCV",)).notice
    assert "mp4v by OpenCV (not there: avc1 of OpenCV)" in told and "pip install av" in told


def test_a_file_that_breaks_off_leaves_the_one_before(tmp_path, monkeypatch):
    path = write_video(frames(), tmp_path / "a.mp4", 24)
    before = path.read_bytes()

    def broken(pixels, target, fps, codec, **more):
        target.write_bytes(b"half")
        raise RuntimeError("no more")

    for name in ("_write_pyav", "_write_opencv"):
        monkeypatch.setattr(video_files, name, broken)
    with pytest.raises(AtelierError, match="no more"):
        write_video(frames(), path, 24)
    assert path.read_bytes() == before and [entry.name for entry in tmp_path.iterdir()] == ["a.mp4"]

    def full(pixels, target, fps, codec, **more):
        raise OSError(errno.ENOSPC, "No space left on device", str(target))

    for name in ("_write_pyav", "_write_opencv"):
        monkeypatch.setattr(video_files, name, full)
    with pytest.raises(WriteError, match="no space is left"):
        write_video(frames(), path, 24)


def test_frames_are_numbered_pictures_of_a_folder(tmp_path):
    made = frames(3)
    folder = write_frames(made, tmp_path / "clip", {"prompt": "a bar"})
    assert sorted(path.name for path in folder.iterdir()) == [f"clip_{number:03d}.png" for number in range(3)]
    with Image.open(folder / "clip_002.png") as image:
        assert np.array_equal(np.asarray(image), np.asarray(made[2])) and image.text["prompt"] == "a bar"


def test_a_contact_sheet_shows_the_first_the_last_and_frames_between():
    made = [Image.new("RGB", (64, 48), (100 + number, 0, 0)) for number in range(30)]
    sheet = np.asarray(contact_sheet(made, 10.0))
    flat = sheet[(sheet[..., 1] == 0) & (sheet[..., 2] == 0)][:, 0]
    shown = {int(level) - 100 for level in np.unique(flat) if (flat == level).sum() >= 64 * 48}
    assert shown == {0, 4, 7, 11, 14, 18, 22, 25, 29} and len(shown) == CONTACT_CELLS
    assert contact_sheet(made[:1], 10.0).width < 2 * 64


def test_a_file_without_pictures_is_named(tmp_path):
    (tmp_path / "sound.mp4").write_bytes(b"\0" * 100)
    with pytest.raises(ConfigError, match="sound.mp4"):
        read_video(tmp_path / "sound.mp4")


@pytest.mark.skipif(not has_pyav(), reason="needs PyAV")
@pytest.mark.parametrize(("codec", "ending"), [(c, e) for c, endings in CODEC_ENDINGS.items() for e in endings])
def test_a_codec_keeps_frames_and_texts_in_equal_bytes(tmp_path, codec, ending):
    made, texts = frames(4), {"prompt": "a \"bar\" 日本", "seed": "7"}
    for frame in made:
        frame.paste((20, 210, 60), (0, 0, 64, 24))
    path, again = (write_video(made, tmp_path / f"{name}{ending}", 24.0, codec, texts) for name in "ab")
    assert path.read_bytes() == again.read_bytes() and read_video_texts(path).items() >= texts.items()
    read = read_video(path)
    differences = [np.abs(np.asarray(a, float) - np.asarray(b, float)).mean() for a, b in zip(made, read, strict=True)]
    assert max(differences) < 2, "nearly without loss, in their colours"
    import av

    with av.open(str(path)) as file:
        stream = file.streams.video[0]
        assert stream.codec_context.name == {"h264": "h264", "h265": "hevc", "prores": "prores"}[codec]
        assert codec != "prores" or stream.codec_context.codec_tag == "apch", "HQ"
        assert stream.codec_context.colorspace == 1 and stream.codec_context.pix_fmt == CODINGS[codec].pixels


@pytest.mark.skipif(not has_pyav(), reason="needs PyAV")
@pytest.mark.parametrize("codec", [None, *CODINGS])
def test_small_frames_are_the_same_bytes_each_time(tmp_path, codec):
    generator = np.random.default_rng(3)
    noise = generator.integers(0, 255, (17, 8, 10, 3), dtype=np.uint8)
    made = [Image.fromarray(pixels).resize((80, 64)) for pixels in noise]
    memory, files, ending = [], set(), CODEC_ENDINGS.get(codec, (".mp4",))[0]
    for number in range(5 if codec == "h265" else 20):  # what was freed lies where the encoder works
        memory = [*memory[-20:], np.full(int(generator.integers(1, 200_000)), number, np.uint8)]
        files.add(write_video(made, tmp_path / f"a{ending}", 24, codec).read_bytes())
    assert len(files) == 1
