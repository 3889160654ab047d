"""The accelerator of a loop of one's own, its number formats, and DeepSpeed, which is not there."""

from __future__ import annotations

import os
import time
from typing import Any

import torch

from library.compat.namespace import options_of
from library.core.errors import UnsupportedCombination
from library.training.accelerator_setup import allow_fp16_gradients, start_accelerator
from library.training.computing_options import DdpOptions, DeepSpeedOptions, PrecisionOptions
from library.training.option_groups import LoggingOptions, LoopOptions
from library.utils import str_to_dtype


def prepare_accelerator(args: Any) -> Any:
    """accelerate's Accelerator for the precision, the processes, the accumulation and the trackers of the options."""
    prepare_deepspeed_args(args)
    logging_options, folder = options_of(args, LoggingOptions), None
    if logging_options.logging_dir:
        stamp = time.strftime("%Y%m%d%H%M%S", time.localtime())
        folder = os.path.join(logging_options.logging_dir, f"{logging_options.log_prefix or ''}{stamp}")
    return start_accelerator(
        options_of(args, PrecisionOptions), options_of(args, DdpOptions),
        gradient_accumulation_steps=options_of(args, LoopOptions).gradient_accumulation_steps,
        log_with=logging_options.log_with or ("tensorboard" if folder else None), project_dir=folder,
    )


def prepare_dtype(args: Any) -> tuple[torch.dtype, torch.dtype | None]:
    """(type of the forward pass, type of saved weights or None for that of the trained ones)."""
    precision = args.mixed_precision
    return str_to_dtype("fp32" if precision in (None, "no") else precision), str_to_dtype(args.save_precision)


def patch_accelerator_for_fp16_training(accelerator: Any) -> None:
    """Let --full_fp16 unscale gradients that are float16 themselves; nothing without a gradient scaler."""
    if accelerator.scaler is not None:
        allow_fp16_gradients(accelerator.scaler)


def prepare_deepspeed_args(args: Any) -> None:
    """ConfigError for --deepspeed: there is no training through DeepSpeed."""
    if getattr(args, "deepspeed", False):
        fields = DeepSpeedOptions.__dataclass_fields__["deepspeed"]
        raise UnsupportedCombination(
            f"--deepspeed is on; it is not available here: {next(iter(fields.metadata.values())).reason}"
        )


def prepare_deepspeed_plugin(args: Any) -> None:
    """None, which accelerate takes for "no plug-in"; ConfigError for --deepspeed."""
    prepare_deepspeed_args(args)


def prepare_deepspeed_model(args: Any, **models: Any) -> Any:
    """One module that holds `models`, for DeepSpeed's engine, which is not there."""
    raise UnsupportedCombination(
        "prepare_deepspeed_model: there is no training through DeepSpeed here; give the models to accelerator.prepare"
    )
