"""Real runs on tiny random models and a folder of small pictures; FLUX.1 where nothing else is said."""

from __future__ import annotations

import csv
import hashlib
import json
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from PIL import Image

from library.core.registry import import_target
from library.families.registry import record_of
from library.tiny_models import TinySet
from library.training import cli, parser_common
from library.training.hooks.base import Hook
from library.training.run import Run
from library.training.trainables.network import NetworkTrainable
from library.training.trainer_base import Trainer
from tests.families import CASES, FamilyCase
from tests.tiny import TinyFlux, build_tiny_flux

CHANGING_KEYS = {"ss_session_id", "ss_training_started_at", "ss_training_finished_at", "modelspec.date"}
"""metadata that no two runs share"""

DATASET = """
[general]
caption_extension = ".txt"
enable_bucket = true
min_bucket_reso = {min_bucket}
bucket_reso_steps = {bucket_step}
[[datasets]]
resolution = 64
batch_size = {batch_size}
{dataset_keys}
[[datasets.subsets]]
image_dir = '{images}'
{subset_keys}
"""


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> TinyFlux:
    return build_tiny_flux(tmp_path_factory.mktemp("tiny"))


def draw_pictures(folder: Path, count: int, size: tuple[int, int] = (64, 64)) -> Path:
    """Noise pictures of one size, or of two when `count` is negative: every third wider."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.RandomState(0)
    for i in range(abs(count)):
        width = 96 if count < 0 and i % 3 == 0 else size[0]
        Image.fromarray(random.randint(0, 255, (size[1], width, 3), dtype=np.uint8)).save(folder / f"{i:02d}.png")
        (folder / f"{i:02d}.txt").write_text(f"a red cat, number {i}, photo", encoding="utf-8")
    return folder


@dataclass
class Work:
    """A folder with pictures, a dataset configuration and the options of a short run."""

    folder: Path
    tiny: TinySet
    images: Path
    case: FamilyCase = field(default=CASES["flux"], kw_only=True)
    trainable: ClassVar[type[Any]] = NetworkTrainable

    def dataset(
        self, batch_size: int = 2, dataset_keys: str = "", subset_keys: str = "", name: str = "data.toml"
    ) -> Path:
        path = self.folder / name
        step = self.case.bucket_step
        text = DATASET.format(
            batch_size=batch_size, images=self.images, dataset_keys=dataset_keys, subset_keys=subset_keys,
            bucket_step=step,
            min_bucket=max(32, step),
        )
        path.write_text(text, encoding="utf-8")
        return path

    def argv(self, out: str, *more: str, dataset: Path | None = None) -> list[str]:
        return [
            *self.tiny.arguments(), *self.case.options(), f"--dataset_config={dataset or self.dataset()}",
            f"--output_dir={self.folder / out}",
            "--output_name=lora", "--network_dim=4", "--max_train_steps=7", "--seed=5",
            "--learning_rate=1e-2", "--max_data_loader_n_workers=0", "--console_log_level=WARNING", *more,
        ]

    def train(self, out: str, *more: str, dataset: Path | None = None) -> Path:
        """Train in this process; the path of the final file."""
        cli.run(self.case.family, self.trainable.name, self.argv(out, *more, dataset=dataset))
        return self.folder / out / "lora.safetensors"

    def trainer(
        self, out: str, *more: str, dataset: Path | None = None, hooks: list[Hook] | None = None,
        family: type[Any] | None = None
    ) -> Trainer:
        """A trainer for the same run that has not begun; `family` replaces the class of the family."""
        argv = self.argv(out, *more, dataset=dataset)
        config = parser_common.parse_command(argv, self.case.family, self.trainable.name).config
        family = family or import_target(record_of(self.case.family).family)
        return Trainer(config, family(config), self.trainable(config), hooks)

    def prepare(self, out: str, *more: str, dataset: Path | None = None) -> Run:
        """A run that has not begun, with its name free for others."""
        trainer = self.trainer(out, *more, dataset=dataset)
        run = trainer.prepare()
        trainer.release()
        return run


class ControlWork(Work):
    """The short run on pictures with control pictures, for what learns from them."""

    @property
    def control(self) -> Path:
        return self.folder / "control"

    def dataset(
        self, batch_size: int = 2, dataset_keys: str = "", subset_keys: str = "", name: str = "data.toml"
    ) -> Path:
        keys = f"conditioning_data_dir = '{self.control}'\n{subset_keys}"
        return super().dataset(batch_size, dataset_keys, keys, name)

    def argv(self, out: str, *more: str, dataset: Path | None = None) -> list[str]:
        words = super().argv(out, dataset=dataset)
        return [*(word for word in words if not word.startswith("--network_")), *more]


@pytest.fixture
def work(tmp_path: Path, tiny: TinyFlux) -> Work:
    return Work(tmp_path, tiny, draw_pictures(tmp_path / "images", -9))


def read_parts(path: Path) -> tuple[dict[str, str], bytes]:
    """Metadata and everything after the header of a safetensors file."""
    content = path.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + size])
    return header.get("__metadata__", {}), content[8 + size :]


def fingerprint(path: Path) -> str:
    """Of all bytes of a file but the values that no two runs share; keys, their order and all lengths count."""
    content = path.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + size])
    header["__metadata__"] = {k: len(v) if k in CHANGING_KEYS else v for k, v in header["__metadata__"].items()}
    return hashlib.sha256(content[:8] + json.dumps(header).encode() + content[8 + size :]).hexdigest()


def losses_of(path: Path, column: str = "loss") -> list[float]:
    """A column of the table of losses beside an adapter: loss, average or validation."""
    with open(path.with_name("lora-loss.csv"), encoding="utf-8") as file:
        return [float(row[column]) for row in csv.DictReader(file) if row.get(column)]


@pytest.fixture
def scaled(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """The scaling of gradients that fp16 has on a GPU, on the CPU; whether each step was left out. The factor grows
    with every step until one is."""
    import torch

    from library.training import loop, trainer_base

    prepare, update, skipped = trainer_base.prepare_runtime, loop.update, []

    def with_scaler(config):
        runtime = prepare(config)
        runtime.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_factor=4.0, growth_interval=1)
        runtime.accelerator.native_amp = True
        return runtime

    def noting(run):
        update(run)
        skipped.append(run.optimizer.step_was_skipped)

    monkeypatch.setattr(trainer_base, "prepare_runtime", with_scaler)
    monkeypatch.setattr(loop, "update", noting)
    return skipped


class Stopped(Exception):
    """Stands for a kill."""


def stop_after(patch: pytest.MonkeyPatch, step: int) -> None:
    """Let a run die right after an optimizer step, when its files are written."""
    from library.training import loop

    original = loop.micro_step

    def dying(run, batch):
        if run.progress.global_step >= step:
            raise Stopped
        return original(run, batch)

    patch.setattr(loop, "micro_step", dying)


def sample_pictures(folder: Path) -> list[Path]:
    """The samples in an output folder, without the sheets of several."""
    return [path for path in sorted((folder / "sample").glob("*.png")) if not path.stem.endswith(("_grid", "sheet"))]


def largest_difference(a: Path, b: Path) -> float:
    """Over all tensors of two files with the same keys."""
    from safetensors.torch import load_file

    left, right = load_file(a), load_file(b)
    assert left.keys() == right.keys()
    return max(float((left[key].float() - right[key].float()).abs().max()) for key in left)


Train = Callable[[str, Sequence[str]], Path]
