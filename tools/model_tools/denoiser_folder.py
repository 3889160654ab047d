"""Denoisers between one file in the original layout and the `transformer` of a diffusers folder, tensor by tensor;
other parts that are rewritten alone, such as autoencoders, likewise. Where a family has a pipeline, the other parts of
a file of all make one.

The rules are those of the family (DenoiserLayouts). What the folder has no place for goes into `REST` beside
`transformer`, with the file's metadata, from where the way back takes it, so that this gives the same tensors.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from library.checkpoints.layout_rules import DenoiserLayouts, Rule, from_original, to_original
from library.checkpoints.loading import prefixed
from library.checkpoints.scaled_weights import is_blob, unscaled
from library.components.ldm_folder_files import REST
from library.core.errors import CheckpointError
from library.safetensors_utils import is_pickled, load_safetensors, read_header
from tools.model_tools import pipeline_parts
from tools.model_tools.plans import FolderPlan, SinglePlan, as_written, infos_of

logger = logging.getLogger("atelier")

PLACES = "original_places"
"""entry in the metadata of `REST`: sub-folder -> what stood before its names in the file of all parts"""


def single_plan(source: str, layouts: DenoiserLayouts, dtype: torch.dtype | None) -> SinglePlan:
    """From a folder, its `transformer`, one of the shards or a file, or from a file in a further layout. A pipeline
    folder that was made of a file of all parts gives that again; see `PipelineLayout.places` for others.
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
    original = to_original(metas, rules)
    file = info.source.files[0]
    if further:
        _tell_of_others(info, "the file gets", layouts.part)
    kept, metadata, places = ({}, _metadata_of(file), {}) if further else _around(source, file, layouts)
    for name, like in layouts.unused.items():
        if name not in kept and name not in original:
            if like not in original:
                raise CheckpointError(f"{source} lacks {like}; are all its parts there?")
            kept[name] = torch.ones(original[like].shape, dtype=original[like].dtype)
    place, beside = places.get(layouts.part, ""), pipeline_parts.NOTHING
    if layouts.pipeline is not None:
        beside = pipeline_parts.parts_for_single(source, layouts.pipeline, places, dtype)
    infos = infos_of(prefixed(place, original)) | beside[0]
    infos |= infos_of({name: as_written(tensor, dtype) for name, tensor in kept.items()})

    def items() -> Iterator[tuple[str, Tensor]]:
        yield from ((place + name, tensor) for name, tensor in joined(_stream(info), rules))
        yield from beside[1]()
        yield from kept.items()

    return SinglePlan(infos, items, metadata)


def folder_plan(
    source: str, layouts: DenoiserLayouts, dtype: torch.dtype | None, tokenizer: str | None = None,
    tokenizer_cache_dir: str | None = None,
) -> FolderPlan:
    """From one file. Its other parts go along where the family has a pipeline, and are left out otherwise.
    CheckpointError when it has the names of diffusers already."""
    info = layouts.inspect(source)
    if info.is_diffusers:
        raise CheckpointError(f"{source} has the names of diffusers already; --to diffusers takes the original layout")
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

    infos, plan = infos_of(from_original(placed, rules.values(), rows_of)), FolderPlan()
    plan.metadata = _metadata_of(info.source.files[0])
    plan.parts[layouts.part] = infos, items
    plan.configs[f"{layouts.part}/config.json"] = layouts.config(info.params)
    if layouts.pipeline is not None:
        found = pipeline_parts.add_parts(plan, layouts.pipeline, info.source, dtype)
        pipeline_parts.add_pipeline(plan, layouts.pipeline, info.params, source, tokenizer, tokenizer_cache_dir)
        if found.places:
            plan.rest = pipeline_parts.rest_of(info.source, found.used | {info.prefix + name for name in placed})
            plan.metadata[PLACES] = json.dumps({layouts.part: info.prefix, **found.places}, sort_keys=True)
            return plan
    _tell_of_others(info, "the folder gets", layouts.part)
    plan.rest = {name: tensor.contiguous() for name, tensor in _stream(info, metas.keys() - placed.keys())}
    return plan


def _tell_of_others(info: Any, target: str, part: str) -> None:
    others = len(info.source.shapes) - len(info.keys)
    if others:
        logger.warning("%s has %d tensors of other parts; %s its %s alone", info.source.path, others, target, part)


def _metadata_of(file: str) -> dict[str, str]:
    return {} if is_pickled(file) else dict(read_header(file)[1])


def _metas(info: Any, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Name in its layout -> the tensor as it is to be written, without data."""
    return {
        key[len(info.prefix) :]: as_written(info.source.shapes[key].to(info.source.dtype_of(key)), dtype)
        for key in info.keys if not is_blob(key)
    }  # fmt: skip


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


def _around(
    source: str, file: str, layouts: DenoiserLayouts
) -> tuple[dict[str, Tensor], dict[str, str], Mapping[str, str]]:
    """(tensors, metadata, places) that belong to the file into which a denoiser goes: what a conversion has kept, and
    what stands before the names of each sub-folder. Of a sub-folder or a shard alone the denoiser is meant."""
    kept, metadata = _read_rest(file, layouts.part)
    if layouts.pipeline is None:
        return kept, metadata, {}
    usual, made_of = layouts.pipeline.places, json.loads(metadata.pop(PLACES, "{}"))
    if (Path(source) / layouts.part).is_dir():
        return kept, metadata, made_of or usual
    own = {part: place for part, place in usual.items() if part == layouts.part}
    return ({}, {}, own) if made_of else (kept, metadata, own)


def _read_rest(file: str, part: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata) that a conversion has kept beside the folder `part` in which a file lies; else what the file
    itself says of the model."""
    rest = Path(file).absolute().parent.parent / REST
    if Path(file).absolute().parent.name != part or not rest.is_file():
        return {}, {name: text for name, text in _metadata_of(file).items() if name != "format"}
    return load_safetensors(rest, "cpu"), read_header(rest)[1]
