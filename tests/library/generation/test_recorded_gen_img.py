"""Pictures of gen_img.py tell how they were made: each is made again alone, byte by byte."""

from __future__ import annotations

import json
from pathlib import Path

import numpy
from PIL import Image

from library.generation.gen_img import script as gen_img
from library.generation.picture_files import read_texts
from library.generation.recorded_requests import ENTRY
from tests.library.test_unet_inference import arguments, network, tiny, with_networks  # noqa: F401


def settings(path: Path) -> dict:
    return json.loads(read_texts(path)[ENTRY])


def test_gen_img_makes_pictures_again_one_by_one(tiny, network, tmp_path):
    sources = tmp_path / "sources"
    sources.mkdir()
    for name, colour in (("a", 40), ("b", 200)):
        Image.fromarray(numpy.full((64, 64, 3), colour, numpy.uint8)).save(sources / f"{name}.png")
    lines = tmp_path / "lines.txt"
    lines.write_text("a {cat|dog|bird} \\{x\\} --n blue --s 2\nb --l 3 --d 5,6 --nl 2\n", encoding="utf-8")
    cases = {
        "drawn": ("sd1", [f"--from_file={lines}", "--images_per_prompt=2", "--batch_size=2", "--image_format=webp"]),
        "sources": ("sd1", ["--prompt=c --t 0.5", f"--image_path={sources}", "--images_per_prompt=2", "--seed=1"]),
        "networks": ("sd1", ["--prompt=c --am 0.7", *with_networks(network), "--seed=4"]),
        "sizes": ("sdxl", ["--prompt=c --ow 32 --d 1 --dsd1 1", "--crop_top=3"]),
        "stages": ("sd1", [
            "--prompt=c --w 128", "--H=128", "--highres_fix_scale=0.5", "--highres_fix_steps=2",
            "--highres_fix_save_1st", "--seed=3",
        ]),
    }  # fmt: skip
    for name, (kind, words) in cases.items():
        paths = gen_img.run(arguments(tiny[kind], tmp_path / name, *words))
        for number, path in enumerate(paths):
            made = gen_img.run([f"--from_metadata={path}", f"--outdir={tmp_path / 'again' / name / str(number)}"])
            assert path.read_bytes() in [again.read_bytes() for again in made], (name, path)
    drawn = settings(next((tmp_path / "drawn").glob("*_000_*")))
    assert drawn["line"]["raw_prompt"].startswith("a {cat|dog|bird}") and "n_iter" not in drawn["options"]
    assert drawn["options"]["prompt"].endswith(r"\{x\} --n blue")
    assert [settings(path)["line"].get("place") for path in sorted((tmp_path / "drawn").iterdir())] == [0, 1, 0, 1]
