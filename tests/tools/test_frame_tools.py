"""The tools for frames: enlarging, blurred faces, frames between frames, frames as pictures, on files and folders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from library.components.esrgan_models import RRDBNet, RRDBParams
from library.components.esrgan_utils import enlarged, load_rrdb
from library.core.errors import AtelierError, CheckpointError, ConfigError
from library.dataset.clips.video_files import has_pyav, look_at_video
from library.generation.video_files import read_video, write_video
from library.safetensors_utils import save_file_atomic
from tools import face_blur, facefix, interpolate_frames, upscaler, video_to_png
from tools.frame_tools import face_blur as blur
from tools.frame_tools import interpolate, to_png, upscale
from tools.frame_tools.processing import FrameProcessor

NEEDS_PYAV = pytest.mark.skipif(not has_pyav(), reason="needs PyAV")


def moving_bar(count: int = 5, size: tuple[int, int] = (64, 48)) -> list[Image.Image]:
    made = []
    for number in range(count):
        pixels = np.full((size[1], size[0], 3), 60, np.uint8)
        pixels[:, number * 8 : number * 8 + 16] = 230
        made.append(Image.fromarray(pixels))
    return made


@pytest.fixture
def folder(tmp_path) -> Path:
    """A picture of odd sides, one with alpha, a video, a text, and a folder with a picture."""
    place = tmp_path / "in"
    (place / "deeper").mkdir(parents=True)
    noise = np.random.default_rng(0).integers(0, 255, (21, 33, 3), dtype=np.uint8)
    Image.fromarray(noise).save(place / "a.png")
    Image.fromarray(noise).convert("RGBA").save(place / "b.webp")
    Image.fromarray(noise).save(place / "deeper" / "c.jpg")
    (place / "a.txt").write_text("a caption")
    write_video(moving_bar(), place / "v.mp4", 12)
    return place


# -- the network -------------------------------------------------------------------------------------------------------

PARAMS = {"x4": RRDBParams(8, 4, 2, 2), "x2": RRDBParams(8, 4, 1, 2, 2), "x1": RRDBParams(8, 4, 1, 2, 4),
          "x8": RRDBParams(8, 4, 1, 3)}  # fmt: skip


def network(name: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(7)
    return RRDBNet(PARAMS[name]).state_dict()


def old_names(tensors: dict[str, torch.Tensor], doublings: int) -> dict[str, torch.Tensor]:
    """As the first release of ESRGAN has them: places in sequences."""
    places = {"conv_first": "0", **{f"conv_up.{n}": str(3 + 3 * n) for n in range(doublings)}}
    places |= {"conv_hr": str(2 + 3 * doublings), "conv_last": str(4 + 3 * doublings)}
    blocks = max(int(name.split(".")[1]) for name in tensors if name.startswith("body."))
    found = {}
    for name, tensor in tensors.items():
        stem, kind = name.rsplit(".", 1)
        if stem.startswith("body."):
            _, block, dense, convolution = stem.split(".")
            found[f"model.1.sub.{block}.{dense.upper()}.{convolution}.0.{kind}"] = tensor
        elif stem == "conv_body":
            found[f"model.1.sub.{blocks + 1}.{kind}"] = tensor
        else:
            found[f"model.{places[stem]}.{kind}"] = tensor
    return found


def bsrgan_names(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    pairs = (("conv_body", "trunk_conv"), ("body.", "RRDB_trunk."), (".rdb", ".RDB"), ("conv_hr", "HRconv"),
             ("conv_up.0", "upconv1"), ("conv_up.1", "upconv2"))  # fmt: skip
    found = {}
    for name, tensor in tensors.items():
        for own, theirs in pairs:
            name = name.replace(own, theirs)
        found[name] = tensor
    return found


def real_names(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.replace("conv_up.0", "conv_up1").replace("conv_up.1", "conv_up2"): t for name, t in tensors.items()}


def by_hand(tensors: dict[str, torch.Tensor], x: torch.Tensor, doublings: int, unshuffle: int) -> torch.Tensor:
    """The formula of the papers, written out on a file's tensors."""

    def conv(name: str, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, tensors[f"{name}.weight"], tensors[f"{name}.bias"], padding=1)

    def act(x: torch.Tensor) -> torch.Tensor:
        return torch.where(x > 0, x, 0.2 * x)

    b, c, h, w = x.shape
    s = unshuffle
    x = x.reshape(b, c, h // s, s, w // s, s).permute(0, 1, 3, 5, 2, 4).reshape(b, c * s * s, h // s, w // s)
    first = x = conv("conv_first", x)
    for block in range(1 + max(int(n.split(".")[1]) for n in tensors if n.startswith("body."))):
        start = x
        for dense in ("rdb1", "rdb2", "rdb3"):
            at = f"body.{block}.{dense}.conv"
            one = act(conv(f"{at}1", x))
            two = act(conv(f"{at}2", torch.cat((x, one), 1)))
            three = act(conv(f"{at}3", torch.cat((x, one, two), 1)))
            four = act(conv(f"{at}4", torch.cat((x, one, two, three), 1)))
            x = conv(f"{at}5", torch.cat((x, one, two, three, four), 1)) * 0.2 + x
        x = x * 0.2 + start
    x = first + conv("conv_body", x)
    for number in range(doublings):
        x = act(conv(f"conv_up.{number}", x.repeat_interleave(2, 2).repeat_interleave(2, 3)))
    return conv("conv_last", act(conv("conv_hr", x)))


@pytest.mark.parametrize("name", PARAMS)
def test_the_network_of_files_under_all_their_names_is_that_of_the_papers(tmp_path, name):
    params, tensors = PARAMS[name], network(name)
    x = torch.rand(1, 3, 12, 8)
    expected = by_hand(tensors, x, params.doublings, params.unshuffle)
    forms = {"real": real_names(tensors), "bsrgan": bsrgan_names(tensors)} if params.doublings == 2 else {}
    if params.unshuffle == 1:
        forms["old"] = old_names(tensors, params.doublings)
    for form, named in forms.items():
        path = tmp_path / f"{form}.pth"
        torch.save({"params_ema": named, "params": {}} if form == "real" else named, path)
        model = load_rrdb(path)
        assert model is not None and model.params == params and model.params.scale == int(name[1:])
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-6)
    parts = enlarged(model, x[0], tile=4, overlap=64)
    torch.testing.assert_close(parts, expected[0].clamp(0, 1), rtol=1e-5, atol=1e-6)
    odd = enlarged(model, x[0, :, :7, :5])
    assert odd.shape == (3, 7 * params.scale, 5 * params.scale)


