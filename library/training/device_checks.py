"""Number formats that the device of the run cannot compute with, found before models are loaded."""

from __future__ import annotations

from library.core.options import Config
from library.training.option_groups import PrecisionOptions


def precision_problems(config: Config) -> list[str]:
    """Formats that the device does not have."""
    precision = config[PrecisionOptions]
    asked = {"bf16": [("--mixed_precision bf16", "bfloat16", "use --mixed_precision fp16 or no")]}.get(
        precision.mixed_precision, []
    )
    asked += [
        (f"--{name}", "float8_e4m3fn", "leave it out (--gradient_checkpointing saves memory too)")
        for name in ("fp8_base", "fp8_base_unet") if getattr(precision, name)
    ]  # fmt: skip
    if not asked:
        return []
    from library.device_utils import format_problem

    return [problem for flag, dtype, instead in asked if (problem := format_problem(flag, dtype, None, instead))]


def precision_warnings(config: Config) -> list[str]:
    """Formats that the device imitates."""
    if config[PrecisionOptions].mixed_precision != "bf16":
        return []
    from library.device_utils import described, get_preferred_device, imitates_bfloat16

    device = get_preferred_device()
    if not imitates_bfloat16(device):
        return []
    return [
        f"--mixed_precision is bf16, which {described(device)} computes in software, many times slower; fp16 is quick "
        "there"
    ]
