"""Calls as scripts and plug-ins of other trainers know them, on any object that has the options as attributes.

Nothing is computed here: each function turns its arguments into the option groups and calls the place that does the work.
`library.train_util` hands these names out.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch

from library.core.errors import Problems, did_you_mean
from library.core.options import add_options, allows_none, option_fields, parse_bool
from library.safetensors_utils import read_header
from library.training import optimizers, schedulers
from library.training.checkpoint import CheckpointNames, outdated_epoch, outdated_step
from library.training.config_file import NEVER_IN_FILE, read_config_file
from library.training.inference_samplers import SamplerOptions
from library.training.losses import LossOptions
from library.training.option_groups import (
    DdpOptions,
    HubOptions,
    LoggingOptions,
    LoopOptions,
    MemoryOptions,
    ModelOptions,
    NoiseOptions,
    PrecisionOptions,
    ResumeOptions,
    SamplingOptions,
    SavingOptions,
)
from library.training.parser_common import PATH_OPTIONS
from library.training.sampling_prompts import load_prompts as read_prompts
from library.training.sampling_prompts import parse_line
from library.utils import str_to_dtype

T = TypeVar("T")

TRAINING_GROUPS = (
    SavingOptions, HubOptions, ResumeOptions, LoopOptions, PrecisionOptions, MemoryOptions, DdpOptions, LoggingOptions,
    SamplingOptions, SamplerOptions, NoiseOptions, LossOptions,
)  # fmt: skip


def options_of(namespace: Any, options_class: type[T]) -> T:
    """The option group whose names are attributes of `namespace`; absent ones, and None where it means nothing, are left
    at their defaults. Raises ConfigError when a value is out of its range."""
    values = {name: getattr(namespace, name) for name in option_fields(options_class) if hasattr(namespace, name)}
    return options_class(
        **{name: value for name, value in values.items() if value is not None or allows_none(options_class, name)}
    )


def line_to_prompt_dict(line: str) -> dict[str, Any]:
    """The settings of one prompt line by name. Raises ConfigError for options that do not exist."""
    return parse_line(line).to_dict()


def load_prompts(prompt_file: str) -> list[dict[str, Any]]:
    """The settings of every prompt of a file by name, `enum` being its place."""
    return [prompt.to_dict() for prompt in read_prompts(prompt_file)]


def prepare_dtype(namespace: Any) -> tuple[torch.dtype, torch.dtype | None]:
    """(type of the forward pass, type of saved weights or None for that of the trained ones)."""
    precision = namespace.mixed_precision
    return str_to_dtype("fp32" if precision in (None, "no") else precision), str_to_dtype(namespace.save_precision)


def get_optimizer(namespace: Any, trainable_params: Iterable[Any]) -> tuple[str, str, torch.optim.Optimizer]:
    """(name as module.Class, arguments as k=v,..., the optimizer). `trainable_params`: parameters, or groups with `params`."""
    items = list(trainable_params)
    groups = items if items and isinstance(items[0], Mapping) else [{"params": items}]
    built = optimizers.build(options_of(namespace, optimizers.OptimizerOptions), groups)
    return built.class_path, built.args_text, built.optimizer


def is_schedulefree_optimizer(optimizer: torch.optim.Optimizer, namespace: Any = None) -> bool:
    return optimizers.switches_weights(optimizer)


def get_optimizer_train_eval_fn(optimizer: torch.optim.Optimizer, namespace: Any = None) -> tuple[Callable, Callable]:
    """(train, eval): what puts the weights to train, or those to save and sample with, in place; empty for most optimizers."""
    if optimizers.switches_weights(optimizer):
        return optimizer.train, optimizer.eval
    return (lambda: None), (lambda: None)


def get_scheduler_fix(namespace: Any, optimizer: torch.optim.Optimizer, num_processes: int) -> Any:
    """The learning rate schedule over max_train_steps * num_processes calls of step(), as a prepared scheduler makes them."""
    options = options_of(namespace, optimizers.OptimizerOptions)
    built = optimizers.OptimizerBuild(optimizer, optimizers.choose(options), type(optimizer).__name__, "")
    return schedulers.build(
        options_of(namespace, schedulers.SchedulerOptions), built,
        learning_rate=options.learning_rate, max_train_steps=namespace.max_train_steps * num_processes,
    )  # fmt: skip


def get_epoch_ckpt_name(namespace: Any, ext: str, epoch_no: int) -> str:
    return CheckpointNames(namespace.output_name).epoch(epoch_no) + ext


def get_step_ckpt_name(namespace: Any, ext: str, step_no: int) -> str:
    return CheckpointNames(namespace.output_name).step(step_no) + ext


def get_last_ckpt_name(namespace: Any, ext: str) -> str:
    return CheckpointNames(namespace.output_name).last() + ext


def get_remove_epoch_no(namespace: Any, epoch_no: int) -> int | None:
    """The epoch whose file goes when that of `epoch_no` was written, or None."""
    if namespace.save_last_n_epochs is None:
        return None
    return outdated_epoch(epoch_no, namespace.save_every_n_epochs, namespace.save_last_n_epochs)


def get_remove_step_no(namespace: Any, step_no: int) -> int | None:
    """The step whose file goes when that of `step_no` was written, or None."""
    if namespace.save_last_n_steps is None:
        return None
    return outdated_step(step_no, namespace.save_every_n_steps, namespace.save_last_n_steps)


def load_metadata_from_safetensors(path: str) -> dict[str, str]:
    """Metadata of a safetensors file, empty for files of other kinds."""
    return read_header(path)[1] if str(path).endswith(".safetensors") else {}


def get_sanitized_config_or_none(namespace: Any) -> dict[str, Any] | None:
    """What --log_config records: every option without secrets and paths; None without the option."""
    if not namespace.log_config:
        return None
    left_out = {*PATH_OPTIONS, *NEVER_IN_FILE}
    for group in (HubOptions, LoggingOptions):
        left_out |= {name for name, (_, spec) in option_fields(group).items() if spec.secret}
    return {
        name: value if isinstance(value, (bool, int, float, str)) else str(value)
        for name, value in vars(namespace).items()
        if name not in left_out
    }


def read_config_from_file(namespace: Any, parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The namespace of `parser` with the values of --config_file below those of the command line. Raises ConfigError for
    keys that the parser does not know and values that its options cannot take."""
    if not namespace.config_file:
        return namespace
    actions = {action.dest: action for action in parser._actions}
    problems, values = Problems(), {}
    for key, value in read_config_file(namespace.config_file).items():
        if key not in actions:
            problems.add(f"{namespace.config_file}: unknown key {key}{did_you_mean(key, actions)}")
            continue
        try:
            values[key] = _converted(actions[key], value)
        except (ValueError, TypeError, argparse.ArgumentTypeError) as error:
            problems.add(f"{namespace.config_file}: {key} is {value!r}, which the option does not take ({error})")
    problems.raise_if_any()
    parser.set_defaults(**values)
    return parser.parse_args()