def test_files_that_are_no_such_network(tmp_path, capsys, monkeypatch):
    names = ("conv_first.weight", "layers.0.residual_group.blocks.0.attn.qkv.weight")  # SwinIR has the first one too
    save_file_atomic({name: torch.zeros(2, 3, 3, 3) for name in names}, tmp_path / "swinir.safetensors")
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    words = ["--model", str(tmp_path / "swinir.safetensors"), "--input", str(tmp_path / "a.png")]
    monkeypatch.setattr(upscale, "find_spec", lambda name: None)
    assert upscaler.main(words) != 0
    assert "needs torchvision; install the one that fits your torch, and spandrel" in capsys.readouterr().err
    monkeypatch.setattr(upscale, "find_spec", lambda name: None if name == "spandrel" else object())
    with pytest.raises(ConfigError, match="spandrel, which reads it, is not installed: pip install spandrel"):
        upscale.TOOL.run(words)
    tensors = network("x4")
    del tensors["conv_hr.bias"]
    save_file_atomic(real_names(tensors), tmp_path / "cut.safetensors")
    with pytest.raises(CheckpointError, match="not complete"):
        load_rrdb(tmp_path / "cut.safetensors")


@pytest.mark.skipif(upscale.spandrel_problem() is not None, reason=f"not tried: {upscale.spandrel_problem()}")
def test_spandrel_reads_the_same_network(tmp_path):
    torch.manual_seed(7)
    tensors = RRDBNet(RRDBParams(8, 32, 1, 2)).state_dict()  # it knows growths of 32 alone
    save_file_atomic(real_names(tensors), tmp_path / "x4.safetensors")
    x = torch.rand(3, 8, 8)
    own = load_rrdb(tmp_path / "x4.safetensors")
    theirs = upscale._of_spandrel(str(tmp_path / "x4.safetensors"), torch.float32, torch.device("cpu"))
    torch.testing.assert_close(theirs(x).clamp(0, 1), enlarged(own, x))


