"""Sample prompts as dictionaries."""

from __future__ import annotations

from typing import Any

from library.training.sampling_prompts import load_prompts as read_prompts
from library.training.sampling_prompts import parse_line


def line_to_prompt_dict(line: str) -> dict[str, Any]:
    """The settings of one prompt line by name. Raises ConfigError for options that do not exist."""
    return parse_line(line).to_dict()


def load_prompts(prompt_file: str) -> list[dict[str, Any]]:
    """The settings of every prompt of a file by name, `enum` being its place."""
    return [prompt.to_dict() for prompt in read_prompts(prompt_file)]
