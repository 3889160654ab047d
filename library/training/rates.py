"""Learning rates by the path of a parameter, for whatever is trained: `regex=rate,regex=rate`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from library.core.errors import ConfigError
from networks.kinds.network_args import pattern_values, rate

if TYPE_CHECKING:
    import torch

Rates = Sequence[tuple[re.Pattern[str], float]]


def parse_rates(text: str | None, option: str) -> Rates:
    """Patterns with their rates in the order in which they are written; ConfigError that names the option."""
    if not text:
        return ()
    try:
        return pattern_values(text, rate)
    except ValueError as error:
        raise ConfigError(f"--{option} is {text}; needed: regex=rate,regex=rate ({error})") from error


def rate_groups(
    named: Iterable[tuple[str, torch.nn.Parameter]], default: float, rates: Rates = (), *, name: str
) -> list[dict[str, Any]]:
    """Optimizer groups of parameters with their paths. The first pattern that is found in a path gives its rate, else
    `default`; parameters of rate 0 are frozen and in no group."""
    groups: dict[int, dict[str, Any]] = {}
    for path, parameter in named:
        number = next((i for i, (pattern, _) in enumerate(rates) if pattern.search(path)), -1)
        lr = default if number < 0 else rates[number][1]
        parameter.requires_grad_(bool(lr))
        if lr:
            label = name if number < 0 else f"{name} {rates[number][0].pattern}"
            groups.setdefault(number, {"params": [], "lr": lr, "name": label})["params"].append(parameter)
    return [groups[number] for number in sorted(groups)]