# -- files -------------------------------------------------------------------------------------------------------------


def test_pictures_and_videos_of_a_folder_are_enlarged(folder, tmp_path, capsys):
    save_file_atomic(real_names(network("x4")), tmp_path / "x4.safetensors")
    words = ["--model", str(tmp_path / "x4.safetensors"), "--input", str(folder), "--recursive"]
    assert upscaler.main([*words, "--output", str(tmp_path / "out"), "--scale", "1.5", "--keep_pngs"]) == 0
    sizes = {
        path.relative_to(tmp_path / "out").as_posix(): Image.open(path).size
        for path in (tmp_path / "out").rglob("*.*") if path.suffix != ".mp4"
    }  # fmt: skip
    frames = {f"v/v_{number:03d}.png": (96, 72) for number in range(5)}
    assert sizes == {"a.png": (50, 32), "b.webp": (50, 32), "deeper/c.jpg": (50, 32), **frames}
    check = look_at_video(str(tmp_path / "out" / "v.mp4"))
    assert (check.size, check.frames, check.rate) == ((96, 72), 5, 12)
    assert "files: 4 done" in capsys.readouterr().err
    assert upscaler.main([*words, "--output", str(tmp_path / "out")]) != 0
    assert "4 whose result exists" in capsys.readouterr().err
    assert upscaler.main([*words[:2], "--input", str(folder / "a.png"), "--mode", "esrgan", "-y"]) == 0
    assert Image.open(folder / "a_upscaled.png").size == (132, 84)


def test_wrong_options_of_frame_tools_are_told_together(folder, tmp_path):
    Image.new("RGB", (4, 4)).save(folder / "x.png")
    (folder / "x.mkv").write_bytes((folder / "v.mp4").read_bytes())
    (folder / "x.mp4").write_bytes((folder / "v.mp4").read_bytes())
    with pytest.raises(ConfigError) as caught:
        wrong = ["--scale", "-1", "--dtype", "fp8", "--codec", "h265", "--container", "avi"]
        upscale.TOOL.run(["--input", str(folder), *wrong])
    told = str(caught.value)
    for part in ("--model is missing", "--scale is -1", "--dtype is fp8", "would both become", "--codec is h265"):
        assert part in told, part
    with pytest.raises(ConfigError, match="would be written over itself"):
        upscale.TOOL.run(["--input", str(folder / "a.png"), "--output", str(folder)], make=lambda: FaceFree())
    with pytest.raises(ConfigError, match="which has no video in it"):
        interpolate.TOOL.run(["--input", str(folder / "deeper")])


def test_the_file_that_output_names_has_to_be_of_its_kind(folder, tmp_path):
    def refused(source: str, output: str, *words: str) -> str:
        with pytest.raises(ConfigError) as caught:
            upscale.TOOL.run(
                ["--input", str(folder / source), "--output", str(tmp_path / output), *words], make=lambda: FaceFree()
            )
        return str(caught.value)

    assert "needed for a picture: .png," in refused("a.png", "x.mp4") and "or a folder" in refused("a.png", "new.v2")
    assert "needed for a video: .mp4," in refused("v.mp4", "x.png")
    assert "x.mkv, and --container avi" in refused("v.mp4", "x.mkv", "--container", "avi")
    if has_pyav():
        words = ["--input", str(folder / "v.mp4"), "--output", str(tmp_path / "x.mkv")]
        assert upscale.TOOL.run(words, make=lambda: FaceFree()) == [tmp_path / "x.mkv"]


@pytest.mark.parametrize("output", [None, "inside"])
def test_a_second_run_over_a_folder_takes_no_results_for_inputs(folder, output):
    words = ["--input", str(folder), "--recursive", *(["--output", str(folder / output)] if output else [])]
    assert len(upscale.TOOL.run(words, make=lambda: FaceFree())) == 4
    Image.new("RGB", (4, 4)).save(folder / "own_upscaled.png")  # there is no picture `own` that it was made of
    assert len(upscale.TOOL.run(words, make=lambda: FaceFree())) == 1


class FaceFree(FrameProcessor):
    def picture(self, frame: np.ndarray) -> np.ndarray:
        return frame


