"""ControlNets through their command line, on every family that has them: what learns, files, resuming, pictures of
samples, what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from library.checkpoints.kinds import describe_checkpoint
from library.components.control_nets import control_nets_of
from library.core.errors import ConfigError
from library.core.registry import import_target
from library.families.registry import FAMILIES, record_of
from library.generation.picture_files import read_frames
from library.safetensors_utils import load_safetensors, save_file_atomic
from library.training import cli, parser_common
from library.training.loop import fit
from library.training.run import Run
from library.training.trainables.control_net import ControlNetTrainable
from library.training.trainer_base import Trainer
from tests.families import CASES
from tests.runs.conftest import Stopped, Work, fingerprint, read_parts, sample_pictures, stop_after
from tests.runs.families import Tinies

SETS = [name for name, case in CASES.items() if FAMILIES[case.family].control_nets]


class ControlWork(Work):
    """The short run of a family on pictures with control pictures."""

    @property
    def control(self) -> Path:
        return self.folder / "control"

    def dataset(self, batch_size: int = 2, dataset_keys: str = "", subset_keys: str = "", name: str = "data.toml") -> Path:
        keys = f"conditioning_data_dir = '{self.control}'\n{subset_keys}"
        return super().dataset(batch_size, dataset_keys, keys, name)

    def argv(self, out: str, *more: str, dataset: Path | None = None) -> list[str]:
        words = super().argv(out, dataset=dataset)
        return [*(word for word in words if not word.startswith("--network_")), *more]

    def train(self, out: str, *more: str, dataset: Path | None = None) -> Path:
        cli.run(self.case.family, "control_net", self.argv(out, *more, dataset=dataset))
        return self.folder / out / "lora.safetensors"

    def prepare(self, out: str, *more: str, dataset: Path | None = None) -> Run:
        config = parser_common.parse_command(self.argv(out, *more, dataset=dataset), self.case.family, "control_net").config
        trainer = Trainer(config, import_target(record_of(self.case.family).family)(config), ControlNetTrainable(config))
        run = trainer.prepare()
        trainer.release()
        return run


@pytest.fixture(scope="module")
def tinies(tmp_path_factory: pytest.TempPathFactory) -> Tinies:
    return Tinies(tmp_path_factory)


def work_of(tinies: Tinies, name: str, folder: Path) -> ControlWork:
    plain = tinies.work(name, folder)
    work = ControlWork(folder, plain.tiny, plain.images, case=plain.case)
    work.control.mkdir()
    random = np.random.RandomState(9)
    for path in sorted(work.images.glob("*.png")):
        Image.fromarray(random.randint(0, 255, (64, 64, 3), dtype=np.uint8)).save(work.control / path.name)
    return work


@pytest.fixture(params=SETS)
def work(request: pytest.FixtureRequest, tinies: Tinies, tmp_path: Path) -> ControlWork:
    return work_of(tinies, request.param, tmp_path)


def test_a_net_learns_and_nothing_else_does(work: ControlWork) -> None:
    """A new one changes nothing; then the loss of a batch falls; the file, read again, gives the same loss."""
    run = work.prepare("out", "--max_train_steps=8", "--learning_rate=4e-3", "--save_precision=float", "--control_net_lr=4e-3")
    batch = next(run.data.batches(1))

    def loss(run: Run) -> float:
        with torch.no_grad(), run.weights_for_eval():
            return run.step(batch).loss_sum.item()

    def alone(run: Run) -> float:
        with pytest.MonkeyPatch.context() as patch, torch.no_grad(), run.weights_for_eval():
            patch.setattr(run.trainable, "inputs", lambda *_: {})
            return run.step(batch).loss_sum.item()

    frozen = {name: p.detach().clone() for name, p in run.models.denoiser.named_parameters()}
    start = loss(run)
    assert start == alone(run)
    fit(run)
    end = loss(run)
    assert end < start and alone(run) == start
    assert all(torch.equal(p, frozen[name]) for name, p in run.models.denoiser.named_parameters())
    file = work.folder / "out" / "lora.safetensors"
    assert describe_checkpoint(file).kind in control_nets_of(work.case.family).kinds
    assert read_parts(file)[0]["modelspec.architecture"].endswith("/controlnet")
    assert loss(work.prepare("next", f"--controlnet_model_name_or_path={file}")) == end


def test_the_same_command_writes_the_same_bytes_also_when_resumed(work: ControlWork) -> None:
    """With caches, validation, samples, averages and checkpointed activations in one of them and not in the other."""
    prompts = work.folder / "prompts.txt"
    guided = work.control / "00.png"
    prompts.write_text(f"a cat --w 64 --h 64 --s 2 --d 1 --cn {guided}\na cat --w 64 --h 64 --s 2 --d 1\n", encoding="utf-8")
    more = [
        "--ema", "--ema_decay=0.5", "--lr_scheduler=cosine", "--max_train_steps=4", "--gradient_accumulation_steps=2",
        f"--sample_prompts={prompts}", "--sample_every_n_steps=4", "--control_net_lr=1e-2",
    ]  # fmt: skip
    caches = [word for word in work.case.caches(on_disk=True) if not word.startswith("--network")]
    data = work.dataset(dataset_keys="validation_split = 0.25", subset_keys="flip_aug = true")
    first = work.train("first", *more, dataset=data)
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(Stopped):
            work.train("parts", *more, *caches, "--gradient_checkpointing", "--save_every_n_steps=2", "--save_state", dataset=data)
    again = work.train("parts", *more, *caches, "--resume=latest", dataset=data)
    for stem in ("lora", "lora-ema"):
        files = [path.with_name(f"{stem}.safetensors") for path in (first, again)]
        assert read_parts(files[0])[1] == read_parts(files[1])[1]
    guided_sample, plain_sample = (read_frames(path)[0] for path in sample_pictures(work.folder / "first"))
    assert np.abs(np.asarray(guided_sample, float) - np.asarray(plain_sample, float)).mean() > 0.1
    sheet = read_frames(work.folder / "first" / "sample" / "lora_sheet.png")[0]
    grid = read_frames(next((work.folder / "first" / "sample").glob("*_grid.png")))[0]
    with Image.open(guided) as picture:
        for page in (sheet, grid):
            assert shows(page, picture)


def shows(page: Image.Image, picture: Image.Image) -> bool:
    """Whether a picture is on a page at three times its size."""
    pixels, small = np.asarray(page.convert("RGB")), np.asarray(picture.convert("RGB"))
    found = np.argwhere((pixels == small[0, 0]).all(axis=2))
    return any(
        np.array_equal(pixels[top : top + 192 : 3, left : left + 192 : 3], small) for top, left in found
    )
