"""Restoring optimizer and schedule from a state, with the settings of the run that goes on.

What an optimizer learned (moments, counts, estimated step sizes) comes from the state, what its user sets from this
run. A schedule of other settings is brought to the step of the state, so that its rate there is the first one used.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from typing import Any

import torch

from library.core.errors import CheckpointError, ConfigError
from library.training.optimizers import OTHER_WAYS
from library.training.run_settings import RunSettings, group_settings, plain


def restore(
    optimizer: Any, schedule: Any, state: dict[str, Any], schedule_state: dict[str, Any] | None, *,
    step: int, recorded: RunSettings | None, own: RunSettings,
) -> dict[str, list[Any]]:
    """Load both. `step`: optimizer steps that were done; `recorded`: settings of the state, None for states of earlier
    versions.

    Returns the settings of groups that were found changed where nothing was recorded: name -> [old, new].
    """
    position = int(schedule_state.get("last_epoch", step)) if schedule_state else step
    replayed = (
        recorded is None
        or recorded.schedule != own.schedule
        or (schedule_state is None) == hasattr(schedule, "state_dict")
    )
    if replayed:
        advance(schedule, position)
    now = [group_settings(group) for group in optimizer.param_groups]
    given = settable(optimizer, own, recorded)
    before = _recorded_groups(state, recorded, own)
    if recorded is None:
        _check_kind(before, now, given)
    saved = fitted(state, recorded, own, optimizer)
    optimizer.load_state_dict(saved)
    keep_number_formats(optimizer, saved)
    changes: dict[str, list[Any]] = {}
    for number, (group, new, built) in enumerate(zip(optimizer.param_groups, now, own.groups, strict=True)):
        earlier = before[number]
        touched = {
            key
            for key in new
            if key == "lr" or key not in built["settings"] or plain(new[key]) != built["settings"][key]
        }
        for key, value in new.items():
            is_changed = (
                key in given
                and key not in touched
                and earlier is not None
                and key in earlier
                and earlier[key] != plain(value)
            )
            if is_changed and recorded is None:
                changes[f"{key} of {new.get('name') or f'group {number}'}"] = [earlier[key], plain(value)]
            if is_changed or key not in group or key == "name" or (replayed and key in touched):
                group[key] = value
        if recorded is None and earlier is not None:
            rates = [earlier.get("initial_lr", earlier.get("lr")), plain(new.get("initial_lr", new.get("lr")))]
            if rates[0] != rates[1]:
                changes[f"learning rate of {new.get('name') or f'group {number}'}"] = rates
    place_counts(optimizer)
    if not replayed and schedule_state is not None:
        schedule.load_state_dict(schedule_state)
    return changes


def keep_number_formats(optimizer: Any, saved: Mapping[str, Any]) -> None:
    """What torch brought to the number format of its parameter gets its own back: float32 moments of weights in
    bfloat16, say."""
    wrapped = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it for fp16
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    parameters = [parameter for group in wrapped.param_groups for parameter in group["params"]]
    for number, parameter in zip(numbers, parameters, strict=True):
        now = wrapped.state.get(parameter, {})
        for key, value in saved["state"].get(number, {}).items():
            if isinstance(value, torch.Tensor) and isinstance(now.get(key), torch.Tensor):
                if now[key].dtype != value.dtype and now[key].is_floating_point():
                    now[key] = value.to(now[key].device)


def place_counts(optimizer: Any) -> None:
    """Counts of steps stand where the fused kernel reads them: with the parameters. Those of a state that was written
    without it are on the CPU."""
    wrapped = getattr(optimizer, "optimizer", optimizer)
    for group in wrapped.param_groups:
        for parameter in group["params"] if group.get("fused") else ():
            entry = wrapped.state.get(parameter, {})
            if isinstance(entry.get("step"), torch.Tensor):
                entry["step"] = entry["step"].to(parameter.device)


def advance(schedule: Any, steps: int) -> None:
    """Bring a new schedule to where `steps` optimizer steps lead. Schedules without a state follow the optimizer's own
    count."""
    if not hasattr(schedule, "state_dict") or steps < 1:
        return
    if isinstance(schedule, torch.optim.lr_scheduler.LambdaLR):  # a function of the step alone
        schedule.last_epoch, schedule._step_count, steps = steps - 1, steps, 1
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch misses the optimizer steps
            for _ in range(steps):
                schedule.step()
    except ValueError as error:
        raise ConfigError(f"the learning rate schedule cannot go on after {steps} steps: {error}") from error


def settable(optimizer: Any, own: RunSettings, recorded: RunSettings | None) -> set[str]:
    """Keys of groups that a user sets: arguments of the optimizer's class, and what --optimizer_args names. How the
    step is computed is one only if it is named: a run that goes on ends in the bytes of one that was not stopped, also
    where this version chooses another way."""
    cls = type(getattr(optimizer, "optimizer", optimizer))  # accelerate wraps it for fp16
    options = {**own.options, **(recorded.options if recorded else {})}
    arguments = set(inspect.signature(cls.__init__).parameters) - set(OTHER_WAYS)
    return {"lr", *arguments, *(n.split()[1] for n in options if n.startswith("optimizer_args "))}


def _recorded_groups(
    state: Mapping[str, Any], recorded: RunSettings | None, own: RunSettings
) -> list[dict[str, Any] | None]:
    """Settings of the earlier run for each group of this one; None for a group that is new."""
    if recorded is None:
        groups = [plain(group_settings(group)) for group in state["param_groups"]]
        return [groups[i] if i < len(groups) else None for i in range(len(own.groups))]
    sources = _sources(recorded, own)
    return [None if source is None else recorded.groups[source]["settings"] for source in sources]


def _check_kind(before: list[dict[str, Any] | None], now: list[dict[str, Any]], given: set[str]) -> None:
    """An optimizer of another kind keeps other settings in its groups."""
    for earlier, new in zip(before, now):
        missing = [] if earlier is None else sorted(key for key in given & new.keys() if key not in earlier)
        if missing:
            raise CheckpointError(
                "the optimizer state of --resume is that of another optimizer (its groups have no "
                f"{', '.join(missing)}); resume with the"
                " --optimizer_type of the interrupted run"
            )


def _sources(recorded: RunSettings, own: RunSettings) -> list[int | None]:
    """For each group of this run, the earlier group that holds most of its parameters."""
    home = {name: number for number, group in enumerate(recorded.groups) for name in group["parameters"]}
    found: list[int | None] = []
    for group in own.groups:
        places = [home[name] for name in group["parameters"] if name in home]
        found.append(max(dict.fromkeys(places), key=places.count) if places else None)
    return found


def fitted(state: dict[str, Any], recorded: RunSettings | None, own: RunSettings, optimizer: Any) -> dict[str, Any]:
    """The optimizer state in the order of this run's groups: other learning rates may group the parameters otherwise. A
    parameter that was not trained before begins without a state."""
    if recorded is None or [g["parameters"] for g in recorded.groups] == [g["parameters"] for g in own.groups]:
        return state
    old_numbers = [number for group in state["param_groups"] for number in group["params"]]
    old_names = [name for group in recorded.groups for name in group["parameters"]]
    number_of = dict(zip(old_names, old_numbers, strict=True))
    fresh = optimizer.state_dict()["param_groups"]
    groups, states = [], {}
    for group, source, template in zip(own.groups, _sources(recorded, own), fresh, strict=True):
        for name, number in zip(group["parameters"], template["params"], strict=True):
            if name in number_of and number_of[name] in state["state"]:
                states[number] = state["state"][number_of[name]]
        groups.append({**(template if source is None else state["param_groups"][source]), "params": template["params"]})
    return {**state, "state": states, "param_groups": groups}
