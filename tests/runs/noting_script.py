"""Trains like flux_train_network.py and writes down which images each process saw: NOTES names the folder."""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from library.training import cli, loop  # noqa: E402

SEEN: list[tuple[int, str]] = []
original = loop.micro_step


def noting(run, batch):
    SEEN.extend((batch.request.epoch, os.path.basename(key)) for key in batch.image_keys)
    return original(run, batch)


if __name__ == "__main__":
    loop.micro_step = noting
    cli.run("flux", "network", sys.argv[1:])
    rank = os.environ.get("RANK", "0")
    Path(os.environ["NOTES"], f"rank{rank}.json").write_text(json.dumps(SEEN), encoding="utf-8")
