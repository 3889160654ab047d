"""What a picture of a mixed-size set costs in packs, beside the batches that buckets make of the same pictures, and
beside the sizes of each pack one after the other.

A LoRA on the tiny model of a family, latents and text outputs cached in memory; every loop goes through the same
pictures in turn, in one process, on one thread. Figures are CPU time of an epoch by its pictures: forward, backward,
update, with loading and collating.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.figures import Baseline, Figure, spread
from benchmarks.words import count

if TYPE_CHECKING:
    from library.training.notebook import Training

CASES = ("flux", "sd3", "wan")
BATCH_SIZE, LARGEST = 8, 128
STEP = 16
"""pixels between two sizes"""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--families", nargs="+", choices=CASES, default=["flux"], help="tiny models (default: flux)")
    parser.add_argument("--rounds", type=count, help="epochs of each loop (default: 9)")
    parser.add_argument("--pictures", type=count, help="pictures, nearly every one of a size of its own (default: 48)")


def measure(options: argparse.Namespace) -> list[Figure]:
    rounds, pictures = options.rounds or (2 if options.quick else 9), options.pictures or (8 if options.quick else 48)
    return [measure_one(family, rounds, pictures) for family in options.families]


def measure_one(family: str, rounds: int, pictures: int) -> Figure:
    from benchmarks.bounds import threads
    from library.tiny_models import build_tiny
    from library.training import step as steps

    together = steps.denoise_together
    with tempfile.TemporaryDirectory() as folder, threads(1):
        tiny = build_tiny(family, Path(folder) / "model")
        dataset = write_mixed(Path(folder), pictures)
        packed = prepared(Path(folder), family, tiny, dataset, "packed")
        loops = {
            "packs": (packed, together), "sizes of a pack alone": (packed, one_by_one),
            "buckets": (prepared(Path(folder), family, tiny, dataset, "buckets"), together),
        }  # fmt: skip
        times: dict[str, list[float]] = {name: [] for name in loops}
        try:
            for number in range(rounds + 1):
                for name, (training, denoise) in loops.items():
                    steps.denoise_together = denoise
                    seconds = epoch_of(training)
                    times[name] += [1e3 * seconds / pictures] if number else []  # the first one warms up
        finally:
            steps.denoise_together = together
        notes = {name: training.run.data.batches_per_epoch for name, (training, _) in loops.items()}
    ours = times.pop("packs")
    return Figure(
        "packing", f"{family} LoRA, {pictures} pictures of mixed sizes", "ms of CPU a picture", spread(ours),
        tuple(Baseline(name, spread(values)) for name, values in times.items()),
        notes={f"steps of an epoch, {name}": steps for name, steps in notes.items()},
    )  # fmt: skip


def one_by_one(calls: list) -> list:
    return [call.alone() for call in calls]


def write_mixed(folder: Path, pictures: int) -> Path:
    """Pictures of sides from 32 to 128 pixels, and the configuration that keeps their sizes."""
    from PIL import Image

    from library.tiny_models.pictures import draw_pictures, write_configuration

    images = draw_pictures(folder / "images", pictures)
    sides = range(2 * STEP, LARGEST + 1, STEP)
    sizes = [(width, height) for width in sides for height in sides]
    for number, path in enumerate(sorted(images.glob("*.png"))):
        size = sizes[number * 11 % len(sizes)]
        with Image.open(path) as picture:
            picture.resize(size).save(path)
    path = write_configuration(folder / "dataset.toml", images, LARGEST, BATCH_SIZE)
    keys = f"enable_bucket = true\nbucket_no_upscale = true\nmin_bucket_reso = {STEP}\nbucket_reso_steps = {STEP}\n"
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace("batch_size =", f"{keys}batch_size ="), encoding="utf-8")
    return path


def prepared(folder: Path, family: str, tiny: object, dataset: Path, out: str) -> Training:
    import library
    from library.tiny_models import tiny_entry

    entry = tiny_entry(family)
    brief = ["--t5xxl_max_token_length=64"] if family == "flux" else []  # as short as the captions of the others
    tokens = BATCH_SIZE * (LARGEST // STEP) ** 2 // 2
    packing = ["--navit_packing", f"--navit_token_budget={tokens}"] if out == "packed" else []
    training = library.Training(
        [
            *tiny.arguments(), *entry.options, f"--network_module={entry.network_module}", "--cache_latents",
            "--network_train_unet_only", "--cache_text_encoder_outputs", *packing, *brief,
        ],
        family=entry.family, dataset_config=dataset, output_dir=folder / out, output_name="lora", network_dim=16,
        network_alpha=16, learning_rate=1e-4, seed=1, max_train_epochs=100, max_data_loader_n_workers=0,
        console_log_level="ERROR",
    )  # fmt: skip
    training.run  # noqa: B018, caches are filled and models loaded
    training.close()
    return training


def epoch_of(training: Training) -> float:
    """CPU seconds."""
    from library.training.loop import micro_step, update

    begin = time.process_time()
    for batch in training.run.data.batches(epoch=1):
        micro_step(training.run, batch)
        if batch.request.is_last_of_group:
            update(training.run)
    return time.process_time() - begin
