"""Signals: a run that is told to end finishes its step, saves and says how to go on; anything else ends at once,
cleanly."""

from __future__ import annotations

import math
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from library.training.accelerator_setup import Runtime

INTERRUPTED = 128 + signal.SIGINT
"""exit status after Ctrl-C, as shells use it"""
SIGNALS = (signal.SIGINT, signal.SIGBREAK if sys.platform == "win32" else signal.SIGTERM)
SAME_SIGNAL_S = 1.0
"""A terminal signals the launcher and the run, and the launcher signals the run again: within this time it is one
signal."""
WITHOUT = (
    "resume",
    "initial_step",
    "initial_epoch",
    "skip_until_initial_step",
    "resume_from_huggingface",
    "overwrite",
    "on_existing",
)
"""options that a command has no more when it goes on from a state"""
_VALUELESS = ("skip_until_initial_step", "resume_from_huggingface", "overwrite")


class EndedBySignal(KeyboardInterrupt):
    """SIGTERM where there is nothing to finish: like Ctrl-C, with an exit status of its own."""

    exit_code = 128 + signal.SIGTERM if sys.platform != "win32" else INTERRUPTED


def exit_code_of_signal(number: int | None) -> int:
    """As shells tell it; of Windows's break key that of Ctrl-C."""
    return 128 + number if number == signal.SIGTERM else INTERRUPTED


def exit_code_of(interrupt: KeyboardInterrupt) -> int:
    return getattr(interrupt, "exit_code", INTERRUPTED)


@contextmanager
def signals_end_cleanly() -> Iterator[None]:
    """Inside, the signal that asks a process to end leaves through the blocks that clean up, as Ctrl-C does."""

    def end(number: int, frame: Any) -> None:
        raise EndedBySignal

    with _handlers({SIGNALS[1]: end}):
        yield


@contextmanager
def _handlers(wanted: dict[int, Any]) -> Iterator[None]:
    """Python takes handlers in the main thread only; elsewhere (a run in a thread of a notebook) nothing changes."""
    old = {}
    if threading.current_thread() is threading.main_thread():
        for number, handler in wanted.items():
            with suppress(ValueError, OSError):
                old[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


class StopSwitch:
    """Whether a run is to end before its last step. The first signal asks for it; a second one, later, ends the
    process.

    Several processes agree after every step, so that all do the same number: each tells the number of the signal that
    it got, and what all told after one step is read after the next, which keeps nobody waiting. They do so over the
    CPU; the device is not waited for.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        """number of the signal that this process got"""
        self.agreed: int | None = None
        """the same for the run: every process sees it after the same step"""
        self.tell: Callable[[str], object] = _tell
        """says a line from inside the signal handler; whoever draws on the terminal puts its own way here"""
        self._received_at = -math.inf
        self._told: Any = None
        self._work: Any = None
        self._group: Any = None

    @contextmanager
    def listening(self, runtime: Runtime) -> Iterator[None]:
        """Inside, signals turn the switch."""
        if runtime.num_processes > 1:
            import torch

            if torch.distributed.get_backend() != "gloo":
                self._group = torch.distributed.new_group(backend="gloo")
        with _handlers({number: self._on_signal for number in SIGNALS}):
            yield

    def _on_signal(self, number: int, frame: Any) -> None:
        if self.received is None:
            self.received, self._received_at = number, time.monotonic()
            self.tell(f"{signal.Signals(number).name}: finishing this step, then saving; once more ends at once")
        elif time.monotonic() - self._received_at > SAME_SIGNAL_S:
            _tell("ended at once; what was saved before is whole")
            os._exit(exit_code_of_signal(number))

    def agree(self, runtime: Runtime) -> None:
        """After each step, on every process."""
        if runtime.num_processes == 1:
            self.agreed = self.received
            return
        import torch

        self.settle()
        self._told = torch.tensor([self.received or 0])
        self._work = torch.distributed.all_reduce(
            self._told, op=torch.distributed.ReduceOp.MAX, group=self._group, async_op=True
        )

    def settle(self) -> None:
        """Wait for the last question that was asked."""
        if self._work is not None:
            self._work.wait()
            self.agreed = self.agreed or int(self._told) or None
            self._work = None

    @property
    def is_wanted(self) -> bool:
        """Whether this process knows of a signal: long work that others do not wait for may be left."""
        return self.received is not None or self.agreed is not None


def _tell(text: str) -> None:
    """A line on the console from inside a signal handler, which may have interrupted any other printing."""
    if int(os.environ.get("RANK", "0") or 0) == 0:
        with suppress(OSError):
            os.write(2, f"\n{text}\n".encode())


def leave_signals_to_the_run() -> None:
    """In a loader worker: a terminal and many job systems signal all processes of a run, which still needs its workers
    for the step that it finishes. It ends them itself, by a signal that torch knows by its sender."""
    with suppress(ValueError, OSError):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=wait, name="signals", daemon=True).start()


def command_going_on(state: Path, secrets: Sequence[str] = (), argv: Sequence[str] | None = None) -> str:
    """The command of this process with --resume of a state; secrets are masked."""
    words, skip_value = [], False
    for word in sys.argv if argv is None else argv:
        name = word.partition("=")[0].lstrip("-").replace("-", "_") if word.startswith("--") else None
        if name is None and skip_value:
            skip_value = False
            continue
        skip_value = False
        if name in WITHOUT:
            skip_value = name not in _VALUELESS and "=" not in word
            continue
        if name in secrets:
            word, skip_value = f"{word.partition('=')[0]}=***", "=" not in word
        words.append(word)
    words += ["--resume", str(state)]
    python = [os.path.basename(sys.executable or "python")] if words[0].endswith(".py") else []
    return subprocess.list2cmdline(python + words) if sys.platform == "win32" else shlex.join(python + words)
