"""Which layers are trained, and each one's rank, alpha and rate. The one place where these rules are applied.

Rank of a layer, first rule that speaks: block selection (not selected = 0) > exclude and include patterns >
`network_reg_dims` > ranks by part or block > the network's rank. 0 = the layer takes no adapter.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from library.core.errors import ConfigError
from networks.kinds.block_rates import block_factors
from networks.kinds.network_args import NetworkSettings, selected_blocks
from networks.kinds.targets import (
    NORM_CLASSES,
    Layer,
    NetworkTargets,
    denoiser_layers,
    entry_layers,
    text_encoder_layers,
    weighted_layers,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LayerPlan:
    """One adapter to be built. `rate` is (number of the pattern, learning rate) from network_reg_lrs; `split` gives the
    rows of the parts of a fused layer that is trained part by part."""

    layer: Layer
    rank: int
    alpha: float | None
    rate: tuple[int, float] | None = None
    split: tuple[int, ...] | None = None
    block: int | None = None
    """number of the U-Net block that the layer stands in"""


def plan_network(
    targets: NetworkTargets, denoiser: nn.Module, text_encoders: Sequence[nn.Module | None], settings: NetworkSettings
) -> list[LayerPlan]:
    """The adapters for these models. Text encoders stand at their place in the family's list, absent ones as None."""
    layers = all_layers(targets, denoiser, text_encoders, settings)
    selected = {**_selected_by_rate(targets, layers, settings), **_selected_by_index(targets, layers, settings)}
    plans = []
    for layer in layers:
        rank, alpha = _rank_and_alpha(targets, layer, settings, selected)
        if rank > 0:
            rate, split = rate_of(targets, layer, settings), split_of(targets, layer, settings)
            plans.append(LayerPlan(layer, rank, alpha, rate, split, block_of(targets, layer)))
    _warn_about_idle_settings(targets, layers, settings)
    return plans


def all_layers(
    targets: NetworkTargets,
    denoiser: nn.Module,
    text_encoders: Sequence[nn.Module | None],
    settings: NetworkSettings,
    *,
    every: bool = False,
) -> list[Layer]:
    """Layers that the settings make targets; with `every` all that a file may name: whatever has a weight."""
    encoders = list(enumerate(text_encoders[: len(targets.text_encoders)]))
    if every:
        return [
            layer
            for position, part in [(None, denoiser), *encoders]
            if part is not None
            for layer in weighted_layers(part, position, targets)
        ]
    classes, paths = targets.classes, None
    if targets.choice:
        choice = settings.get(targets.choice.arg, next(iter(targets.choice.classes)))
        classes, paths = targets.choice.classes[choice], targets.choice.paths.get(choice)
    if settings.get("conv_dim") or settings.get("conv_block_dims"):
        classes = (*classes, *targets.conv_classes)
    for arg, added in targets.optional_classes.items():
        if settings.get(arg):
            classes = (*classes, *added)
    if settings.get("train_norm"):
        targets = replace(targets, leaf_classes=(*targets.leaf_classes, *NORM_CLASSES))
    layers = denoiser_layers(denoiser, targets, classes)
    if targets.narrowed and not settings.get(targets.narrowed[1]):
        paths = targets.narrowed[0]
    if paths is not None:
        layers = [layer for layer in layers if re.fullmatch(paths, layer.path)]
    if targets.entries and settings.get(targets.entries.arg):
        layers += entry_layers(denoiser, targets)
    for position, encoder in encoders:
        switch = targets.text_encoders[position].switch
        if encoder is not None and (switch is None or settings.get(switch)):
            layers += text_encoder_layers(encoder, position, targets)
    return layers


def split_of(targets: NetworkTargets, layer: Layer, settings: NetworkSettings) -> tuple[int, ...] | None:
    """Rows of the parts of a layer that is trained part by part."""
    if targets.part_by_part and layer.encoder is None and type(layer.module).__name__ == "Linear":
        return fused_rows(targets, layer) or (layer.module.out_features,)
    return fused_rows(targets, layer) if settings.get("split_qkv") else None


def fused_rows(targets: NetworkTargets, layer: Layer) -> tuple[int, ...] | None:
    """Rows of the parts (query, key, value, ...) of a fused layer; None when the layer is no such one."""
    if layer.encoder is not None or type(layer.module).__name__ != "Linear":
        return None
    for rule in targets.splits:
        if re.fullmatch(rule.pattern, layer.path):
            return tuple(rule.sizes(layer.module.out_features, layer.module.in_features))
    return None


def _rank_and_alpha(
    targets: NetworkTargets, layer: Layer, settings: NetworkSettings, selected: dict[str, bool]
) -> tuple[int, float | None]:
    alpha = settings.alpha
    if not selected.get(layer.lora_name, True) or _excluded(targets, layer, settings):
        return 0, alpha
    for pattern, rank in settings.get("network_reg_dims", ()):
        if matches(targets, pattern, layer):
            return rank, alpha
    if layer.encoder is None:
        rank = _part_rank(targets, layer, settings)
        if rank is not None:
            return rank, alpha
        block = block_of(targets, layer)
        if block is not None:
            return _block_rank(layer, settings, block)
    if layer.is_kxk_conv:
        return settings.conv_rank, settings.conv_alpha
    return settings.rank, alpha


