"""The settings of a run as its states record them, and what another run that goes on from a state may not change.

Options about files, logs, samples, memory and processes are left out: they change nothing that is learned.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from library.core.errors import CheckpointError
from library.core.options import Config, option_fields
from library.dataset import CachingOptions
from library.training import option_groups
from library.training.inference_samplers import SamplerOptions
from library.training.keyword_args import parse_keyword_args
from library.training.optimizers import OptimizerOptions, choose
from library.training.schedulers import SchedulerOptions

if TYPE_CHECKING:
    import torch

    from library.training.optimizers import OptimizerBuild
    from library.training.protocols import Plain
    from library.training.trainables.base import Trainable
    from library.training.wiring.base import ModelFamily

SETTINGS_FILE = "settings.json"
LEARNED = "learned"
"""among fixed settings: what a state is of"""
NOT_ABOUT_LEARNING = (
    CachingOptions,
    SamplerOptions,
    *(
        getattr(option_groups, f"{name}Options")
        for name in (
            "ConfigFile", "Console", "Metadata", "Saving", "Memory", "Resume", "Sampling", "Validation", "Logging",
            "Hub", "Ddp", "DeepSpeed",
        )
    ),
)  # fmt: skip
KEYWORD_OPTIONS = ("optimizer_args", "lr_scheduler_args")
NOT_COMPARED = (
    "seed",
    "max_train_epochs",
    "max_data_loader_n_workers",
    "persistent_data_loader_workers",
    "max_train_steps",
    "network_weights",
)
"""options that are recorded elsewhere, or, as the weights to begin with, mean nothing to a run that goes on"""
SHOWN_CHARACTERS = 60


@dataclass
class RunSettings:
    """`fixed`: what cannot change, by option; `options`: what can; `schedule`: all that the learning rate follows from;
    `groups`: name, settings and parameter names of each optimizer group as it was built; `history`: what earlier
    resumes changed, [{"step", "changed": {name: [old, new]}}]. Plain values, as JSON gives them back."""

    fixed: dict[str, Plain] = field(default_factory=dict)
    options: dict[str, Plain] = field(default_factory=dict)
    schedule: dict[str, Plain] = field(default_factory=dict)
    groups: list[dict[str, Plain]] = field(default_factory=list)
    history: list[dict[str, Plain]] = field(default_factory=list)

    def text(self) -> str:
        """The content of SETTINGS_FILE."""
        return json.dumps(asdict(self))


def read_settings(folder: str | Path) -> RunSettings | None:
    """Of a state folder; None for states that were written before settings were recorded."""
    path = Path(folder) / SETTINGS_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return RunSettings(**{name: content[name] for name in RunSettings.__dataclass_fields__})
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); the state folder is damaged") from None


def fixed_settings(config: Config, family: ModelFamily, trainable: Trainable) -> dict[str, Plain]:
    """What a state is bound to, by option; the seed is in train_state.json."""
    return plain({
        LEARNED: f"{trainable.state_kind or trainable.name} of {family.name}", **trainable.fixed_settings(family),
        "optimizer_type": choose(config[OptimizerOptions]).class_path,
    })  # fmt: skip


def settings_of(
    config: Config, family: ModelFamily, trainable: Trainable, built: OptimizerBuild, max_train_steps: int,
    hook_modules: Mapping[str, torch.nn.Module] = MappingProxyType({}),
    left_out: Collection[str] = (),
) -> RunSettings:
    """Of a run whose optimizer was just built; the schedule must not have touched it yet. `left_out`: options that
    mean nothing in it."""
    fixed = fixed_settings(config, family, trainable)
    options = {**_option_values(config, fixed, left_out), "max_train_steps": max_train_steps}
    modules = {**trainable.modules(), **hook_modules}
    names = {id(p): f"{part}.{name}" for part, module in modules.items() for name, p in module.named_parameters()}
    groups = [
        {
            "settings": plain(group_settings(group)),
            "parameters": [names.get(id(p), f"further {number}") for number, p in enumerate(group["params"])],
        }
        for group in built.optimizer.param_groups
    ]
    own = option_fields(SchedulerOptions).keys() - {"lr_scheduler_args"}
    schedule = {name: value for name, value in options.items() if name in own or name.startswith("lr_scheduler_args ")}
    schedule |= {"learning_rate": options.get("learning_rate"), "max_train_steps": max_train_steps}
    schedule |= {
        "rates": [group["settings"].get("lr") for group in groups],
        "finds_own_rate": built.choice.finds_own_rate,
    }
    return RunSettings(fixed, options, schedule, groups)


def group_settings(group: Mapping[str, Any]) -> dict[str, Any]:
    """An optimizer group without its parameters."""
    return {key: value for key, value in group.items() if key != "params"}


def _option_values(config: Config, fixed: Mapping[str, Any], left_out: Collection[str]) -> dict[str, Any]:
    """Options that may change, by name; arguments written as key=value each by their own. Of paths the last part."""
    values: dict[str, Any] = {}
    for options_class in config.classes():
        if options_class in NOT_ABOUT_LEARNING:
            continue
        for name, (_, spec) in option_fields(options_class).items():
            value = getattr(config[options_class], name)
            if name in KEYWORD_OPTIONS:
                values.update({f"{name} {key}": argument for key, argument in parse_keyword_args(value, name).items()})
            elif name == "network_args":
                values.update(
                    {
                        f"{name} {key}": text
                        for key, text in config[options_class].pairs.items()
                        if key not in fixed.get(name, {})
                    }
                )
            elif name not in {*fixed, *NOT_COMPARED, *left_out} and not spec.secret and spec.status == "works":
                values[name] = (
                    [_without_folder(part) for part in value] if isinstance(value, list) else _without_folder(value)
                )
    return plain(values)


def _without_folder(value: Any) -> Any:
    """The last part of a path; other values as they are."""
    if not isinstance(value, (str, Path)):
        return value
    return re.split(r"[/\\]", str(value).rstrip("/\\"))[-1] or str(value)


def plain(value: Any) -> Any:
    """As JSON gives it back, so that what was read equals what is there now; tensors are their numbers."""
    return json.loads(json.dumps(value, default=lambda v: v.tolist() if hasattr(v, "tolist") else str(v)))


# -- what a resumed run may change -----------------------------------------------------------------------------------


def fixed_problems(
    folder: Path, state: Mapping[str, Any], recorded: RunSettings | None, seed: int | None, own: Mapping[str, Any],
    begins_with: str,
) -> list[str]:
    """Settings that a state is bound to and that this run has otherwise. `state`: content of train_state.json; `seed`:
    None takes that of the state; `own`: `fixed_settings` of this run; `begins_with`: that of its trainable. A state of
    another training is told alone: nothing of it fits."""
    problems = []
    if seed is not None and "seed" in state and state["seed"] != seed:
        problems.append(
            f"--seed is {seed}; the run of --resume {folder} has {state['seed']}, from which the order of its images "
            "and every"
            f" random draw follow: give --seed {state['seed']}, or leave it out"
        )
    for name, value in own.items():
        if recorded is None or name not in recorded.fixed or recorded.fixed[name] == value:
            continue
        earlier = recorded.fixed[name]
        if name == LEARNED:
            return [
                f"--resume is {folder}, the state of another training ({earlier}); this one is {value}: resume with the "
                "script, and the kind of model, of the interrupted run"
            ]
        if isinstance(value, dict) and isinstance(earlier, dict):
            problems += [
                f"--{name} has {_written(key, value)}; the run of --resume {folder} has {_written(key, earlier)}, and "
                f"what learns cannot change: {_advice(name, begins_with)}"
                for key in dict.fromkeys((*earlier, *value))
                if earlier.get(key) != value.get(key)
            ]
        else:
            what = (
                "the state of another optimizer does not fit"
                if name == "optimizer_type"
                else "what learns cannot change"
            )
            problems.append(
                f"--{name} is {value}; the run of --resume {folder} has {earlier}, and {what}:"
                f" {_advice(name, begins_with)}"
            )
    return problems


def _written(key: str, pairs: Mapping[str, Any]) -> str:
    return f"{key}={pairs[key]}" if key in pairs else f"no {key}"


def _advice(name: str, begins_with: str) -> str:
    return f"give the same --{name}, or begin a new run from the weights with {begins_with}"


def changed(earlier: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, list[Any]]:
    """name -> [old, new] of the options that both know and that differ; arguments (`optimizer_args eps`) may come and
    go."""
    names = [n for n in dict.fromkeys((*earlier, *own)) if (n in earlier and n in own) or " " in n]
    return {n: [earlier.get(n), own.get(n)] for n in names if earlier.get(n) != own.get(n)}


def change_lines(changes: Mapping[str, Sequence[Any]]) -> str:
    """One line for each change: `  learning_rate  0.01 -> 0.001`."""
    width = max(map(len, changes), default=0)
    return "\n".join(f"  {name:<{width}}  {_shown(old)} -> {_shown(new)}" for name, (old, new) in changes.items())


def _shown(value: Any) -> str:
    text = "not given" if value is None else str(value)
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 3] + "..."
