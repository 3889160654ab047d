"""Errors in loader workers, lost workers and processes, and a limit of open files: one line, never a traceback, never a
wait for ever."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from library.core.errors import AtelierError
from library.training import checks, cli, loop, parser_common
from library.training.failures import failure_of
from library.training.run_lock import claimed_output, lock_path
from tests.runs.conftest import Work
from tests.waiting import PATIENCE

ROOT = Path(__file__).resolve().parents[2]
BRIEF = "--t5xxl_max_token_length=32"
LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def lose_an_image(monkeypatch: pytest.MonkeyPatch, work: Work) -> Path:
    """A picture that is gone when training began."""
    lost, original = work.images / "03.png", loop.micro_step

    def losing(run, batch):
        lost.unlink(missing_ok=True)
        return original(run, batch)

    monkeypatch.setattr(loop, "micro_step", losing)
    return lost


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_in_a_worker_is_the_one_of_the_main_process(work: Work, monkeypatch, capsys, workers: int) -> None:
    lost = lose_an_image(monkeypatch, work)
    with pytest.raises(SystemExit) as ended:
        cli.main(
            "flux",
            "network",
            work.argv("out", BRIEF, f"--max_data_loader_n_workers={workers}", dataset=work.dataset(batch_size=1)),
        )
    lines = [
        line
        for line in capsys.readouterr().err.splitlines()
        if "step/s" not in line and line.strip() and "\x1b" not in line
    ]
    assert ended.value.code in (1, 2)
    assert len([line for line in lines if line.startswith("error: ")]) == 1, lines
    assert str(lost) in lines[-1] and not any("Traceback" in line or "Caught" in line for line in lines)


def test_what_cannot_be_compiled_is_one_line() -> None:
    """A block that cannot be compiled whole, or a system without the compiler that a backend needs."""
    import torch._dynamo

    def counted(x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return x + 1

    def failing(graph, inputs):
        raise OSError("no compiler")

    for function, how in ((counted, {"fullgraph": True, "backend": "eager"}), (lambda x: x + 1, {"backend": failing})):
        with pytest.raises(Exception) as caught:  # noqa: PT011 - of the compiler's own kinds
            torch.compile(function, **how)(torch.ones(2))
        told = str(failure_of(caught.value))
        assert told.startswith("torch.compile cannot compile the blocks of this run: ") and "\n" not in told, told


def test_an_unknown_error_of_a_dataset_is_one_line_too() -> None:
    from library.training.data import Failure, Guarded

    class Broken:
        def __getitem__(self, request):
            raise KeyError("latents")

    failure = Guarded(Broken())[None]
    assert (
        isinstance(failure, Failure)
        and "KeyError: 'latents'" in str(failure.as_error())
        and "\n" not in str(failure.as_error())
    )


def test_a_killed_worker(work: Work, monkeypatch, capsys) -> None:
    """As the system does for lack of memory."""
    import multiprocessing

    original = loop.micro_step

    def killing(run, batch):
        for child in multiprocessing.active_children():
            os.kill(child.pid, signal.SIGKILL)
        time.sleep(0.2)
        return original(run, batch)

    monkeypatch.setattr(loop, "micro_step", killing)
    with pytest.raises(SystemExit) as ended:
        cli.main(
            "flux",
            "network",
            work.argv("out", BRIEF, "--max_data_loader_n_workers=1", dataset=work.dataset(batch_size=1)),
        )
    shown = capsys.readouterr().err
    assert ended.value.code == 1 and "Traceback" not in shown
    assert (
        "error: a process that loads images was lost (something killed it, often the system for lack of memory)"
        in shown
    )
    assert "--max_data_loader_n_workers" in shown


@pytest.mark.parametrize("error, words", [
    (RuntimeError("DataLoader worker (pid 12) is killed by signal: Bus error. It is possible ..."), "shared memory"),
    (RuntimeError("DataLoader worker (pid(s) 12, 13) exited unexpectedly"), "ended by itself"),
    (RuntimeError("unable to write to file </torch_1_2_3>: No space left on device (28)"), "shared memory"),
    (RuntimeError("received 0 items of ancdata"), "ulimit -n"), (OSError(24, "Too many open files"), "ulimit -n"),
    (OSError(28, "No space left on device"), "no space is left"),
])  # fmt: skip
def test_errors_of_libraries_that_mean_something(error: Exception, words: str) -> None:
    told = failure_of(error)
    assert isinstance(told, AtelierError) and words in str(told) and "\n" not in str(told)


def test_other_errors_keep_their_traceback() -> None:
    assert (
        failure_of(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
        and failure_of(KeyError("x")) is None
    )


@pytest.mark.skipif(sys.platform == "win32", reason="has no such limit")
def test_a_low_limit_of_open_files_is_told_at_start(work: Work) -> None:
    """With workers such a run waited for ever."""
    import resource

    argv = work.argv("out", "--max_data_loader_n_workers=2")
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (24, int(sys.argv.pop(1))))\n"
        "from library.training import checks, parser_common\n"
        "print(checks.open_files_problems(parser_common.parse(sys.argv[1:], 'flux', 'network')))\n"
        "print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])\n"
    )
    shown = []
    for hard in (24, resource.getrlimit(resource.RLIMIT_NOFILE)[1]):
        done = subprocess.run(
            [sys.executable, "-c", code, str(hard), *argv], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE
        )
        assert done.returncode == 0, done.stderr
        shown.append(done.stdout)
    workers = min(2, os.cpu_count() or 1)
    assert f"a run needs {64 + 16 * workers} open files" in shown[0] and "ulimit -n" in shown[0]
    assert shown[1].splitlines() == ["[]", str(64 + 16 * workers)], "raised where the system lets it"
    assert (
        checks.open_files_problems(parser_common.parse([*argv, "--max_data_loader_n_workers=0"], "flux", "network"))
        == []
    )


# ---- two runs --------------------------------------------------------------------------------------------------------


def hold_lock(work: Work, seconds: int) -> subprocess.Popen[str]:
    """Another process that writes under the same name."""
    code = (
        "import sys, time\nfrom library.training import parser_common\nfrom library.training.run_lock import "
        "claimed_output\n"
        "with claimed_output(parser_common.parse(sys.argv[2:], 'flux', 'network')):\n    print('held', flush=True); "
        "time.sleep(int(sys.argv[1]))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(seconds), *work.argv("out")], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    return process


def test_two_runs_under_one_name(work: Work) -> None:
    """The lock names the other one; when that is killed, its name is free."""
    other = hold_lock(work, 600)
    try:
        with pytest.raises(AtelierError) as caught:
            work.train("out", BRIEF)
        message = str(caught.value)
        assert f"process {other.pid} on " in message and "started 2" in message and ".lora.lock" in message
        config = parser_common.parse([*work.argv("out"), "--output_name=other"], "flux", "network")
        with claimed_output(config):
            assert lock_path(config[type_of_saving()]).exists()
        assert not lock_path(config[type_of_saving()]).exists()
    finally:
        other.kill()
        other.wait()
    assert (work.folder / "out" / ".lora.lock").exists()
    assert work.train("out", BRIEF, "--max_train_steps=1").exists()
    assert not (work.folder / "out" / ".lora.lock").exists()


def type_of_saving() -> type:
    from library.training.option_groups import SavingOptions

    return SavingOptions


def test_where_a_file_system_has_no_locks_the_owner_is_looked_for(work: Work, monkeypatch) -> None:
    from library.training import run_lock

    other = hold_lock(work, 600)
    monkeypatch.setattr(run_lock, "_lock", lambda file: None)
    config = parser_common.parse(work.argv("out"), "flux", "network")
    try:
        with pytest.raises(AtelierError, match=f"process {other.pid} on "), claimed_output(config):
            pass
    finally:
        other.kill()
        other.wait()
    with claimed_output(config):
        pass


# ---- several processes -----------------------------------------------------------------------------------------------


def start_two(work: Work, *more: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*LAUNCHER, str(ROOT / "tests" / "runs" / "held_script.py"), *work.argv("out", BRIEF, "--max_train_steps=30", *more)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HOLD_AT": "2", "HOLD_FOLDER": str(work.folder), **environment},
        cwd=ROOT,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def own_lines(told: str) -> list[str]:
    """Without what the launcher prints."""
    return [line for line in told.splitlines() if "error: " in line and "torch/distributed" not in line]


def test_what_every_process_finds_is_said_once(monkeypatch, capsys) -> None:
    """Before the processes know each other: by the first of each machine."""
    from library.core.errors import ConfigError

    for rank, local in (("0", "0"), ("1", "1"), ("2", "0")):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", local)
        assert cli.report(ConfigError("--x is y")) == 2
    assert capsys.readouterr().err == "error: --x is y\n[process 2] error: --x is y\n"


def test_a_killed_process_of_two(work: Work) -> None:
    """The other one says in a line that it cannot go on."""
    import psutil

    from tests.waiting import wait_until

    process = start_two(work)
    wait_until((work.folder / "held").exists, process)
    ranks = {
        child.environ().get("RANK"): child
        for child in psutil.Process(process.pid).children(recursive=True)
        if "RANK" in child.environ()
    }
    ranks["1"].kill()
    (work.folder / "go").touch()
    told = process.communicate(timeout=PATIENCE)[1]
    own = own_lines(told)
    assert process.returncode and len(own) == 1 and "the connection to another process of this run is lost" in own[0], (
        told
    )
    launcher = told.split("torch.distributed.elastic.multiprocessing.errors")[0]
    assert 'File "' + str(ROOT / "library") not in launcher, told
