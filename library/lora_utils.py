"""Adapters of every kind merged into a model while its file is read: a few tensors at a time, never the whole model
twice.

`CheckpointMerge` knows from the headers which tensors of a checkpoint an adapter changes. `stream` takes the tensors of
the file in any order and gives them back, changed ones in float32; tensors that make up one layer (q, k and v of a
diffusers folder, say) wait for one another. Loaders, the merge tool and `--base_weights` use it; the formula is that of
a forward pass.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from library.checkpoints.loading import CheckpointFiles, open_checkpoint
from library.checkpoints.number_formats import IN_MEMORY, narrowed
from library.checkpoints.scaled_weights import unscaled
from library.core.errors import CheckpointError, ConfigError
from networks.files.checkpoint_layers import LayerParameter, checkpoint_layers, prefixes_of_part
from networks.files.network_files import by_module, check_finite, match_names, read_adapter_file
from networks.kinds.adapter_family import nothing_fits
from networks.kinds.adapter_module import change_of
from networks.kinds.registry import check_layers, known_kind_of
from networks.kinds.targets import NetworkTargets

logger = logging.getLogger(__name__)

Tensors = Mapping[str, torch.Tensor]
Accepts = Callable[[Sequence[str]], bool]
"""whether a layer takes part, from its name in adapter files and its dotted path"""
LISTED = 5
ROW_BLOCK = 1 << 22
"""numbers of a weight that are merged at a time: they stay in the processor's cache"""


@dataclass(frozen=True)
class Adapter:
    """An adapter to be merged: `layers` maps the names of its layers to their tensors; `multiplier_of` gives the
    strength of a layer by its name, `accepts` says which of them take part (None: all)."""

    label: str
    layers: Mapping[str, Tensors]
    multiplier_of: Callable[[str], float]
    accepts: Accepts | None = None


def read_adapter(
    path: str | os.PathLike[str], targets: NetworkTargets, multiplier: float | Callable[[str], float] = 1.0,
    accepts: Accepts | None = None,
) -> Adapter:
    """An adapter file of any kind and naming. CheckpointError when it is none, is damaged or holds a value that is not
    finite."""
    tensors = read_adapter_file(path, targets)
    check_finite(tensors, str(path))
    layers = by_module(tensors)
    check_layers(layers, str(path))
    multiplier_of = multiplier if callable(multiplier) else lambda name: float(multiplier)
    return Adapter(str(path), layers, multiplier_of, accepts)


@dataclass(frozen=True)
class _Change:
    """What the adapters do to one weight or bias."""

    layer: LayerParameter
    sources: tuple[tuple[Tensors, float], ...]


@dataclass
class _Group:
    """Tensors of the file that must be there together, and the changes of the layers that they make up."""

    keys: set[str] = field(default_factory=set)
    changes: list[_Change] = field(default_factory=list)

    def is_one_whole_layer(self, tensor: torch.Tensor) -> bool:
        """Whether this tensor alone is the weight of one layer."""
        pieces = self.changes[0].layer.pieces
        return len(self.keys) == len(self.changes) == len(pieces) == 1 and (pieces[0].start, pieces[0].stop) == (
            0,
            len(tensor),
        )


