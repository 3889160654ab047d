"""The kinds of adapters, and which kind the tensors of one layer are.

A file may mix kinds: a layer's own tensors decide, never the file's name or metadata. A new kind is a file with a KIND
and one line in the table below; one from outside calls `register_kind`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from library.checkpoints.adapter_tensors import OUTSIDE, load_installed_kinds
from library.core.errors import CheckpointError
from library.core.registry import import_target
from networks.files.layer_tensors import missing_alphas, problem_of
from networks.files.parameter_names import PARAMETERS
from networks.kinds.adapter_module import AdapterModule, change_of

if TYPE_CHECKING:
    from networks.kinds.network_args import NetworkSettings
    from networks.kinds.network_base import AdditionalNetwork
    from networks.kinds.targets import Layer, NetworkTargets

logger = logging.getLogger(__name__)

Mark = str | tuple[str, int]

MARKS: dict[str, tuple[Mark, ...]] = {
    "networks.lora:KIND": ("lora_down.weight", "lora_up.weight", "lora_down.0.weight"),
    "networks.loha:KIND": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
    "networks.lokr:KIND": ("lokr_w1", "lokr_w2", "lokr_w1_a", "lokr_w2_a"),
    "networks.glora:KIND": ("a1.weight", "a2.weight", "b1.weight", "b2.weight"),
    "networks.boft:KIND": (("oft_blocks", 4),),
    "networks.oft:KIND": (("oft_blocks", 3), "oft_blocks.0"),
    "networks.ia3:KIND": ("on_input",),
    "networks.full:KIND": ("diff", "diff_b"),
    "networks.norm:KIND": ("w_norm", "b_norm"),
    "networks.files.stacked:KIND": ("part.rows",),
}
"""kind -> marks of which any one tells that a layer is of this kind: the name of a tensor, or (name, number of its
axes) where several kinds use the name"""

NO_INNER_VALUES = "it has no inner values to drop; rank_dropout and module_dropout work"


def register_kind(kind: NetworkKind, *marks: Mark) -> None:
    """Make a kind from outside known to everything that reads adapter files: `marks` as in MARKS, none when it writes
    the tensors of a kind that has its own. The network module that holds it as `KIND` calls this at its end.

    ValueError when a mark is that of another kind.
    """
    module = kind.module_class.__module__
    target = f"{module}:KIND"
    for other, taken in MARKS.items():
        shared = sorted(map(str, set(marks) & set(taken)))
        if other != target and shared:
            raise ValueError(
                f"{', '.join(shared)} is the mark of {other} already; give the tensors of {kind.name} other names"
            )
    if marks:
        MARKS[target] = marks
        names = {
            *kind.module_class.weight_keys,
            *kind.module_class.optional_keys,
            *(m if isinstance(m, str) else m[0] for m in marks),
        }
        OUTSIDE.update(dict.fromkeys(names - PARAMETERS.keys(), module))


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
    `splits`: whether fused layers of a file can be taken apart (split_qkv).
    """

    name: str
    module_class: type[AdapterModule]
    shape_from_file: Callable[
        [Mapping[str, torch.Tensor], Sequence[int] | None], tuple[int, float | None, dict[str, Any]]
    ]
    shape_from_settings: Callable[[NetworkSettings, Layer, Sequence[int] | None], dict[str, Any]] = (
        lambda settings, layer, split: {}
    )
    arguments: Callable[[NetworkTargets], dict[str, Callable[[Any], Any]]] = _no_arguments
    refused: Mapping[str, str] = field(default_factory=dict)
    check: Callable[[Mapping[str, Any]], None] = lambda values: None
    targets: Callable[[NetworkTargets], NetworkTargets] = lambda targets: targets
    prepare: Callable[[AdditionalNetwork], None] = lambda network: None
    splits: bool = False


