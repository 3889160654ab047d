"""Number formats and forms of weights that the device of the run cannot hold or compute with, found before models are
loaded."""

from __future__ import annotations

from collections.abc import Iterator

from library.core.options import Config
from library.training.computing_options import PrecisionOptions

_INT8 = "needed: int8 in its place, which every device holds (--quantize_base int8, --quantize_text_encoder int8)"


def precision_problems(config: Config) -> list[str]:
    """Formats and forms that the device does not have."""
    precision = config[PrecisionOptions]
    asked = {"bf16": [("--mixed_precision bf16", "bfloat16", "use --mixed_precision fp16 or no")]}.get(
        precision.mixed_precision, []
    )
    names = [name for name in ("fp8_base", "fp8_base_unet", "fp8_scaled") if getattr(precision, name)]
    flags = [f"--{name}" for name in names]
    if precision.quantize_text_encoder in ("fp8", "fp8_scaled"):
        flags.append(f"--quantize_text_encoder {precision.quantize_text_encoder}")
    asked += [(flag, "float8_e4m3fn", _INT8) for flag in flags]
    found = []
    if asked:
        from library.device_utils import format_problem

        found = [problem for flag, dtype, instead in asked if (problem := format_problem(flag, dtype, None, instead))]
    return [*found, *_nf4_problems(precision), *_product_problems(precision)]


def _nf4_problems(precision: PrecisionOptions) -> Iterator[str]:
    names = ("quantize_base", "quantize_text_encoder")
    flags = [f"--{name} nf4" for name in names if getattr(precision, name) == "nf4"]
    if not flags:
        return
    from library.checkpoints.weight_forms import has_nf4, holds_nf4
    from library.device_utils import described, get_preferred_device

    asking = " and ".join(flags)
    if not has_nf4():
        yield (
            f"{asking}: 4-bit weights are computed by bitsandbytes, which is not installed; needed: pip install"
            f" bitsandbytes, or {asking.replace('nf4', 'int8')}, which needs no package and takes 8 bits"
        )
    elif not holds_nf4(get_preferred_device()):
        yield (
            f"{asking}: the installed bitsandbytes has no 4-bit weights for {described(get_preferred_device())};"
            f" needed: a newer one, or {asking.replace('nf4', 'int8')}, which every device holds"
        )


def _product_problems(precision: PrecisionOptions) -> Iterator[str]:
    if not precision.multiplies_fp8:
        return
    from library.device_utils import get_preferred_device
    from library.fp8_optimization_utils import fp8_product_problem

    if problem := fp8_product_problem(get_preferred_device()):
        yield problem


def precision_warnings(config: Config) -> list[str]:
    """Formats that the device imitates, and sums of fewer digits."""
    precision = config[PrecisionOptions]
    return [*_imitated(precision), *_short_sums(precision)]


def _imitated(precision: PrecisionOptions) -> Iterator[str]:
    if precision.mixed_precision != "bf16":
        return
    from library.device_utils import described, get_preferred_device, imitates_bfloat16

    device = get_preferred_device()
    if imitates_bfloat16(device):
        yield (
            f"--mixed_precision is bf16, which {described(device)} computes in software, many times slower; fp16 is quick"
            " there"
        )


def _short_sums(precision: PrecisionOptions) -> Iterator[str]:
    if not precision.fp16_accumulation or precision.mixed_precision != "fp16":
        return
    from library.device_utils import fp16_sums_lack, get_preferred_device

    if fp16_sums_lack(get_preferred_device()) is None:
        yield (
            "--fp16_accumulation: sums of products keep 11 binary digits, in gradients too, which is quicker and may be"
            " learned from less well"
        )
