"""Where reference files lie, and one pytest case per recorded case.

`GOLDEN_DIR=/other pytest tests/golden_tests` runs the same tests on other files. A missing file gives one failing case.
"""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest

GOLDEN_DIR = Path(os.environ.get("GOLDEN_DIR", Path(__file__).parent / "golden"))
BEHAVIOUR_DIR = GOLDEN_DIR / "behaviour"


class MissingFile:
    """Stands for the cases of a file that is not there, or not readable, or has no such list; the first look at it
    fails the test."""

    def __init__(self, path: Path, problem: str = "is missing") -> None:
        self.path = path
        self.problem = problem

    def __getitem__(self, key: Any) -> Any:
        pytest.fail(f"reference file {self.path} {self.problem}")

    def get(self, key: str, default: Any = None) -> Any:
        return self[key]


def behaviour(name: str) -> dict[str, Any]:
    """The parsed content of a JSON file in the behaviour folder."""
    path = BEHAVIOUR_DIR / name
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        return json.load(file)


def behaviour_cases(name: str, key: str = "cases", where=lambda case: True) -> list[Any]:
    """pytest parameters, one per case of a list in a behaviour file, named by the case's `id` or `name`."""
    path = BEHAVIOUR_DIR / name
    missing = MissingFile(path)
    try:
        cases = behaviour(name).get(key)
    except FileNotFoundError:
        cases = None
    except (OSError, ValueError) as error:
        cases, missing = None, MissingFile(path, f"cannot be read: {error}")
    else:
        missing = MissingFile(path, f"has no list '{key}'")
    if cases is None:
        return [pytest.param(missing, id=f"missing-{name}")]
    return [
        pytest.param(
            case,
            id=str(case.get("id") or case.get("name") or case.get("line") or i) if isinstance(case, dict) else str(i),
        )
        for i, case in enumerate(cases)
        if where(case)
    ]


def load_golden(name: str) -> tuple[dict, dict, dict, dict]:
    """(weights, inputs, outputs, config) of a reference file, keys without their prefix."""
    from safetensors import safe_open

    path = GOLDEN_DIR / f"{name}.safetensors"
    if not path.exists():
        pytest.fail(f"reference file {path} is missing")
    parts: dict[str, dict] = {"weights": {}, "input": {}, "output": {}}
    with safe_open(path, framework="pt") as file:
        config = json.loads(file.metadata()["golden"])["config"]
        for key in file.keys():
            prefix, _, rest = key.partition("/")
            parts[prefix][rest] = file.get_tensor(key)
    return parts["weights"], parts["input"], parts["output"], config
