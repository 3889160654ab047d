"""What a user sees of an error: one message on stderr, an exit code, no traceback."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from library.core.errors import CheckpointError, TrainingError
from library.training import cli
from library.training.option_groups import ConsoleOptions
from tests.waiting import PATIENCE

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True)
def root_logger_as_before():
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    yield
    root.setLevel(level)
    root.handlers[:] = handlers


def start(*argv):
    return subprocess.run(
        [sys.executable, "flux_train_network.py", *argv], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE
    )


def test_bad_options_end_with_code_2_and_one_message():
    result = start("--max_train_steps", "0", "--netwrk_dim", "4")
    assert result.returncode == 2
    assert result.stderr.startswith("error: 9 problems:") and "--ae is not given" in result.stderr
    assert "--max_train_steps is 0" in result.stderr and "did you mean 'network_dim'" in result.stderr
    assert "Traceback" not in result.stderr and "usage" not in result.stderr


def test_a_missing_value_is_one_line():
    result = start("--network_dim")
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1 and "--network_dim" in result.stderr


@pytest.mark.parametrize("error, code", [(CheckpointError("file is cut"), 2), (TrainingError("loss is nan"), 1)])
def test_the_exit_code_is_that_of_the_error(monkeypatch, capsys, error, code):
    def fail(*_):
        raise error

    monkeypatch.setattr(cli, "run", fail)
    logging.getLogger().setLevel(logging.INFO)
    with pytest.raises(SystemExit) as caught:
        cli.main("flux", "network", [])
    shown = capsys.readouterr().err
    assert caught.value.code == code
    assert shown == f"error: {error}\n"


def test_debug_shows_the_traceback(capsys):
    cli.set_up_logging(ConsoleOptions(console_log_level="DEBUG"))
    try:
        raise CheckpointError("file is cut")
    except CheckpointError as error:
        cli.report(error)
    assert "Traceback" in capsys.readouterr().err


def test_an_interrupt_ends_quietly(monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "run", interrupted)
    with pytest.raises(SystemExit) as caught:
        cli.main("flux", "network", [])
    assert caught.value.code == cli.INTERRUPTED and capsys.readouterr().err == "interrupted\n"


def test_messages_go_to_a_file_and_it_is_replaced(tmp_path):
    path = tmp_path / "run.log"
    for text in ("first run", "second run"):
        cli.set_up_logging(ConsoleOptions(console_log_file=str(path), console_log_simple=True))
        logging.getLogger("library").info(text)
    assert path.read_text() == "second run\n"


def test_other_processes_show_warnings_only(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    cli.set_up_logging(ConsoleOptions(console_log_simple=True))
    logging.getLogger("library").info("told by the first")
    logging.getLogger("library").warning("odd")
    assert capsys.readouterr().err == "[process 1] odd\n"


def test_what_bitsandbytes_says_of_kernels_that_nothing_uses_is_not_shown(capsys):
    cli.set_up_logging(ConsoleOptions())
    logging.getLogger("bitsandbytes.backends.cpu.ops").warning(
        "Failed to load CPU gemm_4bit_forward from kernels-community: %s", "why"
    )
    logging.getLogger("bitsandbytes.cextension").warning("no binary for this CUDA")
    told = capsys.readouterr().err
    assert "gemm_4bit" not in told and "no binary for this CUDA" in told