class CheckpointMerge:
    """Adapters of one family, laid out for the tensors of one checkpoint (all of its files).

    `matched`: layers that are changed; `unmatched`: adapter label -> layers that are in no part of the checkpoint that
    is there; `absent`: the same for parts (a text encoder, say) that the checkpoint does not hold. `part`: see
    `prefixes_of_part`.
    """

    def __init__(
        self, targets: NetworkTargets, shapes: Mapping[str, tuple[int, ...]], adapters: Sequence[Adapter],
        part: str = "",
    ) -> None:
        self._adapters, self._family = tuple(adapters), targets.family
        layers: dict[str, list[LayerParameter]] = {}
        for layer in checkpoint_layers(targets, shapes, prefixes_of_part(targets, part)):
            layers.setdefault(layer.lora_name, []).append(layer)
        self.matched: set[str] = set()
        self.matched_of: dict[str, int] = {}
        self.unmatched: dict[str, list[str]] = {}
        self.absent: dict[str, list[str]] = {}
        sources: dict[str, list[tuple[Tensors, float]]] = {}
        present = {targets.encoder_of(name) for name in layers}
        for adapter in adapters:
            found, unknown = match_names(adapter.layers, layers, targets)
            self.matched_of[adapter.label] = len(found)
            for name, own in found.items():
                if adapter.accepts is None or adapter.accepts([own, layers[own][0].path]):
                    sources.setdefault(own, []).append((adapter.layers[name], adapter.multiplier_of(own)))
            for name in unknown:
                lacks = targets.encoder_of(targets.canonical_names(name)[-1]) not in present
                (self.absent if lacks else self.unmatched).setdefault(adapter.label, []).append(name)
        self.matched = set(sources)
        self._groups = _grouped(_changes(layers, sources))

    def check(self, *, allow_partial: bool = False) -> None:
        """CheckpointError when nothing matches, or when layers of an adapter are unknown and that is not allowed."""
        if not self.matched:
            label = next(iter([*self.unmatched, *self.absent]), "the adapter")
            layers = next((adapter.layers for adapter in self._adapters if adapter.label == label), {})
            raise CheckpointError(nothing_fits(label, layers, self._family))
        if self.unmatched and not allow_partial:
            label, names = next(iter(self.unmatched.items()))
            more = " ..." if len(names) > LISTED else ""
            raise CheckpointError(
                f"{label}: {len(names)} layers are not in this model: {', '.join(names[:LISTED])}{more}. "
                f"{len(self.matched)} are;"
                " use the model that the adapter was trained on, or --allow_partial to merge what fits"
            )

    def check_family(self) -> None:
        """CheckpointError when parts of the model that are there have no layer of any adapter."""
        if self.unmatched and not self.matched:
            self.check()

    def warn(self) -> None:
        """Say which layers are left out."""
        for what, left_out in (
            ("that are not in this model", self.unmatched),
            ("of parts that this model file does not hold", self.absent),
        ):
            for label, names in left_out.items():
                logger.warning("%s: %d layers %s are left out (first: %s)", label, len(names), what, names[0])

    def stream(
        self, items: Iterable[tuple[str, torch.Tensor]], device: torch.device | str | None = None,
        dtype_of: Callable[[str], torch.dtype] | None = None,
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """(key, tensor) pairs of the checkpoint, each once; changed tensors come as float32 on `device` (default: where
        they are), others as given.

        `dtype_of` says which type the receiver makes of a tensor. A changed one may then come in that type, and in the
        memory of the one given: large layers are computed in float32 a few rows at a time, which needs no float32 copy
        of them.
        """
        waiting: dict[int, dict[str, torch.Tensor]] = {}
        for key, tensor in items:
            group = self._groups.get(key)
            if group is None:
                yield key, tensor
                continue
            if dtype_of is not None and group.is_one_whole_layer(tensor):
                merged = _merge_rows(group.changes[0], tensor if device is None else tensor.to(device), dtype_of(key))
                if merged is not None:
                    yield key, merged
                    continue
            held = waiting.setdefault(id(group), {})
            held[key] = tensor.to(device or tensor.device, torch.float32)
            if len(held) == len(group.keys):
                yield from _merge_group(group, waiting.pop(id(group))).items()
        for held in waiting.values():  # only a part of the layers was asked for
            yield from held.items()


class MergeOnLoad:
    """What a loader is given as `transform`: adapters merged into every part of the model that it reads.

    A part is one file of several, so that layers of other parts are not missed; `report` says what fitted nowhere.
    """

    def __init__(self, targets: NetworkTargets, adapters: Sequence[Adapter]) -> None:
        self.targets = targets
        self.adapters = tuple(adapters)
        self._left_out: dict[str, set[str]] = {}
        self._matched_of = {adapter.label: 0 for adapter in self.adapters}
        self._merged: set[str] = set()

    def __call__(
        self, files: CheckpointFiles, items: Iterable[tuple[str, torch.Tensor]]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        merge = self.plan(files)
        for label, names in merge.unmatched.items():
            self._left_out.setdefault(label, set()).update(names)
        for label, count in merge.matched_of.items():
            self._matched_of[label] += count
        self._merged |= merge.matched
        return merge.stream(items)

    def plan(self, files: CheckpointFiles) -> CheckpointMerge:
        """What would be merged into this file."""
        shapes = {key: tuple(tensor.shape) for key, tensor in files.shapes.items()}
        return CheckpointMerge(self.targets, shapes, self.adapters, files.part)

    def finish(self) -> None:
        """When the whole model was read: CheckpointError when an adapter has no layer of it or the filter leaves
        nothing."""
        foreign = next((adapter for adapter in self.adapters if not self._matched_of[adapter.label]), None)
        if foreign is not None:
            raise CheckpointError(nothing_fits(foreign.label, foreign.layers, self.targets.family))
        if not self._merged:
            raise ConfigError(
                f"--include_patterns and --exclude_patterns leave none of the {sum(self._matched_of.values())} layers "
                "of the adapters"
            )
        self.report()

    def report(self) -> None:
        """When all parts were read: say how many layers are merged, and warn of those that no part has."""
        if self._merged:
            logger.info("adapters are merged into %d layers", len(self._merged))
        for label, names in self._left_out.items():
            logger.warning(
                "%s: %d layers are in no model that was loaded and are left out (first: %s)",
                label,
                len(names),
                min(names),
            )


def _changes(
    layers: Mapping[str, list[LayerParameter]], sources: Mapping[str, list[tuple[Tensors, float]]]
) -> list[_Change]:
    changes = []
    for name, of_layer in sources.items():
        for layer in layers[name]:
            own = [(t, m) for t, m in of_layer if layer.parameter == "weight" or _changes_bias(t, m)]
            if own:
                changes.append(_Change(layer, tuple(own)))
    return changes


def _changes_bias(tensors: Tensors, multiplier: float) -> bool:
    return known_kind_of(tensors, "").module_class.bias_change(tensors, multiplier) is not None


def _grouped(changes: Iterable[_Change]) -> dict[str, _Group]:
    """key -> its group: changes that share a tensor of the file belong together."""
    groups: dict[str, _Group] = {}
    for change in changes:
        keys = {piece.key for piece in change.layer.pieces}
        joined = _Group(set(keys), [change])
        for other in {id(groups[key]): groups[key] for key in keys if key in groups}.values():
            joined.keys |= other.keys
            joined.changes += other.changes
        groups.update(dict.fromkeys(joined.keys, joined))
    return groups


@torch.no_grad()
def _merge_group(group: _Group, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    for change in group.changes:
        pieces = [tensors[piece.key][piece.start : piece.stop] for piece in change.layer.pieces]
        weight = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        delta = None
        for source, multiplier in change.sources:
            own = {name: tensor.to(weight.device) for name, tensor in source.items()}
            more = _delta(change.layer, own, weight, multiplier)
            delta = more if delta is None else delta + more
        for piece, part in zip(pieces, delta.split([len(piece) for piece in pieces]), strict=True):
            piece += part  # a view of the tensor
    return tensors


@torch.no_grad()
def _merge_rows(change: _Change, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
    """One layer's weight with its changes, as `dtype`; None when a kind has no rows of its own. Sums are float32."""
    total, sources = len(tensor), []
    for source, multiplier in change.sources:
        own = {name: part.to(tensor.device, torch.float32) for name, part in source.items()}
        kind = known_kind_of(own, change.layer.lora_name).module_class
        if change.layer.parameter != "weight" or kind.rows_of(own, slice(0, 1), total) is None:
            return None
        sources.append((kind, own, multiplier))
    result = tensor if tensor.dtype == dtype else torch.empty_like(tensor, dtype=dtype)
    step = max(1, ROW_BLOCK * total // max(1, tensor.numel()))
    for start in range(0, total, step):
        rows = slice(start, min(start + step, total))
        weight = tensor[rows].to(torch.float32, copy=True)
        delta = None
        for kind, own, multiplier in sources:
            more = _delta(change.layer, kind.rows_of(own, rows, total), weight, multiplier)
            delta = more if delta is None else delta.add_(more)
        result[rows] = narrowed(change.layer.lora_name, weight.add_(delta), dtype)
    return result


def _delta(layer: LayerParameter, tensors: Tensors, parameter: torch.Tensor, multiplier: float) -> torch.Tensor:
    kind = known_kind_of(tensors, layer.lora_name).module_class
    try:
        change = (
            kind.bias_change(tensors, multiplier)
            if layer.parameter == "bias"
            else change_of(kind, tensors, parameter, multiplier)
        )
        return change.view(parameter.shape)
    except (RuntimeError, ValueError) as error:
        shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items() if tensor.ndim)
        raise CheckpointError(
            f"{layer.lora_name}: the model's {layer.parameter} has shape {list(parameter.shape)}, to which {shapes} of "
            "the adapter do not fit"
        ) from error


def load_safetensors_with_lora_and_fp8(
    model_files: str | Sequence[str],
    lora_weights_list: Sequence[Tensors] | None,
    lora_multipliers: Sequence[float] | None,
    *,
    targets: NetworkTargets,
    fp8_optimization: bool = False,
    calc_device: torch.device | str | None = None,
    move_to_device: bool = False,
    dit_weight_dtype: torch.dtype | None = None,
    target_keys: Sequence[str] = (),
    exclude_keys: Sequence[str] = (),
) -> dict[str, torch.Tensor]:
    """The state of a checkpoint with adapters merged and, with `fp8_optimization`, the 2-D weights whose key contains
    one of `target_keys` (all when empty) and none of `exclude_keys` rounded to float8_e4m3fn in the same pass.

    `lora_weights_list`: tensors of adapter files under kohya names; missing multipliers are 1. `dit_weight_dtype` is
    the type of the other floating-point tensors, None = as in the file. `move_to_device` leaves the result on
    `calc_device`.
    """
    files = [model_files] if isinstance(model_files, (str, os.PathLike)) else list(model_files)
    sources = [open_checkpoint(file) for file in files]
    shapes = {key: tuple(tensor.shape) for source in sources for key, tensor in source.shapes.items()}
    given = list(lora_multipliers or [])
    if len(given) > len(lora_weights_list or ()):
        raise CheckpointError(
            f"there are {len(given)} multipliers for {len(lora_weights_list or ())} adapters; give at most one for each"
        )
    adapters = [
        Adapter(
            f"adapter {number + 1}", by_module(tensors), lambda name, m=given[number] if number < len(given) else 1.0: m
        )
        for number, tensors in enumerate(lora_weights_list or ())
    ]
    merge = CheckpointMerge(targets, shapes, adapters) if adapters else None
    state: dict[str, torch.Tensor] = {}
    for source in sources:
        items: Iterable[tuple[str, torch.Tensor]] = source.stream(calc_device, True, source.shapes)
        for key, tensor in merge.stream(unscaled(source, items)) if merge else items:
            dtype = dit_weight_dtype or source.shapes[key].dtype
            wanted = not target_keys or any(part in key for part in target_keys)
            if fp8_optimization and tensor.ndim == 2 and wanted and not any(part in key for part in exclude_keys):
                dtype = torch.float8_e4m3fn
            tensor = narrowed(key, tensor, dtype, IN_MEMORY) if tensor.is_floating_point() else tensor
            state[key] = tensor if move_to_device else tensor.cpu()
    if merge:
        merge.warn()
    return state


def filter_lora_state_dict(
    tensors: Tensors, include_pattern: str | None = None, exclude_pattern: str | None = None
) -> dict[str, torch.Tensor]:
    """Adapter tensors whose key has a match of `include_pattern`, less those with a match of `exclude_pattern`."""
    return {
        key: tensor
        for key, tensor in tensors.items()
        if (not include_pattern or re.search(include_pattern, key))
        and not (exclude_pattern and re.search(exclude_pattern, key))
    }


