"""Sigma tables and previews in the image scripts of Stable Diffusion and SDXL, through their command lines."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from library.core.errors import AtelierError
from library.generation.recorded_requests import ENTRY
from library.generation.tiny_decoders import clip_layers, picture_layers
from tests.library.generation.test_previews import randomized
from tests.library.generation.tiny_scripts import build, made, script_of, words

SCRIPTS = ("gen_img", "sdxl")
FOLDER = {"gen_img": "--outdir", "sdxl": "--output_dir"}


@pytest.fixture(scope="module", params=SCRIPTS)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    return request.param, build(request.param, tmp_path_factory.mktemp(request.param))


def test_tables_make_other_pictures(tiny, tmp_path: Path) -> None:
    name, model = tiny
    more = ["--sampler=euler", "--steps=4"]
    pictures = [made(name, model, tmp_path / "own", *more)]
    for table in ("simple", "sgm_uniform", "karras", "beta"):
        pictures.append(made(name, model, tmp_path / table, *more, f"--sigma_table={table}"))
    for number, picture in enumerate(pictures):
        assert not any(torch.equal(picture, other) for other in pictures[:number]), number
    for sampler in ("pndm", "dpmsolver"):
        with pytest.raises(AtelierError, match=f"--sigma_table is beta with the sampler {sampler}"):
            made(name, model, tmp_path, f"--sampler={sampler}", "--sigma_table=beta")


def test_a_picture_tells_its_table_and_is_made_again(tiny, tmp_path: Path) -> None:
    name, model = tiny
    (path,) = script_of(name).run(words(name, model, tmp_path / "first", "--sampler=euler", "--sigma_table=karras"))
    assert '"sigma_table": "karras"' in Image.open(path).text[ENTRY]
    (again,) = script_of(name).run([f"--from_metadata={path}", f"{FOLDER[name]}={tmp_path / 'again'}"])
    assert Path(again).read_bytes() == Path(path).read_bytes()


def test_a_table_with_fewer_steps_and_a_picture_to_start_from(tmp_path: Path) -> None:
    """Of 200 steps beta has 192; the strength is a share of those that are made."""
    model = build("gen_img", tmp_path / "model")
    Image.new("RGB", (64, 64), "red").save(tmp_path / "source.png")
    more = (f"--image_path={tmp_path / 'source.png'}", "--sampler=euler", "--sigma_table=beta")
    few = made("gen_img", model, tmp_path / "few", *more, "--steps=6", "--strength=0.5")
    none = made("gen_img", model, tmp_path / "none", *more, "--steps=6", "--strength=0")
    assert torch.isfinite(few).all() and not torch.equal(few, none)


def test_previews_change_nothing(tiny, tmp_path: Path) -> None:
    name, model = tiny
    save_file(randomized(picture_layers(4, 4)).state_dict(), tmp_path / "tiny.safetensors")
    save_file(randomized(clip_layers(16, (4, 4, 4, 4))).state_dict(), tmp_path / "clips.safetensors")
    files = []
    for folder, more in {
        "without": [], "colours": ["--preview_latent_every=2"],
        "tiny": ["--preview_latent_every=1", f"--preview_vae={tmp_path / 'tiny.safetensors'}"],
    }.items():  # fmt: skip
        (path,) = script_of(name).run(words(name, model, tmp_path / folder, "--steps=3", *more))
        preview = tmp_path / folder / "latent_preview.png"
        files.append(Path(path).read_bytes())
        assert preview.is_file() == bool(more)
        assert not more or Image.open(preview).size == Image.open(path).size
    assert files[0] == files[1] == files[2], "pictures and what they tell of their settings"
    with pytest.raises(AtelierError, match="a TAEHV, for clips; needed for .*TAESD"):
        given = ["--preview_latent_every=1", f"--preview_vae={tmp_path / 'clips.safetensors'}"]
        script_of(name).run(words(name, model, tmp_path / "none", *given))


def test_letters_of_sdxl(tmp_path: Path) -> None:
    model = build("sdxl", tmp_path / "model")
    lines = tmp_path / "lines.txt"
    lines.write_text("a --ss heun --sg karras\na --ss heun\na --ss heun --sg -\n", encoding="utf-8")
    given = (f"--from_file={lines}", "--sigma_table=beta", "--steps=4")
    paths = script_of("sdxl").run(words("sdxl", model, tmp_path / "out", *given))
    karras, beta, own = (Image.open(path).tobytes() for path in paths)
    assert len({karras, beta, own}) == 3
    lines.write_text("a --ss pndm --sg karras\n", encoding="utf-8")
    with pytest.raises(AtelierError, match="--sigma_table is karras with the sampler pndm"):
        script_of("sdxl").run(words("sdxl", model, tmp_path / "none", f"--from_file={lines}"))
