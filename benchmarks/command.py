"""`python -m benchmarks`: which subjects there are, and the one table of what they measured."""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from benchmarks.figures import Figure, table
from benchmarks.words import figures_file
from library.core.errors import AtelierError

SUBJECTS = {
    "step": ("benchmarks.training_step", "a training step beside a bare loop, diffusers + peft, and its multiplications"),
    "first": ("benchmarks.first_step", "from the start of the demo to its first step, beside importing its packages"),
    "start": ("benchmarks.start", "starts with few and with many pictures, beside the least that a start must read"),
    "loading": ("benchmarks.loading", "how long steps wait for batches that are read from caches of real sizes"),
    "packing": ("benchmarks.packing", "pictures of mixed sizes in packs, beside the batches that buckets make of them"),
    "help": ("benchmarks.startup", "--help of every script, beside a bare interpreter"),
    "forms": ("benchmarks.weight_forms", "weights of a base in 8 and 4 bits: errors, held-out loss, room"),
    "merge": ("benchmarks.merge", "memory and time of a merge into a large model, beside a copy of the file"),
    "caching": ("benchmarks.caching", "how much of the time of caching the encoder computes"),
    "gpu": ("benchmarks.gpu", "training of FLUX.1 dev, SDXL and Wan on a GPU, beside what its arithmetic takes"),
}
"""name -> (module, what it measures). A module has `add_options(parser)` for what it alone reads, and
`measure(options)`, which gives a list of `Figure`; `options.quick` asks for a look that takes seconds."""


def main(argv: Sequence[str] | None = None) -> int:
    options, subjects = read(list(sys.argv[1:] if argv is None else argv))
    figures: list[Figure] = []
    for name, (module, own) in subjects.items():
        print(f"measuring: {name}, {SUBJECTS[name][1]}", file=sys.stderr, flush=True)
        try:
            figures += module.measure(own)
        except AtelierError as error:
            raise SystemExit(f"{name}: {error}") from error
    print(table(figures))
    Path(options.json).write_text(json.dumps(report(figures), indent=1) + "\n", encoding="utf-8")
    print(f"\nevery value: {options.json}")
    misses = [line for figure in figures for line in figure.misses()]
    for line in misses if options.check else ():
        print(line, file=sys.stderr)
    return 1 if options.check and misses else 0


def read(words: list[str]) -> tuple[argparse.Namespace, dict[str, tuple[ModuleType, argparse.Namespace]]]:
    """The options of the command, and the modules of the subjects that are named, all of them when none is, with their
    own options: those of the command line where one alone is named, the defaults otherwise."""
    names = [word for word in dict.fromkeys(words) if word in SUBJECTS]
    chosen = {name: importlib.import_module(SUBJECTS[name][0]) for name in names or SUBJECTS}
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Measure, every figure beside its baseline from the same run.",
        epilog="subjects:\n" + "\n".join(f"  {name:<10} {told}" for name, (_, told) in SUBJECTS.items())
        + "\n\n`python -m benchmarks SUBJECT --help` shows the options of one.",
    )  # fmt: skip
    parser.add_argument("subjects", nargs="*", metavar="SUBJECT", help="default: all")
    parser.add_argument("--quick", action="store_true", help="a look that takes seconds; its figures say little")
    parser.add_argument(
        "--json", type=figures_file, default="benchmarks.json", help="file for every value (default: %(default)s)"
    )
    parser.add_argument("--check", action="store_true", help="exit code 1 when a figure is not what is wanted")
    if len(names) == 1:
        chosen[names[0]].add_options(parser.add_argument_group(names[0]))
    options, rest = parser.parse_known_args(words)
    if rest:
        parser.error(f"{rest[0]} is not known here; an option of a subject needs that subject alone before it")
    if unknown := [name for name in options.subjects if name not in SUBJECTS]:
        parser.error(f"unknown subject {unknown[0]}; known: {', '.join(SUBJECTS)}")
    if len(names) == 1:
        return options, {names[0]: (chosen[names[0]], options)}
    return options, {name: (module, defaults_of(module, options.quick)) for name, module in chosen.items()}


def defaults_of(module: ModuleType, quick: bool) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    module.add_options(parser)
    return parser.parse_args([], argparse.Namespace(quick=quick))


def report(figures: Sequence[Figure]) -> dict[str, object]:
    """What the JSON file holds: the machine, and every figure with the values of its rounds."""
    import torch

    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": {
            "system": platform.platform(), "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(), "python": platform.python_version(), "torch": str(torch.__version__),
        },
        "figures": [figure.json() for figure in figures],
    }  # fmt: skip
