"""Readers of videos: rates found from times, odd files, and both readers giving the same frames."""

from __future__ import annotations

import dataclasses
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

from library.dataset.cache_index import CacheIndex
from library.dataset.clips import opencv_video, video_files
from library.dataset.clips.cutting import Cutter
from library.dataset.clips.rates import Conversion, constant_rate, stored_rate
from library.dataset.clips.settings import ClipSettings
from library.dataset.clips.video_check import VideoCheck
from library.dataset.clips.video_files import check_of_note, frames_of, look_at_noted_video, look_at_video, note_of
from library.dataset.clips.windows import ClipWindow
from library.dataset.media_utils import ImageFileError
from library.families.record import ClipFacts
from tests.golden_dir import BEHAVIOUR_DIR, behaviour
from tests.library.dataset.clips.videos import numbered_frame, numbers_of, write_frames, write_video
from tests.library.dataset.images import FLUX
from tests.toy_video.record import FAMILY

NTSC = Fraction(30000, 1001)


def rounded(rate: Fraction, count: int, clock: int) -> list[Fraction]:
    """When frames begin, as a container with so many ticks a second stores it."""
    return [Fraction(round(number / rate * clock), clock) for number in range(count)]


@pytest.mark.parametrize("rate", [Fraction(24), Fraction(24000, 1001), Fraction(25), NTSC, Fraction(30), Fraction(60)])
def test_rounded_times_give_the_exact_rate(rate):
    for clock, count in ((1000, 400), (1_000_000, 400), (90000, 400), (1_000_000, 6)):
        assert constant_rate(rounded(rate, count, clock), stored_rate(float(rate))) == rate, (clock, count)
    assert constant_rate(rounded(rate, 2000, 1000)) == rate, "without the header's word, of a long file"
    assert constant_rate([time + 7 for time in rounded(rate, 400, 1000)], stored_rate(float(rate))) == rate


def test_uneven_times_have_no_rate():
    times = rounded(Fraction(24), 40, 1000)
    assert constant_rate([*times[:20], *(time + Fraction(1, 100) for time in times[20:])]) is None
    assert constant_rate([Fraction(0)] * 5) is None and constant_rate([Fraction(0)]) is None


def test_times_that_are_stored_rounded_meet_the_frame_that_begins_there():
    """Thirds of a second in millionths: frame 4 begins at 666667, a little late, and is on the screen at 2/3 s."""
    times = tuple(rounded(Fraction(6), 7, 1_000_000))
    conversion = Conversion.own(None, (*times[:6], Fraction(3)), 3)
    assert [conversion.frame(number) for number in range(4)] == [0, 2, 4, 5]
    assert conversion.count(7) == 10


def test_folders_of_frames_and_pictures(tmp_path):
    folder = write_frames(tmp_path / "frames", 12)
    (folder / "notes.txt").write_text("no frame", encoding="utf-8")
    check = look_at_video(str(folder))
    assert (check.size, check.frames, check.rate, check.times) == ((64, 32), 12, None, ())
    assert numbers_of(np.stack(list(frames_of(str(folder), [0, 0, 5, 11])))) == [0, 0, 5, 11]
    picture = str(folder / "0007.png")
    assert look_at_video(picture).frames == 1 and numbers_of(np.stack(list(frames_of(picture, [0, 0])))) == [7, 7]
    with pytest.raises(ImageFileError, match="holds no pictures"):
        (tmp_path / "none").mkdir()
        look_at_video(str(tmp_path / "none"))
    (folder / "0003.png").write_bytes(b"damaged")
    with pytest.raises(ImageFileError, match=r"0003\.png"):
        look_at_video(str(folder))


def test_alpha_of_frames_and_of_videos_without(tmp_path):
    folder = write_frames(tmp_path / "frames", 2)
    picture = Image.fromarray(numbered_frame(9)).convert("RGBA")
    picture.putalpha(51)
    picture.save(folder / "0001.png")
    opaque, clear = frames_of(str(folder), [0, 1], with_alpha=True)
    assert (opaque[..., 3] == 255).all() and (clear[..., 3] == 51).all() and look_at_video(str(folder)).transparent
    path = write_video(tmp_path / "a.avi", 3)
    (frame,) = frames_of(str(path), [1], with_alpha=True)
    assert frame.shape == (32, 64, 4) and (frame[..., 3] == 255).all()


