"""How the denoisers of image and video scripts compute: options without torch, and what they come to."""

from __future__ import annotations

from dataclasses import dataclass

from library.core.options import Config, option
from library.generation.requests import DTYPE_NAMES

FORMATS = ("dit_dtype", "dtype")
"""options that say the number format of a denoiser, the first that is given counts, unless a group of the script has
others as `format_options`; scripts without one have --fp16 and --bf16"""


@dataclass(frozen=True, kw_only=True)
class SpeedOptions:
    """Speed"""

    fp16_accumulation: bool = option(
        False,
        help="let GPUs add up products of float16 in float16: quicker and less exact; for a denoiser that computes in"
        " float16",
    )


def speed_of(config: Config) -> SpeedOptions:
    """The group of a script; its defaults where the script has none."""
    found = (config[group] for group in config.classes() if issubclass(group, SpeedOptions))
    return next(found, SpeedOptions())


@dataclass(frozen=True)
class Format:
    """What a denoiser computes in: `name` in torch, as the option that is `said`; `asking`: how float16 is asked for."""

    name: str
    said: str
    asking: str


def denoiser_format(config: Config) -> Format:
    """By the options of a script. Weights of 8 bits compute in bfloat16."""
    values = config.values()
    own = (group.format_options for group in config.classes() if hasattr(group, "format_options"))
    for option_name in next(own, FORMATS):
        if (value := values.get(option_name)) is not None:
            name = DTYPE_NAMES.get(str(value).lower(), str(value))
            name = "bfloat16" if name.startswith("float8") else name
            return Format(name, f"--{option_name} is {value}", f"--{option_name} float16")
    given = next((name for name in ("fp16", "bf16") if values.get(name)), None)
    name = {"fp16": "float16", "bf16": "bfloat16", None: "float32"}[given]
    return Format(name, f"--{given} is given" if given else "neither --fp16 nor --bf16 is given", "--fp16")
