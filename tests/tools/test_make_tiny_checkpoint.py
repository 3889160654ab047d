"""Tiny checkpoints that users make: the printed command trains, the same seed gives the same files, nothing is lost by
accident."""

from __future__ import annotations

import logging
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from library.families.registry import FAMILIES
from library.tiny_models import TINY_SETS
from library.training.parser_common import chosen_variant
from tests.waiting import PATIENCE
from tools import make_tiny_checkpoint

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def as_before():
    """A run sets up the log."""
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    yield
    root.setLevel(level)
    root.handlers[:] = handlers


def make(capsys: pytest.CaptureFixture[str], *options: str) -> list[str]:
    """Words of the printed command."""
    make_tiny_checkpoint.main(list(options))
    (line,) = capsys.readouterr().out.splitlines()
    return shlex.split(line)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.full if name == "sd2" else ()) for name in TINY_SETS]
)
def test_the_printed_command_trains_and_samples(name: str, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    python, *argv = make(capsys, "--family", name, "--output", "a model")
    assert python == "python" and Path(argv[0]) == ROOT / TINY_SETS[name].script
    monkeypatch.setattr(sys, "argv", argv)
    runpy.run_path(argv[0], run_name="__main__")
    output = tmp_path / "a model" / "output"
    state = load_file(output / f"{name}_lora.safetensors")
    assert any(tensor.any() for key, tensor in state.items() if key.endswith("lora_up.weight"))
    pictures = [path for path in (output / "sample").glob("*.png") if not path.stem.endswith(("_grid", "sheet"))]
    assert [Image.open(path).size for path in pictures] == [(64, 64)] * 2


def test_the_printed_line_can_be_pasted(tmp_path: Path, monkeypatch, capsys) -> None:
    """Through a shell, in a process of its own, started where the tool was."""
    monkeypatch.chdir(ROOT)
    line = shlex.join(
        [
            sys.executable,
            *make(capsys, "--family", "sd1", "--output", str(tmp_path / "it's"))[1:],
            "--max_train_steps=1",
        ]
    )
    result = subprocess.run(line, shell=True, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "it's" / "output" / "sd1_lora.safetensors").is_file()


@pytest.mark.parametrize("name", TINY_SETS)
def test_the_same_seed_gives_the_same_files(name: str, tmp_path: Path, monkeypatch, capsys) -> None:
    made = {}
    for place, seed in (("a", 3), ("b", 3), ("c", 4)):
        (tmp_path / place).mkdir()
        monkeypatch.chdir(tmp_path / place)
        make(capsys, f"--family={name}", "--output=tiny", f"--seed={seed}", "--num_pictures=2")
        made[place] = contents(tmp_path / place)
    assert made["a"] == made["b"] and made["a"].keys() == made["c"].keys()
    models = [file for file in made["a"] if file.endswith(".safetensors")]
    assert models and all(made["a"][file] != made["c"][file] for file in models)
    assert made["a"]["tiny/images/00.png"] != made["c"]["tiny/images/00.png"]


def test_weights_are_stored_in_the_wanted_type(tmp_path: Path, capsys) -> None:
    words = make(capsys, "--family=flux", f"--output={tmp_path}", "--precision=bf16", "--num_pictures=0")
    assert {tensor.dtype for tensor in load_file(tmp_path / "flux1.safetensors").values()} == {torch.bfloat16}
    assert "--dataset_config=YOUR_DATASET.toml" in words and not (tmp_path / "images").exists()


def test_a_folder_in_use_is_refused(tmp_path: Path, capsys) -> None:
    folder = tmp_path / "tiny"
    folder.mkdir()
    make(capsys, "--family=sd1", f"--output={folder}")  # an empty folder will do
    first = contents(folder)
    with pytest.raises(SystemExit) as stop:
        make_tiny_checkpoint.main(["--family=sd1", f"--output={folder}", "--seed=1"])
    message = capsys.readouterr().err
    assert (
        stop.value.code != 0 and "has files in it" in message and "--overwrite" in message and contents(folder) == first
    )
    make(capsys, "--family=sd1", f"--output={folder}", "--seed=1", "--overwrite")
    assert contents(folder).keys() == first.keys() and contents(folder) != first


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("", ["--family is missing", "--output is missing"]),
        ("--family=flax --output=x", ["'flax'", "did you mean 'flux'"]),
        ("--family=flux --output=x --num_pictures=-1", ["--num_pictures is -1"]),
        (f"--family=flux --output={__file__}", ["is a file"]),
    ],
)  # fmt: skip
def test_wrong_options_are_named(options: str, words: list[str], tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        make_tiny_checkpoint.main(options.split())
    message = capsys.readouterr().err
    assert stop.value.code != 0 and all(word in message for word in words) and not list(tmp_path.iterdir())


def test_every_family_has_a_set_and_its_script_trains_that_family() -> None:
    assert {entry.family for entry in TINY_SETS.values()} == set(FAMILIES)
    for entry in TINY_SETS.values():
        family = (FAMILIES[entry.family].variant_of or (entry.family,))[0]
        assert f'family="{family}"' in (ROOT / entry.script).read_text(encoding="utf-8")
        assert chosen_variant(family, entry.options) == entry.family


def test_the_page_names_every_set_and_option() -> None:
    page = (ROOT / "docs" / "tiny_checkpoints.md").read_text(encoding="utf-8")
    first = [action.option_strings[0] for action in make_tiny_checkpoint.setup_parser()._actions]
    names = [name for name in first if name.startswith("--") and not name.startswith("--no-")]
    assert names and all(f"| `{name}` |" in page for name in [*TINY_SETS, *names])
