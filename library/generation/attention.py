"""How the denoisers of image and video scripts compute their attention."""

from __future__ import annotations

import logging
from typing import Any

from library.attention import use_attention
from library.core.attention_modes import AttentionChoice, Place
from library.core.options import Config
from library.device_utils import get_preferred_device
from library.generation.requests import DTYPE_NAMES
from library.training.attention_options import AttentionSettings, attention_settings

logger = logging.getLogger(__name__)

SWITCHES = {"use_sage_attn": "sageattn", "use_flash_attn": "flash", "xformers": "xformers", "sdpa": "torch"}
"""options that scripts have beside --attn_mode -> the mode; the first that is set counts"""
HALVES = {"dit_dtype": "--dit_dtype bfloat16", "dtype": "--dtype bfloat16", "bf16": "--bf16"}
"""options of the number format -> how to ask for 16 bits"""


def attention_of(config: Config) -> AttentionSettings:
    """What the options of a script come to on its device."""
    values = config.values()
    given = {name: value for name, value in values.items() if name in config.explicit}
    name = next(name for name in HALVES if name in values or name == "bf16")
    if name == "bf16":
        in_halves = bool(values.get("bf16") or values.get("fp16"))
    else:
        in_halves = DTYPE_NAMES.get(str(values[name]).lower(), "") != "float32"
    device = str(values.get("device") or get_preferred_device()).partition(":")[0]
    return attention_settings(SWITCHES, given, Place(device, in_halves, halves=HALVES[name]))


def choose_attention(denoiser: Any, config: Config) -> None:
    """Let a denoiser compute as the options say, and tell what is other than they say."""
    settings = attention_of(config)
    for line in (*settings.notes, *map(str, settings.idle)):
        logger.info(line)
    if settings.choice != AttentionChoice():
        use_attention(denoiser, settings.choice)
        logger.info("attention: %s", settings.choice)
