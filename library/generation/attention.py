"""How the denoisers of image and video scripts compute their attention."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from library.attention import use_attention
from library.core.attention_modes import AttentionChoice, Place
from library.core.errors import ConfigError
from library.core.options import Config
from library.device_utils import get_preferred_device
from library.generation.speed_options import denoiser_format, speed_of
from library.training.attention_options import AttentionSettings, attention_settings

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

SWITCHES = {"use_sage_attn": "sageattn", "use_flash_attn": "flash", "xformers": "xformers", "sdpa": "torch"}
"""options that scripts have beside --attn_mode -> the mode; the first that is set counts"""


def attention_of(config: Config, loaded: torch.dtype | None = None) -> AttentionSettings:
    """What the options of a script come to on its device. `loaded`: what a denoiser computes in that takes its types
    from its file; before it is there, 16 bits are assumed of it."""
    values = config.values()
    given = {name: value for name, value in values.items() if name in config.explicit}
    computed = denoiser_format(config)
    device = str(values.get("device") or get_preferred_device()).partition(":")[0]
    if speed_of(config).mixed_precision_transformer:
        place = Place(device, loaded is None or loaded.itemsize == 2, halves="a file that is mostly of 16 bits")
    else:
        place = Place(device, computed.name != "float32", halves=computed.asking_for("bfloat16"))
    return attention_settings(SWITCHES, given, place)


def choose_attention(denoiser: Any, config: Config) -> None:
    """Let a denoiser compute as the options say, and tell what is other than they say. ConfigError where its file has
    types that the attention does not take."""
    loaded = denoiser.dtype if speed_of(config).mixed_precision_transformer else None
    settings = attention_of(config, loaded)
    if settings.problems:
        raise ConfigError(settings.problems)
    for line in (*settings.notes, *map(str, settings.idle)):
        logger.info(line)
    if settings.choice != AttentionChoice():
        use_attention(denoiser, settings.choice)
        logger.info("attention: %s", settings.choice)
