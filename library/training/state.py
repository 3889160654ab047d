"""State folders: everything an interrupted run needs to go on exactly.

Random numbers are keyed (library/keyed_random.py) and the order of an epoch is a function of (seed, epoch), so a state holds
no generators: trained weights, optimizer, schedule, scaler, hook states and the position are enough.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from library.errors import CheckpointError, ConfigError
from library.training.checkpoint import resume_point
from library.training.option_groups import HubOptions, LoopOptions, ResumeOptions
from library.training.run_settings import SETTINGS_FILE, change_lines, changed, fixed_problems, read_settings

if TYPE_CHECKING:
    from library.options import Config
    from library.training.run import Run

logger = logging.getLogger(__name__)

WEIGHTS_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer.bin"
SCHEDULER_FILE = "scheduler.bin"
SCALER_FILE = "scaler.pt"
HOOKS_FILE = "hooks.bin"
STATE_FILE = "train_state.json"


def save_state(run: Run, folder: str | Path, counters: Mapping[str, int]) -> None:
    """Write a state folder under a temporary name, then rename it. Main process only; weights are equal on all ranks.

    `counters`: see checkpoint.train_state.
    """
    from library.safetensors_utils import save_file_atomic

    folder = Path(folder)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    tensors = {
        f"{name}.{key}" if len(run.trainable.modules()) > 1 else key: tensor.detach().cpu().contiguous()
        for name, module in run.trainable.modules().items()
        for key, tensor in module.state_dict().items()
    }
    save_file_atomic(tensors, str(temporary / WEIGHTS_FILE), {"format": "pt"})
    torch.save(run.optimizer.state_dict(), temporary / OPTIMIZER_FILE)
    if hasattr(run.lr_scheduler, "state_dict"):
        torch.save(run.lr_scheduler.state_dict(), temporary / SCHEDULER_FILE)
    scaler = run.runtime.accelerator.scaler
    if scaler is not None:
        torch.save(scaler.state_dict(), temporary / SCALER_FILE)
    torch.save({key: hook.state_dict() for key, hook in run.hooks.by_key().items()}, temporary / HOOKS_FILE)
    run.settings.write(temporary / SETTINGS_FILE)
    content = {**counters, "seed": run.step.seed, "steps_per_epoch": run.progress.steps_per_epoch}
    (temporary / STATE_FILE).write_text(json.dumps(content, indent=2), encoding="utf-8")
    _flush_folder(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)


def _flush_folder(folder: Path) -> None:
    for path in folder.iterdir():
        with open(path, "rb+") as file:
            os.fsync(file.fileno())


def read_train_state(folder: str | Path) -> dict[str, Any]:
    """The counters of a state folder; CheckpointError when it is not one."""
    path = Path(folder) / STATE_FILE
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        return {**state, "current_epoch": int(state["current_epoch"]), "current_step": int(state["current_step"])}
    except FileNotFoundError:
        raise CheckpointError(
            f"--resume is {folder}, which holds no {STATE_FILE}; give a state folder that --save_state wrote (its name ends in -state)"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); the state folder is damaged") from None


def load_state(run: Run, folder: str | Path, step: int) -> dict[str, list[Any]]:
    """Restore weights, optimizer, schedule, scaler and hooks. The position is restored by the caller. `step`: that of the state.

    Returns what this run has set otherwise: name -> [old, new]; this run's values hold.
    """
    from library.training.resumed_optimizer import restore

    folder, recorded = Path(folder), read_settings(folder)
    _load_weights(run, folder)
    schedule = _load(folder / SCHEDULER_FILE) if (folder / SCHEDULER_FILE).exists() else None
    try:
        changes = restore(
            run.optimizer, run.lr_scheduler, _load(folder / OPTIMIZER_FILE), schedule, step=step, recorded=recorded, own=run.settings
        )
    except (ValueError, KeyError) as error:
        raise CheckpointError(
            f"the optimizer state in {folder} does not fit this run ({error}); resume with the optimizer, network and learning"
            " rate groups of the interrupted run"
        ) from error
    if recorded is not None:
        changes = changed(recorded.options, run.settings.options)
        run.settings.history[:] = recorded.history
    scaler = run.runtime.accelerator.scaler
    if scaler is not None and (folder / SCALER_FILE).exists():
        scaler.load_state_dict(_load(folder / SCALER_FILE))
    if (folder / HOOKS_FILE).exists():
        states = _load(folder / HOOKS_FILE)
        for key, hook in run.hooks.by_key().items():
            if key in states:
                hook.load_state_dict(states[key])
    return changes


def resume(run: Run) -> None:
    """Set the position of a run from --resume, --initial_step or --initial_epoch, and restore the state when there is one.

    Raises CheckpointError when the state does not fit, ConfigError when no step is left.
    """
    options, progress = run.config[ResumeOptions], run.progress
    folder = local_state_folder(options, run.config[HubOptions].huggingface_token, run.runtime)
    counters, changes = None, {}
    if folder is not None:
        counters = read_train_state(folder)
        problems = fixed_problems(folder, counters, read_settings(folder), run.step.seed, run.settings.fixed)
        if problems:  # those of a local folder were told before models were loaded
            raise ConfigError(problems)
        changes = load_state(run, folder, counters["current_step"])
        _compare(counters, run)
    point = resume_point(
        options, counters, steps_per_epoch=progress.steps_per_epoch, accumulation=run.data.accumulation,
        max_train_steps=progress.max_train_steps,
    )
    progress.global_step, progress.epoch, progress.step_in_epoch = point.global_step, point.epoch, point.step_in_epoch
    if point.global_step:
        logger.info("going on after step %d, in epoch %d", point.global_step, point.epoch)
    if changes:
        run.settings.history.append({"step": point.global_step, "changed": changes})
        logger.info(
            "settings that changed since the state was saved; the new ones hold from step %d on:\n%s", point.global_step + 1, change_lines(changes)
        )
    if counters is not None and point.global_step != counters["current_step"]:
        logger.warning("the state is at step %d, but training goes on at step %d, as you asked", counters["current_step"], point.global_step)


def _compare(counters: Mapping[str, Any], run: Run) -> None:
    """Say what of the data makes the rest of the run another one than the interrupted run would have been."""
    own = run.progress.steps_per_epoch
    if counters.get("steps_per_epoch", own) != own:
        logger.warning(
            "steps_per_epoch was %s when the state was saved and is %s now: the images, batch size or number of processes changed; the"
            " position is counted in steps", counters["steps_per_epoch"], own,
        )


def seed_of(config: Config) -> int | None:
    """--seed or, when it is not given, that of the local state to go on with; None = to be drawn."""
    given, resume = config[LoopOptions].seed, config[ResumeOptions]
    if given is not None or not resume.resume or resume.resume_from_huggingface or not (Path(resume.resume) / STATE_FILE).is_file():
        return given
    return read_train_state(resume.resume).get("seed")


def local_state_folder(options: ResumeOptions, token: str | None, runtime: Any) -> Path | None:
    """The folder of --resume; with --resume_from_huggingface the main process fetches it for all."""
    if not options.resume:
        return None
    if not options.resume_from_huggingface or not options.resume:
        return Path(options.resume)
    from library.huggingface_util import download_folder, parse_hub_folder

    fetched = str(download_folder(parse_hub_folder(options.resume), token)) if runtime.is_main_process else None
    return Path(runtime.from_main(fetched))


def _load(path: Path) -> Any:
    if not path.exists():
        raise CheckpointError(f"{path} is missing; the state folder is incomplete")
    return torch.load(path, map_location="cpu", weights_only=True)


def _load_weights(run: Run, folder: Path) -> None:
    from library.safetensors_utils import load_safetensors

    path = folder / WEIGHTS_FILE
    if not path.exists():
        raise CheckpointError(f"{path} is missing; the state folder is incomplete")
    tensors = load_safetensors(str(path), device="cpu")
    modules = run.trainable.modules()
    for name, module in modules.items():
        prefix = f"{name}." if len(modules) > 1 else ""
        part = {key[len(prefix):]: value for key, value in tensors.items() if key.startswith(prefix)}
        own = {key: value.shape for key, value in module.state_dict().items()}
        wrong = [key for key in own if key not in part or part[key].shape != own[key]]
        if wrong or len(part) != len(own):
            raise CheckpointError(
                f"the weights in {path} do not fit this run: {len(wrong)} of {len(own)} tensors differ"
                f" (first: {wrong[0] if wrong else sorted(set(part) - set(own))[0]});"
                " resume with the network options of the interrupted run"
            )
        module.load_state_dict(part)