def _converted(action: argparse.Action, value: Any) -> Any:
    if isinstance(action.const, bool):  # a switch, of either way to declare one
        return parse_bool(str(value))
    if isinstance(value, list):
        return [_converted_one(action, item) for item in value]
    return _converted_one(action, value)


def _converted_one(action: argparse.Action, value: Any) -> Any:
    result = value if action.type is None else action.type(str(value))
    if action.choices is not None and result not in action.choices:
        raise ValueError(f"known: {', '.join(map(str, action.choices))}")
    return result


def add_sd_models_arguments(parser: argparse.ArgumentParser) -> None:
    _add(parser, ModelOptions)


def add_optimizer_arguments(parser: argparse.ArgumentParser) -> None:
    _add(parser, optimizers.OptimizerOptions, schedulers.SchedulerOptions)


def add_training_arguments(parser: argparse.ArgumentParser, support_dreambooth: bool = True) -> None:
    """Every shared option of a training; `support_dreambooth` is taken for compatibility, the options are in
    add_dataset_arguments."""
    _add(parser, *TRAINING_GROUPS)


def add_dataset_arguments(
    parser: argparse.ArgumentParser,
    support_dreambooth: bool = True,
    support_caption: bool = True,
    support_caption_dropout: bool = True,
) -> None:
    """The options of datasets and caches; those of captions or caption dropout only where they are supported."""
    from library.dataset import CachingOptions, DatasetOptions

    left_out = set() if support_caption else {"in_json", "dataset_repeats"}
    if not support_dreambooth:
        left_out |= {"reg_data_dir"}
    if not support_caption_dropout:
        left_out |= {"caption_dropout_rate", "caption_dropout_every_n_epochs", "caption_tag_dropout_rate"}
    _add(parser, DatasetOptions, CachingOptions, left_out=left_out)


def _add(parser: argparse.ArgumentParser, *groups: type, left_out: Iterable[str] = ()) -> None:
    """Add option groups with their defaults; names that the parser has already are left alone."""
    present = {action.dest for action in parser._actions} | set(left_out)
    for group in groups:
        names = option_fields(group)
        add_options(parser, group, skip=present & set(names))
        parser.set_defaults(**{name: field.default for name, (field, _) in names.items() if name not in present})
