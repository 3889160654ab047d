"""The frozen options of the training scripts: what each option is called, takes, is by default, and whether it works
there.

    python -m tests.option_sets          after a change that is meant: writes tests/golden/options anew
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from library.core.options import is_bool_option, value_type
from library.families.registry import FAMILIES
from library.training import cache_tools
from library.training.option_reader import Script
from library.training.parser_common import script
from tools.document_options import video_scripts

FOLDER = Path(__file__).parent / "golden" / "options"
SCRIPTS = (
    *((family, "network") for family in FAMILIES),
    *((family, what) for family, record in FAMILIES.items() for what in record.scripts),
)


def status(what: Script, name: str) -> str:
    """works, equivalent, ignored, foreign or refused, in this script."""
    return what.status(name)


def reason(what: Script, name: str) -> str | None:
    return what.reason(name)


def option_set(what: Script) -> dict[str, dict[str, Any]]:
    """Name -> what is frozen of an option, as JSON has it."""
    found = {}
    for name, owner in what.owners.items():
        spec = what.spec(name)
        kind = "bool" if is_bool_option(owner, name) else value_type(owner, name).__name__
        found[name] = {
            "type": f"{kind} by {spec.convert.__name__}"
            if spec.convert is not None and spec.convert is not str
            else kind,
            "nargs": spec.nargs,
            "default": what.default(name),
            "choices": list(spec.choices) if spec.choices else None,
            "flags": [f"--{name}", *spec.flags],
            "status": status(what, name),
        }
    return json.loads(json.dumps(found))


def frozen_path(family: str, trainable: str) -> Path:
    return FOLDER / f"{family}_{trainable}.json"


def frozen_tool_path(family: str, what: str) -> Path:
    """Of a tool that fills caches of clips."""
    return FOLDER / f"{family}_cache_{what}.json"


def as_text(options: dict[str, dict[str, Any]]) -> str:
    """One option per line, so that a change of one is a change of one line."""
    lines = [f" {json.dumps(name)}: {json.dumps(entry)}" for name, entry in sorted(options.items())]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def video_path(family: str) -> Path:
    """Of the options of a family's video script."""
    return FOLDER / f"{family}_generation.json"


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    for family, what in video_scripts().items():
        video_path(family).write_text(as_text(option_set(what)), encoding="utf-8")
        print(f"wrote {video_path(family)}")
    for family, trainable in SCRIPTS:
        frozen_path(family, trainable).write_text(as_text(option_set(script(family, trainable))), encoding="utf-8")
        print(f"wrote {frozen_path(family, trainable)}")
    for family in (name for name, record in FAMILIES.items() if record.clips is not None):
        for what in cache_tools.PARTS:
            path = frozen_tool_path(family, what)
            path.write_text(as_text(option_set(cache_tools.tool_script(family, what))), encoding="utf-8")
            print(f"wrote {path}")


if __name__ == "__main__":
    main()
