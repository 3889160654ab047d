"""Option names of other scripts and of graphical front ends: which values ask for nothing, and why the others are
ignored.

The rule: what a known script or front end accepts, starts. A name that is known but has no meaning for a script is
ignored and listed on the start page; one that is known nowhere is an error with the nearest name.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

from library.training.known_options_table import NAMES_BY_DEFAULTS

_COMPILE = "a setting of another trainer's compiler; --torch_compile and --dynamo_backend are the ones here"
_SWAP = "an old option that its script no longer reads; see --blocks_to_swap"
_TOOL = "a setting of the front end, which the training script does not read"
_NO_STOP = "no script for adapters reads it; --network_train_unet_only or a rate of 0 in --text_encoder_lr keeps text encoders still"

FRONT_END_KEYS: dict[str, tuple[list[Any], str]] = {
    "epoch": ([1], "only the front end reads it; the length of the run is max_train_steps or max_train_epochs"),
    "noise_offset_type": (["Original"], "noise_offset and multires_noise_iterations say it"),
    "stop_text_encoder_training": ([0], _NO_STOP),
    "train_inpainting": ([False], "no known script reads it"),
    "mem_eff_save": ([False], "files are always written without a second copy in memory"),
    "single_blocks_to_swap": ([None], _SWAP),
    "double_blocks_to_swap": ([None], _SWAP),
    "show_timesteps": ([None], "it shows the noise levels of a training"),
    "show_timesteps_resolution": ([None], "it shows the noise levels of a training"),
    "qwen_image_vae_2d": ([False], "an autoencoder of another trainer"),
    "compile": ([False], _COMPILE),
    "compile_backend": (["inductor"], _COMPILE),
    "compile_mode": (["default"], _COMPILE),
    "compile_dynamic": ([None, "auto"], _COMPILE),
    "compile_fullgraph": ([False], _COMPILE),
    "compile_cache_size_limit": ([None], _COMPILE),
    "lr_restart_cycles": ([1], "an old key that no script reads; see --lr_scheduler_num_cycles"),
    "model_train_type": ([None], _TOOL),
    "enable_preview": ([False], _TOOL),
    "enable_block_weights": ([False], _TOOL),
    "enable_base_weight": ([False], _TOOL),
    "gpu_ids": ([None], _TOOL),
    "ui_custom_params": ([None], _TOOL),
    "save_as_bool": ([False], _TOOL),
    "t5xxl_lr": (
        [None],
        "an old key that no script reads; rates of several text encoders are a list in --text_encoder_lr",
    ),
    "learning_rate_te": ([None], "only scripts that train a whole model read it; see --text_encoder_lr"),
}
"""keys that front ends write for all families alike -> their neutral values, and why they are ignored"""

OLD_OPTIONS: dict[str, str] = {
    "use_safetensors": "files, and those of folders, are safetensors unless --save_model_as says otherwise",
}
"""options that old guides give to every script -> why they are ignored, on the command line too"""

INSTEAD: dict[str, str] = {
    "epoch": "use max_train_epochs",
    "single_blocks_to_swap": "use blocks_to_swap",
    "double_blocks_to_swap": "use blocks_to_swap",
    "compile": "use torch_compile",
    "compile_backend": "use dynamo_backend",
    "train_inpainting": "inpainting models are not trained here",
    "stop_text_encoder_training": "use network_train_unet_only or a rate of 0 in text_encoder_lr",
}
"""what to use in place of an option of another script on the command line"""

ONLY_WITH: dict[str, tuple[str, ...]] = {
    "show_timesteps_resolution": ("show_timesteps",),
    "compile_backend": ("compile",),
    "compile_mode": ("compile",),
    "compile_dynamic": ("compile",),
    "compile_fullgraph": ("compile",),
    "compile_cache_size_limit": ("compile",),
}
"""settings of a feature -> the keys that switch it on; without one of them the setting asks for nothing"""

ALSO_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "clip_skip": (1,),
    "max_token_length": (75,),
}
"""options that a family ignores or refuses: values that ask for what happens anyway"""


@cache
def known_defaults() -> dict[str, list[Any]]:
    """Name -> defaults, of every known script and front end."""
    table = {name: json.loads(defaults) for defaults, names in NAMES_BY_DEFAULTS.items() for name in names.split()}
    for name, (values, _) in FRONT_END_KEYS.items():
        table[name] = [*values, *table.get(name, [])]
    return table


def why_ignored(key: str, content: Mapping[str, Any]) -> str:
    """The reason for ignoring a key of another script that stands in a file with `content`."""
    if key == "epoch" and content.get("max_train_steps"):
        return f"the length is max_train_steps = {content['max_train_steps']}, which front ends compute from it"
    if key == "epoch" and content.get("max_train_epochs"):
        return f"the length is max_train_epochs = {content['max_train_epochs']}"
    if key in OLD_OPTIONS:
        return OLD_OPTIONS[key]
    return FRONT_END_KEYS[key][1] if key in FRONT_END_KEYS else "a key of other scripts, which nothing reads here"


def is_neutral(name: str, value: Any, defaults: Iterable[Any]) -> bool:
    """Whether `value` asks for nothing: a default, nothing at all, or zero where no default is another number."""
    if value is None or value is False or value in ("", [], {}, [""]):
        return True
    value = _plain(value)
    accepted = [_plain(default) for default in defaults]
    if any(value == default and isinstance(value, bool) == isinstance(default, bool) for default in accepted):
        return True
    numbers = [d for d in accepted if isinstance(d, (int, float)) and not isinstance(d, bool)]
    return not isinstance(value, bool) and value == 0 and not any(numbers)


def is_idle(name: str, values: Mapping[str, Any]) -> bool:
    """Whether `name` only tunes a feature that nothing in `values` switches on."""
    switches = ONLY_WITH.get(name)
    return switches is not None and all(is_neutral(switch, values.get(switch), []) for switch in switches)


def _plain(value: Any) -> Any:
    """ "1e-4" -> 0.0001, "false" -> False, other texts as they are: front ends write values as texts too."""
    if not isinstance(value, str):
        return value
    lowered = value.strip().lower()
    if lowered in ("true", "false"):
        return lowered == "true"
    try:
        return float(lowered)
    except ValueError:
        return value
