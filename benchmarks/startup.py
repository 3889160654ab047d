"""How long `--help` takes for every script and tool, beside a bare interpreter.

CPU time of a process, in turn with the interpreter. What is compared is the slowest script and the middle one; the JSON
file has all of them.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

from benchmarks.figures import Baseline, Figure, spread
from benchmarks.processes import ROOT, cpu_seconds
from benchmarks.words import count


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--runs", type=count, help="counted runs of each script (default: 5)")
    parser.add_argument("--scripts", nargs="+", metavar="FILE", help="these alone, by their paths in the repository")


def measure(options: argparse.Namespace) -> list[Figure]:
    runs = options.runs or (1 if options.quick else 5)
    scripts = [ROOT / name for name in options.scripts or ()] or every_script()[: 2 if options.quick else None]
    bare = [sys.executable, "-c", "pass"]
    own: dict[str, list[float]] = {}
    beside: dict[str, list[float]] = {}
    for script in scripts:
        command, name = [sys.executable, str(script), "--help"], script.relative_to(ROOT).as_posix()
        cpu_seconds(command)  # byte code and disk cache
        pairs = [(cpu_seconds(command), cpu_seconds(bare)) for _ in range(runs)]
        own[name], beside[name] = (list(side) for side in zip(*pairs))
    middles = {name: statistics.median(values) for name, values in own.items()}
    ordered = sorted(middles, key=middles.__getitem__)
    chosen = {"the slowest": ordered[-1], f"the middle one of {len(ordered)}": ordered[len(ordered) // 2]}
    return [
        Figure(
            "help", f"--help of {name}, {which}", "s of CPU", spread(own[name]),
            (Baseline("bare interpreter", spread(beside[name])),), notes={"medians of all": middles},
        )
        for which, name in chosen.items()
    ]  # fmt: skip


def every_script() -> list[Path]:
    scripts = [path for path in sorted(ROOT.glob("*.py")) if path.name != "setup.py"]
    return scripts + [path for path in sorted((ROOT / "tools").glob("*.py")) if path.name != "__init__.py"]
