"""Lines on standard output by which a program that started a run follows it."""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from library.training.earlier_runs import resumed_state
from library.training.hooks.base import Hook
from library.training.hooks.trackers import metrics_path
from library.training.option_groups import ProgressOptions, ResumeOptions, SavingOptions

if TYPE_CHECKING:
    from library.training.run import Run

logger = logging.getLogger(__name__)

MARK = "__EVENT__"
BACKUP, STATE = "auto_epoch_backup_written", "state_written"
KINDS = {
    "resume_state_loaded": "the run goes on with a state: state, null where only a step was given",
    "train_loop_started": "before the first step: max_train_steps, num_epochs, steps_per_epoch, output_dir, "
    "output_name, metrics (the file of --log_metrics or null), pid",
    "model_written": "the trained file stands: files, with those beside it",
    BACKUP: "a state after a whole epoch stands: state",
    STATE: "another state stands: state",
    "samples_written": "pictures or clips of one occasion stand: files",
    "pause_state": "the end after a signal: state, to go on with (null when none could be written)",
    "eval_training_finished": "the end after the last step: file, the trained one",
    "train_failed": "the end by an error: error, its message",
}
"""Type of an event -> what its object holds beside `step`, `epoch` (whole epochs done) and `time`."""


class EventHook(Hook):
    """One line for each event, `__EVENT__:<type>:<object of JSON>`, in ASCII; on the main process only. A reader that
    is gone is told of once; the run goes on without it. Comes after the hook that writes files, so that its last line is
    the last of all, and before that of the samples, which may be made before the first step."""

    reads_saved_files = False

    def __init__(self) -> None:
        self._state: str | None = None
        self._file: str | None = None
        self._lock = threading.Lock()
        self._is_open = True

    def on_train_start(self, run: Run) -> None:
        progress, saving, resume = run.progress, run.config[SavingOptions], run.config[ResumeOptions]
        if progress.global_step:
            state = resume.resume if resume.resume_from_huggingface else resumed_state(run.config)
            self._state = None if state is None else str(state)
            self._emit(run, "resume_state_loaded", state=self._state)
        self._emit(
            run, "train_loop_started", max_train_steps=progress.max_train_steps, num_epochs=progress.num_epochs,
            steps_per_epoch=progress.steps_per_epoch, output_dir=saving.output_dir, output_name=saving.output_name,
            metrics=str(metrics_path(saving)) if run.config[ProgressOptions].log_metrics else None, pid=os.getpid(),
        )  # fmt: skip

    def on_files_written(self, run: Run, what: str, files: Sequence[str], step: int) -> None:
        if what == "state":
            self._state = files[0]
            kind = STATE if step % run.progress.steps_per_epoch else BACKUP
            self._emit(run, kind, step, state=files[0])
            return
        if what == "model":
            self._file = files[0]
        self._emit(run, f"{what}_written", step, files=list(files))

    def close(self, run: Run, error: BaseException | None) -> None:
        if error is not None:
            self._emit(run, "train_failed", error=str(error) or type(error).__name__)
        elif run.progress.is_finished:
            self._emit(run, "eval_training_finished", file=self._file)
        else:
            self._emit(run, "pause_state", state=self._state)

    def _emit(self, run: Run, kind: str, step: int | None = None, **values: Any) -> None:
        if not run.runtime.is_main_process or not self._is_open:
            return
        step = run.progress.global_step if step is None else step
        place = {"step": step, "epoch": step // run.progress.steps_per_epoch, "time": round(time.time(), 3)}
        line = f"{MARK}:{kind}:{json.dumps(place | values)}\n"
        with self._lock:  # files are written by a thread
            try:
                sys.stdout.write(line)
                sys.stdout.flush()
            except (OSError, ValueError) as error:
                self._is_open = False
                logger.warning("--emit_events: nobody reads the events (%s); training goes on without them", error)
