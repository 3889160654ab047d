"""Denoisers between one file in the original layout and the `transformer` of a diffusers folder, tensor by tensor; other
parts that are rewritten alone, such as autoencoders, likewise.

The rules are those of the family (DenoiserLayouts). What the folder has no place for goes into `REST` beside
`transformer`, with the file's metadata, from where the way back takes it, so that this gives the same tensors.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from library.checkpoints.layout_rules import DenoiserLayouts, Rule, from_original, to_original
from library.checkpoints.loading import is_blob, unscaled
from library.components.ldm_folder_files import REST
from library.core.atomic_file import atomic_folder
from library.core.errors import CheckpointError
from library.safetensors_utils import is_pickled, load_safetensors, read_header, save_file_atomic, stream_file_atomic

logger = logging.getLogger("atelier")

Infos = dict[str, tuple[torch.dtype, tuple[int, ...]]]


@dataclass(frozen=True)
class SinglePlan:
    """One file to be written: `infos` as stream_file_atomic takes them."""

    infos: Infos
    items: Callable[[], Iterable[tuple[str, Tensor]]]
    metadata: dict[str, str]

    def write(self, target: str) -> None:
        stream_file_atomic(self.infos, self.items(), target, self.metadata or None)


@dataclass(frozen=True)
class FolderPlan(SinglePlan):
    """A folder to be written, with the sub-folder `part`. `metadata` are those of the file, kept beside the tensors of
    `rest`."""

    part: str
    config: dict[str, Any]
    rest: dict[str, Tensor] = field(default_factory=dict)

    def write(self, target: str, variant: str | None = None) -> None:
        """The folder appears whole or not at all."""
        ending = f".{variant}.safetensors" if variant else ".safetensors"
        with atomic_folder(os.path.abspath(target)) as work:
            part = work / self.part
            part.mkdir()
            (part / "config.json").write_text(f"{json.dumps(self.config, indent=2)}\n", encoding="utf-8")
            weights = part / f"diffusion_pytorch_model{ending}"
            stream_file_atomic(self.infos, self.items(), weights, {"format": "pt"})
            if self.rest or self.metadata:
                save_file_atomic(self.rest, work / REST, self.metadata or None)


def single_plan(source: str, layouts: DenoiserLayouts, dtype: torch.dtype | None) -> SinglePlan:
    """From a folder, its `transformer`, one of the shards or a file, or from a file in a further layout.
    CheckpointError when tensors are missing."""
    info = layouts.inspect(source)
    metas = _metas(info, dtype)
    further = list(layouts.further(metas))
    if not info.is_diffusers and not further:
        raise CheckpointError(f"{source} is in the original layout already; nothing is to be rewritten")
    rules = [rule for rule in further or layouts.rules(metas) if any(part in metas for part in rule.parts)]
    lacking = [part for rule in rules for part in rule.parts if part not in metas]
    if lacking:
        raise CheckpointError(
            f"{source} lacks {len(lacking)} tensors, the first is {lacking[0]}; are all its parts there?"
        )
    infos = infos_of(to_original(metas, rules))
    file = info.source.files[0]
    if further:
        _tell_of_others(info, "the file gets", layouts.part)
    kept, metadata = ({}, _metadata_of(file)) if further else _read_rest(file, layouts.part)
    for name, like in layouts.unused.items():
        if name not in kept and name not in infos:
            if like not in infos:
                raise CheckpointError(f"{source} lacks {like}; are all its parts there?")
            kept[name] = torch.ones(infos[like][1], dtype=infos[like][0])
    infos |= infos_of({name: _as(tensor, dtype) for name, tensor in kept.items()})

    def items() -> Iterator[tuple[str, Tensor]]:
        yield from joined(_stream(info), rules)
        yield from kept.items()

    return SinglePlan(infos, items, metadata)


def folder_plan(source: str, layouts: DenoiserLayouts, dtype: torch.dtype | None) -> FolderPlan:
    """From one file, whose other parts are left out. CheckpointError when it has the names of diffusers already."""
    info = layouts.inspect(source)
    if info.is_diffusers:
        raise CheckpointError(f"{source} has the names of diffusers already; --to diffusers takes the original layout")
    _tell_of_others(info, "the folder gets", layouts.part)
    metas = _metas(info, dtype)
    further = list(layouts.further(metas))
    metas = to_original(metas, further)
    rules = {rule.original: rule for rule in layouts.rules(metas)}
    rows_of = layouts.rows_of(info.params)
    placed = {name: meta for name, meta in metas.items() if name in rules}

    def items() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in joined(_stream(info), further):
            if name in placed:
                parts = from_original({name: tensor}, [rules[name]], rows_of)
                yield from ((part, piece.contiguous()) for part, piece in parts.items())

    return FolderPlan(
        infos_of(from_original(placed, rules.values(), rows_of)),
        items,
        _metadata_of(info.source.files[0]),
        layouts.part,
        layouts.config(info.params),
        {name: tensor.contiguous() for name, tensor in _stream(info, metas.keys() - placed.keys())},
    )


def _tell_of_others(info: Any, target: str, part: str) -> None:
    others = len(info.source.shapes) - len(info.keys)
    if others:
        logger.warning("%s has %d tensors of other parts; %s its %s alone", info.source.path, others, target, part)


def _metadata_of(file: str) -> dict[str, str]:
    return {} if is_pickled(file) else read_header(file)[1]


def _metas(info: Any, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Name in its layout -> the tensor as it is to be written, without data."""
    return {
        key[len(info.prefix) :]: _as(info.source.shapes[key].to(info.source.dtype_of(key)), dtype)
        for key in info.keys if not is_blob(key)
    }  # fmt: skip


def _as(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.to("meta").to(dtype) if dtype and tensor.is_floating_point() else tensor.to("meta")


def infos_of(metas: Mapping[str, Tensor]) -> Infos:
    return {name: (meta.dtype, tuple(meta.shape)) for name, meta in metas.items()}


def _stream(info: Any, names: Iterable[str] | None = None) -> Iterator[tuple[str, Tensor]]:
    """The tensors by their names without prefix, scaled 8-bit ones multiplied out."""
    keys = info.keys if names is None else [info.prefix + name for name in names]
    for key, tensor in unscaled(info.source, info.source.stream("cpu", True, keys)):
        yield key[len(info.prefix) :], tensor


def joined(items: Iterable[tuple[str, Tensor]], rules: Iterable[Rule]) -> Iterator[tuple[str, Tensor]]:
    """Under original names; a tensor waits until those have come that it is joined with."""
    rule_of = {part: rule for rule in rules for part in rule.parts}
    waiting: dict[str, dict[str, Tensor]] = {}
    for name, tensor in items:
        if name not in rule_of:
            yield name, tensor
            continue
        rule = rule_of[name]
        held = waiting.setdefault(rule.original, {})
        held[name] = tensor
        if len(held) == len(rule.parts):
            yield from to_original(waiting.pop(rule.original), [rule]).items()


def _read_rest(file: str, part: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata) that a conversion has kept beside the folder `part` in which a file lies."""
    rest = Path(file).absolute().parent.parent / REST
    if Path(file).absolute().parent.name != part or not rest.is_file():
        return {}, {}
    return load_safetensors(rest, "cpu"), read_header(rest)[1]
