"""metaview shows what files of every kind tell, and its command line makes them again."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import numpy as np
from PIL import Image

from library.dataset.clips.video_files import has_pyav
from library.generation import flux_inference
from library.generation.picture_files import write_picture
from library.generation.recorded_requests import ENTRY, RecordedSettings
from library.generation.video_files import write_video
from library.safetensors_utils import save_file_atomic
from tests.library.test_flux_inference import arguments, tiny  # noqa: F401
from tools import metaview
from tools.frame_tools.metaview import command_of

TEXTS = {
    "seed": "7", "zeta": "1", "prompt": "日本 \"猫\"\nsecond", "negative-prompt": "ü",
    ENTRY: RecordedSettings("gen_img.py", {"prompt": "it's 日本", "steps": 3, "v2": True}, {}).text,
}  # fmt: skip


def files(folder: Path) -> dict[str, Path]:
    import torch

    picture = Image.fromarray(np.full((32, 32, 3), 90, np.uint8))
    made = {ending: write_picture(picture, folder / f"a.{ending}", TEXTS) for ending in ("png", "webp", "jpg")}
    made["safetensors"] = folder / "a.safetensors"
    save_file_atomic({"latent": torch.zeros(1, 1, 2, 2)}, made["safetensors"], TEXTS)
    for ending in ("mkv", "mp4", "mov", "webm", "avi") if has_pyav() else ():
        made[ending] = write_video([picture, picture], folder / f"a.{ending}", 8, texts=TEXTS)
    return made


def test_each_kind_of_file_tells_the_same(tmp_path, capsys):
    for kind, path in files(tmp_path).items():
        assert metaview.main([str(path), "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        told.pop("duration", None)
        assert list(told) == ["prompt", "negative-prompt", "seed", "zeta", "settings"], kind
        assert told["prompt"] == TEXTS["prompt"] and told["settings"]["options"]["prompt"] == "it's 日本", kind
        assert metaview.main([str(path), "--command"]) == 0
        words = shlex.split(capsys.readouterr().out)
        assert words == ["python", "gen_img.py", "--prompt=it's 日本", "--steps=3", "--v2=true"], kind
    assert metaview.main([str(path), str(tmp_path / "a.png"), "--max-rows", "3"]) == 0
    out = capsys.readouterr().out
    entries = 'prompt: 日本 "猫"\n    second\nnegative-prompt: ü\nseed: 7\nzeta: 1\ncommand: python'
    assert f"{tmp_path / 'a.png'}:\n{entries}" in out


def test_the_command_line_makes_the_picture_again(tiny, tmp_path, capsys):
    (tmp_path / "lines.txt").write_text("a cat --n dog --l 2\n", encoding="utf-8")
    (path,) = flux_inference.run(arguments(tiny, tmp_path / "a", f"--from_file={tmp_path / 'lines.txt'}"))
    assert metaview.main([str(path), "--command"]) == 0
    script, *words = shlex.split(capsys.readouterr().out)[1:]
    assert script == "flux_minimal_inference.py"
    (again,) = flux_inference.run([*words, f"--output_dir={tmp_path / 'b'}"])
    assert again.read_bytes() == path.read_bytes()


def test_what_no_option_can_say_is_taken_from_the_file():
    settings = RecordedSettings("gen_img.py", {"steps": 3}, {"multipliers": [0.5]})
    assert command_of({ENTRY: settings.text}, "a b.png") == "python gen_img.py --steps=3 '--from_metadata=a b.png'"


def test_entries_of_other_programs_and_files_without_any(tmp_path, capsys):
    entries = {"bt_seeds": "3", "bt_prompt": "x", "bt_fps": "8"}
    known = write_picture(Image.new("RGB", (8, 8)), tmp_path / "k.png", entries)
    bare = write_picture(Image.new("RGB", (8, 8)), tmp_path / "b.jpg")
    (tmp_path / "n.png").write_bytes(b"no picture")
    assert metaview.main([str(known)]) == 0 and capsys.readouterr().out == "prompt: x\nseeds: 3\nfps: 8\n"
    assert metaview.main([str(bare), str(tmp_path / "n.png"), str(tmp_path / "none.png")]) != 0
    told = capsys.readouterr()
    assert "b.jpg:\nno entries" in told.out and "n.png" in told.err and "there is no such file" in told.err
    assert metaview.main([str(known), "--command"]) != 0
    assert "which script and models have made it is not told" in capsys.readouterr().err
    assert metaview.main([str(bare), "--command"]) != 0 and "no prompt" in capsys.readouterr().err
    damaged = write_picture(Image.new("RGB", (8, 8)), tmp_path / "d.png", {ENTRY: "{"})
    for words in ([], ["--json"], ["--command"]):
        assert metaview.main([str(damaged), str(tmp_path), str(known), *words]) != 0
        told = capsys.readouterr()
        assert f"{damaged} has an entry" in told.err and f"{tmp_path} is a folder" in told.err
        assert "--command" in words or "seeds" in told.out
    assert metaview.main([]) != 0 and metaview.main([str(known), "--json", "--command"]) != 0
