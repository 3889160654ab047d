"""What pictures of other programs tell of how they were made: the one text of AUTOMATIC1111's web UI and its relatives
(Forge, SD.Next), and the graphs of ComfyUI, which tell no prompt."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

TEXT_ENTRIES = ("parameters", "comment")
"""entries that hold the one text: of PNG, and of the EXIF data of JPEG and WebP"""
NEGATIVE = "Negative prompt:"
_SETTING = re.compile(r'\s*(\w[\w \-/]*):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
_FEWEST = 3
"""settings of the last line; with fewer of them it is a line of a prompt"""
_FIELDS: Mapping[str, str] = {
    "Steps": "steps", "Seed": "seed", "CFG scale": "cfg_scale", "Distilled CFG Scale": "guidance",
}  # fmt: skip
"""settings -> fields of requests. Samplers have other names there, and models are told by a part of their hash"""


def fields_of_parameters(text: str) -> dict[str, str]:
    """Fields of a request from a text of the form

        PROMPT
        Negative prompt: NEGATIVE PROMPT
        Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1, Size: 512x768, ...

    of which the prompts may have several lines; nothing of a text that does not end with such settings.
    """
    *lines, last = text.strip().split("\n")
    settings = dict(_SETTING.findall(last))
    if len(settings) < _FEWEST or "Steps" not in settings:
        return {}
    starts = [number for number, line in enumerate(lines) if line.strip().startswith(NEGATIVE)]
    end = starts[0] if starts else len(lines)
    negative = "\n".join(lines[end:]).strip().removeprefix(NEGATIVE).strip()
    found = {"prompt": "\n".join(lines[:end]).strip(), **({"negative_prompt": negative} if negative else {})}
    return {**found, **{_FIELDS[name]: value.strip() for name, value in settings.items() if name in _FIELDS}}


def fields_of_other_program(texts: Mapping[str, str]) -> dict[str, str]:
    """Fields of a request from the entries of a picture; none where they do not hold the text of a known program."""
    found = (fields_of_parameters(texts[name]) for name in TEXT_ENTRIES if name in texts)
    return next((fields for fields in found if fields), {})


def is_graph(text: str) -> bool:
    """Whether a prompt is a graph of ComfyUI: JSON whose nodes name their classes."""
    try:
        nodes = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(nodes, dict) and any(isinstance(node, dict) and "class_type" in node for node in nodes.values())
