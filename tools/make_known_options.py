"""Write library/training/known_options_table.py: every option name of the known scripts with its neutral values.

    python tools/make_known_options.py cli_a.json cli_b.json

Each input maps a script's name to a list of options with `dest`, `flags` and `default`. The output groups names by the
defaults that they have in any script, written as JSON: '[null]': "name name ..."; it serves to tell a configuration
key that another family's script knows from a misspelt one.
"""

from __future__ import annotations

import json
import sys
import textwrap
from pathlib import Path

TARGET = Path(__file__).resolve().parent.parent / "library" / "training" / "known_options_table.py"


def defaults_by_name(paths: list[str]) -> dict[str, list]:
    """Option name -> its distinct defaults, in the order found; addresses are left out."""
    found: dict[str, list] = {}
    for path in paths:
        for options in json.loads(Path(path).read_text(encoding="utf-8")).values():
            for option in options:
                if not option["flags"]:
                    continue
                values = found.setdefault(option["dest"], [])
                default = option["default"]
                if default not in values and "://" not in str(default):
                    values.append(default)
    return found


def grouped(defaults: dict[str, list]) -> dict[str, str]:
    groups: dict[str, list[str]] = {}
    for name in sorted(defaults):
        groups.setdefault(json.dumps(defaults[name]), []).append(name)
    return {key: " ".join(names) for key, names in sorted(groups.items())}


def as_module(groups: dict[str, str]) -> str:
    """The table as Python source, with short lines."""
    lines = [
        '"""Written by tools/make_known_options.py: defaults of known options as JSON -> names."""',
        "",
        "NAMES_BY_DEFAULTS: dict[str, str] = {",
    ]
    for defaults, names in groups.items():
        wrapped = textwrap.wrap(names, 108)
        lines.append(f"    {defaults!r}: (")
        lines += [
            f'        "{text}{"" if last else " "}"'
            for text, last in zip(wrapped, [False] * (len(wrapped) - 1) + [True])
        ]
        lines.append("    ),")
    return "\n".join([*lines, "}", ""])


def main(paths: list[str]) -> None:
    if not paths or paths[0] in ("-h", "--help"):
        print(__doc__)
        return
    TARGET.write_text(as_module(grouped(defaults_by_name(paths))), encoding="utf-8")
    print(f"wrote {TARGET}")


if __name__ == "__main__":
    main(sys.argv[1:])