def test_frames_that_are_not_wanted_are_not_converted(tmp_path, monkeypatch):
    path = write_video(tmp_path / "a.avi", 30)
    read = []
    retrieved = opencv_video._retrieved
    monkeypatch.setattr(video_files, "reader_of", lambda _: opencv_video)
    monkeypatch.setattr(opencv_video, "_retrieved", lambda *given: read.append(1) or retrieved(*given))
    assert numbers_of(np.stack(list(frames_of(str(path), [20, 20, 22])))) == [20, 20, 22] and len(read) == 2


@pytest.mark.parametrize("video", [v["file"] for v in behaviour("video_frames.json")["videos"] if v["frame_rate"]])
def test_a_clip_far_behind_is_found_without_decoding_all_before_it(video, monkeypatch):
    """Of every codec and container of the reference files, from every frame on."""
    path = str(BEHAVIOUR_DIR / video)
    check = look_at_video(path)
    whole = list(frames_of(path, range(check.frames)))
    monkeypatch.setattr(video_files, "FAR", 1)
    monkeypatch.setattr(video_files, "reader_of", lambda _: pytest.fail("it is decoded from the beginning"))
    for first in range(1, check.frames):
        numbers = [number for number in (first, first, first + 2) if number < check.frames]
        found = list(frames_of(path, numbers, rate=check.even_rate))
        assert len(found) == len(numbers)
        for frame, number in zip(found, numbers):
            assert np.array_equal(frame, whole[number]), number


def test_where_a_place_is_not_found_all_frames_are_decoded(tmp_path, monkeypatch):
    """A rate that the file no longer has leads to no frame's time."""
    path = str(write_video(tmp_path / "a.avi", 30, fps=24))
    monkeypatch.setattr(video_files, "FAR", 1)
    for rate in (Fraction(19), Fraction(24), None):
        assert numbers_of(np.stack(list(frames_of(path, [7, 9], rate=rate)))) == [7, 9], rate


def test_what_is_no_video_is_named(tmp_path):
    cases = {"no.mp4": (None, "does not exist"), "0.mp4": (b"", "empty file"), "x.webm": (b"x" * 5000, "no.*video")}
    for name, (content, message) in cases.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(ImageFileError, match=rf"{name}.*{message}"):
            look_at_video(str(tmp_path / name))


def test_notes_hold_all_that_was_seen(tmp_path):
    uneven = VideoCheck(
        (64, 32), transparent=True, frames=3, rate=NTSC, times=(Fraction(0), Fraction(1, 3), Fraction(2)), promised=4,
        reads_alpha=False, mixed_sizes=True,
    )
    for check in (uneven, VideoCheck((1, 2)), look_at_video(str(write_video(tmp_path / "a.avi", 5)))):
        assert check_of_note(note_of(check)) == check and "|" not in note_of(check)
    for text in ("", "1 2 3", "a b c d e f g h i j k"):
        with pytest.raises(ValueError):
            check_of_note(text)
    assert look_at_noted_video(str(tmp_path / "a.avi"), CacheIndex()).frames == 5


def test_both_readers_agree(tmp_path):
    """On the reference files, what OpenCV tells is what PyAV tells, and the frames are the same but for rounding."""
    pytest.importorskip("av")
    from library.dataset.clips import pyav_video

    for video in behaviour("video_frames.json")["videos"]:
        path = str(BEHAVIOUR_DIR / video["file"])
        seen = [(check.size, check.frames, check.rate, check.times) for check in (
            reader.look(path) for reader in (opencv_video, pyav_video)
        )]  # fmt: skip
        assert seen[0] == seen[1], path
        one, other = (np.stack([read() for read in m.each_frame(path, False)]) for m in (opencv_video, pyav_video))
        assert np.abs(one.astype(int) - other).max() <= 2, path
    whole = [write_video(tmp_path / "a.avi", 40), BEHAVIOUR_DIR / "videos" / "v30_60.mkv"]
    for path in whole:
        cut = tmp_path / f"cut{path.suffix}"
        for part in (0.9, 0.7, 0.5):
            cut.write_bytes(path.read_bytes()[: int(path.stat().st_size * part)])
            one, other = (reader.look(str(cut)) for reader in (opencv_video, pyav_video))
            assert (one.frames, one.rate, one.is_cut) == (other.frames, other.rate, other.is_cut), (path, part)
            assert len(list(pyav_video.each_frame(str(cut), False))) == other.frames < 60
    cut.write_bytes(whole[1].read_bytes()[:300])
    with pytest.raises(ImageFileError, match=r"cut\.mkv"):
        pyav_video.look(str(cut))


