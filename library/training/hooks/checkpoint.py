"""Writes model files and state folders when they are due, and removes the outdated ones."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from library.checkpoints.number_formats import clamping
from library.core.atomic_file import remove_file, remove_folder
from library.core.postponed_writes import postponing
from library.core.write_errors import HeldFileError, WriteError
from library.training.checkpoint import AVERAGED, SaveRules, Saving, companion_name, side_name, train_state
from library.training.file_writer import FileWriter, Occasion
from library.training.hooks.base import Hook
from library.training.hooks.finite import SAVE_DTYPES, NonFiniteGuard
from library.training.option_groups import HubOptions, SavingOptions
from library.training.state import save_state

if TYPE_CHECKING:
    from library.huggingface_util import Uploader
    from library.training.run import Run, StepOutput

logger = logging.getLogger(__name__)


def companion_path(path: Path, ending: str) -> Path:
    """Where the companion of a model file is (Hook.companions)."""
    return path.with_name(companion_name(path.name, ending))


def side_path(path: Path, ending: str) -> Path:
    """Where a part of a model is that has a file of its own (Trainable.side_files)."""
    return path.with_name(side_name(path.name, ending))


def holds_model(ending: str) -> bool:
    """Whether the companions of this ending are models like the one they stand beside, with parts in files of their
    own."""
    return ending == AVERAGED


def planned_lines(savings: Sequence[Saving], companions: Sequence[str], sides: Sequence[str] = ()) -> list[str]:
    """What the start page says of the files of several occasions: the first, the last and how many; those removed later
    too."""
    if not savings:
        return []
    names = [saving.file for saving in savings]
    beside = {ending: [companion_name(name, ending) for name in names] for ending in companions}
    models = [names, *(files for ending, files in beside.items() if holds_model(ending))]
    lines = [names, *beside.values()]
    lines += [[side_name(name, ending) for name in model] for model in models for ending in sides]
    lines.append([f"{saving.state}/" for saving in savings if saving.state is not None])
    removed = sum(bool(saving.remove) for saving in savings)
    note = f", {removed} of them removed again" if removed else ""
    return [
        line[0] if len(line) == 1 else f"{line[0]} ... {line[-1]} ({len(line)}{note})" for line in lines if line
    ]


def _multiples(interval: int | None, last: int) -> range:
    """Those of an interval up to `last`, none without one."""
    return range(interval, last + 1, interval) if interval else range(0)


MetadataMaker = Callable[["Run"], dict[str, str]]


class CheckpointHook(Hook):
    """Rules of names and of what is due are in library/training/checkpoint.py. All ranks come here, because reading the
    pending losses sums over ranks; the main process writes, in a thread of its own while training goes on. An error
    there ends the run at the end of the next step.

    `metadata`: makes the metadata of a file from the run as it stands; `upload`: a huggingface_util.Uploader or None.
    """

    def __init__(self, metadata: MetadataMaker, upload: Uploader | None = None) -> None:
        self._metadata = metadata
        self._upload = upload
        self._files: dict[str, None] = {}
        self.last_state: Path | None = None
        self._saved_at = -1
        """optimizer steps done when the last state was copied, to be written"""
        self._last_file: Path | None = None
        self._writer = FileWriter()

    def planned_files(self, run: Run) -> list[str]:
        rules, progress = self._rules(run), run.progress
        at_epochs = [
            s for s in map(rules.after_epoch, _multiples(rules.every_n_epochs, progress.num_epochs)) if s is not None
        ]
        at_steps = [
            s
            for s in map(rules.after_step, _multiples(rules.options.save_every_n_steps, progress.max_train_steps))
            if s is not None
        ]
        at_epochs = [
            saving for saving in at_epochs if saving.number * progress.steps_per_epoch > progress.global_step
        ]  # still to come
        at_steps = [saving for saving in at_steps if saving.number > progress.global_step]
        last = rules.at_end(progress.max_train_steps)
        return [
            line for savings in (at_epochs, at_steps, [last])
            for line in planned_lines(savings, self._companions(run), self._sides(run))
        ]

    def written_files(self) -> list[str]:
        return list(self._files)

    def on_step_end(self, run: Run, output: StepOutput) -> None:
        if self._writer.has_ended:
            self.settle()
        self._write(run, self._rules(run).after_step(run.progress.global_step))

    def on_epoch_end(self, run: Run) -> None:
        self._write(run, self._rules(run).after_epoch(run.progress.epoch))

    def on_train_end(self, run: Run) -> None:
        step = run.progress.global_step
        if run.progress.is_finished:
            self._write(run, self._rules(run).at_end(step), is_last=True)
        elif self._saved_at != step:
            self._write(run, self._rules(run).at_stop(step), is_last=True)
        self.settle()
        if self._upload is not None:
            self._upload.finish()

    def close(self, run: Run, error: BaseException | None) -> None:
        self.settle()

    def settle(self) -> None:
        """What is on its way to the disk is there."""
        with self._told_what_stands():
            self._writer.settle()

    @staticmethod
    def _companions(run: Run) -> list[str]:
        return [ending for hook in run.hooks for ending in hook.companions]

    @staticmethod
    def _sides(run: Run) -> list[str]:
        return run.trainable.side_files(run.family)

    @staticmethod
    def _rules(run: Run) -> SaveRules:
        return SaveRules(run.config[SavingOptions], run.progress.num_epochs, run.progress.steps_per_epoch)

    def _write(self, run: Run, saving: Saving | None, is_last: bool = False) -> None:
        """File, state, then removal of what is outdated: a kill at any time leaves the newest or the one before. What
        has to be there on return, and the last of all, is; the rest is on its way."""
        if saving is None:
            return
        guard = run.hooks.find(NonFiniteGuard)
        if guard is not None:
            guard.check_before_save(run)
        if saving.state is not None:
            self._saved_at = run.progress.global_step
        if run.runtime.is_main_process:
            self.settle()  # so that copies of one occasion are in memory at most
            with self._told_what_stands():
                self._write_all(run, Path(run.config[SavingOptions].output_dir), saving, is_last)
        run.runtime.barrier()

    def _write_all(self, run: Run, folder: Path, saving: Saving, is_last: bool) -> None:
        """What another program keeps from its place is kept under another name, so training goes on; whoever waits for
        the last file is told at the end."""
        occasion = Occasion(may_wait=not is_last)
        try:
            self._write_file(run, folder / saving.file, is_last, occasion)
        except HeldFileError as error:
            occasion.held.append(error)
        if saving.state is not None:
            self._write_state(run, folder / saving.state, is_last, occasion)
        occasion.add(lambda: self._finish(run, folder, saving, occasion.held))
        if not is_last:
            self._writer.start(occasion)
            return
        occasion.write_now()
        if occasion.held:
            raise occasion.held[0]

    def _finish(self, run: Run, folder: Path, saving: Saving, held: Sequence[HeldFileError]) -> None:
        for error in held:
            logger.warning("%s", error)
        self._remove(run, folder, saving)

    @contextmanager
    def _told_what_stands(self) -> Iterator[None]:
        """Errors of writing tell what of the run stands, and how to go on."""
        try:
            yield
        except HeldFileError:
            raise
        except WriteError as error:
            raise error.with_more(self._kept()) from error

    def _kept(self) -> str:
        if self.last_state is None:
            kept = "Nothing was saved before" if self._last_file is None else f"Kept: {self._last_file}"
            return f"{kept}; there is no state to go on from (--save_state writes them)"
        return f"Kept: {self._last_file or self.last_state}. Go on with --resume {self.last_state}"

    def _write_file(self, run: Run, path: Path, is_last: bool, occasion: Occasion) -> None:
        metadata, dtype = self._metadata(run), SAVE_DTYPES[run.config[SavingOptions].save_precision]
        written, models = [path], [path]
        clamp = run.config[SavingOptions].clamp_overflow
        with run.weights_for_eval(averaged=False), clamping(clamp), postponing(occasion):
            run.trainable.save(str(path), dtype, metadata)
        for hook in run.hooks:
            for ending in hook.companions:
                written.append(companion_path(path, ending))
                models += written[-1:] if holds_model(ending) else []
                with clamping(clamp), postponing(None if hook.reads_saved_files else occasion):
                    hook.save_companion(run, ending, str(written[-1]), dtype, metadata)
        written += [side_path(model, ending) for model in models for ending in self._sides(run)]
        occasion.add(partial(self._files_stand, run, written, run.progress.global_step, occasion.held))
        if any(hook.reads_saved_files and type(hook).on_post_save is not Hook.on_post_save for hook in run.hooks):
            occasion.write_now()
            if occasion.held:
                return
        run.hooks.on_post_save(run, str(path), metadata)
        if self._upload is not None:
            occasion.add(partial(self._upload_all, self._upload, written, is_last, occasion.held))

    @staticmethod
    def _upload_all(upload: Uploader, files: Sequence[Path], is_last: bool, held: Sequence[HeldFileError]) -> None:
        for file in files if not held else ():
            upload(file, file.name if file.is_dir() else "", wait=is_last)

    def _files_stand(self, run: Run, files: Sequence[Path], step: int, held: Sequence[HeldFileError]) -> None:
        """They are written, unless a place was held."""
        if held:
            return
        self._last_file = files[0]
        self._files.update(dict.fromkeys(map(str, files)))
        logger.info("saved %s", " and ".join(map(str, files)))
        run.hooks.on_files_written(run, "model", [str(file) for file in files], step)

    def _write_state(self, run: Run, folder: Path, is_last: bool, occasion: Occasion) -> None:
        counters = train_state(run.progress.global_step, run.progress.steps_per_epoch)
        try:
            save_state(run, folder, counters, occasion)
        except HeldFileError as error:
            occasion.held.append(error)
        occasion.add(partial(self._state_stands, run, folder, counters["current_step"], is_last, occasion.held))

    def _state_stands(
        self, run: Run, folder: Path, step: int, is_last: bool, held: Sequence[HeldFileError]
    ) -> None:
        kept = next((error.kept for error in held if error.place == folder), None)
        if kept is not None:
            self.last_state = kept
            run.hooks.on_files_written(run, "state", [str(kept)], step)
            return
        self.last_state = folder
        self._files[str(folder)] = None
        logger.info("saved the state %s", folder)
        run.hooks.on_files_written(run, "state", [str(folder)], step)
        if self._upload is not None and run.config[HubOptions].save_state_to_huggingface:
            self._upload(folder, folder.name, wait=is_last)

    def _remove(self, run: Run, folder: Path, saving: Saving) -> None:
        for name in saving.remove:
            endings = dict.fromkeys(
                (AVERAGED, *self._companions(run))
            )  # a run that is resumed without --ema has older averages
            models = [folder / name, *(companion_path(folder / name, ending) for ending in endings)]
            for path in (*models, *(side_path(model, ending) for model in models for ending in self._sides(run))):
                is_gone = path.is_file() and remove_file(path)
                if self._rules(run).names.is_folder and path.is_dir():
                    is_gone = remove_folder(path)
                if is_gone:
                    self._files.pop(str(path), None)
                    logger.info("removed the outdated %s", path)
        stopped: list[str] = []
        if saving.state is not None and saving.stopped_until:
            stopped = self._rules(run).stopped_states(os.listdir(folder), saving.stopped_until)
        for name in (*saving.remove_states, *stopped):
            if (folder / name).is_dir() and remove_folder(folder / name):
                self._files.pop(str(folder / name), None)
                logger.info("removed the outdated state %s", folder / name)
