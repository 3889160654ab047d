"""What a training step costs: our loop beside a bare loop around the same modules, the same in diffusers and PEFT, and
the time that its multiplications take.

All train a LoRA on the same layers of the same tiny model, from the same pictures (latents, and text outputs where the
family caches them, in memory), in turn, in one process, on one thread, a few steps of each a round. Figures are CPU
time of a step, with loading and collating: medians over the rounds, and ratios within a round. Ours is the loop of the
scripts (`library/training/loop.py`) with its standard hooks, not a call of the step.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import inspect
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.figures import Baseline, Figure, spread
from benchmarks.words import count

if TYPE_CHECKING:
    from benchmarks.loops import BareLoop, HandWritten, PeftLoop
    from library.training.hooks.base import Hook
    from library.training.notebook import Training
    from library.training.run import Run, StepOutput

CASES = ("flux", "sdxl", "sd1")
"""tiny sets whose forward `benchmarks/loops.py` has on all sides"""
OVER_BARE, OVER_PEFT = 1.03, 0.85
RANK, LEARNING_RATE, PICTURES, BATCH_SIZE = 16, 1e-4, 16, 2


@dataclass(frozen=True)
class Sizes:
    rounds: int
    steps: int
    """of each loop in a round"""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--families", nargs="+", choices=CASES, default=list(CASES), help="tiny models (default: all)")
    parser.add_argument("--rounds", type=count, help="rounds, in each of which every loop has its turn (default: 25)")
    parser.add_argument("--steps", type=count, help="steps of each loop in a round (default: 8)")
    parser.add_argument(
        "--model_settings", nargs="*", default=[], metavar="NAME=NUMBER", type=setting,
        help="sizes of the tiny model, as its builder calls them: hidden=256 depth=2",
    )


def setting(word: str) -> tuple[str, int]:
    """"hidden=256" -> ("hidden", 256)."""
    name, _, value = word.partition("=")
    return name, int(value)


def measure(options: argparse.Namespace) -> list[Figure]:
    sizes = Sizes(options.rounds or (3 if options.quick else 25), options.steps or (2 if options.quick else 8))
    check(options.families, dict(options.model_settings))
    return [measure_one(name, sizes, dict(options.model_settings)) for name in options.families]


def check(families: Sequence[str], settings: Mapping[str, int]) -> None:
    """ConfigError when a package is missing, or when a builder does not know a setting."""
    from library.core.errors import Problems, did_you_mean
    from library.core.registry import import_target
    from library.tiny_models import tiny_entry

    problems = Problems()
    missing = [name for name in ("diffusers", "peft") if importlib.util.find_spec(name) is None]
    if missing:
        problems.add(f"{' and '.join(missing)} missing; pip install -r requirements-dev.txt")
    for family in families:
        known = set(inspect.signature(import_target(tiny_entry(family).build)).parameters) - {"folder", "seed", "dtype"}
        for name in settings.keys() - known:
            hint = did_you_mean(name, known) or f"; known: {', '.join(sorted(known))}"
            problems.add(f"--model_settings {name}: the tiny model {family} has no such size{hint}")
    problems.raise_if_any()


def measure_one(name: str, sizes: Sizes, settings: Mapping[str, int] | None = None) -> Figure:
    from benchmarks.bounds import bytes_of, flops_of, matmul_rate, threads

    with tempfile.TemporaryDirectory() as folder, threads(1):
        bench = Bench(name, Path(folder), sizes, settings or {})
        bare, peft = bench.bare(), bench.peft()
        flops = flops_of(bare.step)
        times = bench.times([bare, peft], rate=matmul_rate)
        rates = times.pop("rate")
        unlike = bench.difference(bare, peft)
    if unlike > 1e-3:
        raise SystemExit(f"{name}: the two models are not the same function: they differ by {unlike:.2g}")
    return Figure(
        "step", f"{name} LoRA, rank {RANK}", "ms of CPU", spread(1e3 * t for t in times["ours"]),
        (
            Baseline(bare.name, spread(1e3 * t for t in times[bare.name]), OVER_BARE),
            Baseline(peft.name, spread(1e3 * t for t in times[peft.name]), OVER_PEFT),
            Baseline("its multiplications", spread(1e3 * flops / rate for rate in rates), is_bound=True),
        ),
        notes={
            "flops of a step": flops, "flops per second": spread(rates).median, "steps of a round": sizes.steps,
            "bytes of the denoiser": bytes_of(bare.denoiser.parameters()),
            "trained numbers, ours": sum(p.numel() for p in bare.parameters),
            "trained numbers, peft": sum(p.numel() for p in peft.parameters),
            "layers with an adapter, ours": len(bare.run.trainable.network.loras),
            "layers with an adapter, peft": peft.num_layers,
            "model code": "ours and the bare loop: library; the other: diffusers, with the same weights",
        },
    )  # fmt: skip


class Bench:
    """The three loops of one tiny model."""

    def __init__(self, name: str, folder: Path, sizes: Sizes, settings: Mapping[str, int]) -> None:
        from library.tiny_models import build_tiny, tiny_entry
        from library.tiny_models.pictures import write_dataset

        self.folder, self.sizes, self.entry = folder, sizes, tiny_entry(name)
        self.tiny = build_tiny(name, folder / "model", **settings)
        self.dataset = write_dataset(folder / "data", count=PICTURES, batch_size=BATCH_SIZE)
        self.rows: Sequence[dict[str, Any]] = ()

    def prepared(self, out: str, hooks: Sequence[Hook] = ()) -> Training:
        """A Training, which reads the same files each time."""
        import library

        caches_text = self.entry.family != "sd"
        return library.Training(
            [
                *self.tiny.arguments(), *self.entry.options, f"--network_module={self.entry.network_module}",
                "--cache_latents", "--network_train_unet_only",
                *(["--cache_text_encoder_outputs"] if caches_text else []),
            ],
            family=self.entry.family, hooks=hooks, dataset_config=self.dataset, output_dir=self.folder / out,
            output_name="lora", network_dim=RANK, network_alpha=RANK, learning_rate=LEARNING_RATE, seed=1,
            max_train_steps=(self.sizes.rounds + 1) * self.sizes.steps, max_data_loader_n_workers=0,
            console_log_level="ERROR",
        )  # fmt: skip

    def bare(self) -> BareLoop:
        from benchmarks.loops import BareLoop, rows_of

        run = self.run_of("bare")
        self.rows = rows_of(run)
        return BareLoop(run, self.rows, BATCH_SIZE)

    def run_of(self, out: str) -> Run:
        training = self.prepared(out)
        run = training.run
        training.close()
        return run

    def peft(self) -> PeftLoop:
        from benchmarks.loops import PeftLoop, TheirModel

        run, folder = self.run_of("peft"), self.folder / "diffusers"
        source = next(word.partition("=")[2] for word in self.tiny.arguments() if "pretrained_model" in word)
        tokenizer = getattr(self.tiny, "tokenizer", None)
        words = [source, str(folder), *(["--tokenizer", str(tokenizer)] if tokenizer else [])]
        return PeftLoop(run, self.rows, BATCH_SIZE, TheirModel.converted(words, folder), RANK, LEARNING_RATE)

    def times(self, others: Sequence[HandWritten], rate: Callable[[], float]) -> dict[str, list[float]]:
        """CPU seconds of a step of each loop, by name, a value for each round; `rate` is measured in each as well."""
        turns = turns_hook(self.sizes, others, rate)
        with nothing_old_collected():
            self.prepared("ours", [turns]).train()
        return turns.times

    def difference(self, bare: BareLoop, peft: PeftLoop) -> float:
        """Of the outputs of both models on the same inputs, relative to their size, without what they have learned."""
        import torch

        batch = next(bare.batches)
        noise = torch.randn(batch["latents"].shape, generator=torch.Generator().manual_seed(1))
        times = torch.full((len(noise),), 0.6) if bare.is_flow else torch.full((len(noise),), 600)
        peft.denoiser.disable_adapters()
        with torch.no_grad(), bare.run.trainable.disabled():
            ours, theirs = (loop.predict(noise, times, batch) for loop in (bare, peft))
        return ((ours - theirs).norm() / theirs.norm()).item()


@contextmanager
def nothing_old_collected():
    """Inside, what the models and their packages keep alive is not looked through for garbage, in nobody's turn."""
    was_frozen = gc.get_freeze_count() > 0
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        if not was_frozen:
            gc.unfreeze()


def turns_hook(sizes: Sizes, others: Sequence[HandWritten], rate: Callable[[], float]) -> Hook:
    """A hook in our loop that lets the others have their turns, and keeps the time that our own steps took between."""
    from library.training.hooks.base import Hook

    class Turns(Hook):
        def __init__(self) -> None:
            super().__init__()
            self.times: dict[str, list[float]] = {"ours": [], "rate": [], **{loop.name: [] for loop in others}}
            self.done, self.started = 0, 0.0

        def on_step_end(self, run: Run, output: StepOutput) -> None:
            self.done += 1
            if self.done % sizes.steps:
                return
            ours = (time.process_time() - self.started) / sizes.steps
            turn = {loop.name: self.turn_of(loop) for loop in others} | {"rate": rate(), "ours": ours}
            if self.done > sizes.steps:  # the first round warms up
                for name, value in turn.items():
                    self.times[name].append(value)
            self.started = time.process_time()

        @staticmethod
        def turn_of(loop: HandWritten) -> float:
            started = time.process_time()
            for _ in range(sizes.steps):
                loop.step()
            return (time.process_time() - started) / sizes.steps

    return Turns()
