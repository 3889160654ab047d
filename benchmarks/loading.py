"""Whether batches are there when the step wants them: FLUX.1 at 1024 pixels, with caches on the disk of real sizes.

Latents are [16, 128, 128] and outputs of T5 [512, 4096] in float32, 9 MB a picture, in files as the known trainer
writes them. The device is stood for by a sleep of as long as a step takes, a quarter of a second for each picture,
which is less than any card needs. `waiting` is the part of the time in which the loop waits for the loader, behind the
first batch; beside it stands how many pictures a second the loader gives when nothing is computed. The files are in
the system's cache of files: a slow disk is another measurement.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.figures import Figure, spread
from benchmarks.words import count, count_or_none

if TYPE_CHECKING:
    from library.training.data import TrainingData

MOST_WAITING = 0.02
SECONDS_PER_PICTURE = 0.25
SIDE, TOKENS, WIDTH = 1024, 512, 4096


def write_set(folder: Path, count: int, side: int, width: int) -> None:
    """Pictures of one colour with captions, and caches of noise."""
    import numpy as np
    from PIL import Image

    random, place = np.random.default_rng(0), f"{side // 8}x{side // 8}"
    folder.mkdir(parents=True)
    for number in range(count):
        name = folder / f"{number:04d}"
        Image.new("RGB", (side, side), (number, 0, 0)).save(f"{name}.png")
        Path(f"{name}.txt").write_text(f"colour {number}", encoding="utf-8")
        np.savez(f"{name}_{side:04d}x{side:04d}_flux.npz", **{
            f"latents_{place}": random.normal(size=(16, side // 8, side // 8)).astype(np.float32),
            f"original_size_{place}": np.array([side, side]), f"crop_ltrb_{place}": np.zeros(4),
        })  # fmt: skip
        np.savez(
            f"{name}_flux_te.npz", l_pooled=random.normal(size=768).astype(np.float32),
            t5_out=random.normal(size=(TOKENS, width)).astype(np.float32), txt_ids=np.zeros((TOKENS, 3), np.float32),
            t5_attn_mask=np.ones(TOKENS, np.int32), apply_t5_attn_mask=np.array(False),
        )  # fmt: skip


def training_data(folder: Path, workers: int) -> TrainingData:
    """The batches of a run with these options, as its trainer makes them; no model is loaded."""
    from library.dataset.fill_caches import fill_latent_cache, fill_text_cache
    from library.tiny_models import build_tiny, tiny_entry
    from library.training import parser_common
    from library.training.accelerator_setup import prepare_runtime
    from library.training.data_phase import find_data, group_data
    from library.training.trainables.network import NetworkTrainable
    from library.training.trainer_base import Trainer
    from library.training.wiring.flux import FluxFamily

    entry, tiny = tiny_entry("flux"), build_tiny("flux", folder / "model")
    words = [
        *tiny.arguments(), f"--network_module={entry.network_module}", *entry.options,
        f"--t5xxl_max_token_length={TOKENS}", f"--dataset_config={folder / 'data.toml'}", "--cache_latents_to_disk",
        "--cache_text_encoder_outputs_to_disk", "--network_train_unet_only", "--seed=1", "--max_train_steps=1",
        f"--max_data_loader_n_workers={workers}", f"--output_dir={folder}", "--output_name=x",
    ]  # fmt: skip
    config = parser_common.parse_command(words, "flux", "network").config
    family, trainable = FluxFamily(config), NetworkTrainable(config)
    runtime = prepare_runtime(config)
    data = group_data(config, find_data(config, family.architecture), family.architecture, runtime.seed)
    strategies = family.strategies([False, False])
    data.set_strategies(strategies)

    def refuse() -> None:
        raise SystemExit("the caches of this measurement are not accepted")

    fill_latent_cache(data.groups, strategies, refuse, runtime, index=data.index)
    fill_text_cache(data.groups, strategies, refuse, runtime, index=data.index)
    return Trainer(config, family, trainable).loader(data, runtime)


def waiting(data: TrainingData, seconds: float) -> tuple[float, float]:
    """(part of the time that one epoch waits, pictures a second) behind the first batch; a step takes so long for each
    picture."""
    waited, pictures, started = 0.0, 0, None
    batches = iter(data.batches(1))
    while True:
        asked = time.perf_counter()
        batch = next(batches, None)
        if batch is None:
            break
        if started is None:
            started = time.perf_counter()
        else:
            waited += time.perf_counter() - asked
            pictures += len(batch)
        time.sleep(seconds * len(batch))
    total = asked - (started or asked)  # without the end of the epoch, at which workers go
    return waited / total, pictures / total


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pictures", type=count, help="default: 48")
    parser.add_argument("--workers", type=count_or_none, nargs="+", default=[0, 2], help="loader workers (default: 0 2)")
    parser.add_argument("--rounds", type=count, help="epochs of each (default: 3)")


def measure(options: argparse.Namespace) -> list[Figure]:
    from library.tiny_models.pictures import write_configuration

    side, width = (64, 32) if options.quick else (SIDE, WIDTH)
    seconds = 0.005 if options.quick else SECONDS_PER_PICTURE
    count, rounds = options.pictures or (8 if options.quick else 48), options.rounds or (1 if options.quick else 3)
    figures = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_set(folder / "images", count, side, width)
        write_configuration(folder / "data.toml", folder / "images", side, batch_size=2)
        for workers in options.workers:
            data = training_data(folder, workers)
            name = f"FLUX.1 {side} px, {workers} workers"
            figures.append(
                Figure(
                    "loading", f"{name}: waiting", "share",
                    spread(waiting(data, seconds)[0] for _ in range(rounds)), wanted=MOST_WAITING if workers else None,
                )
            )
            figures.append(
                Figure("loading", f"{name}: alone", "pictures/s", spread(waiting(data, 0.0)[1] for _ in range(rounds)))
            )
    return figures
