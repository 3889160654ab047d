"""How long `--help` takes for every script and tool, against a bare interpreter in the same run.

    python benchmarks/startup.py [--runs 7]

Prints the median and the fastest of several runs, in turn with the baseline, so that both see the same load of the
machine.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def seconds(command: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=7, help="counted runs of each script (default: 7)")
    runs = parser.parse_args().runs
    scripts = [path for path in sorted(ROOT.glob("*.py")) if path.name != "setup.py"]
    scripts += [path for path in sorted((ROOT / "tools").glob("*.py")) if path.name != "__init__.py"]
    bare = [sys.executable, "-c", "pass"]
    print(f"{'script':<44} {'median':>8} {'fastest':>8} {'bare':>8}")
    for script in scripts:
        command = [sys.executable, str(script), "--help"]
        seconds(command)  # byte code and disk cache
        pairs = [(seconds(command), seconds(bare)) for _ in range(runs)]
        own, baseline = zip(*pairs)
        name = script.relative_to(ROOT).as_posix()
        print(f"{name:<44} {statistics.median(own):>7.3f}s {min(own):>7.3f}s {statistics.median(baseline):>7.3f}s")


if __name__ == "__main__":
    main()
