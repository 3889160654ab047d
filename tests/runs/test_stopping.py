"""A run that has to stop says why and saves nothing that is not finite."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from library.core.errors import ConfigError, TrainingError
from library.training import cli
from tests.runs.conftest import Work


def poison(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Make the loss of one optimizer step NaN."""
    from library.training import loop

    original = loop.micro_step

    def poisoned(run, batch):
        output = original(run, batch)
        if run.progress.global_step == step:
            output.loss_sum.fill_(float("nan"))
        return output

    monkeypatch.setattr(loop, "micro_step", poisoned)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_what_is_needed(
    work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, step=4)
    with pytest.raises(TrainingError) as caught:
        work.train("out", "--save_every_n_steps=2")
    message = str(caught.value)
    assert "step 5" in message and ".png" in message and "lora-step00000004.safetensors" in message
    files = sorted(path.name for path in (work.folder / "out").glob("*.safetensors"))
    assert files == ["lora-step00000002.safetensors", "lora-step00000004.safetensors"]
    for name in files:
        assert all(torch.isfinite(t.float()).all() for t in load_file(work.folder / "out" / name).values())


def test_weights_that_overflow_are_never_saved(work: Work) -> None:
    with pytest.raises(TrainingError):
        work.train("out", "--learning_rate=1e30", "--optimizer_type=SGD", "--max_grad_norm=0", "--save_every_n_steps=1")
    for path in (work.folder / "out").glob("*.safetensors"):
        assert all(torch.isfinite(t.float()).all() for t in load_file(path).values())


def test_weights_that_overflow_in_the_precision_of_the_file_are_never_saved(work: Work) -> None:
    """Finite in float32, infinite in float16."""
    options = [
        "--learning_rate=1e8",
        "--optimizer_type=SGD",
        "--max_grad_norm=0",
        "--save_precision=fp16",
        "--max_train_steps=1",
    ]
    with pytest.raises(TrainingError, match="too large for --save_precision fp16"):
        work.train("out", *options)
    assert not list((work.folder / "out").glob("*.safetensors"))


def test_the_exit_code_of_a_stopped_run_is_not_0(work: Work, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    poison(monkeypatch, step=0)
    with pytest.raises(SystemExit) as caught:
        cli.main("flux", "network", work.argv("out"))
    assert caught.value.code == 1
    assert "Traceback" not in capsys.readouterr().err


def test_resuming_a_finished_run_says_that_no_step_is_left(work: Work) -> None:
    work.train("out", "--save_state")
    with pytest.raises(ConfigError, match="no step is left|leaves nothing"):
        work.train("out", f"--resume={work.folder / 'out' / 'lora-state'}")


def test_a_state_of_another_network_is_refused_before_training(work: Work) -> None:
    work.train("out", "--save_state")
    with pytest.raises(ConfigError, match="--network_dim is 8.* has 4"):
        work.train("more", "--network_dim=8", "--max_train_steps=9", f"--resume={work.folder / 'out' / 'lora-state'}")
    assert not list(Path(work.folder / "more").glob("*.safetensors"))
