"""Learning rate factors of the blocks of a U-Net: `down_lr_weight`, `mid_lr_weight`, `up_lr_weight`.

Factors of the way down go from shallow to deep, those of the way up from deep to shallow. Written as numbers with
commas, one number for all blocks, or the name of a curve with an optional base: `sine+.25`
(library/core/learning_rates.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from library.core.errors import ConfigError
from library.core.learning_rates import factor, factor_parser

if TYPE_CHECKING:
    from networks.kinds.network_args import NetworkSettings
    from networks.kinds.targets import BlockTable, NetworkTargets

NAMES = ("down_lr_weight", "mid_lr_weight", "up_lr_weight")


def block_parsers(blocks: BlockTable) -> dict[str, Callable[[Any], Any]]:
    """Parsers of the arguments of this file."""
    parts = (blocks.down, blocks.mid, blocks.up)
    parsers: dict[str, Callable[[Any], Any]] = {
        name: factor_parser(len(part)) for name, part in zip(NAMES, parts, strict=True)
    }
    return {**parsers, "block_lr_zero_threshold": _factor_of}


def _factor_of(value: Any) -> float:
    return factor(str(value))


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
