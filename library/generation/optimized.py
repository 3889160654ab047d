"""--optimized: the fast options of a script that the machine allows, where they are not given."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from library.core.attention_modes import Place, lacking
from library.core.errors import CheckpointError
from library.core.options import Config, option_fields
from library.device_utils import can_compute, described, device_problem, fp16_sums_lack
from library.generation.attention import SWITCHES
from library.generation.speed import device_of
from library.generation.speed_options import denoiser_format, speed_of

ATTENTION = "sageattn"
MODEL_OPTIONS = ("dit", "ckpt_path", "pretrained_model_name_or_path")
"""options that name the file of a denoiser"""


@dataclass(frozen=True)
class Chosen:
    """What --optimized comes to: values of options that it sets, and one line about it."""

    values: Mapping[str, Any]
    line: str


def with_optimized(values: dict[str, Any], groups: Sequence[type], told: list[str]) -> dict[str, Any]:
    """Values of options by name, with those that are set in the place of --optimized where they are left out; `told`
    gets its line. Where the values of a group cannot be read, which is told of itself, nothing is set."""
    config, problems = Config.read_partly(values, groups)
    if problems.messages or device_problem("device", values.get("device")) is not None:
        return values
    chosen = choose(config, groups)
    told.append(chosen.line)
    return {**values, **chosen.values}


def choose(config: Config, groups: Sequence[type]) -> Chosen:
    """`config`: the options without what --optimized sets."""
    device = device_of(config)
    if device.type != "cuda":
        line = f"--optimized sets nothing: what it would set is quick on NVIDIA GPUs, and the device is {device.type}"
        return Chosen({}, line)
    known = {name for group in groups for name in option_fields(group)}
    found: dict[str, Any] = {}
    kept, left = [], []
    for name, value, given, reason in _wanted(config, device, found):
        if name not in known:
            continue
        lack = None if given else _of_models(config).get(name) or reason()
        if given:
            kept.append(given)
        elif lack:
            left.append(f"{_word(name, value)} ({lack})")
        else:
            found[name] = value
    parts = [
        f"sets {', '.join(_word(name, value) for name, value in found.items()) or 'nothing'}",
        *([f"left as given: {', '.join(kept)}"] if kept else []), *([f"left out: {'; '.join(left)}"] if left else []),
    ]  # fmt: skip
    return Chosen(found, f"--optimized {'; '.join(parts)}")


def _word(name: str, value: Any) -> str:
    return f"--{name}" if value is True else f"--{name} {value}"


def _of_models(config: Config) -> Mapping[str, str]:
    """Option -> why the models of a script do not bear it, `not_optimized` of a group."""
    return next((config[group].not_optimized for group in config.classes() if hasattr(group, "not_optimized")), {})


def _wanted(
    config: Config, device: torch.device, found: Mapping[str, Any]
) -> Iterator[tuple[str, Any, str | None, Callable[[], str | None]]]:
    """(option, value, what the user said in its place, why it cannot be set) in the order in which they are decided;
    `found` is what was set of those before."""

    def given(*names: str) -> str | None:
        return next((f"--{name}" for name in names if name in config.explicit), None)

    yield "attn_mode", ATTENTION, given("attn_mode", *SWITCHES), lambda: _attention_lack(config, device)
    yield "compile", True, given("compile", "compile_args"), lambda: _compile_lack(config)
    form = given("fp8_scaled", "fp8", "mixed_precision_transformer")
    yield "fp8_scaled", True, form, lambda: _scaled_lack(config, device)
    is_scaled = found.get("fp8_scaled") or config.values().get("fp8_scaled")
    products = given("fp8_fast", "upcast_linear")
    yield "fp8_fast", True, products, lambda: _products_lack(bool(is_scaled), device)
    yield "fp16_accumulation", True, given("fp16_accumulation"), lambda: _sums_lack(config, device)


def _attention_lack(config: Config, device: torch.device) -> str | None:
    if speed_of(config).mixed_precision_transformer:
        return "it takes numbers of 16 bits alone, and the file says what they are"
    return lacking(ATTENTION, Place(device.type, denoiser_format(config).name != "float32", halves="16 bits"))


def _compile_lack(config: Config) -> str | None:
    from library.training.compilation import backend_problems

    problems = backend_problems(config.value("compile_backend"), "compile_backend")
    return problems[0] if problems else None


def _scaled_lack(config: Config, device: torch.device) -> str | None:
    values = config.values()
    if values.get("save_merged_model"):
        return "--save_merged_model writes whole weights"
    if values.get("lycoris"):
        return "--lycoris needs whole weights"
    if denoiser_format(config).in_eight_bits:
        return f"{denoiser_format(config).said}, which is 8 bits without scales"
    if not can_compute(device, torch.float8_e4m3fn):
        return f"{described(device)} has no 8-bit numbers"
    return _file_lack(next((values[name] for name in MODEL_OPTIONS if values.get(name)), None))


def _file_lack(path: str | None) -> str | None:
    """Weights that are in 8 bits of another kind stay as they are."""
    from library.safetensors_utils import FP8_DTYPES, read_header

    if path is None or not Path(path).is_file():
        return None
    try:
        kinds = {info.dtype for info in read_header(path)[0].values()}
    except (CheckpointError, OSError):
        return None  # told by the check of the files
    other = kinds & (set(FP8_DTYPES) - {torch.float8_e4m3fn})
    return f"{path} has weights in 8 bits of another kind" if other else None


def _products_lack(is_scaled: bool, device: torch.device) -> str | None:
    from library.fp8_optimization_utils import can_multiply_fp8

    if not is_scaled:
        return "weights are not in scaled 8 bits"
    return None if can_multiply_fp8(device) else f"{described(device)} does not multiply 8-bit numbers"


def _sums_lack(config: Config, device: torch.device) -> str | None:
    if (lack := fp16_sums_lack(device)) is not None:
        return lack
    computed = denoiser_format(config)
    if computed.name == "float16" or speed_of(config).mixed_precision_transformer:
        return None
    return f"{computed.said}; it needs {computed.asking_for('float16')}"
