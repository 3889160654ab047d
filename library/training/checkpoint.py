"""Rules of saving and resuming, without touching a file: names, what is due, what is removed, where a run goes on."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from library.core.errors import ConfigError

EPOCH_STEM, STEP_STEM, LAST_STEM = "epoch", "at", "last"
AVERAGED = "-ema"
"""what stands behind the name of a file that holds the moving average of the weights"""
DEFAULT_FORMAT = "safetensors"
FOLDER_FORMATS = ("diffusers", "diffusers_safetensors")
"""values of --save_model_as that write a folder"""
FILE_ENDINGS = (".safetensors", ".ckpt", ".pt")
STATE_ENDING = "-state"
METRICS_ENDING = "-metrics.jsonl"
CURVE_ENDINGS = ("-loss.png", "-loss.csv", METRICS_ENDING)
"""of the files about the course of a run, beside its last file"""


def companion_name(file: str, ending: str) -> str:
    """The name of a file beside a model file, or of a folder beside one: `lora-ema.safetensors` of `lora.safetensors`."""
    extension = _extension(file)
    return f"{file.removesuffix(extension)}{ending}{extension}"


def side_name(file: str, ending: str) -> str:
    """The name of a part that has a file of its own beside a model: `model_clip_l.safetensors` of `model.ckpt`."""
    return f"{file.removesuffix(_extension(file))}{ending}.{DEFAULT_FORMAT}"


def _extension(file: str) -> str:
    return next((known for known in FILE_ENDINGS if file.endswith(known)), "")


@dataclass(frozen=True)
class CheckpointNames:
    """Names below output_dir; folders of states have no slash. `output_name` None takes the default stems."""

    output_name: str | None = None
    save_model_as: str | None = DEFAULT_FORMAT

    @property
    def extension(self) -> str:
        return "" if self.is_folder else "." + (self.save_model_as or DEFAULT_FORMAT)

    @property
    def is_folder(self) -> bool:
        """Whether a model is a folder, whose name has no extension."""
        return self.save_model_as in FOLDER_FORMATS

    def epoch(self, epoch: int) -> str:
        """Name without extension of the file of a finished epoch (from 1)."""
        return f"{self.output_name or EPOCH_STEM}-{epoch:06d}"

    def step(self, step: int) -> str:
        return f"{self.output_name or STEP_STEM}-step{step:08d}"

    def last(self) -> str:
        return self.output_name or LAST_STEM

    def file(self, name: str) -> str:
        return name + self.extension

    def companion(self, name: str, ending: str) -> str:
        """A file that a hook writes beside that of this name."""
        return companion_name(self.file(name), ending)

    def state(self, name: str) -> str:
        return name + STATE_ENDING


@dataclass(frozen=True)
class Saving:
    """What is written on one occasion: `at` is "step", "epoch", "end" or "stop". When file and state stand, `remove`
    files and `remove_states` folders go, where they exist."""

    at: str
    number: int
    file: str
    state: str | None
    remove: tuple[str, ...] = ()
    remove_states: tuple[str, ...] = ()
    stopped_until: int = 0
    """states that a signal left at this step or before go too; see `SaveRules.stopped_states`"""


@dataclass(frozen=True)
class SaveRules:
    """Which occasions save, from SavingOptions and the number of epochs of the run."""

    options: Any
    num_epochs: int
    steps_per_epoch: int = 0
    """0: not known; states that a signal left are then not told by their epoch"""

    @property
    def names(self) -> CheckpointNames:
        return CheckpointNames(self.options.output_name, self.options.save_model_as)

    @property
    def every_n_epochs(self) -> int | None:
        """--save_every_n_epochs, or from --save_n_epoch_ratio: about that many files over the run."""
        ratio = self.options.save_n_epoch_ratio
        if ratio is not None:
            return self.num_epochs // ratio or 1
        return self.options.save_every_n_epochs

    def after_step(self, step: int) -> Saving | None:
        """At every multiple of save_every_n_steps, the last step included."""
        options, interval = self.options, self.options.save_every_n_steps
        if not interval or step < 1 or step % interval:
            return None
        keep, keep_state = options.save_last_n_steps, _or(options.save_last_n_steps_state, options.save_last_n_steps)
        file, state = (None if kept is None else outdated_step(step, interval, kept) for kept in (keep, keep_state))
        until = 0 if keep_state is None else step - keep_state - 1
        return self._saving("step", step, self.names.step, file, state, until)

    def after_epoch(self, epoch: int) -> Saving | None:
        """At every multiple of the interval before the last epoch, which has the final file only. `epoch` from 1."""
        options, interval = self.options, self.every_n_epochs
        if not interval or epoch < 1 or epoch % interval or epoch >= self.num_epochs:
            return None
        keep, keep_state = options.save_last_n_epochs, _or(options.save_last_n_epochs_state, options.save_last_n_epochs)
        file, state = (None if kept is None else outdated_epoch(epoch, interval, kept) for kept in (keep, keep_state))
        return self._saving("epoch", epoch, self.names.epoch, file, state, (state or 0) * self.steps_per_epoch)

    def at_end(self, step: int) -> Saving:
        name = self.names.last()
        with_state = self.options.save_state or self.options.save_state_on_train_end
        state = self.names.state(name) if with_state else None
        return Saving("end", step, self.names.file(name), state, stopped_until=self._stopped_until(step))

    def at_stop(self, step: int) -> Saving:
        """When a signal ends the run before its last step: file and state, whatever the options say of states."""
        name = self.names.step(step)
        return Saving(
            "stop", step, self.names.file(name), self.names.state(name), stopped_until=self._stopped_until(step)
        )

    def _stopped_until(self, step: int) -> int:
        """The last step whose state is no longer kept at this one, when neither is a multiple of an interval."""
        options = self.options
        steps = _or(options.save_last_n_steps_state, options.save_last_n_steps)
        epochs = _or(options.save_last_n_epochs_state, options.save_last_n_epochs)
        if steps is not None:
            return max(0, step - steps - 1)
        return 0 if epochs is None or not self.steps_per_epoch else max(0, step - max(1, epochs) * self.steps_per_epoch)

    def stopped_states(self, names: Iterable[str], until: int) -> list[str]:
        """Of these names, the states that a signal left at step `until` or before: not those of --save_every_n_steps,
        which have their own time."""
        interval = self.options.save_every_n_steps if self.options.save_state else None
        pattern = re.compile(re.escape(self.names.step(0)[:-8]) + r"(\d{8,})" + re.escape(STATE_ENDING))
        found = {name: int(match[1]) for name in names if (match := pattern.fullmatch(name))}
        return sorted(name for name, step in found.items() if step <= until and not (interval and step % interval == 0))

    def _saving(
        self, at: str, number: int, name_of: Any, old_file: int | None, old_state: int | None, stopped_until: int
    ) -> Saving:
        names, saves_state = self.names, self.options.save_state
        return Saving(
            at, number, names.file(name_of(number)), names.state(name_of(number)) if saves_state else None,
            remove=() if old_file is None else (names.file(name_of(old_file)),),
            remove_states=() if old_state is None or not saves_state else (names.state(name_of(old_state)),),
            stopped_until=max(0, stopped_until) if saves_state else 0,
        )


def _or(value: int | None, default: int | None) -> int | None:
    return default if value is None else value


def outdated_step(step: int, interval: int, keep_steps: int) -> int | None:
    """The saved step that falls out of the last `keep_steps` steps at `step`: the multiple of the interval at or below
    step - keep_steps - 1."""
    border = step - keep_steps - 1
    outdated = border - border % interval
    return outdated if outdated > 0 else None


def outdated_epoch(epoch: int, interval: int, keep_epochs: int) -> int | None:
    """The saved epoch that goes at `epoch` when `keep_epochs` files are kept. At least the newest one stays."""
    outdated = epoch - interval * max(1, keep_epochs)
    return outdated if outdated > 0 else None


def train_state(step: int, steps_per_epoch: int) -> dict[str, int]:
    """The counters of `train_state.json` after optimizer step `step`: the epoch (from 1) that the step belongs to."""
    return {"current_epoch": max(0, step - 1) // steps_per_epoch + 1, "current_step": step}


@dataclass(frozen=True)
class ResumePoint:
    """Where training goes on. `global_step` steps are done; the next one is step `step_in_epoch` + 1 of `epoch` (from
    1), after leaving out `batches_to_skip` micro-batches of that epoch."""

    global_step: int
    epoch: int
    step_in_epoch: int
    batches_to_skip: int
    steps_left: int


def resume_point(
    options: Any, state: Mapping[str, Any] | None, *, steps_per_epoch: int, accumulation: int, max_train_steps: int,
    lacks_final_file: bool = False,
) -> ResumePoint:
    """The start of a run, from ResumeOptions and the content of train_state.json (None for a fresh run).

    --initial_step, else --initial_epoch, else the state's step: the position follows from the step alone, so that a state
    saved at the border of an epoch goes on with the next one. Raises ConfigError when no step is left, unless the state is that
    of the last step and `lacks_final_file`: the run was killed before it wrote its file, which is all that is left to do.
    """
    if options.initial_step is not None:
        step, source = options.initial_step, "--initial_step"
    elif options.initial_epoch is not None:
        step, source = (
            (options.initial_epoch - 1) * steps_per_epoch,
            f"--initial_epoch {options.initial_epoch} after step",
        )
    else:
        step, source = 0 if state is None else int(state["current_step"]), "the state of --resume after step"
    if step < 0:
        raise ConfigError(f"{source} {step} is negative; 0 or more is needed")
    writes_file = lacks_final_file and state is not None and step == max_train_steps == int(state["current_step"])
    if step >= max_train_steps and not writes_file:
        raise ConfigError(
            f"{source} {step} leaves nothing to train: the run has {max_train_steps} steps, "
            f"{-(-max_train_steps // steps_per_epoch)} epochs of"
            f" {steps_per_epoch}; raise --max_train_steps (or --max_train_epochs) above it"
        )
    step_in_epoch = step % steps_per_epoch
    return ResumePoint(
        step, step // steps_per_epoch + 1, step_in_epoch, step_in_epoch * accumulation, max_train_steps - step
    )


def steps_of_epoch(batches_per_epoch: int, accumulation: int) -> int:
    """Optimizer steps per epoch: a short group at the end of an epoch makes a step as well."""
    return -(-batches_per_epoch // accumulation)
