"""How the denoisers of image and video scripts compute, as the options of `speed_options.py` say."""

from __future__ import annotations

import logging

import torch
from torch import nn

from library.core.options import Config
from library.device_utils import device_problem, fp16_sums_lack, get_preferred_device, sum_in_fp16
from library.generation.speed_options import denoiser_format, speed_of

logger = logging.getLogger(__name__)


def device_of(config: Config) -> torch.device:
    """Where the denoiser of a script computes; the options are checked."""
    named = config.values().get("device")
    return get_preferred_device() if named is None else torch.device(named)


def set_switches(config: Config) -> None:
    """What is a setting of the process."""
    sum_in_fp16(speed_of(config).fp16_accumulation)


def speed_problems(config: Config) -> list[str]:
    """What the device cannot do."""
    from library.fp8_optimization_utils import fp8_product_problem

    values = config.values()
    if not (values.get("fp8_fast") and values.get("fp8_scaled")):
        return []
    if device_problem("device", values.get("device")) is not None:
        return []  # which is told of itself
    problem = fp8_product_problem(device_of(config))
    return [problem] if problem else []


def speed_notices(config: Config) -> list[str]:
    """Lines about options that have no effect."""
    values = config.values()
    found = [
        f"--{name} has no effect without --fp8_scaled"
        for name in ("fp8_fast", "upcast_linear")
        if values.get(name) and not values["fp8_scaled"]
    ]
    return [*found, *_without_fp16_sums(config)]


def choose_products(denoiser: nn.Module, config: Config) -> None:
    """Let the layers of a loaded denoiser multiply as the options say."""
    from library.fp8_optimization_utils import multiply_in_float32, multiply_in_fp8

    values = config.values()
    if values.get("fp8_fast") and values.get("fp8_scaled"):
        logger.info("--fp8_fast: %d layers of the denoiser multiply in 8 bits", multiply_in_fp8(denoiser))
    if speed_of(config).upcast_linear:
        logger.info("--upcast_linear: %d layers of the denoiser multiply in float32", multiply_in_float32(denoiser))


def _without_fp16_sums(config: Config) -> list[str]:
    if not speed_of(config).fp16_accumulation:
        return []
    told, computed = "--fp16_accumulation has no effect", denoiser_format(config)
    if (lack := fp16_sums_lack(device_of(config))) is not None:
        return [f"{told}: {lack}"]
    if computed.name != "float16":
        return [f"{told} on the denoiser: {computed.said}; needed: {computed.asking_for('float16')}"]
    return []
