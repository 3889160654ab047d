"""The kinds of adapters, and which kind the tensors of one layer are.

A file may mix kinds: a layer's own tensors decide, never the file's name or metadata. A new kind is a file with a KIND and
one line in the table below.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from library.errors import CheckpointError
from library.registry import import_target
from networks.adapter_module import AdapterModule, change_of

if TYPE_CHECKING:
    from networks.network_args import NetworkSettings
    from networks.network_base import AdditionalNetwork
    from networks.targets import Layer, NetworkTargets

MARKS: dict[str, tuple[str, ...]] = {
    "networks.lora:KIND": ("lora_down.weight", "lora_up.weight", "lora_down.0.weight"),
    "networks.ia3:KIND": ("on_input",),
    "networks.full:KIND": ("diff", "diff_b"),
    "networks.norm:KIND": ("w_norm", "b_norm"),
}
"""kind -> tensor names of which any one tells that a layer is of this kind"""


def _no_arguments(targets: NetworkTargets) -> dict[str, Callable[[Any], Any]]:
    return {}


@dataclass(frozen=True)
class NetworkKind:
    """One kind of adapter.

    `shape_from_file(tensors, split)`: rank, alpha and constructor arguments of a layer in a file.
    `shape_from_settings(settings, layer, split)`: constructor arguments of a layer of a new network.
    `arguments(targets)`: network arguments that only this kind has, name -> parser.
    `refused`: arguments that other kinds have, but not this one, name -> reason (`dropout`, `network_dim` and
    `network_alpha` stand for the options).
    `check(values)`: raises ConfigError for arguments that contradict each other.
    `targets`: the layers of a family that this kind trains, where they are not those of the table.
    `prepare`: a last touch on a new network.
    """

    name: str
    module_class: type[AdapterModule]
    shape_from_file: Callable[[Mapping[str, torch.Tensor], Sequence[int] | None], tuple[int, float | None, dict[str, Any]]]
    shape_from_settings: Callable[[NetworkSettings, Layer, Sequence[int] | None], dict[str, Any]] = lambda settings, layer, split: {}
    arguments: Callable[[NetworkTargets], dict[str, Callable[[Any], Any]]] = _no_arguments
    refused: Mapping[str, str] = field(default_factory=dict)
    check: Callable[[Mapping[str, Any]], None] = lambda values: None
    targets: Callable[[NetworkTargets], NetworkTargets] = lambda targets: targets
    prepare: Callable[[AdditionalNetwork], None] = lambda network: None

    @property
    def tensor_names(self) -> set[str]:
        """Tensors that a layer of this kind may have in a file."""
        return {*self.module_class.weight_keys, *self.module_class.optional_keys, "alpha", "dora_scale"}

    def reads(self, names: Iterable[str]) -> bool:
        """Whether tensors of these names make a layer of this kind. Several kinds may write the same tensors (LoRA, DyLoRA)."""
        names = set(names)
        return names <= self.tensor_names and not self.module_class.missing_keys(names)


def kind_of(names: Iterable[str]) -> NetworkKind | None:
    """The kind that tensors of these names make, None when they are no adapter that is known."""
    names = set(names)
    target = next((target for target, marks in MARKS.items() if not names.isdisjoint(marks)), None)
    return None if target is None else import_target(target)


def known_kind_of(tensors: Mapping[str, torch.Tensor], lora_name: str) -> NetworkKind:
    """As kind_of, for a layer of a file: CheckpointError when the kind is unknown or its tensors are not complete."""
    kind = kind_of(tensors)
    if kind is None:
        known = ", ".join(marks[0] for marks in MARKS.values())
        raise CheckpointError(f"{lora_name} has {', '.join(sorted(tensors))}, which is no kind of adapter that is known ({known})")
    missing = kind.module_class.missing_keys(tensors)
    if missing:
        raise CheckpointError(f"{lora_name} has {', '.join(sorted(tensors))}; needed for {kind.name}: {', '.join(missing)} too")
    return kind


def weight_change(tensors: Mapping[str, torch.Tensor], weight: torch.Tensor, multiplier: float = 1.0, lora_name: str = "") -> torch.Tensor:
    """Change of a weight by one layer's tensors, whatever their kind: float32, shape of `weight`, on the tensors' device."""
    return change_of(known_kind_of(tensors, lora_name).module_class, tensors, weight, multiplier)


def bias_change(tensors: Mapping[str, torch.Tensor], multiplier: float = 1.0, lora_name: str = "") -> torch.Tensor | None:
    """Change of a bias by one layer's tensors, None when the kind leaves it alone."""
    return known_kind_of(tensors, lora_name).module_class.bias_change(tensors, multiplier)
