"""The command lines of musubi-tuner's video scripts and tools, as recorded: which options each of them has."""

from __future__ import annotations

import gzip
import json
from functools import cache
from pathlib import Path
from typing import Any

RECORDED = Path(__file__).parent / "compat" / "cli_musubi.json.gz"


@cache
def _scripts() -> dict[str, list[dict[str, Any]]]:
    return json.loads(gzip.decompress(RECORDED.read_bytes()))


def known_options(script: str) -> list[dict[str, Any]]:
    """The options of a script ("wan_train_network.py"): flags, dest, type, nargs, default, choices, action, required."""
    return _scripts()[script]
