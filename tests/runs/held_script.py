"""Trains like flux_train_network.py and holds before a step: HOLD_AT is the number of steps done, HOLD_FOLDER where it
says so.

There it writes `held` and waits for `go`, so that a test can signal, kill or look at a run that stands at a known
place.
"""

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from library.training import cli, loop  # noqa: E402

original = loop.micro_step


def holding(run, batch):
    folder = Path(os.environ["HOLD_FOLDER"])
    if run.progress.global_step == int(os.environ["HOLD_AT"]):
        (folder / "held").touch()
        while not (folder / "go").exists():
            time.sleep(0.02)
    return original(run, batch)


if __name__ == "__main__":  # loader workers of spawn systems import this file again
    loop.micro_step = holding
    cli.main("flux", "network", sys.argv[1:])
