"""A network in words: its kinds, ranks, alphas and strength, for the page at start."""

from __future__ import annotations

from collections import defaultdict

from networks.kinds.adapter_module import AdapterModule
from networks.kinds.additional_network import AdditionalNetwork


def describe_network(network: AdditionalNetwork) -> str:
    """`lora on 38 layers, rank 16, alpha 8, strength 0.5 (alpha / rank)`, one part per kind of adapter."""
    kinds: dict[str, list[AdapterModule]] = defaultdict(list)
    for module in network.loras:
        kinds[kind_word(module)].append(module)
    return "; ".join(_of_kind(word, modules) for word, modules in sorted(kinds.items(), key=lambda item: -len(item[1])))


def kind_word(module: AdapterModule) -> str:
    """The short name of a layer's kind, as --network_module takes it."""
    word = type(module).__module__.rpartition(".")[2]
    return f"{word} with weight decomposition (DoRA)" if module.dora_scale is not None else word


def is_scaled_by_rank(module: AdapterModule) -> bool:
    """Whether alpha / rank is the strength of the change. Rotations read alpha as a limit, others have none."""
    return module.has_alpha and module.neutral_alpha == float(module.lora_dim)


def _of_kind(word: str, modules: list[AdapterModule]) -> str:
    text = f"{word} on {len(modules)} layer{'s' * (len(modules) != 1)}"
    scaled = [module for module in modules if is_scaled_by_rank(module)]
    if not scaled:
        return text
    ranks, alphas, scales = (
        [get(m) for m in scaled] for get in (lambda m: m.lora_dim, lambda m: float(m.alpha), lambda m: m.scale)
    )
    return f"{text}, rank {_range(ranks)}, alpha {_range(alphas)}, strength {_range(scales)} (alpha / rank)"


def _range(values: list[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"
