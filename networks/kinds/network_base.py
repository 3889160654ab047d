"""Networks made from settings or from a file, for any kind of adapter: what a network module offers."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from library.core.errors import CheckpointError, ConfigError, Problems
from library.core.registry import import_target
from networks.files.layer_tensors import missing_alphas
from networks.files.network_files import by_module, match_names, read_adapter_file, to_kohya_names
from networks.kinds.adapter_family import nothing_fits
from networks.kinds.adapter_module import AdapterModule
from networks.kinds.additional_network import LISTED_PROBLEMS, AdditionalNetwork
from networks.kinds.network_args import NEEDS, NetworkSettings, parse_network_args
from networks.kinds.registry import MARKS, NetworkKind, kind_for
from networks.kinds.selection import LayerPlan, all_layers, block_of, plan_network, rate_of, split_of
from networks.kinds.targets import Layer, NetworkTargets, targets_of_denoiser, targets_of_family

__all__ = [
    "AdapterModule",
    "AdditionalNetwork",
    "NetworkFunctions",
    "NetworkKind",
    "NetworkTargets",
    "build_from_weights",
    "build_network",
]

logger = logging.getLogger(__name__)

OPTIONS = ("dropout", "network_dim", "network_alpha")


def encoder_list(text_encoder: Any) -> list[nn.Module | None]:
    """A bare text encoder, a list of them, or nothing, as a list."""
    if text_encoder is None:
        return []
    return list(text_encoder) if isinstance(text_encoder, (list, tuple)) else [text_encoder]


def read_settings(
    kind: NetworkKind, targets: NetworkTargets, rank: int | None, alpha: float | None, dropout: float | None,
    pairs: Mapping[str, Any],
    explicit: Mapping[str, Any] | None = None,
) -> NetworkSettings:
    """The settings of a network from the arguments of create_network. `explicit` holds network_dim and network_alpha
    where the user gave them, for kinds that have none."""
    values = parse_network_args(pairs, targets, kind.arguments(targets))
    dropout = values.pop("dropout", None) if dropout is None else dropout
    values.pop("dropout", None)
    problems = Problems()
    options = {"dropout": dropout, **(explicit or {})}
    for name, reason in kind.refused.items():
        value = options.get(name, values.get(name))
        if value:
            option = f"--network_{name.removeprefix('network_')}" if name in OPTIONS else f"--network_args {name}"
            problems.add(f"{option} is {value}; {kind.name} has none: {reason}")
    if not kind.module_class.plus_names:
        for name in [name for name in values if name.startswith("loraplus_")]:
            problems.add(f"--network_args {name}: {kind.name} has no part that LoRA+ would train faster; leave it out")
    for name, needed in NEEDS.items():
        if (
            values.get(name) is not None
            and name not in kind.refused
            and not any(values.get(other) is not None for other in needed)
        ):
            problems.add(
                f"--network_args {name} is given without {' or '.join(needed)}, which it belongs to; add it, or leave "
                f"{name} out"
            )
    problems.attempt(lambda: kind.check(values))
    problems.raise_if_any()
    return NetworkSettings(4 if rank is None else int(rank), alpha, dropout, values)


def build_network(
    kind: NetworkKind, multiplier: float, rank: int | None, alpha: float | None,
    text_encoder: Any, unet: nn.Module, dropout: float | None, pairs: Mapping[str, Any],
) -> AdditionalNetwork:
    """A new network of this kind for these models."""
    targets = kind.targets(targets_of_denoiser(unet))
    settings = read_settings(kind, targets, rank, alpha, dropout, pairs)
    plans = plan_network(targets, unet, encoder_list(text_encoder), settings)
    problems = Problems()
    modules = [problems.attempt(lambda plan=plan: build_module(kind, plan, multiplier, settings)) for plan in plans]
    if len(problems.messages) > LISTED_PROBLEMS:
        problems.messages[LISTED_PROBLEMS:] = [f"and {len(problems.messages) - LISTED_PROBLEMS} more layers like these"]
    problems.raise_if_any()
    return _finished(kind, AdditionalNetwork(targets, settings, [m for m in modules if m is not None], multiplier))


def build_module(kind: NetworkKind, plan: LayerPlan, multiplier: float, settings: NetworkSettings) -> AdapterModule:
    """The adapter of one layer of a new network: norms have a kind of their own."""
    if plan.layer.is_norm:
        kind = norm_kind()
    _check_layer(kind, plan.layer, ConfigError, "exclude it")
    if settings.get("rs_lora"):  # scale alpha / sqrt(rank), kept as an alpha that every reader divides by the rank
        plan = replace(plan, alpha=(plan.alpha or plan.rank) * plan.rank**0.5)
    module = _build(kind, plan, multiplier, settings, kind.shape_from_settings(settings, plan.layer, plan.split))
    if settings.get("dora_wd") and module.decomposable:
        module.decompose_weight(settings.get("wd_on_output", True))
    return module


def build_from_weights(
    kind: NetworkKind, multiplier: float, file: str | None, text_encoder: Any, unet: nn.Module,
    weights_sd: Mapping[str, torch.Tensor] | None, for_inference: bool, pairs: Mapping[str, Any],
) -> tuple[AdditionalNetwork, dict[str, torch.Tensor]]:
    """A network with the layers, kinds, ranks and alphas of a file (not loaded yet), and the file's tensors.

    Every layer gets the kind of its own tensors, so that a file may mix kinds; `kind` says which arguments are known.
    Layers that are in no model are left out with a warning, CheckpointError when none is in one; arguments that would
    change shapes (ranks by part, ...) have no effect, all others (dropouts, rates, LoRA+) apply.
    """
    targets = kind.targets(targets_of_denoiser(unet))
    label = file or "the given weights"
    tensors = read_adapter_file(file, targets) if weights_sd is None else to_kohya_names(weights_sd, targets, label)
    pairs = dict(pairs)
    settings = read_settings(kind, targets, None, None, pairs.pop("neuron_dropout", None), pairs)
    layers = {
        layer.lora_name: layer for layer in all_layers(targets, unet, encoder_list(text_encoder), settings, every=True)
    }
    parts = by_module(tensors)
    found, unknown = match_names(parts, layers, targets)
    if not found:
        raise CheckpointError(nothing_fits(label, parts, targets.family))
    if unknown:
        logger.warning(
            "%s: %d of %d modules are in no loaded model and are left out (first: %s)", label, len(unknown), len(parts),
            unknown[0]
        )
    without = missing_alphas({name: parts[name] for name in found})
    if without:
        logger.warning("%s: %s", label, without)
    fused = replace(targets, part_by_part=False)  # in a file the tensors tell; only split_qkv takes a layer apart
    modules = [
        module_from_tensors(
            parts[name], layers[own], split_of(fused, layers[own], settings), multiplier, settings, kind
        )
        for name, own in found.items()
    ]
    if for_inference:
        settings = replace(settings, values={})
    else:
        _refuse_parts(modules, label)
        _check_use(kind, [module for module in modules if not module.is_norm], settings, label)
    network = _finished(kind, AdditionalNetwork(targets, settings, modules, multiplier))
    _give_rates(network, {name: layers[name] for name in found.values()})
    if for_inference:
        network.requires_grad_(False).eval()
        for module in network.loras:
            module.requires_grad_(False).eval()
    return network, tensors


def module_from_tensors(
    tensors: Mapping[str, torch.Tensor], layer: Layer, split: Sequence[int] | None, multiplier: float,
    settings: NetworkSettings,
    wanted: NetworkKind | None = None,
) -> AdapterModule:
    """A module with the shapes of a layer's tensors in a file, of the kind `wanted` where the tensors may be its
    own."""
    kind = kind_for(tensors, layer.lora_name, wanted)
    _check_layer(kind, layer, CheckpointError, "the file belongs to another model")
    split = split if kind.splits else None
    rank, alpha, shape = kind.shape_from_file(tensors, split)
    module = _build(kind, LayerPlan(layer, rank, alpha, None, split), multiplier, settings, shape)
    module.add_optional(tensors)
    return module


def _check_use(kind: NetworkKind, modules: Sequence[AdapterModule], settings: NetworkSettings, label: str) -> None:
    """The layers of a file have the kinds of their tensors, for which arguments of `kind` may do nothing: ConfigError
    where one does nothing for any of them, a warning where it does nothing for some."""
    values = {
        "dropout": settings.neuron_dropout,
        **{name: settings.get(name) for name in ("rank_dropout", "module_dropout")},
    }
    idle = {name: [module for module in modules if name not in module.drops] for name, value in values.items() if value}
    ratios = [name for name in settings.values if name.startswith("loraplus_") and settings.get(name)]
    idle.update({name: [module for module in modules if not module.plus_names] for name in ratios})
    problems = Problems()
    for name, without in idle.items():
        option = "--network_dropout" if name == "dropout" else f"--network_args {name}"
        if without and len(without) == len(modules):
            problems.add(
                f"{option} is given, and no layer of {label} is of a kind that it does something for (the kinds are "
                "those of its"
                " tensors); leave it out"
            )
        elif without:
            logger.warning(
                "%s does nothing for %d of the %d layers of %s (first: %s), because of their kind",
                option, len(without), len(modules), label, without[0].lora_name,
            )
    problems.raise_if_any()
    others = [module for module in modules if not isinstance(module, kind.module_class)]
    if others and not any(import_target(target) is kind for target in MARKS):
        logger.warning(
            "%d of the %d layers of %s are not trained as %s but as what their tensors are (first: %s)",
            len(others), len(modules), label, kind.name, others[0].lora_name,
        )


def _refuse_parts(modules: Sequence[AdapterModule], label: str) -> None:
    """CheckpointError for layers with adapters on their parts, which are not trained."""
    from networks.files.stacked import StackedModule

    found = next((module.lora_name for module in modules if isinstance(module, StackedModule)), None)
    if found is not None:
        raise CheckpointError(
            f"{label}: {found} is one layer here and has adapters other than plain LoRA on its parts, which cannot be "
            "trained on; merge the file"
            " into the base instead (--base_weights, or tools/merge_lora.py --model) and train a new adapter"
        )


def norm_kind() -> NetworkKind:
    return import_target("networks.norm:KIND")  # made of what stands in this file


def _check_layer(kind: NetworkKind, layer: Layer, error: type[Exception], advice: str) -> None:
    """Raise `error` for a layer that this kind of adapter is not defined for."""
    known, own = kind.module_class.layer_classes, type(layer.module).__name__
    if own not in known:
        raise error(
            f"{layer.lora_name} is a layer of class {own}; {kind.name} is defined for {', '.join(known)}; {advice}"
        )


def _give_rates(network: AdditionalNetwork, layers: Mapping[str, Any]) -> None:
    for module in network.loras:
        layer = layers[module.lora_name]
        module.rate = rate_of(network.targets, layer, network.settings)
        module.block = block_of(network.targets, layer)


def _build(
    kind: NetworkKind, plan: LayerPlan, multiplier: float, settings: NetworkSettings, shape: Mapping[str, Any]
) -> AdapterModule:
    extra = dict(shape)
    if plan.split:
        extra["split"] = plan.split
    module = kind.module_class(
        plan.layer.lora_name, plan.layer.module, multiplier, plan.rank, plan.alpha,
        settings.neuron_dropout, settings.get("rank_dropout"), settings.get("module_dropout"), **extra,
    )
    module.rate, module.block = plan.rate, plan.block
    return module


def _finished(kind: NetworkKind, network: AdditionalNetwork) -> AdditionalNetwork:
    kind.prepare(network)
    logger.info(
        "adapter for %s: %d modules in the denoiser, %d in the text encoders",
        network.targets.family, len(network.unet_loras), len(network.text_encoder_loras),
    )
    if network.settings.get("verbose"):
        for module in network.loras:
            logger.info("  %s rank %d alpha %g", module.lora_name, module.lora_dim, float(module.alpha))
    return network


@dataclass(frozen=True)
class NetworkFunctions:
    """The functions that a network module offers to trainers and image scripts, for one kind of adapter."""

    kind: NetworkKind

    def check_network_args(
        self, pairs: Mapping[str, Any], family: str, explicit: Mapping[str, Any] | None = None
    ) -> None:
        """Raise ConfigError for arguments that create_network would refuse, before any model is loaded. `explicit`
        holds network_dim and network_alpha where the user gave them."""
        pairs = dict(pairs)
        dropout = pairs.pop("neuron_dropout", None)
        read_settings(self.kind, self.kind.targets(targets_of_family(family)), None, None, dropout, pairs, explicit)

    def create_network(
        self,
        multiplier: float,
        network_dim: int | None,
        network_alpha: float | None,
        vae: nn.Module | None,
        text_encoder: nn.Module | Sequence[nn.Module | None] | None,
        unet: nn.Module,
        neuron_dropout: float | None = None,
        **kwargs: Any,
    ) -> AdditionalNetwork:
        """A new network for these models. `kwargs` are the --network_args pairs; `vae` is not used."""
        return build_network(
            self.kind, multiplier, network_dim, network_alpha, text_encoder, unet, neuron_dropout, kwargs
        )

    def create_network_from_weights(
        self,
        multiplier: float,
        file: str | None,
        vae: nn.Module | None,
        text_encoder: nn.Module | Sequence[nn.Module | None] | None,
        unet: nn.Module,
        weights_sd: Mapping[str, torch.Tensor] | None = None,
        for_inference: bool = False,
        **kwargs: Any,
    ) -> tuple[AdditionalNetwork, dict[str, torch.Tensor]]:
        """A network with the layers, kinds, ranks and alphas of a file, not loaded yet, and the file's tensors."""
        return build_from_weights(self.kind, multiplier, file, text_encoder, unet, weights_sd, for_inference, kwargs)