def test_a_file_that_cannot_be_read_does_not_end_the_run(folder, tmp_path, caplog):
    (folder / "broken.mp4").write_bytes(b"no video")
    (folder / "broken.png").write_bytes(b"no picture")
    made = blur.TOOL.run(["--input", str(folder), "--output", str(tmp_path / "out")], make=FaceFree)
    assert sorted(path.name for path in made) == ["a.png", "b.webp", "v.mp4"]
    assert "broken.mp4" in caplog.text and "3 done" in caplog.text and "2 failed" in caplog.text


# -- faces -------------------------------------------------------------------------------------------------------------


def test_faces_are_blurred_softly_and_the_rest_is_kept(folder, tmp_path):
    frame = np.random.default_rng(1).integers(0, 255, (80, 100, 3), dtype=np.uint8)
    made = blur.FaceBlur(lambda image: [(20, 30, 20, 20), (-10, -10, 20, 20)], strength=20, sigma=8).picture(frame)
    assert made.shape == frame.shape
    assert np.array_equal(made[60:], frame[60:]) and np.array_equal(made[:, 60:], frame[:, 60:])
    inside = (slice(32, 48), slice(22, 38))
    assert made[inside].std() < 0.2 * frame[inside].std() and made[:8, :8].std() < 0.3 * frame[:8, :8].std()
    mask = blur.face_mask((80, 100), [(20, 30, 20, 20)])
    assert mask[40, 30] == 1 and 0 < mask[40, 41] < 1 and mask[40, 45] == 0 and mask.max() == 1
    assert blur.FaceBlur(lambda image: []).picture(frame) is frame
    with pytest.raises(CheckpointError, match="no YuNet detector"):
        blur.load_detector(str(folder / "a.txt"), 0.5)
    assert face_blur.main(["--input", str(folder), "--model", str(folder / "none.onnx")]) != 0


# -- frames between ----------------------------------------------------------------------------------------------------


@NEEDS_PYAV
@pytest.mark.parametrize(("factor", "count"), [(2, 1), (2, 2), (3, 7)])
def test_frames_stay_and_those_between_lie_between(factor, count):
    frames = [np.asarray(frame) for frame in moving_bar(count)]
    made = list(interpolate.Interpolation(factor).frames(iter(frames), 12.0))
    assert len(made) == (count - 1) * factor + 1
    assert all(np.array_equal(made[number * factor], frame) for number, frame in enumerate(frames))
    if count > 2:
        inner = made[factor:-factor]
        places = [np.average(np.arange(64), weights=frame[24, :, 0].astype(float) - 59) for frame in inner]
        assert all(first < second for first, second in zip(places, places[1:])), "the bar moves on in each"


@NEEDS_PYAV
def test_videos_become_faster_and_pictures_are_left_alone(folder, tmp_path, capsys):
    words = ["--input", str(folder), "--output", str(tmp_path / "out"), "--factor", "4", "--codec", "prores"]
    assert interpolate_frames.main([*words, "--mode", "gimmvfi_f"]) == 0
    check = look_at_video(str(tmp_path / "out" / "v.mkv"))
    assert (check.frames, check.rate, [path.name for path in (tmp_path / "out").iterdir()]) == (17, 48, ["v.mkv"])
    assert "--mode gimmvfi_f is ignored" in capsys.readouterr().err


def test_frames_as_pictures(folder, tmp_path):
    (made,) = to_png.run(["--input", str(folder / "v.mp4"), "--output", str(tmp_path / "frames"), "--num_frames", "3"])
    assert sorted(path.name for path in made.iterdir()) == ["000000.png", "000001.png", "000002.png"]
    expected = read_video(folder / "v.mp4")[2]
    assert Image.open(made / "000002.png").tobytes() == expected.tobytes()
    assert video_to_png.main(["--input", str(folder)]) == 0 and len(list((folder / "v").iterdir())) == 5
    with pytest.raises(AtelierError, match="whose folder has files"):
        to_png.run(["--input", str(folder)])
    with pytest.raises(ConfigError, match="is no video and has none"):
        to_png.run(["--input", str(folder / "a.png")])


def test_face_restoration_is_refused_with_what_to_use(capsys):
    assert facefix.main(["--input", "a.png", "--mode", "gfpgan"]) != 0
    assert "docs/frame_tools.md tells what to use instead" in capsys.readouterr().err
