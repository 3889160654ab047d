"""How the denoisers of image and video scripts compute: options without torch, and what they come to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from library.core.attention_modes import MODE_NAMES
from library.core.options import Config, equivalent_option, option, refused_option
from library.generation.requests import DTYPE_NAMES

FORMATS = ("dit_dtype", "dtype")
"""options that say the number format of a denoiser, the first that is given counts, unless a group of the script has
others as `format_options`; scripts without one have --fp16 and --bf16"""
_NO_EIGHT_BITS = "a U-Net is not kept in scaled 8 bits, which this is for; leave it out"


def attention_option() -> Any:
    """--attn_mode of a script."""
    return option(
        "torch", help="what computes the attention: torch (sdpa), one of its kernels, or a package", choices=MODE_NAMES
    )


def scaled_weights_option() -> Any:
    """--fp8_scaled of a script."""
    return option(
        False,
        help="keep the large matrices of the denoiser in 8 bits, with scales by which they use the whole range",
    )


def fast_products_option() -> Any:
    """--fp8_fast of a script."""
    return option(
        False, help="multiply in 8 bits, for --fp8_scaled: quicker and less exact; needs a GPU that can (RTX 40 on)"
    )


@dataclass(frozen=True, kw_only=True)
class SpeedOptions:
    """Speed and number formats"""

    optimized: bool = option(
        False,
        help="set what makes this script quick on an NVIDIA GPU, as far as it is not given and machine and model allow:"
        " --attn_mode sageattn, --compile, --fp8_scaled, --fp8_fast, --fp16_accumulation, those of them that there are;"
        " a line says which",
    )
    fp16_accumulation: bool = option(
        False,
        help="let GPUs add up products of float16 in float16: quicker and less exact; for a denoiser that computes in"
        " float16",
    )
    upcast_linear: bool = option(
        False,
        help="multiply the matrices of --fp8_scaled in float32 and round the result: closer and slower; not those that"
        " --fp8_fast multiplies in 8 bits",
    )
    upcast_quantization: bool = equivalent_option(
        False, help="compute 8-bit weights and their scales in float32",
        reason="--upcast_quantization: weights become 8 bits in float32 in any case, and scales stay float32",
    )  # fmt: skip
    mixed_precision_transformer: bool = option(
        False,
        help="keep every tensor of the denoiser in the type that its file has, and compute each layer in that of its"
        " weights; between layers is the type of most of them",
    )


@dataclass(frozen=True, kw_only=True)
class UnetSpeedOptions(SpeedOptions):
    """Speed and number formats"""

    upcast_linear: bool = refused_option(
        False, help="multiply the matrices of --fp8_scaled in float32", reason=_NO_EIGHT_BITS
    )
    upcast_quantization: bool = refused_option(
        False, help="compute 8-bit weights and their scales in float32", reason=_NO_EIGHT_BITS
    )
    mixed_precision_transformer: bool = refused_option(
        False, help="keep every tensor of the denoiser in the type that its file has",
        reason="the denoiser is a U-Net, which computes in one type; leave it out",
    )  # fmt: skip


def speed_of(config: Config) -> SpeedOptions:
    """The group of a script; its defaults where the script has none."""
    found = (config[group] for group in config.classes() if issubclass(group, SpeedOptions))
    return next(found, SpeedOptions())


@dataclass(frozen=True)
class Format:
    """What a denoiser computes in: `name` in torch, as is `said` by an option. `option`: by which another is asked
    for, None = --fp16 and --bf16."""

    name: str
    said: str
    option: str | None
    in_eight_bits: bool = False
    """whether the option asks for weights of 8 bits"""

    def asking_for(self, name: str) -> str:
        """The option for a format, float16 or bfloat16."""
        return f"--{self.option} {name}" if self.option else {"float16": "--fp16", "bfloat16": "--bf16"}[name]


def denoiser_format(config: Config) -> Format:
    """By the options of a script. Weights of 8 bits compute in bfloat16."""
    values = config.values()
    for option_name in _format_options(config):
        if (value := values.get(option_name)) is not None:
            name = DTYPE_NAMES.get(str(value).lower(), str(value))
            in_eight_bits = name.startswith("float8")
            name = "bfloat16" if in_eight_bits else name
            return Format(name, f"--{option_name} is {value}", option_name, in_eight_bits)
    given = next((name for name in ("fp16", "bf16") if values.get(name)), None)
    name = {"fp16": "float16", "bf16": "bfloat16", None: "float32"}[given]
    return Format(name, f"--{given} is given" if given else "neither --fp16 nor --bf16 is given", None)


def _format_options(config: Config) -> tuple[str, ...]:
    own = (group.format_options for group in config.classes() if hasattr(group, "format_options"))
    return next(own, FORMATS)


def format_option(config: Config) -> str:
    """The option of the denoiser's number format alone; of some scripts there is none of this name."""
    return _format_options(config)[0]
