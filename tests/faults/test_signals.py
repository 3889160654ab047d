"""A signal lets a run finish its step, save and say how to go on; what goes on ends in the same bytes."""

from __future__ import annotations

import os
import random
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from library.core.errors import RunInterrupted
from library.training import cli, loop
from library.training.stopping import StopSwitch, command_going_on
from tests.runs.conftest import Work, fingerprint
from tests.waiting import PATIENCE

ROOT = Path(__file__).resolve().parents[2]
BRIEF = "--t5xxl_max_token_length=32"


def signal_at(monkeypatch: pytest.MonkeyPatch, step: int, number: int = signal.SIGTERM) -> None:
    """Send this process a signal in the middle of an optimizer step."""
    original = loop.micro_step

    def signalled(run, batch):
        output = original(run, batch)
        if run.progress.global_step == step:
            os.kill(os.getpid(), number)
        return output

    monkeypatch.setattr(loop, "micro_step", signalled)


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_step_is_finished_and_the_run_goes_on_to_the_same_bytes(
    work: Work, monkeypatch, number: int, code: int
) -> None:
    """Without --save_state too; samples that were due at this step are left out, because a job system waits for seconds
    only."""
    (work.folder / "prompts.txt").write_text("a cat --w 64 --h 64 --s 1", encoding="utf-8")
    samples = [f"--sample_prompts={work.folder / 'prompts.txt'}", "--sample_every_n_steps=3"]
    whole = work.train("whole", BRIEF)
    with monkeypatch.context() as patch, pytest.raises(RunInterrupted) as ended:
        signal_at(patch, 2, number)
        work.train("parts", BRIEF, *samples)
    assert ended.value.exit_code == code
    state = work.folder / "parts" / "lora-step00000003-state"
    assert f"--resume {state}" in str(ended.value)
    assert names_in(work.folder / "parts") == {
        "lora-step00000003.safetensors",
        state.name,
        "lora-loss.csv",
        "lora-loss.png",
    }
    assert (
        signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
    assert fingerprint(work.train("parts", BRIEF, "--resume=latest")) == fingerprint(whole)


def test_at_the_end_of_an_epoch_its_file_is_written_and_no_second_state(work: Work, monkeypatch) -> None:
    with monkeypatch.context() as patch, pytest.raises(RunInterrupted):
        signal_at(patch, 4)
        work.train("out", BRIEF, "--save_every_n_epochs=1", "--save_state")
    assert {name for name in names_in(work.folder / "out") if "loss" not in name} == {
        "lora-000001.safetensors",
        "lora-000001-state",
    }


def test_a_signal_in_the_last_step_lets_the_run_be_finished(work: Work, monkeypatch) -> None:
    signal_at(monkeypatch, 6)
    assert work.train("out", BRIEF).exists()


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_while_a_run_prepares_it_ends_at_once(number: int, code: int, capsys) -> None:
    """As in every tool: blocks that clean up are left on the way."""
    left = []

    def prepare() -> None:
        try:
            os.kill(os.getpid(), number)
            time.sleep(30)
        finally:
            left.append(True)

    assert cli.exit_code(prepare) == code and left
    assert capsys.readouterr().err == "interrupted\n"


def test_a_second_signal_ends_at_once() -> None:
    """One that follows at once is the same signal, which a launcher passed on."""
    code = (
        "import os, signal, time\n"
        "from types import SimpleNamespace\n"
        "from library.training.stopping import StopSwitch\n"
        "with StopSwitch().listening(SimpleNamespace(num_processes=1)):\n"
        "    os.kill(os.getpid(), signal.SIGTERM); os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print('goes on', flush=True); time.sleep(1.1)\n"
        "    os.kill(os.getpid(), signal.SIGTERM); time.sleep(30)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 143 and done.stdout == "goes on\n"
    assert "once more ends at once" in done.stderr and "ended at once" in done.stderr


def test_all_processes_agree_on_the_step(tmp_path: Path) -> None:
    """One of two hears a signal while they are not at the same place."""
    children = []
    for rank in (0, 1):
        pid = os.fork()
        if pid == 0:
            os._exit(_rank(rank, tmp_path))
        children.append(pid)
    for pid in children:
        assert os.waitpid(pid, 0)[1] == 0
    first, second = ((tmp_path / str(rank)).read_text() for rank in (0, 1))
    assert first == second and first.split() in (["6", "15"], ["7", "15"])


def _rank(rank: int, folder: Path) -> int:
    import torch

    try:
        torch.distributed.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
        from types import SimpleNamespace

        runtime, stop, steps = SimpleNamespace(num_processes=2), StopSwitch(), 0
        draw = random.Random(rank)
        while stop.agreed is None and steps < 100:
            time.sleep(draw.random() * 0.02)
            steps += 1
            if steps == 5 and rank == 1:
                stop.received = signal.SIGTERM
            stop.agree(runtime)
        stop.settle()
        (folder / str(rank)).write_text(f"{steps} {int(stop.agreed or 0)}")
        return 0
    except BaseException:
        import traceback

        traceback.print_exc()
        return 1


def test_the_command_that_goes_on_is_the_same_with_the_state() -> None:
    argv = [
        "flux_train_network.py", "--output_dir=a b", "--resume", "old-state", "--initial_step=3", "--overwrite",
        "--on_existing", "backup",
        "--network_args", "x=1", "y=2", "--wandb_api_key", "KEY", "--huggingface_token=TOKEN", "--seed", "3",
    ]  # fmt: skip
    words = shlex.split(command_going_on(Path("out/x-state"), ["wandb_api_key", "huggingface_token"], argv))
    assert words[1:] == [
        "flux_train_network.py", "--output_dir=a b", "--network_args", "x=1", "y=2", "--wandb_api_key=***",
        "--huggingface_token=***",
        "--seed", "3", "--resume", "out/x-state",
    ]  # fmt: skip
