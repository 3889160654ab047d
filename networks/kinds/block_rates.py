"""Learning rate factors of the blocks of a U-Net: `down_lr_weight`, `mid_lr_weight`, `up_lr_weight`.

Factors of the way down go from shallow to deep, those of the way up from deep to shallow. Written as numbers with
commas, one number for all blocks, or the name of a curve with an optional base: `sine+.25`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from library.core.errors import ConfigError, did_you_mean
from library.core.options import number_problem

if TYPE_CHECKING:
    from networks.kinds.network_args import NetworkSettings
    from networks.kinds.targets import BlockTable, NetworkTargets

CURVES: dict[str, Callable[[float], float]] = {
    "sine": lambda x: math.sin(math.pi * x / 2),
    "cosine": lambda x: math.sin(math.pi * (1 - x) / 2),
    "linear": lambda x: x,
    "reverse_linear": lambda x: 1 - x,
    "zeros": lambda x: 0.0,
}
"""name -> factor at place x of the part, 0 = first block, 1 = last"""

NAMES = ("down_lr_weight", "mid_lr_weight", "up_lr_weight")


def curve_factors(name: str, base: float, count: int) -> list[float]:
    """`count` factors of a curve plus `base`. ConfigError for an unknown name."""
    if name not in CURVES:
        raise ValueError(
            f"there is no curve '{name}'{did_you_mean(name, CURVES)} Known: {', '.join(CURVES)}, or numbers with commas"
        )
    return [CURVES[name](i / max(count - 1, 1)) + base for i in range(count)]


def factor_parser(count: int) -> Callable[[Any], list[float]]:
    """Parser of the factors of a part with `count` blocks. Factors that a list leaves out at its end are 1, empty ones
    0; more than `count` are an error."""

    def parse(value: Any) -> list[float]:
        if isinstance(value, (list, tuple)):
            items = [str(item) for item in value]
        else:
            match = re.fullmatch(r"\s*([a-z_]+)\s*(?:\+\s*([\d.]+))?\s*", str(value))
            if match:
                return curve_factors(match[1], float(match[2] or 0), count)
            items = [item.strip() for item in str(value).strip().removeprefix("[").removesuffix("]").split(",")]
        if len(items) > count:
            raise ValueError(f"there are {len(items)} factors for {count} blocks; needed: one for all, or one for each")
        factors = [_factor(item) for item in items]
        return factors * count if len(factors) == 1 else factors + [1.0] * (count - len(factors))

    return parse


def _factor(text: str) -> float:
    try:
        factor = float(text or 0)
    except ValueError:
        raise ValueError(f"'{text}' is no number") from None
    if not factor >= 0 or number_problem(factor, is_whole=False):
        raise ValueError(f"{text} is no factor of a learning rate; needed: 0 or more")
    return factor


def block_parsers(blocks: BlockTable) -> dict[str, Callable[[Any], Any]]:
    """Parsers of the arguments of this file."""
    parts = (blocks.down, blocks.mid, blocks.up)
    parsers: dict[str, Callable[[Any], Any]] = {
        name: factor_parser(len(part)) for name, part in zip(NAMES, parts, strict=True)
    }
    return {**parsers, "block_lr_zero_threshold": _factor_of}


def _factor_of(value: Any) -> float:
    return _factor(str(value))


def block_factors(targets: NetworkTargets, settings: NetworkSettings) -> list[float] | None:
    """One factor per numbered block; None when no factors are given. Factors up to `block_lr_zero_threshold` count as
    0."""
    blocks = targets.blocks
    if blocks is None or not any(settings.get(name) for name in NAMES):
        return None
    factors, threshold = [1.0] * blocks.count, settings.get("block_lr_zero_threshold", 0.0)
    for name, part in zip(NAMES, (blocks.down, blocks.mid, blocks.up), strict=True):
        for block, factor in zip(part, settings.get(name, ()), strict=False):
            factors[block] = factor if factor > threshold else 0.0
    return factors


def check_block_rates(values: dict[str, Any]) -> None:
    """ConfigError for a threshold without factors to compare with it."""
    if values.get("block_lr_zero_threshold") is not None and not any(values.get(name) for name in NAMES):
        raise ConfigError(
            f"--network_args block_lr_zero_threshold is set without any of {', '.join(NAMES)}; add one, or leave it out"
        )