def test_transparent_videos(tmp_path):
    """PyAV reads what OpenCV only knows to be there."""
    av = pytest.importorskip("av")
    from library.dataset.clips import pyav_video

    path = tmp_path / "a.mov"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("png", rate=24)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "rgba"
        for number, alpha in enumerate((255, 51)):
            pixels = np.dstack([numbered_frame(number), np.full((32, 64), alpha, np.uint8)])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgba")))
        container.mux(stream.encode(None))
    read, unread = pyav_video.look(str(path)), opencv_video.look(str(path))
    assert (read.transparent, read.reads_alpha, unread.transparent, unread.reads_alpha) == (True, True, True, False)
    frames = [frame() for frame in pyav_video.each_frame(str(path), True)]
    assert [int(frame[..., 3].mean()) for frame in frames] == [255, 51] and numbers_of(np.stack(frames)[..., :3]) == [0, 1]


# ---- cutting ---------------------------------------------------------------------------------------------------------

def test_sections_of_a_clip_are_samples():
    """A stride of 2 and sections of 3 latent frames: 13 frames give 7 latent ones, the first and two sections."""
    cutter = Cutter(ClipSettings(target_frames=(7, 13)), sectioned(), section_frames=3)
    windows = cutter.clips_of(VideoCheck((64, 32), frames=14))
    assert [window.key for window in windows] == [(0, 7, 0), (0, 13, 0), (0, 13, 1)]
    assert cutter.needed == 7 and cutter.settings_problem() is None
    short = Cutter(ClipSettings(target_frames=(1, 5, 7)), sectioned(), section_frames=3)
    assert "target_frames [1, 5] are too few for a section of 3 latent frames" in short.settings_problem()
    assert short.too_short([("a.mp4", VideoCheck((64, 32), frames=6))]) is None, "the video is not at fault"
    whole = Cutter(ClipSettings(frame_extraction="full"), sectioned(), section_frames=3)
    assert whole.settings_problem() is None and whole.needed == 7 and not whole.clips_of(VideoCheck((64, 32), frames=6))
    assert "a.mp4 (6 frames)" in whole.too_short([("a.mp4", VideoCheck((64, 32), frames=6))])


def test_a_control_without_times_goes_with_uneven_frames():
    """Of a video whose frames begin at 0, 1/12, 4/12 and 5/12 s; a picture stands beside all of them."""
    times = tuple(Fraction(place, 12) for place in (0, 1, 4, 5))
    cutter = Cutter(ClipSettings(source_fps="auto"), sectioned())
    video = VideoCheck((64, 32), frames=4, rate=Fraction(36, 5), times=times)
    window = ClipWindow(0, 6)
    shown = {count: cutter.control_clip(VideoCheck((64, 32), frames=count), video).frame_numbers(window)
             for count in (4, 3, 2, 1)}  # fmt: skip
    assert shown == {4: [0, 1, 1, 1, 2, 3], 3: [0, 1, 1, 1, 2, 2], 2: [0, 1, 1, 1, 1, 1], 1: [0, 0, 0, 0, 0, 0]}


def sectioned():
    return dataclasses.replace(FAMILY.architecture, clips=ClipFacts(short="toy", long="toy", fps=12, sections=True))


def test_a_family_without_videos_cuts_none():
    class Subset:
        clips, window_size = ClipSettings(), 9

    assert Cutter.of(Subset, FLUX) is None and Cutter.of(Subset, None) is None
    assert Cutter.of(Subset, sectioned()).section_frames == 9


def test_a_clip_says_which_frames_it_has():
    conversion = Conversion.given(24, 12)
    assert ClipWindow(3, 5, 2, conversion).words == "frames 3 to 7 at 24 to 12 fps, section 2"
    assert ClipWindow(0, 1).key == (0, 1) and ClipWindow(0, 1, 0).key == (0, 1, 0)
