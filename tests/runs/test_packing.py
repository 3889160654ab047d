"""Packing through the command line: samples of several sizes in one step are what they are alone, and what does not go
with it is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from library.dataset.packed_batch import PackedBatch
from library.training import step as step_module
from library.training.run import Run
from library.training.trainables.full import FullTrainable
from tests.runs.clip_work import ClipWork
from tests.runs.conftest import Stopped, Work, fingerprint, largest_difference, losses_of, stop_after
from tests.runs.families import Tinies, case_of, refused_run
from tests.runs.test_processes import OPTIONS as OF_PROCESSES
from tests.runs.test_processes import train_in_two

SIZES = ((64, 64), (96, 64), (64, 96), (128, 64), (64, 64), (96, 96), (64, 128))
FAMILIES = ("flux", "chroma", "sd3", "lumina", "anima", "hunyuan_image", "wan", "hunyuan_video")
PACKING = ("--navit_packing",)


@pytest.fixture(scope="module")
def tinies(tmp_path_factory: pytest.TempPathFactory) -> Tinies:
    return Tinies(tmp_path_factory)


class WholeWork(Work):
    trainable = FullTrainable

    def argv(self, out: str, *more: str, dataset: Path | None = None) -> list[str]:
        return [word for word in super().argv(out, *more, dataset=dataset) if not word.startswith("--network_")]


def draw(folder: Path, sizes: tuple[tuple[int, int], ...] = SIZES) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.RandomState(1)
    for number, (width, height) in enumerate(sizes):
        pixels = random.randint(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02d}.png")
        (folder / f"{number:02d}.txt").write_text("a red cat, " * (1 + number % 3), encoding="utf-8")
    return folder


@pytest.fixture
def mixed(work: Work, tmp_path: Path) -> Work:
    """FLUX.1 on pictures of several sizes."""
    work.images = draw(tmp_path / "mixed")
    return work


def mixed_dataset(work: Work, **more: Any) -> Path:
    """Every picture in the bucket of its own size."""
    keys = "bucket_no_upscale = true\nmax_bucket_reso = 256"
    path = work.dataset(dataset_keys=keys, **more)
    path.write_text(path.read_text().replace("resolution = 64", "resolution = 128"))
    return path


def step_results(run: Run, batches: list[Any]) -> tuple[list[float], list[torch.Tensor]]:
    """(the loss of every sample by its position, the gradients)"""
    places: dict[int, float] = {}
    original = run.step.loss

    def noting(output, sample, batch):
        losses = original(output, sample, batch)
        places.update(zip(batch.request.positions, losses.tolist(), strict=True))
        return losses

    run.step.loss = noting
    parameters = [p for group in run.optimizer.param_groups for p in group["params"]]
    for parameter in parameters:
        parameter.grad = None
    for batch in batches:
        run.step(batch).loss.backward()
    run.step.loss = original
    return [places[place] for place in sorted(places)], [p.grad.clone() for p in parameters if p.grad is not None]


def assert_equal(gradients: list[torch.Tensor], of_each: list[torch.Tensor]) -> None:
    """To 1e-5 of each; what is a hundredth of the largest and less is a sum that nearly vanishes."""
    scale = max(float(one.norm()) for one in of_each)
    for one, other in zip(gradients, of_each, strict=True):
        assert float((one - other).norm()) <= 1e-5 * max(float(other.norm()), 1e-2 * scale)


def shaken(run: Run) -> None:
    """Give every trained weight a value, so that all of them have gradients."""
    draws = torch.Generator().manual_seed(0)
    for group in run.optimizer.param_groups:
        for parameter in group["params"]:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=draws)


@pytest.mark.parametrize("family", [*FAMILIES, pytest.param("wan22", marks=pytest.mark.full)])
def test_losses_and_gradients_are_those_of_each_size_alone(tinies: Tinies, tmp_path: Path, family: str) -> None:
    work = tinies.work(family, tmp_path)
    work.images = draw(tmp_path / "mixed")
    run = work.prepare("out", *PACKING, dataset=mixed_dataset(work))
    shaken(run)
    (pack,) = run.data.batches(1)
    assert isinstance(pack, PackedBatch) and len(pack) == len(SIZES) and len(pack.parts) > 2
    (losses, gradients), (expected, of_each) = step_results(run, [pack]), step_results(run, pack.parts)
    assert len(losses) == len(SIZES)
    assert losses == pytest.approx(expected, rel=1e-5)
    assert_equal(gradients, of_each)


@pytest.mark.parametrize("family", ["wan", "hunyuan_video", pytest.param("wan_i2v", marks=pytest.mark.full)])
def test_clips_of_several_lengths(tinies: Tinies, tmp_path: Path, family: str) -> None:
    case = case_of(family)
    work = ClipWork(tmp_path, tinies[family], draw(tmp_path / "mixed"), case=case)
    run = work.prepare("out", *PACKING, dataset=work.clips())
    shaken(run)
    pack = max(run.data.batches(1), key=lambda batch: len(batch.parts))
    assert len({latents.shape[2] for part in pack.parts if (latents := run.step.latents_of(part)) is not None}) > 1
    (losses, gradients), (expected, of_each) = step_results(run, [pack]), step_results(run, pack.parts)
    assert losses == pytest.approx(expected, rel=1e-5)
    assert_equal(gradients, of_each)


def test_a_run_ends_as_one_that_computes_each_size_alone(mixed: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    options = (*PACKING, "--navit_token_budget=64", "--max_train_epochs=3", "--min_snr_gamma=0")
    packed = mixed.train("packed", *options, dataset=mixed_dataset(mixed))
    together: list[int] = []

    def alone(calls):
        together.append(len(calls))
        return [call.alone() for call in calls]

    monkeypatch.setattr(step_module, "denoise_together", alone)
    apart = mixed.train("apart", *options, dataset=mixed_dataset(mixed))
    assert max(together) > 1
    assert largest_difference(packed, apart) < 1e-5
    assert losses_of(packed) == pytest.approx(losses_of(apart), rel=1e-5)


def test_a_resumed_run_writes_the_same_bytes(mixed: Work) -> None:
    options = (*PACKING, "--navit_token_budget=80", "--navit_pack_strategy=ffd", "--navit_pack_ffd_window=4")
    dataset = mixed_dataset(mixed)
    whole = mixed.train("whole", *options, dataset=dataset)
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(Stopped):
            mixed.train("parts", *options, "--save_every_n_steps=3", "--save_state", dataset=dataset)
    state = mixed.folder / "parts" / "lora-step00000003-state"
    assert fingerprint(mixed.train("parts", *options, f"--resume={state}", dataset=dataset)) == fingerprint(whole)


def test_two_processes_see_the_packs_of_two_micro_batches(mixed: Work) -> None:
    dropped = ("--network_dropout=0", "--network_args", "module_dropout=0.1")
    options = (*PACKING, "--navit_token_budget=64", "--max_train_epochs=3", "--cache_latents", *dropped)
    dataset = mixed_dataset(mixed)
    one = mixed.train("one", *OF_PROCESSES, *options, "--gradient_accumulation_steps=2", dataset=dataset)
    two = train_in_two(mixed, "two", *options, dataset=dataset)
    assert largest_difference(one, two) < 1e-5


def test_whole_models_learn_from_packs(tinies: Tinies, tmp_path: Path) -> None:
    """With checkpoints, caches and loader workers."""
    work = WholeWork(tmp_path, tinies["flux"], draw(tmp_path / "mixed"))
    more = ("--gradient_checkpointing", "--cache_latents", "--max_data_loader_n_workers=1")
    run = work.prepare("out", *PACKING, *more, dataset=mixed_dataset(work))
    (pack,) = run.data.batches(1)
    (losses, gradients), (expected, of_each) = step_results(run, [pack]), step_results(run, pack.parts)
    assert losses == pytest.approx(expected, rel=1e-5)
    assert_equal(gradients, of_each)


@pytest.mark.parametrize(("family", "more", "message"), [
    ("sdxl", (), "the denoiser of SDXL takes batches of one size;"),
    ("framepack", (), "the denoiser of FramePack takes batches of one size;"),
    ("flux", ("--torch_compile",), "--torch_compile are set: every pack has lengths of its own"),
    ("flux", ("--network_dropout=0.1",), "--network_dropout is 0.1, which is drawn for every sample"),
    ("flux", ("--network_args", "rank_dropout=0.1"), "--network_args rank_dropout=0.1"),
    ("flux", ("--network_module=networks.tlora",), "T-LoRA trains ranks by the noise level of every sample"),
    ("flux", ("--leap_enabled",), "--leap_enabled replaces the body of the step"),
    ("flux", ("--self_flow",), "--self_flow replaces the body of the step"),
    ("flux", ("--navit_token_budget=0",), "--navit_token_budget is 0"),
])  # fmt: skip
def test_what_does_not_go_with_packs_is_refused(
    tinies: Tinies, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, family: str,
    more: tuple[str, ...], message: str,
) -> None:
    work = tinies.work(family, tmp_path)
    assert message in refused_run(family, work.argv("out", *PACKING, *more), monkeypatch, capsys)
