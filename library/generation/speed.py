"""How the denoisers of image and video scripts compute, as the options of `speed_options.py` say."""

from __future__ import annotations

import torch

from library.core.options import Config
from library.device_utils import fp16_sums_lack, get_preferred_device, sum_in_fp16
from library.generation.speed_options import denoiser_format, speed_of


def device_of(config: Config) -> torch.device:
    """Where the denoiser of a script computes; the options are checked."""
    named = config.values().get("device")
    return get_preferred_device() if named is None else torch.device(named)


def set_switches(config: Config) -> None:
    """What is a setting of the process."""
    sum_in_fp16(speed_of(config).fp16_accumulation)


def speed_notices(config: Config) -> list[str]:
    """Lines about options that have no effect."""
    return _without_fp16_sums(config)


def _without_fp16_sums(config: Config) -> list[str]:
    if not speed_of(config).fp16_accumulation:
        return []
    told, computed = "--fp16_accumulation has no effect", denoiser_format(config)
    if (lack := fp16_sums_lack(device_of(config))) is not None:
        return [f"{told}: {lack}"]
    if computed.name != "float16":
        return [f"{told} on the denoiser: {computed.said}; needed: {computed.asking}"]
    return []
