"""A made file tells how it was made, and the script makes the same bytes of that."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from PIL import Image

from library.core.errors import ConfigError
from library.generation import flux_inference
from library.generation.foreign_texts import fields_of_parameters
from library.generation.picture_files import read_texts, write_picture
from library.generation.recorded_files import read_file_texts
from library.generation.recorded_requests import ENTRY, file_name_alone
from tests.library.test_flux_inference import adapter, tiny  # noqa: F401
from tests.library.test_flux_inference import arguments as flux_arguments


def settings(path: Path) -> dict:
    return json.loads(read_texts(path)[ENTRY])




def test_pictures_of_every_kind_of_file_are_made_again_of_what_they_tell(tiny, adapter, tmp_path):
    lines = tmp_path / "lines.txt"
    lines.write_text("日本の猫 --n 犬 --l 2 --m 0.5 --w 50\na {cat} --s 1 --d 9\n", encoding="utf-8")
    for kind, ending in (("png", ".png"), ("webp", ".webp"), ("jpeg", ".jpg")):
        base = [word for word in flux_arguments(tiny, tmp_path / kind) if not word.startswith("--seed")]
        paths = flux_inference.run([
            *base, f"--from_file={lines}", "--image_format", kind, "--lora_weights", f"{adapter};0.25",
        ])  # fmt: skip
        assert [path.suffix for path in paths] == [ending] * 2
        for path in paths:
            (again,) = flux_inference.run([f"--from_metadata={path}", f"--output_dir={tmp_path / 'again'}"])
            assert again.read_bytes() == path.read_bytes(), path
    first = settings(paths[0])
    assert first["options"]["prompt"] == "日本の猫" and first["options"]["width"] == 50
    assert first["line"] == {"multipliers": [0.5]} and "output_dir" not in first["options"]
    words = [f"--from_metadata={paths[1]}", "--prompt=a dog", f"--output_dir={tmp_path / 'other'}"]
    (other,) = flux_inference.run(words)
    assert read_texts(other)["prompt"] == "a dog" and read_texts(other)["seed"] == "9"


def test_files_are_told_without_folders_where_that_is_asked_for(tiny, adapter, tmp_path, monkeypatch):
    words = flux_arguments(tiny, tmp_path / "a", "--metadata_file_names", "--lora_weights", f"{adapter};0.5")
    (path,) = flux_inference.run(words)
    options = settings(path)["options"]
    assert str(tiny.folder) not in path.read_bytes().decode("latin-1") and options["lora_weights"] == [
        "adapter.safetensors;0.5"
    ]
    with pytest.raises(ConfigError, match="there is no such file|does not exist|no file"):
        flux_inference.run([f"--from_metadata={path}", f"--output_dir={tmp_path / 'b'}"])
    (again,) = flux_inference.run([f"--from_metadata={path}", *words[:-1], f"{adapter};0.5"])
    assert again.read_bytes() == path.read_bytes()
    assert file_name_alone(f"weights={adapter};scale=2") == "weights=adapter.safetensors;scale=2"


def test_files_of_other_programs_and_of_trainings_give_what_they_tell(tiny, tmp_path):
    plain = write_picture(
        Image.new("RGB", (32, 48)), tmp_path / "sample.png", {"prompt": "a bird", "seed": "3", "steps": "1"}
    )
    known = write_picture(
        Image.new("RGB", (32, 48)), tmp_path / "bt.png", {"bt_prompt": "a bird", "bt_seeds": "3", "bt_infer_steps": "1"}
    )
    left = ("--prompt", "--width", "--height", "--seed", "--steps")
    models = [word for word in flux_arguments(tiny, tmp_path / "out") if not word.startswith(left)]
    (first,), (second,) = (flux_inference.run([*models, f"--from_metadata={path}"]) for path in (plain, known))
    told = read_texts(first)
    assert (told["prompt"], told["seed"], told["steps"], Image.open(first).size) == ("a bird", "3", "1", (32, 48))
    assert first.read_bytes() == second.read_bytes()


WEB_UI = (
    "a (red:1.2) bird, é\nin front\nNegative prompt: blurry,\nworse\n"
    'Steps: 1, Sampler: Euler a, CFG scale: 2.5, Seed: 3, Size: 64x64, Lora hashes: "x: 1, y: 2", Distilled CFG Scale: 3'
)


def test_the_text_of_a_web_ui_is_read_from_every_kind_of_picture(tiny, tmp_path):
    picture, exif = Image.new("RGB", (32, 48)), Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + WEB_UI.encode("utf-16-be")
    paths = [write_picture(picture, tmp_path / "a.png", {"parameters": WEB_UI}), tmp_path / "a.jpg", tmp_path / "a.webp"]
    for path in paths[1:]:
        picture.save(path, exif=exif)
    left = ("--prompt", "--width", "--height", "--seed", "--steps")
    models = [word for word in flux_arguments(tiny, tmp_path / "out") if not word.startswith(left)]
    made = [flux_inference.run([*models, f"--from_metadata={path}"])[0] for path in paths]
    told = read_texts(made[0])
    assert told["prompt"] == "a (red:1.2) bird, é\nin front" and told["negative-prompt"] == "blurry,\nworse"
    assert [told[name] for name in ("seed", "steps", "scale", "guidance")] == ["3", "1", "2.5", "3.0"]
    assert Image.open(made[0]).size == (32, 48) and len({path.read_bytes() for path in made}) == 1


def test_texts_that_are_none_of_a_web_ui_give_no_settings():
    assert fields_of_parameters("only a prompt") == fields_of_parameters("") == {}
    assert fields_of_parameters("a, b: c, d: e\nf: g, h: i, j: k") == {}
    assert fields_of_parameters("\nSteps: 4, Sampler: Euler, Seed: 1") == {"prompt": "", "steps": "4", "seed": "1"}


def test_texts_before_pixels_that_are_cut_off_are_read(tmp_path):
    path = write_picture(Image.effect_noise((64, 64), 50).convert("RGB"), tmp_path / "cut.png", {"prompt": "a 猫"})
    path.write_bytes(path.read_bytes()[:-2000])
    assert read_file_texts(path) == {"prompt": "a 猫"}


def test_what_cannot_be_taken_from_a_file_is_refused(tiny, tmp_path):
    def refused(texts: dict[str, str], *words: str) -> str:
        path = write_picture(Image.new("RGB", (8, 8)), tmp_path / "told.png", texts)
        with pytest.raises(ConfigError) as caught:
            flux_inference.run([f"--from_metadata={path}", *words])
        return str(caught.value)

    def told(script: str = "flux_minimal_inference.py", line: dict | None = None, **options) -> dict[str, str]:
        return {ENTRY: json.dumps({"script": script, "options": options, "line": line or {}})}

    assert "tells no settings" in refused({"title": "x"})
    graph = json.dumps({"3": {"class_type": "KSampler", "inputs": {"seed": 5}}})
    assert "a picture of ComfyUI" in refused({"prompt": graph, "workflow": "{}"})
    assert "is damaged" in refused({ENTRY: "[1]"}) and "is damaged" in refused({ENTRY: "{"})
    assert "wan_generate_video.py has made" in refused(told("wan_generate_video.py"))
    message = refused(told(plugins=["evil"], colour=1, steps="many", width=[1, 2], model_type="unknown"))
    assert "--plugins evil, which imports modules" in message and "--colour, which this script does not have" in message
    assert "--steps many, which cannot be used" in message and "--width 1 2" in message
    assert "known: flux, chroma" in message
    assert "no such file" in refused({}, f"--from_metadata={tmp_path / 'none.png'}")
    assert "--from_metadata" not in refused(told(prompt="x", seed=4), "--no_metadata", "--metadata_file_names")


def test_the_command_line_that_a_file_tells_can_be_run(tiny, tmp_path):
    from library.generation.recorded_requests import RecordedSettings

    (path,) = flux_inference.run(flux_arguments(tiny, tmp_path / "a", "--prompt=it's \"one\" ü", "--seed=3"))
    words = shlex.split(RecordedSettings.of_text(read_file_texts(path)[ENTRY], "x").command)
    assert words[:2] == ["python", "flux_minimal_inference.py"]
    (again,) = flux_inference.run([*words[2:], f"--output_dir={tmp_path / 'b'}"])
    assert again.read_bytes() == path.read_bytes()


def test_options_of_files_without_effect_are_told(tiny, tmp_path, caplog):
    flux_inference.run(flux_arguments(tiny, tmp_path, "--image_quality=50"))
    assert "--image_quality has no effect: PNG keeps every pixel" in caplog.text
    small, large = (
        flux_inference.run(flux_arguments(tiny, tmp_path, "--image_format=jpeg", f"--image_quality={quality}"))[0]
        for quality in (20, 100)
    )
    assert small.stat().st_size < large.stat().st_size
    (exact,) = flux_inference.run(flux_arguments(tiny, tmp_path, "--image_format=webp", "--image_quality=100"))
    (plain,) = flux_inference.run(flux_arguments(tiny, tmp_path))
    assert Image.open(exact).convert("RGB").tobytes() == Image.open(plain).tobytes(), "WebP of 100 is lossless"
