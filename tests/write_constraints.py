"""Write constraints.txt: the newest versions that fit together on every Python, torch left out.

    python -m tests.write_constraints python3.10 python3.11 python3.12 python3.13 --hold "transformers<5.24"

Nothing is installed. The suite must pass with the result before it is committed; `--hold` keeps a release away that
does not.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "constraints.txt"
TORCH = "torch==2.13.0"
LISTS = ("requirements.txt", "requirements-dev.txt")
APART = ("opencv-python-headless", "open-clip-torch")  # installed by the Makefile without what they require
# torch is the user's choice, and with it what only torch asks for: releases of torch pin other versions of these.
LEFT_OUT = re.compile(r"(torch|torchvision|triton|nvidia-.*|cuda-.*|sympy|mpmath|networkx|setuptools|pip)$")
HEAD = """\
# The versions that the tests last passed with, for Python 3.10 to 3.13. `make demo` and `make test` install these; `make test-newest`
# does not read this file. torch is not here: it is chosen with TORCH (see Makefile).
# Written by `python -m tests.write_constraints`.
"""


def plain_name(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def resolve(python: str, held: list[str], folder: Path) -> tuple[str, dict[str, str]]:
    """("3.11", {package: version}) as pip would install it for an interpreter."""

    def report(name: str, *words: str) -> dict:
        target = folder / f"{name}.json"
        limits = folder / "held.txt"
        limits.write_text("\n".join(held), encoding="utf-8")
        pip = [
            python,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--dry-run",
            "--ignore-installed",
            "--report",
            str(target),
            "-c",
            str(limits),
        ]
        subprocess.run([*pip, *words], check=True, cwd=ROOT)
        return json.loads(target.read_text(encoding="utf-8"))

    whole = report("all", TORCH, *(word for name in LISTS for word in ("-r", name)))
    apart = report("apart", "--no-deps", *APART)
    found = {
        plain_name(item["metadata"]["name"]): item["metadata"]["version"]
        for item in whole["install"] + apart["install"]
    }
    version = ".".join(whole["environment"]["python_version"].split(".")[:2])
    return version, {name: number for name, number in found.items() if not LEFT_OUT.match(name)}


def marker(versions: list[str], known: list[str]) -> str:
    """The shortest marker for these Python versions, neighbours among the known ones; the last known stands for later
    ones too."""
    if versions == known:
        return ""
    if versions[-1] == known[-1]:
        return f'; python_version >= "{versions[0]}"'
    if len(versions) == 1:
        return f'; python_version == "{versions[0]}"'
    first = f'python_version >= "{versions[0]}" and ' if versions[0] != known[0] else ""
    return f'; {first}python_version < "{known[known.index(versions[-1]) + 1]}"'


def lines_of(resolved: dict[str, dict[str, str]]) -> list[str]:
    """One line per package and version; runs of Python versions with the same one share it."""
    known = sorted(resolved, key=lambda text: tuple(map(int, text.split("."))))
    lines = []
    for name in sorted({name for found in resolved.values() for name in found}):
        runs: list[tuple[str, list[str]]] = []
        for python in known:
            version = resolved[python].get(name)
            if runs and runs[-1][0] == version:
                runs[-1][1].append(python)
            else:
                runs.append((version, [python]))
        lines += [f"{name}=={version}{marker(pythons, known)}" for version, pythons in runs if version]
    return lines


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pythons", nargs="+", help="an interpreter of every supported version")
    parser.add_argument("--hold", nargs="*", default=[], help='releases to keep away, as "transformers<5.24"')
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        resolved = dict(resolve(python, args.hold, Path(folder)) for python in args.pythons)
    TARGET.write_text(HEAD + "\n".join(lines_of(resolved)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
