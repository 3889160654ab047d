"""One run in a process of its own, for tests/runs/test_planned_peaks.py: prints the predicted and the measured growth of
main memory, in bytes.

    python -m tests.runs.plan_case FOLDER TINY_SET TRAINABLE SIDE BATCH [options of the run]

A short run before it brings in what is loaded once: packages, tokenizers, kernels.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from pathlib import Path

from library.core.registry import import_target
from library.families.registry import record_of
from library.tiny_models import build_tiny
from library.training import parser_common
from library.training.loop import fit
from library.training.trainer_base import Trainer
from tests.families import CASES
from tests.runs.conftest import draw_pictures

STEPS = 2


def trainer_of(folder: Path, name: str, trainable: str, side: int, batch: int, options: list[str]) -> Trainer:
    """A trainer of `batch` pictures of this side, which train together."""
    case = CASES[name]
    tiny = build_tiny(case.name, folder / "tiny") if not (folder / "tiny").exists() else None
    place = folder / f"{side}_{batch}"
    draw_pictures(place / "images", batch, (side, side))
    step = case.bucket_step
    (place / "data.toml").write_text(
        f"[general]\ncaption_extension = '.txt'\nenable_bucket = true\nmin_bucket_reso = {step}\n"
        f"bucket_reso_steps = {step}\n[[datasets]]\nresolution = {side}\nbatch_size = {batch}\n"
        f"[[datasets.subsets]]\nimage_dir = '{place / 'images'}'\nnum_repeats = {STEPS}\n",
        encoding="utf-8",
    )
    network = [*case.options(), "--network_dim=4"] if trainable == "network" else [*case.entry.options, *case.brief]
    arguments = tiny.arguments() if tiny else ARGUMENTS
    ARGUMENTS[:] = arguments
    words = [
        *arguments, *network, f"--dataset_config={place / 'data.toml'}", f"--output_dir={place / 'out'}",
        f"--max_train_steps={STEPS}", "--seed=5", "--learning_rate=1e-3", "--max_data_loader_n_workers=0",
        "--console_log_level=WARNING", *options,
    ]
    config = parser_common.parse_command(words, case.family, trainable).config
    family = import_target(record_of(case.family).family)
    return Trainer(config, family(config), parser_common.TRAINABLES.resolve(trainable)(config))


ARGUMENTS: list[str] = []


def highest_and_now() -> tuple[int, int]:
    """Bytes of main memory that this process had at most, and has."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith("Vm")}
    return sizes["VmHWM"], sizes["VmRSS"]


def train(trainer: Trainer) -> None:
    run = trainer.prepare()
    trainer.release()
    fit(run)


def main(folder: str, name: str, trainable: str, side: str, batch: str, *options: str) -> None:
    make = lambda side, batch: trainer_of(Path(folder), name, trainable, side, batch, list(options))  # noqa: E731
    train(make(64, 1))
    if any(option.endswith("_to_disk") for option in options):  # caches are complete, so that the step counts
        filling = make(int(side), int(batch))
        filling.prepare()
        filling.release()
        del filling
    predicted = make(int(side), int(batch)).plans()[0]
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the highest begins anew
    before = highest_and_now()[1]
    train(make(int(side), int(batch)))
    highest = highest_and_now()[0]
    print(predicted.device_peak - predicted.host["the program"], highest - before)


if __name__ == "__main__":
    main(*sys.argv[1:])
