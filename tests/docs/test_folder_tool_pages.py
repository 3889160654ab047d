"""The pages of the tools for images and captions: every option is told, every command is one that the tools take, and
those on the pictures of the demo run."""

from __future__ import annotations

import importlib
import re
import shlex
import shutil
from pathlib import Path

import pytest

from library.core.options import option_fields
from library.scripts.folder_tool import FolderTool
from library.training.option_groups import ConsoleOptions
from tools import caption

ROOT = Path(__file__).parents[2]
FRAME_PARTS = ("upscale", "face_blur", "interpolate", "to_png")
IMAGE_PARTS = ("resize", "edges", "faces", "upscale")
TOOLS = {
    **{f"image_tools.{name}": "image_tools.md" for name in IMAGE_PARTS},
    **{f"frame_tools.{name}": "frame_tools.md" for name in FRAME_PARTS},
    **{f"caption_tools.{name}": "dataset_tools.md" for name, _ in caption.PARTS.values()},
}
PAGES = ("image_tools.md", "frame_tools.md", "dataset_tools.md")


def tool(name: str) -> FolderTool:
    found = importlib.import_module(f"tools.{name}").TOOL
    return getattr(found, "folder_tool", found)


def commands() -> list[str]:
    found = []
    for page in PAGES:
        for block in re.findall(r"```\n(.*?)```", (ROOT / "docs" / page).read_text(encoding="utf-8"), re.S):
            found += [line for line in block.splitlines() if line.startswith(("python tools/", "python finetune/"))]
    return found


def script(command: str) -> tuple[object, list[str]]:
    words = shlex.split(command)[1:]
    return importlib.import_module(words[0].removesuffix(".py").replace("/", ".")), words[1:]


@pytest.mark.parametrize("name", TOOLS)
def test_every_option_is_told(name):
    page = (ROOT / "docs" / TOOLS[name]).read_text(encoding="utf-8")
    used = tool(name)
    names = [option for group in used.classes for option in option_fields(group) if option not in used.positional]
    assert [option for option in names if f"--{option}" not in page] == []
    assert ConsoleOptions in used.classes


@pytest.mark.parametrize("command", commands())
def test_a_command_of_the_pages_is_understood(command):
    module, words = script(command)
    if module is caption:
        part, *words = words
        parser, used = (
            tool(f"caption_tools.{caption.PARTS[part][0]}").parser(),
            tool(f"caption_tools.{caption.PARTS[part][0]}"),
        )
    else:
        parser = module.setup_parser()
        used = None
    parser.parse_args(used._plain(words) if used else words)


def test_commands_on_the_demo_run(tmp_path, monkeypatch):
    shutil.copytree(ROOT / "examples/demo/images", tmp_path / "examples/demo/images")
    monkeypatch.chdir(tmp_path)
    ran = 0
    for command in commands():
        module, words = script(command)
        if "demo" in command:
            assert module.main(words) == 0, command
            ran += 1
    assert (
        ran == 5 and (tmp_path / "demo_clean.json").exists() and any((tmp_path / "smaller_images").glob("*+64x64.jpg"))
    )
