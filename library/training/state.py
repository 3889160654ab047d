"""State folders: everything an interrupted run needs to go on exactly.

Random numbers are keyed (library/core/keyed_random.py) and the order of an epoch is a function of (seed, epoch), so a
state holds no generators: trained weights, optimizer, schedule, scaler, hook states and the position are enough.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch

from library.core.atomic_file import atomic_folder
from library.core.errors import AtelierError, CheckpointError, ConfigError
from library.training.checkpoint import resume_point
from library.training.earlier_runs import final_file, resumed_state
from library.training.option_groups import HubOptions, LoopOptions, ResumeOptions
from library.training.run_settings import SETTINGS_FILE, change_lines, changed, fixed_problems, read_settings
from library.training.state_files import (
    HOOKS_FILE,
    OPTIMIZER_FILE,
    SCALER_FILE,
    SCHEDULER_FILE,
    STATE_FILE,
    SUMS_FILE,
    WEIGHTS_FILE,
    read_train_state,
    state_problems,
    write_sums,
)

if TYPE_CHECKING:
    from library.core.options import Config
    from library.core.postponed_writes import Postponed
    from library.training.accelerator_setup import Runtime
    from library.training.run import Run

logger = logging.getLogger(__name__)

HOOK_PREFIX = "hook:"
"""before the keys of the weights of hooks"""


def save_state(run: Run, folder: str | Path, counters: Mapping[str, int], occasion: Postponed | None = None) -> None:
    """Write a state folder under a temporary name, then rename it: an earlier one of the name stands until then. Main
    process only; weights are equal on all ranks.

    `counters`: see checkpoint.train_state. `occasion`: who writes what the run holds now, if there is room for a copy.
    """
    from library.safetensors_utils import pickled, save_file_atomic, tensors_in

    tensors = {
        f"{prefix}{key}": tensor.detach()
        for prefix, module in prefixed_modules(run).items()
        for key, tensor in module.state_dict().items()
    }
    parts, settings = dict(_pickled_parts(run)), run.settings.text()
    content = {**counters, "seed": run.step.seed, "steps_per_epoch": run.progress.steps_per_epoch}

    def write(weights: Mapping[str, torch.Tensor], save: Callable[[BinaryIO, str], object]) -> None:
        with atomic_folder(folder) as temporary:
            save_file_atomic(weights, temporary / WEIGHTS_FILE, {"format": "pt"})
            for name in parts:
                with open(temporary / name, "wb") as file:  # given a name, torch tells nothing of a full disk
                    save(file, name)
            (temporary / SETTINGS_FILE).write_text(settings, encoding="utf-8", newline="\n")
            (temporary / STATE_FILE).write_text(json.dumps(content, indent=2), encoding="utf-8")
            write_sums(temporary)

    size = sum(tensor.nbytes for tensor in tensors_in([tensors, parts]))
    if occasion is None or not occasion.takes(size):
        write(tensors, lambda file, name: torch.save(parts[name], file))
        return
    copies, bytes_of = occasion.copied(tensors), {name: pickled(value) for name, value in parts.items()}
    occasion.add(lambda: write(copies, lambda file, name: file.write(bytes_of[name])))


def _pickled_parts(run: Run) -> Iterator[tuple[str, Any]]:
    """What a state holds beside the weights, by the names of its files."""
    yield OPTIMIZER_FILE, run.optimizer.state_dict()
    if hasattr(run.lr_scheduler, "state_dict"):
        yield SCHEDULER_FILE, run.lr_scheduler.state_dict()
    scaler = run.runtime.accelerator.scaler
    if scaler is not None:
        yield SCALER_FILE, scaler.state_dict()
    yield HOOKS_FILE, {key: hook.state_dict() for key, hook in run.hooks.by_key().items()}


def prefixed_modules(run: Run) -> dict[str, torch.nn.Module]:
    """Modules whose weights a state holds, by what stands before their keys: nothing where one thing alone is
    trained."""
    own = run.trainable.modules()
    found = {f"{name}." if len(own) > 1 else "": module for name, module in own.items()}
    return {**found, **{f"{HOOK_PREFIX}{name}.": module for name, module in run.hooks.all_modules().items()}}


def load_state(run: Run, folder: str | Path, step: int) -> dict[str, list[Any]]:
    """Restore weights, optimizer, schedule, scaler and hooks. The position is restored by the caller. `step`: that of
    the state.

    Returns what this run has set otherwise: name -> [old, new]; this run's values hold.
    """
    from library.training.resumed_optimizer import restore

    folder, recorded = Path(folder), read_settings(folder)
    load_weights(run, folder)
    optimizer = _load(folder / OPTIMIZER_FILE)
    schedule = _load(folder / SCHEDULER_FILE) if (folder / SCHEDULER_FILE).exists() else None
    with _told(
        f"the optimizer state in {folder}",
        "resume with the optimizer, network and learning rate groups of the interrupted run",
    ):
        changes = restore(
            run.optimizer, run.lr_scheduler, optimizer, schedule, step=step, recorded=recorded, own=run.settings
        )
    if recorded is not None:
        changes = changed(recorded.options, run.settings.options)
        run.settings.history[:] = recorded.history
    scaler = run.runtime.accelerator.scaler
    if scaler is not None and (folder / SCALER_FILE).exists():
        with _told(str(folder / SCALER_FILE), "resume with the --mixed_precision of the interrupted run"):
            scaler.load_state_dict(_load(folder / SCALER_FILE))
    if (folder / HOOKS_FILE).exists():
        states = _load(folder / HOOKS_FILE)
        with _told(str(folder / HOOKS_FILE), "resume with the options of the interrupted run"):
            for key, hook in run.hooks.by_key().items():
                if key in states:
                    hook.load_state_dict(states[key])
    return changes


@contextmanager
def _told(what: str, hint: str) -> Iterator[None]:
    """Whatever a library raises for a state of another run, or a damaged one of an older version, as one message."""
    try:
        yield
    except AtelierError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        raise CheckpointError(f"{what} does not fit this run ({error}); {hint}") from error


def content_problems(folder: Path) -> list[str]:
    """What cannot be read in a state folder of an older version, which has no checksums."""
    from library.safetensors_utils import read_header

    if (folder / SUMS_FILE).exists():
        return []
    problems = []
    try:
        read_header(folder / WEIGHTS_FILE)
        for name in (OPTIMIZER_FILE, SCHEDULER_FILE, SCALER_FILE, HOOKS_FILE):
            if (folder / name).exists():
                _load(folder / name)
    except CheckpointError as error:
        problems.append(f"--resume: {error}")
    return problems


def check_hook_weights(folder: Path, names: Iterable[str]) -> None:
    """ConfigError when a state holds weights of hooks that a run with hooks of these names (`HookList.by_key`) does not
    have. From the header alone, before models are loaded."""
    from library.safetensors_utils import read_header

    own = "|".join(re.escape(name) for name in names)
    known = re.compile(rf"{re.escape(HOOK_PREFIX)}({own})( \d+)?\.")  # one that comes twice has a number
    keys = read_header(folder / WEIGHTS_FILE)[0]
    unknown = [key for key in keys if key.startswith(HOOK_PREFIX) and not (own and known.match(key))]
    if unknown:
        raise ConfigError(
            f"--resume is {folder}, which holds weights of hooks that this run does not have (first: {unknown[0]});"
            " resume with each --hook of the interrupted run, and with --self_flow or --sra_enabled where it had one"
        )


def resume(run: Run, folder: Path | None) -> None:
    """Set the position of a run from its state folder, --initial_step or --initial_epoch, and restore the state when
    there is one.

    Raises CheckpointError when the state does not fit, ConfigError when no step is left.
    """
    options, progress = run.config[ResumeOptions], run.progress
    counters, changes = None, {}
    if folder is not None:
        counters = read_train_state(folder)
        recorded, own = read_settings(folder), run.settings.fixed
        problems = fixed_problems(folder, counters, recorded, run.step.seed, own, run.trainable.begins_with)
        if problems:  # those of a local folder were told before models were loaded
            raise ConfigError(problems)
        changes = load_state(run, folder, counters["current_step"])
        _compare(counters, run)
    point = resume_point(
        options, counters, steps_per_epoch=progress.steps_per_epoch, accumulation=run.data.accumulation,
        max_train_steps=progress.max_train_steps, lacks_final_file=not final_file(run.config).exists(),
    )
    progress.global_step, progress.epoch, progress.step_in_epoch = point.global_step, point.epoch, point.step_in_epoch
    if counters is not None and point.steps_left == 0:
        logger.info(
            "the run is finished, and its file is missing: it is written from the state after step %d",
            point.global_step,
        )
    elif point.global_step:
        logger.info("going on after step %d, in epoch %d", point.global_step, point.epoch)
    if changes:
        run.settings.history.append({"step": point.global_step, "changed": changes})
        logger.info(
            "settings that changed since the state was saved; the new ones hold from step %d on:\n%s",
            point.global_step + 1, change_lines(changes)
        )
    if counters is not None and point.global_step != counters["current_step"]:
        logger.warning(
            "the state is at step %d, but training goes on at step %d, as you asked",
            counters["current_step"],
            point.global_step,
        )


def _compare(counters: Mapping[str, Any], run: Run) -> None:
    """Say what of the data makes the rest of the run another one than the interrupted run would have been."""
    own = run.progress.steps_per_epoch
    if counters.get("steps_per_epoch", own) != own:
        logger.warning(
            "steps_per_epoch was %s when the state was saved and is %s now: the images, batch size, packs or number of "
            "processes changed; the"
            " position is counted in steps",
            counters["steps_per_epoch"],
            own,
        )


def seed_of(config: Config) -> int | None:
    """--seed or, when it is not given, that of the local state to go on with; None = to be drawn."""
    given = config[LoopOptions].seed
    if given is not None or ResumeOptions not in config:  # tools that fill caches resume nothing
        return given
    try:
        state = resumed_state(config)
    except ConfigError:
        return None  # told by the check of --resume
    return None if state is None else read_train_state(state).get("seed")


def local_state_folder(config: Config, runtime: Runtime) -> Path | None:
    """The folder of --resume, the same for every process; with --resume_from_huggingface the main process fetches it
    for all, and it is looked at here, before models are loaded."""
    options: ResumeOptions = config[ResumeOptions]
    if not options.resume:
        return None
    if not options.resume_from_huggingface:
        state = resumed_state(config)
        chosen = runtime.from_main(None if state is None else str(state))
        if chosen is None:
            logger.info("--resume %s: there is no state of this name yet; training begins at step 0", options.resume)
        return None if chosen is None else Path(chosen)
    from library.huggingface_util import download_folder, parse_hub_folder

    token = config[HubOptions].huggingface_token
    fetched = str(download_folder(parse_hub_folder(options.resume), token)) if runtime.is_main_process else None
    folder = Path(runtime.from_main(fetched))
    problems = state_problems(folder) or content_problems(folder)
    if problems:
        raise ConfigError(problems)
    return folder


def _load(path: Path) -> Any:
    if not path.exists():
        raise CheckpointError(f"{path} is missing; the state folder is incomplete")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for damaged files
        line = str(error).strip().partition("\n")[0][:200]
        raise CheckpointError(
            f"{path} cannot be read ({line}); the state is damaged, go on from an earlier one"
        ) from error


def load_weights(run: Run, folder: Path) -> None:
    from library.safetensors_utils import load_safetensors

    path = folder / WEIGHTS_FILE
    tensors = load_safetensors(
        str(path), device="cpu", disable_mmap=True
    )  # read, not mapped: the state may be replaced
    modules = prefixed_modules(run)
    unknown = [
        key for key in tensors if key.startswith(HOOK_PREFIX) and not key.startswith(tuple(filter(None, modules)))
    ]
    if unknown:
        raise CheckpointError(
            f"{path} holds weights of hooks that this run does not have (first: {unknown[0]}); resume with each --hook "
            "of the interrupted run, and with --self_flow or --sra_enabled where it had one"
        )
    for prefix, module in modules.items():
        is_hook = prefix.startswith(HOOK_PREFIX)
        part = {
            key[len(prefix) :]: value
            for key, value in tensors.items()
            if key.startswith(prefix) and key.startswith(HOOK_PREFIX) == is_hook
        }
        own = {key: value.shape for key, value in module.state_dict().items()}
        wrong = [key for key in own if key not in part or part[key].shape != own[key]]
        if wrong or len(part) != len(own):
            raise CheckpointError(
                f"the weights in {path} do not fit this run: {len(wrong)} of {len(own)} tensors differ"
                f" (first: {wrong[0] if wrong else sorted(set(part) - set(own))[0]});"
                f" resume with {'each --hook and its options' if is_hook else 'the model and the options'} of the "
                "interrupted run"
            )
        module.load_state_dict(part)
