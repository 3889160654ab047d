"""How long it takes from the start of the demo's training to the end of its first step, beside an interpreter that
imports torch, transformers and accelerate and does nothing.

The command is that of examples/demo, without the samples before the first step, in a process of its own; in turn with the
interpreter, on one thread. All that a start does is in it: checks, pictures, caches in memory, models, adapter, optimizer.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.figures import Baseline, Figure, spread
from benchmarks.processes import ROOT
from benchmarks.words import count
from library.training.hooks.base import Hook

if TYPE_CHECKING:
    from library.training.run import Run, StepOutput

TIMES_THE_IMPORTS = 1.5
STARTED, REPORT = "BENCHMARK_STARTED", "BENCHMARK_REPORT"
"""variables of the environment: when the process was started (seconds since 1970), and the file that tells how it went"""
IMPORTS = "import torch, transformers, accelerate; from benchmarks.first_step import report; report()"
WORDS = (
    "flux_train_network.py", "--config_file=examples/demo/train.toml", "--no-sample_at_first",
    "--hook=benchmarks.first_step:FirstStep",
)  # fmt: skip


def report() -> None:
    """In the measured process: note the time since its start, and the CPU time that it has taken."""
    seconds = {"wall": time.time() - float(os.environ[STARTED]), "cpu": time.process_time()}
    Path(os.environ[REPORT]).write_text(json.dumps(seconds), encoding="utf-8")


class FirstStep(Hook):
    """Notes when the first step is done, and ends the process: what a run does at its end is not asked."""

    def on_step_end(self, run: Run, output: StepOutput) -> None:
        report()
        os._exit(0)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--runs", type=count, help="starts, each with the imports beside it (default: 7)")


def measure(options: argparse.Namespace) -> list[Figure]:
    starts, imports = [], []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(1 + (options.runs or (1 if options.quick else 7))):
            words = [*WORDS, f"--output_dir={folder}/out{number}"]
            turn = measured([sys.executable, *words], folder), measured([sys.executable, "-c", IMPORTS], folder)
            if number:  # the first ones fill the disk cache
                starts.append(turn[0])
                imports.append(turn[1])
    return [
        Figure(
            "first", "demo, start to the end of the first step", unit, spread(start[clock] for start in starts),
            (Baseline("torch, transformers, accelerate", spread(one[clock] for one in imports), at_most),),
        )
        for clock, unit, at_most in (("wall", "s", TIMES_THE_IMPORTS), ("cpu", "s of CPU", None))
    ]  # fmt: skip


def measured(command: list[str], folder: str) -> dict[str, float]:
    """What a process reported, after it has ended."""
    path = Path(folder) / "report.json"
    path.unlink(missing_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", STARTED: str(time.time()), REPORT: str(path)}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)
    if done.returncode or not path.exists():
        raise SystemExit(f"{' '.join(command)} failed\n{done.stderr[-4000:]}".strip())
    return json.loads(path.read_text(encoding="utf-8"))
