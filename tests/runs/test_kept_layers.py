"""--network_weights with layers of parts that are not trained: they act, stay in the output as they are, or are dropped
on request."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from library.core.errors import CheckpointError
from library.training.state_files import SUMS_FILE
from tests.runs.conftest import Work, fingerprint
from tests.runs.families import Tinies

SHORT = ["--max_train_steps=2", "--console_log_level=INFO"]
UNET_ONLY, TEXT_ONLY = "--network_train_unet_only", "--network_train_text_encoder_only"


@pytest.fixture(scope="module")
def tinies(tmp_path_factory: pytest.TempPathFactory) -> Tinies:
    return Tinies(tmp_path_factory)


@pytest.fixture
def work(tinies: Tinies, tmp_path: Path) -> Work:
    return tinies.work("sdxl", tmp_path)


def trained(work: Work) -> Path:
    """An adapter with layers everywhere."""
    return work.train("old", *SHORT)


def split(tensors: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(of the U-Net, of the text encoders)"""
    return tuple({k: v for k, v in tensors.items() if k.startswith(part)} for part in ("lora_unet", "lora_te"))  # type: ignore[return-value]


@pytest.mark.parametrize(("switch", "kept"), [(UNET_ONLY, 1), (TEXT_ONLY, 0)])
def test_untrained_layers_are_carried_to_the_output(
    work: Work, caplog: pytest.LogCaptureFixture, switch: str, kept: int
) -> None:
    old = trained(work)
    with caplog.at_level(logging.INFO):
        new = work.train("new", *SHORT, switch, f"--network_weights={old}")
    before, after = split(load_file(old)), split(load_file(new))
    assert before[kept].keys() == after[kept].keys() and all(
        torch.equal(before[kept][key], after[kept][key]) for key in before[kept]
    )
    assert before[1 - kept].keys() == after[1 - kept].keys()
    assert any(not torch.equal(before[1 - kept][key], after[1 - kept][key]) for key in before[1 - kept])
    told = [record.getMessage() for record in caplog.records if "in parts that are not trained" in record.getMessage()]
    warned = [
        record
        for record in caplog.records
        if record.levelno == logging.WARNING and "in parts that are not trained" in record.getMessage()
    ]
    count = len({key.partition(".")[0] for key in before[kept]})
    assert (
        len(warned) == 1
        and f"{count} layers of --network_weights {old}" in told[0]
        and "--drop_untrained leaves them out" in told[0]
    )
    assert len(told) == 2  # the page at start has it too, beside the number of trained parameters


def test_they_act_while_the_others_learn(work: Work) -> None:
    """The text encoders give what they will give with the file."""
    old = trained(work)
    data = work.dataset()
    whole = work.trainer("a", *SHORT, f"--network_weights={old}", dataset=data).prepare()
    kept = work.trainer("b", *SHORT, UNET_ONLY, f"--network_weights={old}", dataset=data).prepare()
    dropped = work.trainer(
        "c", *SHORT, UNET_ONLY, f"--network_weights={old}", "--drop_untrained", dataset=data
    ).prepare()
    batch = next(whole.data.batches(1))
    with torch.no_grad():
        wanted, used, plain = (run.step.conditioning_of(batch) for run in (whole, kept, dropped))
    assert all(torch.allclose(a, b, atol=1e-4, rtol=1e-3) for a, b in zip(wanted.values(), used.values(), strict=True))
    assert max(float((a - b).abs().max()) for a, b in zip(wanted.values(), plain.values(), strict=True)) > 1e-2


def test_dropped_on_request(work: Work, caplog: pytest.LogCaptureFixture) -> None:
    old = trained(work)
    new = work.train("new", *SHORT, UNET_ONLY, "--drop_untrained", f"--network_weights={old}")
    assert not split(load_file(new))[1] and split(load_file(new))[0].keys() == split(load_file(old))[0].keys()
    assert any(
        "(--drop_untrained)" in record.getMessage() and record.levelno == logging.WARNING for record in caplog.records
    )


def test_with_ranks_of_the_file_caches_and_a_resume(work: Work) -> None:
    old = trained(work)
    options = [*SHORT, UNET_ONLY, "--dim_from_weights", f"--network_weights={old}", "--cache_text_encoder_outputs"]
    whole = work.train("whole", *options, "--save_every_n_steps=1", "--save_state")
    assert split(load_file(whole))[1].keys() == split(load_file(old))[1].keys()
    state = f"--resume={work.folder / 'whole' / 'lora-step00000001-state'}"
    assert fingerprint(work.train("again", *options, state)) == fingerprint(whole)
    without = [option for option in options if "weights" not in option]
    for name in ("settings.json", SUMS_FILE):
        (work.folder / "whole" / "lora-step00000001-state" / name).unlink()
    with pytest.raises(CheckpointError, match="keeps .* untrained layers of its --network_weights"):
        work.train("third", *without, state)


def test_a_foreign_module_carries_them_too(work: Work) -> None:
    pytest.importorskip("lycoris")
    old = trained(work)
    new = work.train(
        "new",
        *SHORT,
        UNET_ONLY,
        f"--network_weights={old}",
        "--network_module=lycoris.kohya",
        "--network_args",
        "algo=lora",
    )
    before, after = split(load_file(old))[1], split(load_file(new))[1]
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