def kind_of(tensors: Mapping[str, torch.Tensor]) -> NetworkKind | None:
    """The kind that one layer's tensors make, None when they are no adapter that is known."""
    present = {*tensors, *((name, tensor.ndim) for name, tensor in tensors.items())}
    target = _marked(present)
    if target is None:
        load_installed_kinds()
        target = _marked(present)
    return None if target is None else import_target(target)


def _marked(present: set) -> str | None:
    return next((target for target, marks in MARKS.items() if not present.isdisjoint(marks)), None)


def known_kind_of(tensors: Mapping[str, torch.Tensor], lora_name: str) -> NetworkKind:
    """As kind_of, for a layer of a file: CheckpointError when the kind is unknown, its tensors are not complete or do
    not fit one another, or when there are more than the kind has a use for."""
    kind = kind_of(tensors)
    if kind is None:
        known = ", ".join(marks[0] if isinstance(marks[0], str) else marks[0][0] for marks in MARKS.values())
        raise CheckpointError(
            f"{lora_name} has {', '.join(sorted(tensors))}, which is no kind of adapter that is known ({known}; kinds "
            "of your own: --plugins MODULE)"
        )
    missing = kind.module_class.missing_keys(tensors)
    if missing:
        raise CheckpointError(
            f"{lora_name} has {', '.join(sorted(tensors))} and no {', no '.join(missing)}, needed for {kind.name}; the "
            "file is incomplete"
        )
    unknown = kind.module_class.unknown_keys(tensors)
    if unknown:
        known = sorted({*kind.module_class.weight_keys, *kind.module_class.optional_keys, "alpha"})
        raise CheckpointError(
            f"{lora_name} has {', '.join(unknown)}, which {kind.name} does not know; known: {', '.join(known)}. What "
            "they do would be"
            " lost; use the file with the program that wrote it, or have that write one without them"
        )
    wrong = problem_of(tensors)
    if wrong:
        raise CheckpointError(f"{lora_name}: {wrong}")
    return kind


def check_layers(layers: Mapping[str, Mapping[str, torch.Tensor]], label: str) -> None:
    """known_kind_of of every layer of a file, in one CheckpointError; layers without an alpha are told in the log."""
    problems: list[str] = []
    for name, tensors in layers.items():
        try:
            known_kind_of(tensors, name)
        except CheckpointError as error:
            problems.append(str(error))
    if problems:
        more = f" ({len(problems) - 1} more layers of {len(layers)} are refused too)" if len(problems) > 1 else ""
        raise CheckpointError(f"{label}: {problems[0]}{more}")
    without = missing_alphas(layers)
    if without:
        logger.warning("%s: %s", label, without)


def kind_for(tensors: Mapping[str, torch.Tensor], lora_name: str, wanted: NetworkKind | None = None) -> NetworkKind:
    """As known_kind_of. Kinds without marks of their own (DyLoRA, say) write the tensors of another: `wanted` is taken
    where it is one of them and has a use for these tensors."""
    kind = known_kind_of(tensors, lora_name)
    if wanted is None or any(import_target(target) is wanted for target in MARKS):
        return kind
    module = wanted.module_class
    return kind if module.missing_keys(tensors) or module.unknown_keys(tensors) else wanted


def weight_change(
    tensors: Mapping[str, torch.Tensor], weight: torch.Tensor, multiplier: float = 1.0, lora_name: str = ""
) -> torch.Tensor:
    """Change of a weight by one layer's tensors, whatever their kind: float32, shape of `weight`, on the tensors'
    device."""
    return change_of(known_kind_of(tensors, lora_name).module_class, tensors, weight, multiplier)


def bias_change(
    tensors: Mapping[str, torch.Tensor], multiplier: float = 1.0, lora_name: str = ""
) -> torch.Tensor | None:
    """Change of a bias by one layer's tensors, None when the kind leaves it alone."""
    return known_kind_of(tensors, lora_name).module_class.bias_change(tensors, multiplier)
