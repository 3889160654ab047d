"""How the denoisers of image and video scripts compute, as the options of `speed_options.py` say."""

from __future__ import annotations

import logging
from typing import TypeVar

import torch
from torch import nn

from library.components.mixed_models import compute_as_stored
from library.core.options import Config
from library.device_utils import device_problem, fp16_sums_lack, get_preferred_device, sum_in_fp16
from library.generation.speed_options import SpeedOptions, denoiser_format, format_option, speed_of

logger = logging.getLogger(__name__)
Denoiser = TypeVar("Denoiser", bound=nn.Module)


def device_of(config: Config) -> torch.device:
    """Where the denoiser of a script computes; the options are checked."""
    named = config.values().get("device")
    return get_preferred_device() if named is None else torch.device(named)


def set_switches(config: Config) -> None:
    """What is a setting of the process."""
    sum_in_fp16(speed_of(config).fp16_accumulation)


def speed_problems(config: Config) -> list[str]:
    """What contradicts itself, and what the device cannot do."""
    from library.fp8_optimization_utils import fp8_product_problem

    values, found = config.values(), []
    if speed_of(config).mixed_precision_transformer:
        given = [name for name in ("fp8", "fp8_scaled") if values.get(name)]
        found += [
            f"--{name} is given with --mixed_precision_transformer, which keeps weights as the file has them; leave one"
            " of them out"
            for name in given
        ]
    if not (values.get("fp8_fast") and values.get("fp8_scaled")):
        return found
    if device_problem("device", values.get("device")) is not None:
        return found  # which is told of itself
    problem = fp8_product_problem(device_of(config))
    return [*found, problem] if problem else found


def speed_notices(config: Config) -> list[str]:
    """Lines about options that have no effect."""
    values, is_mixed = config.values(), speed_of(config).mixed_precision_transformer
    found = [
        f"--{name} has no effect without --fp8_scaled"
        for name in ("fp8_fast", "upcast_linear")
        if values.get(name) and not (values["fp8_scaled"] or (is_mixed and name == "upcast_linear"))
    ]
    if is_mixed and (own := format_option(config)) in config.explicit:
        found.append(f"--{own} is for weights of 8 bits alone: --mixed_precision_transformer takes types from the file")
    return [*found, *_without_fp16_sums(config)]


def type_to_load(wide: torch.dtype, speed: SpeedOptions) -> torch.dtype | None:
    """What loaders of denoisers are asked for; None = the types of the file."""
    return None if speed.mixed_precision_transformer else wide


def as_stored(denoiser: Denoiser, speed: SpeedOptions, wide: torch.dtype) -> Denoiser:
    """A loaded denoiser that computes in the types of its file where that is asked for. `wide`: what weights of 8 bits
    compute in."""
    if speed.mixed_precision_transformer:
        wide = torch.bfloat16 if wide.itemsize == 1 else wide
        logger.info("--mixed_precision_transformer: %s", compute_as_stored(denoiser, wide))
    return denoiser


def choose_products(denoiser: nn.Module, config: Config) -> None:
    """Let the layers of a loaded denoiser multiply as the options say."""
    from library.fp8_optimization_utils import multiply_in_float32, multiply_in_fp8

    values, speed = config.values(), speed_of(config)
    if values.get("fp8_fast") and values.get("fp8_scaled"):
        logger.info("--fp8_fast: %d layers of the denoiser multiply in 8 bits", multiply_in_fp8(denoiser))
    if speed.upcast_linear:
        logger.info("--upcast_linear: %d layers of the denoiser multiply in float32", multiply_in_float32(denoiser))
    if speed.mixed_precision_transformer and speed.fp16_accumulation and denoiser.dtype != torch.float16:
        logger.info("--fp16_accumulation has no effect: most of the denoiser's file is of another type")


def _without_fp16_sums(config: Config) -> list[str]:
    if not speed_of(config).fp16_accumulation:
        return []
    told, computed = "--fp16_accumulation has no effect", denoiser_format(config)
    if (lack := fp16_sums_lack(device_of(config))) is not None:
        return [f"{told}: {lack}"]
    if computed.name != "float16" and not speed_of(config).mixed_precision_transformer:
        return [f"{told} on the denoiser: {computed.said}; needed: {computed.asking_for('float16')}"]
    return []
