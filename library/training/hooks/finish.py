"""The last hook of a run: tells which files there are now."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from library.training.hooks.base import Hook

if TYPE_CHECKING:
    from library.training.run import Run

logger = logging.getLogger(__name__)


class FinishHook(Hook):
    """Comes after every hook that writes at the end of a run."""

    def on_train_end(self, run: Run) -> None:
        if run.runtime.is_main_process:
            files = [path for paths in run.hooks.written_files() for path in paths]
            state = "done" if run.progress.is_finished else f"ended by a signal after step {run.progress.global_step}"
            logger.info("%s", "\n".join([f"{state}; written:", *(f"  {path}" for path in files)]))
