"""FLUX.1 from the shards of a diffusers folder to one file in the original layout, one original tensor at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from library.checkpoints.flux_convert import Rule, convert_diffusers_sd_to_bfl, denoiser_rules, is_diffusers_denoiser
from library.checkpoints.loading import CheckpointFiles, count_blocks, open_checkpoint, strip_prefix
from library.core.errors import CheckpointError
from library.safetensors_utils import read_header, stream_file_atomic
from tools.model_tools.joined import Infos, infos_of, joined_items, rules_of_file


@dataclass(frozen=True)
class Plan:
    """What is written: `infos` as stream_file_atomic takes them; `rules` say what each tensor is made of."""

    files: CheckpointFiles
    infos: Infos
    rules: Mapping[str, Rule]
    prefix: str

    def write(self, target: str) -> None:
        items = joined_items(self.files, self.infos, self.rules, self.prefix)
        stream_file_atomic(self.infos, items, target, read_header(self.files.files[0])[1] or None)


def plan(source: str, dtype: torch.dtype | None) -> Plan:
    """From a pipeline folder, its `transformer`, or any one of the shards. CheckpointError when shards or tensors are
    missing."""
    files = open_checkpoint(source, "transformer")
    prefix = "transformer." if any(key.startswith("transformer.transformer_blocks.") for key in files.shapes) else ""
    shapes = strip_prefix(files.shapes, prefix)
    if not is_diffusers_denoiser(shapes):
        raise CheckpointError(f"{source} is FLUX.1 in the original layout already; nothing is to be rewritten")
    depths = count_blocks(shapes, "transformer_blocks."), count_blocks(shapes, "single_transformer_blocks.")
    rules = rules_of_file(denoiser_rules(*depths), shapes, source)
    return Plan(files, infos_of(convert_diffusers_sd_to_bfl(shapes), dtype), rules, prefix)