def _part_rank(targets: NetworkTargets, layer: Layer, settings: NetworkSettings) -> int | None:
    if targets.entries and settings.get(targets.entries.arg):
        for (_, pattern), rank in zip(targets.entries.parts, settings.get(targets.entries.arg), strict=True):
            if re.fullmatch(pattern, layer.path):
                return rank
    for rule in targets.parts:
        if settings.get(rule.arg) is not None and re.fullmatch(rule.pattern, layer.path):
            return settings.get(rule.arg)
    return None


def _block_rank(layer: Layer, settings: NetworkSettings, block: int) -> tuple[int, float | None]:
    def of_block(name: str, default: Any) -> Any:
        values = settings.get(name)
        return default if values is None else values[block]

    if layer.is_kxk_conv:
        if settings.get("enable_conv"):
            return of_block("block_dims", settings.rank), of_block("block_alphas", settings.alpha)
        return of_block("conv_block_dims", settings.conv_rank), of_block("conv_block_alphas", settings.conv_alpha)
    return of_block("block_dims", settings.rank), of_block("block_alphas", settings.alpha)


def _excluded(targets: NetworkTargets, layer: Layer, settings: NetworkSettings) -> bool:
    defaults = targets.default_excludes if layer.encoder is None else targets.encoder_excludes
    if layer.is_norm:  # trained only when they are asked for
        defaults = ()
    excludes = [*map(re.compile, defaults), *settings.get("exclude_patterns", ())]
    if not any(pattern.fullmatch(layer.path) for pattern in excludes):
        return False
    return not any(pattern.fullmatch(layer.path) for pattern in settings.get("include_patterns", ()))


def matches(targets: NetworkTargets, pattern: re.Pattern[str], layer: Layer) -> bool:
    """Whether a rank or rate pattern means this layer."""
    if targets.regex_on_path:
        return pattern.fullmatch(layer.path) is not None
    return pattern.search(layer.lora_name) is not None or pattern.search(layer.path) is not None


def rate_of(targets: NetworkTargets, layer: Layer, settings: NetworkSettings) -> tuple[int, float] | None:
    for number, (pattern, rate) in enumerate(settings.get("network_reg_lrs", ())):
        if matches(targets, pattern, layer):
            return number, rate
    return None


def block_of(targets: NetworkTargets, layer: Layer) -> int | None:
    """The number of the U-Net block that a layer stands in; None outside the blocks and for families without
    numbers."""
    return targets.blocks.index_of(layer.path) if targets.blocks and layer.encoder is None else None


def _selected_by_rate(targets: NetworkTargets, layers: list[Layer], settings: NetworkSettings) -> dict[str, bool]:
    """lora name -> False for the layers of blocks whose learning rate factor is 0."""
    factors = block_factors(targets, settings)
    if factors is None:
        return {}
    blocks = {layer.lora_name: block for layer in layers if (block := block_of(targets, layer)) is not None}
    idle = sorted({block for block in blocks.values() if factors[block] == 0})
    if idle:
        logger.info("not trained, as their learning rate factor is 0: blocks %s", ", ".join(map(str, idle)))
    return {name: False for name, block in blocks.items() if factors[block] == 0}


def _selected_by_index(targets: NetworkTargets, layers: list[Layer], settings: NetworkSettings) -> dict[str, bool]:
    """lora name -> whether its block is selected, for layers of blocks that a given selection speaks of."""
    chosen: dict[str, bool] = {}
    for rule in targets.indices:
        text = settings.get(rule.arg)
        if text is None:
            continue
        numbers = {
            layer.lora_name: int(match[1])
            for layer in layers
            if layer.encoder is None and (match := re.match(rule.pattern, layer.path))
        }
        if not numbers:
            raise ConfigError(
                f"--network_args {rule.arg}={text}: none of the blocks that it selects from is trained or exists"
            )
        blocks = selected_blocks(text, max(numbers.values()) + 1, rule.arg)
        chosen.update({name: number in blocks for name, number in numbers.items()})
    return chosen


def _warn_about_idle_settings(targets: NetworkTargets, layers: list[Layer], settings: NetworkSettings) -> None:
    for name in ("network_reg_dims", "network_reg_lrs"):
        for pattern, _ in settings.get(name, ()):
            if not any(matches(targets, pattern, layer) for layer in layers):
                logger.warning("--network_args %s: the expression '%s' matches no layer", name, pattern.pattern)
    for name in ("exclude_patterns", "include_patterns"):
        for pattern in settings.get(name, ()):
            if not any(pattern.fullmatch(layer.path) for layer in layers):
                logger.warning(
                    "--network_args %s: the expression '%s' matches no layer (the whole dotted name is compared, e.g. "
                    "%s)",
                    name,
                    pattern.pattern,
                    layers[0].path if layers else "none",
                )
    if settings.get("conv_dim") and not any(layer.is_kxk_conv for layer in layers):
        logger.warning(
            "--network_args conv_dim: this model has no convolution larger than 1x1 among its targets; no effect"
        )
