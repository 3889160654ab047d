"""Names of files as they occur: not UTF-8, as long as the file system allows, with letters of the world."""

from __future__ import annotations

import json
import os
import sys

import pytest

from library.core.errors import ConfigError
from library.safetensors_utils import read_header
from library.training import cli
from tests.runs.conftest import Work, draw_pictures

LATIN = os.fsdecode(b"caf\xe9")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_names_that_are_not_utf8(work: Work, capfd):
    """Folder (and so the caption), pictures, output folder and name; with caches, the file of known pictures and a log
    file."""
    folder = work.folder / f"data {LATIN}" / f"2_{LATIN} cat"
    draw_pictures(folder, 2)
    os.rename(folder / "00.png", folder / f"{LATIN} 😀.png")
    for text in folder.glob("*.txt"):
        text.unlink()
    argv = [
        word
        for word in work.argv(LATIN)
        if not word.startswith(("--dataset_config", "--output_name", "--console_log_level"))
    ]
    more = [
        f"--train_data_dir={folder.parent}", "--resolution=64", f"--output_name=lora {LATIN}",
        "--cache_latents_to_disk", "--cache_info", "--overwrite",
        "--cache_text_encoder_outputs_to_disk", "--network_train_unet_only",
        f"--console_log_file={work.folder / 'log.txt'}", "--max_train_steps=2",
        "--save_state", "--sample_at_first", f"--sample_prompts={work.folder / 'prompts.txt'}",
    ]  # fmt: skip
    (work.folder / "prompts.txt").write_text("a 😀 --w 32 --h 32 --s 1", encoding="utf-8")
    for _ in range(2):
        cli.run("flux", "network", [*argv, *more])
    metadata = read_header(work.folder / LATIN / f"lora {LATIN}.safetensors")[1]
    assert "caf\\udce9 cat" in metadata["ss_tag_frequency"] and metadata["ss_output_name"] == "lora caf\\udce9"
    assert json.loads((folder / "metadata_cache.json").read_text(encoding="utf-8")).keys() == {
        f"{LATIN} 😀.png",
        "01.png",
    }
    assert len(list(folder.glob("*_flux.npz"))) == len(list(folder.glob("*_flux_te.npz"))) == 2
    assert "Traceback" not in capfd.readouterr().err + (work.folder / "log.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("letter", ["x", "ä"])
@pytest.mark.parametrize("more", [[], ["--save_state", "--save_every_n_steps=1"], ["--ema"]])
def test_an_output_name_of_every_length(work: Work, letter: str, more: list[str]):
    """The message comes before anything is written; one letter less and all files are written."""
    limit = os.pathconf(work.folder, "PC_NAME_MAX") if hasattr(os, "pathconf") else 255
    letters = limit // len(os.fsencode(letter))
    with pytest.raises(ConfigError, match="shorten it by (\\d+)") as caught:
        work.train("out", *more, "--max_train_steps=1", f"--output_name={letter * letters}")
    assert not (work.folder / "out").exists()
    surplus = int(str(caught.value).rpartition("shorten it by ")[2])
    name = letter * (letters - -(-surplus // len(os.fsencode(letter))))
    work.train("out", *more, "--max_train_steps=1", f"--output_name={name}")
    assert (work.folder / "out" / f"{name}.safetensors").is_file()
