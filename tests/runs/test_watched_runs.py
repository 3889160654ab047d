"""What is seen of whole runs: on a terminal that is resized, in a pipe, by a program that reads events and metrics. The
run is the same whoever watches."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import sys

import pytest

from library.core.errors import RunInterrupted, TrainingError
from library.training import cli, loop
from library.training.hooks import events
from library.training.hooks.losses import LossReader
from tests.forked import run_ranks
from tests.runs.conftest import Work, fingerprint, read_parts

BRIEF = "--t5xxl_max_token_length=32"
WATCHED = (BRIEF, "--log_metrics", "--emit_events", "--console_log_level=INFO", "--sample_every_n_steps=3")
UNLIKE = {"time", "steps_per_second", "memory_bytes"}
"""what no two runs share"""


def after_steps(monkeypatch: pytest.MonkeyPatch, actions: dict) -> None:
    """Call an action in the middle of the step after so many."""
    original = loop.micro_step

    def step(run, batch):
        output = original(run, batch)
        if run.progress.global_step in actions:
            actions[run.progress.global_step]()
        return output

    monkeypatch.setattr(loop, "micro_step", step)


def watched(work: Work, out: str, *more: str) -> list[str]:
    prompts = work.folder / "prompts.txt"
    prompts.write_text("a cat --w 64 --h 64 --s 1 --d 1", encoding="utf-8")
    return work.argv(out, *WATCHED, f"--sample_prompts={prompts}", *more)


def events_in(lines: list[str]) -> list[tuple[str, dict]]:
    found = [re.fullmatch(rf"{events.MARK}:(\w+):(\{{.*\}})", line) for line in lines if line.startswith(events.MARK)]
    return [(match[1], json.loads(match[2])) for match in found]


def metrics_of(work: Work, out: str) -> list[dict]:
    text = (work.folder / out / "lora-metrics.jsonl").read_text(encoding="ascii")
    return [{k: v for k, v in json.loads(line).items() if k not in UNLIKE} for line in text.splitlines()]


def test_a_run_on_a_terminal_that_is_resized(work: Work, monkeypatch) -> None:
    """With samples, a bar of another part and a print beside the panel; it writes what a run without a panel writes."""
    pytest.importorskip("pty", reason="pseudo-terminals are a matter of POSIX systems")
    from tqdm import tqdm

    from tests.terminal import Terminal, console_on

    def beside() -> None:
        for _ in tqdm(range(3), desc="other part", leave=False, mininterval=0):
            pass
        print("printed beside the panel")

    with console_on(Terminal(100, 30), has_log=False) as terminal, monkeypatch.context() as patch:
        after_steps(patch, {1: lambda: terminal.resize(60, 30), 3: beside, 4: lambda: terminal.resize(90, 12)})
        cli.run("flux", "network", watched(work, "terminal"))
        assert sys.stderr is terminal.stream and sys.stdout is terminal.stream
        screen = terminal.sync()
    lines, text = screen.lines, "\n".join(screen.lines)
    for once in ("printed beside the panel", "epoch 1 of 2", "epoch 2 of 2", "done; written:"):
        assert sum(once in line for line in lines) == 1, (once, text)
    assert any("step 7/7 ━" in line and "100% epoch 2/2" in line for line in lines), text
    assert not screen.unknown and "waiting for the first step" not in "\n".join(screen.shown)
    told = events_in(lines)
    assert [(kind, values["step"]) for kind, values in told] == [
        ("train_loop_started", 0), ("samples_written", 3), ("samples_written", 6), ("model_written", 7),
        ("eval_training_finished", 7),
    ]  # fmt: skip
    out = work.folder / "terminal"
    assert told[0][1]["max_train_steps"] == 7 and told[0][1]["metrics"] == str(out / "lora-metrics.jsonl")
    assert all(os.path.isfile(file) for _, values in told for file in values.get("files", ()))
    assert told[-1][1]["file"] == str(out / "lora.safetensors")
    assert fingerprint(out / "lora.safetensors") == fingerprint(work.train("plain", BRIEF, "--progress=none"))


def test_a_run_in_a_pipe_that_is_stopped_and_goes_on(work: Work, monkeypatch, capsys) -> None:
    cli.run("flux", "network", watched(work, "whole"))
    capsys.readouterr()
    with monkeypatch.context() as patch, pytest.raises(RunInterrupted):
        after_steps(patch, {3: lambda: os.kill(os.getpid(), signal.SIGINT)})
        cli.run("flux", "network", watched(work, "parts", "--log_every=2"))
    first = capsys.readouterr()
    cli.run("flux", "network", watched(work, "parts", "--resume=latest", "--save_every_n_epochs=1", "--save_state"))
    second = capsys.readouterr()
    state = str(work.folder / "parts" / "lora-step00000004-state")
    ended, went_on = events_in(first.out.splitlines()), events_in(second.out.splitlines())
    assert [(kind, values["step"], values["state"]) for kind, values in ended[-2:]] == [
        ("state_written", 4, state), ("pause_state", 4, state),
    ]  # fmt: skip
    assert sorted((values["step"], values["epoch"], kind) for kind, values in went_on) == [
        (4, 0, "resume_state_loaded"), (4, 0, "train_loop_started"), (5, 1, "auto_epoch_backup_written"),
        (5, 1, "model_written"), (6, 1, "samples_written"), (7, 1, "eval_training_finished"), (7, 1, "model_written"),
        (7, 1, "state_written"),
    ]  # fmt: skip
    assert went_on[0] == ("resume_state_loaded", went_on[0][1] | {"state": state})
    assert went_on[-1][0] == "eval_training_finished"
    assert "\x1b" not in first.out + first.err + second.out + second.err
    assert re.findall(r"\bstep (\d)/7, epoch 1/2: loss", first.err) == ["2", "4"]
    assert "steps:" not in first.err and "steps:" in second.err
    parts, whole = (read_parts(work.folder / name / "lora.safetensors")[1] for name in ("parts", "whole"))
    assert parts == whole
    assert metrics_of(work, "parts") == metrics_of(work, "whole") and len(metrics_of(work, "whole")) == 7 + 1


def test_ctrl_c_on_a_terminal_is_told_above_the_panel(work: Work, monkeypatch) -> None:
    pytest.importorskip("pty", reason="pseudo-terminals are a matter of POSIX systems")
    from tests.terminal import Terminal, console_on

    with console_on(Terminal(100, 30), has_log=False) as terminal, monkeypatch.context() as patch:

        def interrupt() -> None:
            terminal.type(b"\x03")
            os.kill(os.getpid(), signal.SIGINT)

        after_steps(patch, {2: interrupt})
        with pytest.raises(RunInterrupted):
            cli.run("flux", "network", work.argv("out", BRIEF))
        rows = [row for row in terminal.sync().shown if row]
    places = [number for number, row in enumerate(rows) if row.startswith("SIGINT: finishing this step, then saving")]
    frames = [number for number, row in enumerate(rows) if row.startswith("╭")]
    assert len(places) == 1 and len(frames) == 1 and places[0] < frames[0] and not any("^C" in row for row in rows)


def test_an_error_of_the_training_and_a_reader_that_is_gone(work: Work, monkeypatch, capsys, caplog) -> None:
    def broken(self) -> None:
        raise TrainingError("of the test")

    with monkeypatch.context() as patch, pytest.raises(TrainingError):
        patch.setattr(LossReader, "read", broken)
        cli.run("flux", "network", work.argv("out", BRIEF, "--emit_events"))
    assert [(kind, values.get("error")) for kind, values in events_in(capsys.readouterr().out.splitlines())] == [
        ("train_loop_started", None), ("train_failed", "of the test"),
    ]  # fmt: skip
    reader, writer = os.pipe()
    os.close(reader)
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(sys, "stdout", open(writer, "w", buffering=1))
        cli.run("flux", "network", work.argv("gone", BRIEF, "--emit_events", "--max_train_steps=2"))
    assert sum("nobody reads the events" in record.getMessage() for record in caplog.records) == 1
    assert (work.folder / "gone" / "lora.safetensors").is_file()


def test_of_two_processes_the_first_alone_shows_and_writes(work: Work) -> None:
    argv = work.argv(
        "out", BRIEF, "--max_train_steps=4", "--log_metrics", "--emit_events", "--log_every=2",
        "--console_log_level=INFO",
    )
    run_ranks(2, lambda: cli.run("flux", "network", argv), work.folder / "notes")
    first, second = ((work.folder / "notes" / f"rank{rank}.txt").read_text(encoding="utf-8") for rank in (0, 1))
    assert [kind for kind, _ in events_in(first.splitlines())] == [
        "train_loop_started", "model_written", "eval_training_finished",
    ]  # fmt: skip
    assert re.findall(r"step (\d)/4, epoch", first) == ["2", "4"] and "step" not in second and events.MARK not in second
    assert [line["step"] for line in metrics_of(work, "out") if line["axis"] == "step"] == [1, 2, 3, 4]


def test_the_page_tells_every_event() -> None:
    with open("docs/progress.md", encoding="utf-8") as file:
        page = file.read()
    assert set(re.findall(r"^\| `(\w+)` \| ", page.partition("## Events")[2], re.M)) == set(events.KINDS)
