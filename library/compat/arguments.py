"""Options as scripts and plug-ins of other trainers add, read and check them: a parser and its namespace."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterable
from typing import Any

from library.compat.namespace import options_of
from library.core.errors import ConfigError, Problems, did_you_mean
from library.core.options import add_options, option_fields, parse_bool
from library.dataset import CachingOptions, DatasetOptions, parse_range, parse_resolution
from library.training import optimizers, schedulers
from library.training.attention_options import AttentionOptions
from library.training.computing_options import DdpOptions, DeepSpeedOptions, MemoryOptions, PrecisionOptions
from library.training.config_file import NEVER_IN_FILE, read_config_file
from library.training.inference_samplers import SamplerOptions
from library.training.loss_weights import LossWeightOptions
from library.training.losses import LossOptions
from library.training.option_groups import (
    HubOptions,
    LoggingOptions,
    LoopOptions,
    MetadataOptions,
    ModelOptions,
    NoiseOptions,
    ResumeOptions,
    SamplingOptions,
    SavingOptions,
    ValidationOptions,
)
from library.training.parser_common import PATH_OPTIONS, shown_paths
from library.training.timestep_samplers import TimestepOptions

logger = logging.getLogger(__name__)

TRAINING_GROUPS = (
    SavingOptions, HubOptions, ResumeOptions, LoopOptions, PrecisionOptions, MemoryOptions, AttentionOptions,
    DdpOptions, LoggingOptions, SamplingOptions, SamplerOptions, NoiseOptions, LossOptions,
)  # fmt: skip
CHECKED_GROUPS = (
    *TRAINING_GROUPS,
    ValidationOptions,
    CachingOptions,
    optimizers.OptimizerOptions,
    schedulers.SchedulerOptions,
)


# -- adding ----------------------------------------------------------------------------------------------------------


def add_sd_models_arguments(parser: argparse.ArgumentParser) -> None:
    add_groups(parser, ModelOptions)


def add_optimizer_arguments(parser: argparse.ArgumentParser) -> None:
    add_groups(parser, optimizers.OptimizerOptions, schedulers.SchedulerOptions)


def add_training_arguments(parser: argparse.ArgumentParser, support_dreambooth: bool = True) -> None:
    """Every shared option of a training. With `support_dreambooth` also --prior_loss_weight."""
    add_groups(parser, *TRAINING_GROUPS)
    if support_dreambooth:
        add_groups(parser, DatasetOptions, only=("prior_loss_weight",))


def add_masked_loss_arguments(parser: argparse.ArgumentParser) -> None:
    add_groups(parser, DatasetOptions, only=("conditioning_data_dir", "masked_loss"))


def add_dit_training_arguments(parser: argparse.ArgumentParser) -> None:
    """What the scripts of flow models share: caches of captions, noise levels, block swap."""
    add_groups(parser, CachingOptions, TimestepOptions)
    add_groups(parser, MemoryOptions, only=("blocks_to_swap", "cpu_offload_checkpointing"))


def add_sd_saving_arguments(parser: argparse.ArgumentParser) -> None:
    add_groups(parser, SavingOptions, only=("save_model_as",))


def add_model_spec_arguments(parser: argparse.ArgumentParser) -> None:
    add_groups(
        parser, MetadataOptions, only=[name for name in option_fields(MetadataOptions) if name.startswith("metadata_")]
    )


def add_custom_train_arguments(parser: argparse.ArgumentParser, support_weighted_captions: bool = True) -> None:
    """Weights of the loss by noise level and, where captions may carry weights, --weighted_captions."""
    add_groups(parser, LossWeightOptions)
    if support_weighted_captions:
        add_groups(parser, ModelOptions, only=("weighted_captions",))


def add_deepspeed_arguments(parser: argparse.ArgumentParser) -> None:
    add_groups(parser, DeepSpeedOptions)


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    add_groups(parser, DatasetOptions, only=("dataset_config",))


def add_sdxl_training_arguments(parser: argparse.ArgumentParser, support_text_encoder_caching: bool = True) -> None:
    names = ["cache_text_encoder_outputs", "cache_text_encoder_outputs_to_disk"] if support_text_encoder_caching else []
    add_groups(parser, CachingOptions, only=names)
    add_groups(parser, ModelOptions, only=("disable_mmap_load_safetensors",))


def add_dataset_arguments(
    parser: argparse.ArgumentParser, support_dreambooth: bool, support_caption: bool,
    support_caption_dropout: bool = True
) -> None:
    """The options of datasets and caches; those of regularisation images, metadata files or caption dropout only where
    they are supported."""
    left_out = set() if support_caption else {"in_json", "dataset_repeats"}
    if not support_dreambooth:
        left_out |= {"reg_data_dir"}
    if not support_caption_dropout:
        left_out |= {"caption_dropout_rate", "caption_dropout_every_n_epochs", "caption_tag_dropout_rate"}
    add_groups(parser, DatasetOptions, CachingOptions, left_out=left_out)


def add_groups(
    parser: argparse.ArgumentParser, *groups: type, left_out: Iterable[str] = (), only: Iterable[str] | None = None
) -> None:
    """Add option groups with their defaults; names that the parser has already are left alone. A script that adds one
    of ours again means its own."""
    for container in (parser, *parser._action_groups):
        container.conflict_handler = "resolve"
    present = {action.dest for action in parser._actions} | set(left_out)
    for group in groups:
        names = option_fields(group)
        skipped = present & set(names) if only is None else set(names) - (set(only) - present)
        if skipped == set(names):
            continue
        add_options(parser, group, skip=skipped)
        parser.set_defaults(**{name: field.default for name, (field, _) in names.items() if name not in skipped})


# -- reading and checking --------------------------------------------------------------------------------------------


def read_config_from_file(args: Any, parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The namespace of `parser` with the values of --config_file below those of the command line. Raises ConfigError
    for keys that the parser does not know and values that its options cannot take."""
    if not args.config_file:
        return args
    actions = {action.dest: action for action in parser._actions}
    problems, values = Problems(), {}
    for key, value in read_config_file(args.config_file).items():
        if key not in actions:
            problems.add(f"{args.config_file}: unknown key {key}{did_you_mean(key, actions)}")
            continue
        try:
            values[key] = _converted(actions[key], value)
        except (ValueError, TypeError, argparse.ArgumentTypeError) as error:
            problems.add(f"{args.config_file}: {key} is {value!r}, which the option does not take ({error})")
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


