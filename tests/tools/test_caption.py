"""The front door of the tools for captions: it reaches the same code as the scripts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from library.dataset.image_files import over_white
from library.scripts.folder_tool import FolderTool, numbers_problem
from tests.library.dataset.images import make_image
from tests.waiting import PATIENCE
from tools import caption

ROOT = Path(__file__).parents[2]


def test_gathering_and_cleaning(tmp_path):
    make_image(tmp_path / "a.png", (8, 8))
    (tmp_path / "a.txt").write_text("2girls, red_eyes, blue_eyes")
    assert caption.main(["merge", "--tags", str(tmp_path), str(tmp_path / "meta.json")]) == 0
    assert caption.main(["clean", str(tmp_path / "meta.json"), str(tmp_path / "clean.json")]) == 0
    assert json.loads((tmp_path / "clean.json").read_text()) == {"a": {"tags": "2girls"}}


@pytest.mark.parametrize("part", caption.PARTS)
def test_every_part_has_its_help_and_reports_a_missing_folder(part, capsys):
    with pytest.raises(SystemExit) as end:
        caption.main([part, "--help"])
    assert end.value.code == 0 and "--console_log_level" in capsys.readouterr().out
    with pytest.raises(SystemExit) as end:
        caption.main([part])
    assert end.value.code == 2


def test_an_unknown_part(capsys):
    with pytest.raises(SystemExit) as end:
        caption.main(["draw"])
    assert end.value.code == 2 and "draw" in capsys.readouterr().err


def test_scripts_run_from_the_root(tmp_path):
    make_image(tmp_path / "a.png", (8, 8))
    (tmp_path / "a.caption").write_text("a cat")
    script = ["finetune/merge_captions_to_metadata.py", str(tmp_path), str(tmp_path / "meta.json")]
    result = subprocess.run([sys.executable, *script], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert result.returncode == 0 and "1 done" in result.stderr, result.stderr


def test_switches_do_not_take_a_folder_for_their_value():
    from tools.caption_tools.metadata import CLASSES

    tool = FolderTool("", CLASSES, ("train_data_dir", "out_json"))
    config = tool.read(["--full_path", "--recursive", "images", "true.json", "--debug", "false"])
    assert [config.value(name) for name in ("train_data_dir", "out_json", "full_path", "recursive", "debug")] == [
        "images",
        "true.json",
        True,
        True,
        False,
    ]


def test_pairs_of_numbers():
    assert numbers_problem("--size", "4,5", 2) is None and numbers_problem("--size", None, 2) is None
    for text in ("4", "4,x", "4,-1", "0,4", "nan,4", "inf,4"):
        assert text in (numbers_problem("--size", text, 2, kind=float) or "")


def test_transparent_pixels_lie_over_white():
    import numpy as np

    image = np.array([[[0, 100, 200, 0], [0, 100, 200, 128], [0, 100, 200, 255]]], np.uint8)
    assert over_white(image).tolist() == [[[255, 255, 255], [127, 177, 227], [0, 100, 200]]]
