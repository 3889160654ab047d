"""The tools for images, on small ones, through their command lines."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from library.components.latent_upscaler_models import LatentUpscaler
from library.core.errors import CheckpointError
from library.dataset.captions import face_numbers
from library.dataset.image_files import read_on_white
from library.safetensors_utils import save_file_atomic
from tests.library.dataset.images import make_image
from tests.tiny import build_tiny_sd
from tools import canny, detect_face_rotate, latent_upscaler, resize_images_to_resolution
from tools.image_tools.faces import Face, FaceOptions, cut_image, cut_name, face_of, plan_cut
from tools.image_tools.faces import run as run_faces


def size_of(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


# -- resizing ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def pictures(tmp_path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    make_image(folder / "wide.PNG", (300, 200), seed=1)
    (folder / "wide.txt").write_text("a wide one")
    make_image(folder / "small.jpg", (40, 60), seed=2)
    (folder / "broken.png").write_bytes(b"no picture")
    (folder / "notes.md").write_text("notes")
    return folder


def test_copies_keep_their_shape_and_are_as_large_as_the_resolution_allows(pictures, tmp_path, caplog):
    caplog.set_level("INFO")
    target = tmp_path / "smaller"
    assert (
        resize_images_to_resolution.main(
            [str(pictures), str(target), "--max_resolution", "64x64,128x128", "--save_as_png"]
        )
        == 0
    )
    factor = (128 * 128 / (300 * 200)) ** 0.5
    assert size_of(target / "wide+128x128.png") == (int(300 * factor), int(200 * factor))
    assert size_of(target / "wide+64x64.png") == (int(300 * factor / 2), int(200 * factor / 2))
    assert size_of(target / "small+128x128.png") == (40, 60)
    assert (target / "wide.txt").read_text() == "a wide one" and (target / "notes.md").exists()
    assert "2 done, 0 skipped, 1 failed" in caplog.text and "broken.png" in caplog.text


def test_each_copy_is_made_from_the_image_itself(pictures, tmp_path):
    """A picture that was made small first and large later would be blurred."""
    for order in ("32x32,128x128", "128x128,32x32"):
        assert (
            resize_images_to_resolution.main(
                [str(pictures), str(tmp_path / order), "--max_resolution", order, "--save_as_png"]
            )
            == 0
        )
    first, second = (
        (tmp_path / order / "wide+128x128.png").read_bytes() for order in ("32x32,128x128", "128x128,32x32")
    )
    assert first == second


def test_captions_go_with_their_copies_once(pictures, tmp_path):
    options = [
        "--max_resolution",
        "64x64",
        "--divisible_by",
        "16",
        "--copy_associated_files",
        "--interpolation",
        "lanczos4",
    ]
    assert resize_images_to_resolution.main([str(pictures), str(tmp_path / "out"), *options]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "notes.md",
        "small+64x64.jpg",
        "wide+64x64.jpg",
        "wide+64x64.txt",
    ]
    assert size_of(tmp_path / "out" / "wide+64x64.jpg") == (64, 48)


def test_turned_and_transparent_images_are_copied_as_shown(tmp_path):
    (tmp_path / "in").mkdir()
    make_image(tmp_path / "in" / "clear.png", (20, 20), alpha=0)
    turned = Image.new("RGB", (40, 20), (255, 0, 0))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "in" / "turned.jpg", exif=exif)
    assert (
        resize_images_to_resolution.main([str(tmp_path / "in"), str(tmp_path / "out"), "--max_resolution", "64x64"])
        == 0
    )
    assert size_of(tmp_path / "out" / "turned+64x64.jpg") == (20, 40)
    assert (read_on_white(str(tmp_path / "out" / "clear+64x64.jpg")) == 255).all()
    assert (
        resize_images_to_resolution.main(
            [str(tmp_path / "in"), str(tmp_path / "png"), "--max_resolution", "64x64", "--save_as_png"]
        )
        == 0
    )
    assert Image.open(tmp_path / "png" / "clear+64x64.png").mode == "RGBA"


def test_existing_copies_stay_without_overwrite(pictures, tmp_path, capsys):
    target = tmp_path / "out"
    command = [str(pictures), str(target), "--max_resolution", "64x64"]
    assert resize_images_to_resolution.main(command) == 0
    (target / "wide+64x64.jpg").write_text("mine")
    assert resize_images_to_resolution.main(command) == 1
    assert "--overwrite" in capsys.readouterr().err and (target / "wide+64x64.jpg").read_text() == "mine"
    assert resize_images_to_resolution.main([*command, "--overwrite"]) == 0
    assert size_of(target / "wide+64x64.jpg") == (78, 52)


def test_every_problem_of_a_command_is_told_at_once(pictures, capsys):
    assert (
        resize_images_to_resolution.main(
            [str(pictures), str(pictures), "--max_resolution", "64", "--divisible_by", "0"]
        )
        == 2
    )
    told = capsys.readouterr().err
    assert all(name in told for name in ("dst_img_folder", "--divisible_by is 0", "--max_resolution has '64'"))
    assert resize_images_to_resolution.main([str(pictures / "nowhere"), "out"]) == 2


# -- edges -------------------------------------------------------------------------------------------------------------


def square(path: Path) -> Path:
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[16:48, 16:48] = (255, 128, 0)
    Image.fromarray(pixels).save(path)
    return path


def test_edges_of_an_image_and_of_a_folder(tmp_path):
    square(tmp_path / "square.png")
    assert canny.main(["--input", str(tmp_path / "square.png"), "--output", str(tmp_path / "edges.png")]) == 0
    edges = np.asarray(Image.open(tmp_path / "edges.png"))
    assert edges.shape == (64, 64) and set(np.unique(edges)) == {0, 255}
    assert not edges[24:40, 24:40].any() and edges[30, 14:18].any()
    (tmp_path / "in").mkdir()
    square(tmp_path / "in" / "a.png")
    (tmp_path / "in" / "b.png").write_bytes(b"")
    assert canny.main(["--input", str(tmp_path / "in"), "--output", str(tmp_path / "out")]) == 0
    assert (np.asarray(Image.open(tmp_path / "out" / "a.png")) == edges).all()


def test_wrong_commands_for_edges(tmp_path, capsys):
    path = str(square(tmp_path / "square.png"))
    assert canny.main(["--input", str(tmp_path / "none.png"), "--thres1", "9", "--thres2", "3"]) == 2
    told = capsys.readouterr().err
    assert all(text in told for text in ("--output is missing", "does not exist", "--thres1 is 9"))
    assert canny.main(["--input", path, "--output", path]) == 2 and "is the input" in capsys.readouterr().err
    (tmp_path / "broken.png").write_bytes(b"no")
    assert canny.main(["--input", str(tmp_path / "broken.png"), "--output", str(tmp_path / "x.png")]) == 2
    assert not (tmp_path / "x.png").exists()


# -- faces -------------------------------------------------------------------------------------------------------------


def marked(size_wh: tuple[int, int], face: Face) -> np.ndarray:
    """A dark picture with a white square at the middle of the face."""
    image = np.zeros((size_wh[1], size_wh[0], 3), np.uint8)
    image[face.y - 2 : face.y + 3, face.x - 2 : face.x + 3] = 255
    return image


@pytest.mark.parametrize(
    "options",
    [
        {}, {"crop_size": "50,40"}, {"crop_size": "100,60", "resize_face_size": 60},
        {"crop_size": "60,90", "resize_fit": True},
        {"crop_ratio": "2,1.5"}, {"resize_face_size": 10}, {"crop_size": "300,300"},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("place", [(30, 20), (100, 60), (190, 110)])
def test_the_face_is_where_the_numbers_say_and_the_cut_lies_in_the_image(options, place):
    face = Face(*place, 30, 24)
    cut, moved = cut_image(marked((200, 120), face), face, FaceOptions(**options))
    assert cut[min(moved.y, cut.shape[0] - 1), min(moved.x, cut.shape[1] - 1)].mean() > 100
    plan = plan_cut((200, 120), face, FaceOptions(**options))
    assert cut.shape[:2] == plan.size_wh[::-1]
    assert all(
        0 <= start and start + length <= side for start, length, side in zip(plan.offset, plan.size_wh, plan.resized_wh)
    )
    assert plan.resized_wh[0] / plan.resized_wh[1] == pytest.approx(200 / 120, rel=0.05)


def test_sizes_of_cuts():
    face = Face(100, 60, 30, 24)
    assert plan_cut((200, 120), face, FaceOptions(crop_size="50,40")).size_wh == (50, 40)
    assert plan_cut((200, 120), face, FaceOptions(crop_size="400,100")).resized_wh == (400, 240)
    assert plan_cut((200, 120), face, FaceOptions(crop_size="60,60", resize_fit=True)).resized_wh == (100, 60)
    assert plan_cut((200, 120), face, FaceOptions(crop_ratio="2,1.5")).size_wh == (60, 45)
    assert plan_cut((200, 120), face, FaceOptions(resize_face_size=60)).face == Face(200, 120, 60, 48)
    assert plan_cut((200, 120), face, FaceOptions(resize_face_size=15, crop_size="150,60")).resized_wh == (150, 90)


def test_turning_brings_the_eyes_level():
    points = np.zeros((28, 3))
    points[11], points[19] = (80, 40, 1), (120, 80, 1)
    face = face_of((60, 30, 140, 90, 0.95), points)
    assert (face.x, face.y, face.width, face.height) == (100, 60, 80, 60) and face.angle == pytest.approx(45)
    image = np.zeros((120, 200, 3), np.uint8)
    for x, y, _ in points[[11, 19]].astype(int):
        image[y - 2 : y + 3, x - 2 : x + 3] = 255
    turned, _ = cut_image(image, face, FaceOptions(rotate=True))
    rows = 30 + np.nonzero(turned[30:90, 60:140, 0] > 100)[0]  # away from the mirrored borders
    assert rows.size and rows.min() >= 56 and rows.max() <= 64


def test_names_are_read_back_by_the_dataset():
    assert cut_name("girl", None, Face(10, 200, 30, 4)) == "girl_0010_0200_0030_0004.png"
    assert cut_name("girl", 2, Face(10, 200, 30, 4)) == "girl_02_0010_0200_0030_0004.png"
    assert face_numbers(cut_name("girl", None, Face(10, 200, 30, 4))) == (10, 200, 30, 4)


def test_the_largest_face_or_every_face_is_written(tmp_path, caplog):
    caplog.set_level("INFO")
    (tmp_path / "in").mkdir()
    make_image(tmp_path / "in" / "a.bmp", (100, 80))
    make_image(tmp_path / "in" / "tiny.png", (20, 20))
    make_image(tmp_path / "in" / "empty.png", (50, 50))
    faces = [Face(20, 20, 10, 10), Face(60, 40, 30, 20)]
    detector = lambda: lambda image: faces if image.shape[1] == 100 else []  # noqa: E731
    command = ["--src_dir", str(tmp_path / "in"), "--min_size", "30", "--crop_size", "40,40"]
    run_faces([*command, "--dst_dir", str(tmp_path / "one")], detector)
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["a_0020_0020_0030_0020.png"]
    assert (
        "1 done" in caplog.text
        and "1 without a face" in caplog.text
        and "1 with a side below --min_size" in caplog.text
    )
    run_faces([*command, "--dst_dir", str(tmp_path / "all"), "--multiple_faces"], detector)
    assert sorted(path.name for path in (tmp_path / "all").iterdir()) == [
        "a_01_0020_0020_0010_0010.png",
        "a_02_0020_0020_0030_0020.png",
    ]


def test_faces_without_the_package_and_with_options_that_exclude_each_other(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    make_image(tmp_path / "a.png")
    assert (
        detect_face_rotate.main(
            [
                "--src_dir",
                str(tmp_path),
                "--dst_dir",
                "x",
                "--resize_fit",
                "--resize_face_size",
                "9",
                "--crop_ratio",
                "4",
            ]
        )
        == 2
    )
    told = capsys.readouterr().err
    assert "pip install anime-face-detector" in told and "--resize_fit and --resize_face_size" in told
    assert (
        "--crop_ratio is '4'" in told
        and "--crop_ratio and --resize_face_size" in told
        and "--resize_fit needs --crop_size" in told
    )


# -- upscaler ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    torch.manual_seed(1)
    model = LatentUpscaler()
    torch.nn.init.normal_(model.conv_final.weight, std=0.01)
    path = tmp_path_factory.mktemp("upscaler") / "upscaler.safetensors"
    save_file_atomic(model.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return build_tiny_sd(tmp_path_factory.mktemp("sd"), "sd1")


def test_a_new_upscaler_changes_nothing_and_has_its_blocks():
    model, latents = LatentUpscaler().eval(), torch.randn(1, 4, 6, 5)
    assert torch.equal(model(latents), latents)
    assert sum(bool(re.fullmatch(r"res\d+", name)) for name, _ in model.named_children()) == 20


def test_images_of_several_sizes_are_doubled(tiny, weights, tmp_path, caplog):
    caplog.set_level("INFO")
    make_image(tmp_path / "a.png", (24, 17), seed=1)
    make_image(tmp_path / "b.png", (32, 32), seed=2)
    make_image(tmp_path / "c.png", (24, 17), seed=3)
    (tmp_path / "d.png").write_bytes(b"no picture")
    command = ["--vae_path", str(tiny.model), "--weights", str(weights), "--image_pattern", str(tmp_path / "?.png")]
    assert latent_upscaler.main([*command, "--output_dir", str(tmp_path / "out"), "--batch_size", "2"]) == 0
    sizes = {path.name: size_of(path) for path in (tmp_path / "out").iterdir()}
    assert sizes == {"a_upscaled.png": (48, 34), "b_upscaled.png": (64, 64), "c_upscaled.png": (48, 34)}
    assert "3 done, 0 skipped, 1 failed" in caplog.text
    assert latent_upscaler.main([*command, "--output_dir", str(tmp_path / "out")]) == 1
    assert latent_upscaler.main([*command, "--output_dir", str(tmp_path / "one"), "--batch_size", "1"]) == 0
    together, alone = (np.asarray(Image.open(tmp_path / where / "a_upscaled.png"), int) for where in ("out", "one"))
    assert abs(together - alone).max() <= 1


def test_the_upscaler_of_the_image_script(tiny, weights, tmp_path):
    from library.generation.gen_img import script as unet_inference

    options = [
        "--prompt",
        "a cat --d 1",
        "--W=128",
        "--H=128",
        "--steps=2",
        "--highres_fix_scale=0.5",
        "--highres_fix_steps=2",
    ]
    base = [f"--ckpt={tiny.model}", f"--clip_tokenizer={tiny.tokenizer}", *options]
    results = []
    for name, more in (
        ("plain", []),
        ("ours", ["--highres_fix_upscaler=tools.latent_upscaler", f"--highres_fix_upscaler_args=weights={weights}"]),
    ):
        unet_inference.run([*base, f"--outdir={tmp_path / name}", *more])
        [path] = (tmp_path / name).glob("*.png")
        results.append(np.asarray(Image.open(path), int))
    assert results[0].shape == (128, 128, 3) and abs(results[0] - results[1]).max() > 0


def test_files_that_are_no_upscaler(tiny, weights, tmp_path, capsys):
    with pytest.raises(CheckpointError, match="is not a latent upscaler"):
        latent_upscaler.create_upscaler(weights=str(tiny.model))
    with pytest.raises(CheckpointError, match="do not exist"):
        latent_upscaler.create_upscaler(weights=str(tmp_path / "none.safetensors"))
    assert (
        latent_upscaler.main(["--image_pattern", str(tmp_path / "*.png"), "--batch_size", "0", "--precision", "fp8"])
        == 2
    )
    told = capsys.readouterr().err
    assert all(
        text in told
        for text in (
            "--vae_path is missing",
            "--weights is missing",
            "fits no image",
            "--batch_size is 0",
            "--precision is fp8",
        )
    )