def verify_command_line_training_args(args: Any) -> None:
    """Warn when W&B would record paths that the command line shows."""
    if getattr(args, "log_with", None) not in ("wandb", "all"):
        return
    given = {
        name: getattr(args, name, None)
        for name in PATH_OPTIONS
        if any(word.startswith(f"--{name}") for word in sys.argv)
    }
    shown = shown_paths(given)
    if shown:
        logger.warning(
            "W&B may record the command line with these paths: %s; a --config_file avoids it", ", ".join(shown)
        )


def verify_training_args(args: Any) -> None:
    """Read every group of options; one ConfigError with all that is wrong. --cache_latents_to_disk switches
    --cache_latents on."""
    problems = Problems()
    for group in CHECKED_GROUPS:
        problems.attempt(lambda group=group: options_of(args, group))
    for name, of in (
        ("adaptive_noise_scale", "noise_offset"),
        ("scale_v_pred_loss_like_noise_pred", "v_parameterization"),
    ):
        if getattr(args, name, None) and not getattr(args, of, None):
            problems.add(f"--{name} is set; it needs --{of}")
    problems.raise_if_any()
    for name in ("cache_latents", "cache_text_encoder_outputs"):
        if getattr(args, f"{name}_to_disk", False):
            setattr(args, name, True)


def verify_sdxl_training_args(args: Any, support_text_encoder_caching: bool = True) -> None:
    """ConfigError for options of Stable Diffusion 1 and 2, which mean another model."""
    if getattr(args, "v2", False):
        raise ConfigError("--v2 is for Stable Diffusion 2; SDXL has its own script, leave --v2 out")
    if support_text_encoder_caching and getattr(args, "cache_text_encoder_outputs_to_disk", False):
        args.cache_text_encoder_outputs = True


def prepare_dataset_args(args: Any, support_metadata: bool) -> None:
    """Put texts into their types in place: sizes to (width, height), ranges to two numbers, the old spelling of
    --caption_extension, and to-disk caches as caches. ConfigError with everything that is wrong."""
    if getattr(args, "caption_extention", None) is not None:
        args.caption_extension, args.caption_extention = args.caption_extention, None
    problems = Problems()
    for name, parse in (
        ("resolution", parse_resolution),
        ("skip_image_resolution", parse_resolution),
        ("face_crop_aug_range", parse_range),
    ):
        value = getattr(args, name, None)
        if value is None:
            continue
        try:
            setattr(args, name, parse(value))
        except argparse.ArgumentTypeError as error:
            problems.add(f"--{name}: {error}")
    if (
        support_metadata
        and getattr(args, "in_json", None)
        and (getattr(args, "color_aug", False) or getattr(args, "random_crop", False))
    ):
        logger.warning("latents in %s are not used, because of --color_aug or --random_crop", args.in_json)
    problems.raise_if_any()


def get_sanitized_config_or_none(args: Any) -> dict[str, Any] | None:
    """What --log_config records: every option without secrets and paths; None without the option."""
    if not args.log_config:
        return None
    left_out = {*PATH_OPTIONS, *NEVER_IN_FILE}
    for group in (HubOptions, LoggingOptions):
        left_out |= {name for name, (_, spec) in option_fields(group).items() if spec.secret}
    return {
        name: value if isinstance(value, (bool, int, float, str)) else str(value)
        for name, value in vars(args).items()
        if name not in left_out
    }


def enable_high_vram(args: Any) -> None:
    """Nothing: device memory is emptied between phases alone, never between pictures, with --highvram and without."""
