"""Option names of other scripts and of graphical front ends, with the values that ask for nothing."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from library.training.known_options_table import NAMES_BY_DEFAULTS

FRONT_END_KEYS: dict[str, list[Any]] = {
    "epoch": [1],
    "noise_offset_type": ["Original"],
    "stop_text_encoder_training": [0],
    "train_inpainting": [False],
    "mem_eff_save": [False],
    "single_blocks_to_swap": [None],
    "double_blocks_to_swap": [None],
    "show_timesteps": [None],
    "show_timesteps_resolution": [None],
    "qwen_image_vae_2d": [False],
    "compile": [False],
    "compile_backend": ["inductor"],
    "compile_mode": ["default"],
    "compile_dynamic": [None, "auto"],
    "compile_fullgraph": [False],
    "compile_cache_size_limit": [None],
}
"""keys that front ends write for all families alike -> their neutral values"""

INSTEAD: dict[str, str] = {
    "epoch": "use max_train_epochs",
    "single_blocks_to_swap": "use blocks_to_swap",
    "double_blocks_to_swap": "use blocks_to_swap",
    "compile": "use torch_compile",
    "compile_backend": "use dynamo_backend",
    "train_inpainting": "inpainting models are not trained here",
    "stop_text_encoder_training": "use network_train_unet_only or a rate of 0 in text_encoder_lr",
}
"""what to use in place of a key that asks for something"""

ONLY_WITH: dict[str, tuple[str, ...]] = {
    "multires_noise_discount": ("multires_noise_iterations",),
    "noise_offset_random_strength": ("noise_offset",),
    "adaptive_noise_scale": ("noise_offset",),
    "ip_noise_gamma_random_strength": ("ip_noise_gamma",),
    "sample_sampler": ("sample_prompts",),
    "show_timesteps_resolution": ("show_timesteps",),
    "compile_backend": ("compile",),
    "compile_mode": ("compile",),
    "compile_dynamic": ("compile",),
    "compile_fullgraph": ("compile",),
    "compile_cache_size_limit": ("compile",),
}
"""settings of a feature -> the options that switch it on; without one of them the setting asks for nothing"""

ALSO_NEUTRAL: dict[str, list[Any]] = {"clip_skip": [1], "max_token_length": [75], "sample_sampler": ["euler", "k_euler"]}
"""refused options: values that ask for what happens anyway"""


@cache
def known_defaults() -> dict[str, list[Any]]:
    """Name -> defaults, of every known script and front end."""
    table = {name: json.loads(defaults) for defaults, names in NAMES_BY_DEFAULTS.items() for name in names.split()}
    for name, values in FRONT_END_KEYS.items():
        table[name] = [*values, *table.get(name, [])]
    return table


def is_neutral(name: str, value: Any, defaults: list[Any]) -> bool:
    """Whether `value` asks for nothing: a default, nothing at all, or zero where no default is another number."""
    if value is None or value == "" or value is False or value == [] or value == {}:
        return True
    value = _plain(value)
    accepted = [_plain(default) for default in (*defaults, *ALSO_NEUTRAL.get(name, []))]
    if any(value == default and isinstance(value, bool) == isinstance(default, bool) for default in accepted):
        return True
    numbers = [d for d in accepted if isinstance(d, (int, float)) and not isinstance(d, bool)]
    return not isinstance(value, bool) and value == 0 and not any(numbers)


def is_idle(name: str, values: dict[str, Any]) -> bool:
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
