"""Text encoders and autoencoder between one file with all parts and the sub-folders of a pipeline of diffusers.

What the parts of a family's pipeline are is the family's to say (PipelineLayout). A T5 passes tensor by tensor;
autoencoder and CLIP, a small part, are renamed in memory.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from library.checkpoints.layout_rules import PipelineLayout, PipelinePart
from library.checkpoints.ldm_convert import (
    attention_as_convolution,
    convert_diffusers_vae_to_ldm,
    convert_ldm_vae_to_diffusers,
    is_diffusers_autoencoder,
)
from library.checkpoints.loading import CheckpointFiles, open_checkpoint
from library.checkpoints.scaled_weights import is_blob, is_scale, unscaled
from library.core.errors import ConfigError
from library.safetensors_utils import cast_all
from tools.model_tools.plans import FolderPlan, Infos, Items, as_written, infos_of

logger = logging.getLogger("atelier")

VAE, CLIP_TOKENIZER = "vae", "CLIPTokenizer"
NOTHING: tuple[Infos, Items] = ({}, tuple)
"""no parts"""
_WITHOUT_PLACE = ("position_ids", "logit_scale")
"""endings of names that no sub-folder has"""


def place_of(part: PipelinePart, names: Iterable[str]) -> str | None:
    """What stands before the names of a part in a file; None when it is not there."""
    names = list(names)
    return next((place for place in part.prefixes if any(name.startswith(place) for name in names)), None)


@dataclass
class Found:
    """What a file holds beside its denoiser. `places`: sub-folder -> what stands before its names in the file; `used`:
    names that are in a sub-folder."""

    places: dict[str, str] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)


def add_parts(
    plan: FolderPlan, pipeline: PipelineLayout, files: CheckpointFiles, dtype: torch.dtype | None
) -> Found:
    """Give the plan of a folder the parts that a file holds beside its denoiser."""
    found = Found()
    for part in pipeline.parts:
        place = place_of(part, files.shapes)
        if place is None:
            continue
        names = {key: key[len(place) :] for key in files.shapes if key.startswith(place) and not is_blob(key)}
        names = {key: name for key, name in names.items() if not name.endswith((*_WITHOUT_PLACE, *part.left_out))}
        plan.parts[part.folder] = _tensors_of(part, files, names, dtype)
        plan.configs[f"{part.folder}/config.json"] = part.config(files.path)
        found.places[part.folder] = place
        found.used |= names.keys()
    return found


def rest_of(files: CheckpointFiles, used: Collection[str]) -> dict[str, Tensor]:
    """What of a file is in no sub-folder, less the scales of 8-bit numbers, which are multiplied out."""
    rest = {key for key in files.shapes if key not in used and not is_scale(key)}
    return {key: tensor.contiguous() for key, tensor in files.stream("cpu", True, rest)}


def _tensors_of(
    part: PipelinePart, files: CheckpointFiles, names: Mapping[str, str], dtype: torch.dtype | None
) -> tuple[Infos, Items]:
    def items() -> Iterator[tuple[str, Tensor]]:
        yield from ((names[key], tensor) for key, tensor in unscaled(files, files.stream("cpu", True, names)))

    if part.passes:
        metas = {name: as_written(files.shapes[key].to(files.dtype_of(key)), dtype) for key, name in names.items()}
        return infos_of(metas), items
    state = dict(items())
    state = {names[key]: state[names[key]].to(files.dtype_of(key)) for key in names}
    if part.folder == VAE and not is_diffusers_autoencoder(state):
        state = convert_ldm_vae_to_diffusers(state)
    elif part.needs_projection and "text_projection.weight" not in state:  # what a file without one means
        norm = state["text_model.final_layer_norm.weight"]
        state["text_projection.weight"] = torch.eye(len(norm), dtype=norm.dtype)
    state = {key: tensor.contiguous() for key, tensor in cast_all(state, dtype).items()}
    return infos_of(state), state.items


def add_pipeline(
    plan: FolderPlan, pipeline: PipelineLayout, params: Any, source: str, tokenizer: str | None, cache_dir: str | None
) -> None:
    """Tokenizers of the text encoders that are there, schedule and model_index.json: what makes a pipeline of the
    parts. ConfigError for a CLIP tokenizer that is given and has no CLIP."""
    wanting = [part for part in pipeline.parts if part.tokenizer is not None and part.folder in plan.parts]
    if tokenizer and not any(part.tokenizer.class_name == CLIP_TOKENIZER for part in wanting):
        raise ConfigError(f"--tokenizer is {tokenizer}, and {source} holds no CLIP text encoder; leave it out")
    for part in wanting:
        try:
            plan.tokenizers[part.tokenizer.folder] = part.tokenizer.load(tokenizer, cache_dir, source)
        except ConfigError as error:
            if part.tokenizer.is_needed:
                raise
            logger.warning("%s is not written, put it there yourself: %s", part.tokenizer.folder, error)
    plan.configs["scheduler/scheduler_config.json"] = pipeline.scheduler(params)
    there = {*plan.parts, *plan.tokenizers, "scheduler"}
    index = {name: list(reader) if name in there else [None, None] for name, reader in pipeline.readers().items()}
    plan.configs["model_index.json"] = {"_class_name": pipeline.name, **index, **pipeline.settings}


def parts_for_single(
    folder: str | os.PathLike, pipeline: PipelineLayout, places: Mapping[str, str], dtype: torch.dtype | None
) -> tuple[Infos, Items]:
    """The parts of a pipeline folder under their names in one file. `places`: sub-folder -> what stands before them.
    CheckpointError when a part does not fit."""
    small: dict[str, Tensor] = {}
    streams: list[tuple[CheckpointFiles, dict[str, str]]] = []
    for part in pipeline.parts:
        place, where = places.get(part.folder), Path(folder) / part.folder
        if place is None or not where.is_dir():
            continue
        part.config(os.fspath(where))  # reads the headers
        files = open_checkpoint(where)
        if part.folder == VAE:
            state = convert_diffusers_vae_to_ldm(dict(files.stream("cpu", True, files.shapes)))
            small |= {place + key: tensor for key, tensor in attention_as_convolution(state).items()}
        else:
            names = [key for key in files.shapes if not key.endswith(_WITHOUT_PLACE) and not is_blob(key)]
            streams.append((files, {key: place + key for key in names}))
    small = cast_all(small, dtype)
    infos = infos_of(small)
    for files, names in streams:
        infos |= infos_of({name: as_written(files.shapes[key], dtype) for key, name in names.items()})

    def items() -> Iterator[tuple[str, Tensor]]:
        yield from small.items()
        for files, names in streams:
            yield from ((names[key], tensor) for key, tensor in files.stream("cpu", True, names))

    return infos, items
