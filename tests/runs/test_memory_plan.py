"""The table of memory at the start of runs, and runs that choose their options by it."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from library.core.errors import AtelierError
from library.training.computing_options import MemoryOptions
from library.training.loop import fit
from library.training.memory import plan as plans
from library.training.memory.measure import PhaseTracer
from tests.runs.conftest import Work, fingerprint


def test_a_start_shows_the_table_and_draws_nothing(work: Work, caplog: pytest.LogCaptureFixture) -> None:
    caches = ("--network_train_unet_only", "--cache_latents", "--cache_text_encoder_outputs_to_disk")
    silent = work.train("silent", "--max_train_steps=1", *caches)
    with caplog.at_level(logging.INFO):
        shown = work.train("shown", "--max_train_steps=1", "--console_log_level=INFO", *caches)
    assert fingerprint(silent) == fingerprint(shown)
    (table,) = [record.getMessage() for record in caplog.records if record.getMessage().startswith("memory plan:")]
    assert "batch of 2 at 64x64" in table and "caching latents" in table and "predicted peak" in table
    assert "caching captions" not in table  # they are in the files of the first run
    assert "not counted" not in table


def test_what_is_not_counted_is_told(work: Work, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat", encoding="utf-8")
    adapter = work.train("adapter", "--max_train_steps=1")
    more = (f"--base_weights={adapter}", f"--sample_prompts={prompts}", "--sample_every_n_steps=5")
    table = work.trainer("out", *more).plans()[0].table()
    assert "not counted: adapters of --base_weights" in table and "not counted: the making of samples" in table


def test_plans_compile_nothing(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("library.training.trainer_base.compile_blocks", lambda *_, **__: pytest.fail("compiled"))
    table = work.trainer("out", "--torch_compile", "--dynamo_backend=eager").plans()[0].table()
    assert "not counted: what compiled blocks keep" in table


def test_a_run_that_cannot_be_planned_begins(
    work: Work, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a value is needed\nhere")

    monkeypatch.setattr(PhaseTracer, "sizes", fail)
    with caplog.at_level(logging.INFO):
        assert work.train("out", "--max_train_steps=1", "--console_log_level=INFO").exists()
    assert "memory plan: none, as the models cannot be followed without their values (RuntimeError: a value is needed)" in (
        caplog.text
    )
    with pytest.raises(AtelierError, match="cannot be followed"):
        work.trainer("budget", "--vram_budget=1").prepare()


def test_a_run_chooses_for_its_budget(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("library.training.trainer_base.resident_memory", lambda: 0)
    peaks = {
        again: work.trainer("plan", *(["--gradient_checkpointing"] if again else [])).plans()[0].device_peak
        for again in (False, True)
    }
    assert peaks[True] < peaks[False]
    budget = f"--vram_budget={(peaks[True] + peaks[False]) / 2 / plans.GB}"
    run = work.prepare("chosen", budget, "--max_train_steps=1")
    assert run.config[MemoryOptions].gradient_checkpointing and run.models.denoiser.gradient_checkpointing
    fit(run)
    chosen = work.folder / "chosen" / "lora.safetensors"
    assert fingerprint(chosen) == fingerprint(work.train("asked", "--max_train_steps=1", "--gradient_checkpointing"))


def test_a_budget_that_nothing_meets_is_refused(work: Work, tmp_path: Path) -> None:
    with pytest.raises(AtelierError, match="the nearest that this run can come to"):
        work.train("refused", "--vram_budget=0.001")
    assert not (tmp_path / "refused").exists()
