"""Old commands: their options translated into those of the tools that took their place, with one line in the log."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Sequence

logger = logging.getLogger("atelier")

SD_SCRIPTS, AI_TOOLKIT = "sd-scripts", "ai-toolkit"


def _forward(old: str, tool: str, run: Callable[[Sequence[str]], int], words: list[str], overwrite: bool = True) -> int:
    """Run the new tool. Old scripts wrote over an output that existed, so their commands still do."""
    print(f"{old} is an old name; the same with: python {tool} {' '.join(words)}", file=sys.stderr)
    return run([*words, "--overwrite"] if overwrite else words)


def convert_flux_lora(argv: Sequence[str] | None = None) -> int:
    """--src, --dst, --src_path, --dst_path."""
    from tools.convert_lora import main

    parser = argparse.ArgumentParser(description=convert_flux_lora.__doc__, allow_abbrev=False)
    parser.add_argument("--src", choices=(AI_TOOLKIT, SD_SCRIPTS), default=AI_TOOLKIT, help="who wrote the file")
    parser.add_argument("--dst", choices=(AI_TOOLKIT, SD_SCRIPTS), default=SD_SCRIPTS, help="who is to read the result")
    parser.add_argument("--src_path", required=True, help="the adapter file")
    parser.add_argument("--dst_path", required=True, help="the file to write")
    args = parser.parse_args(argv)
    to = "kohya" if args.dst == SD_SCRIPTS else AI_TOOLKIT
    return _forward(
        "convert_flux_lora.py",
        "tools/convert_lora.py",
        main,
        [args.src_path, args.dst_path, "--to", to, "--family", "flux"],
    )


def _to_comfy(family: str, argv: Sequence[str] | None) -> int:
    from tools.convert_lora import main

    parser = argparse.ArgumentParser(description=f"{family}: kohya names to those of ComfyUI", allow_abbrev=False)
    parser.add_argument("src_path", help="the adapter file")
    parser.add_argument("dst_path", help="the file to write")
    parser.add_argument("--reverse", action="store_true", help="from the names of ComfyUI to kohya names")
    args = parser.parse_args(argv)
    to = "kohya" if args.reverse else "comfy"
    words = [args.src_path, args.dst_path, "--to", to, "--family", family]
    return _forward(f"convert_{family}_lora_to_comfy.py", "tools/convert_lora.py", main, words)


def convert_anima_lora_to_comfy(argv: Sequence[str] | None = None) -> int:
    return _to_comfy("anima", argv)


def convert_hunyuan_image_lora_to_comfy(argv: Sequence[str] | None = None) -> int:
    return _to_comfy("hunyuan_image", argv)
