"""FLUX.1 from the shards of a diffusers folder to one file in the original layout, one original tensor at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from library.checkpoints.flux_convert import Rule, convert_diffusers_sd_to_bfl, denoiser_rules, is_diffusers_denoiser
from library.checkpoints.loading import CheckpointFiles, count_blocks, open_checkpoint, strip_prefix
from library.core.errors import CheckpointError
from library.safetensors_utils import MemoryEfficientSafeOpen, read_header, stream_file_atomic


@dataclass(frozen=True)
class Plan:
    """What is written: `infos` as stream_file_atomic takes them; `rules` say what each tensor is made of."""

    files: CheckpointFiles
    infos: dict[str, tuple[torch.dtype, tuple[int, ...]]]
    rules: Mapping[str, Rule]
    prefix: str

    def write(self, target: str) -> None:
        stream_file_atomic(self.infos, self._items(), target, read_header(self.files.files[0])[1] or None)

    def _items(self) -> Iterator[tuple[str, torch.Tensor]]:
        opened = {key: reader for reader in map(MemoryEfficientSafeOpen, self.files.files) for key in reader.keys()}
        for name in self.infos:
            rule = self.rules.get(name)
            parts = [self.prefix + part for part in (rule.parts if rule else (name,))]
            state = {part.removeprefix(self.prefix): opened[part].get_tensor(part) for part in parts}
            if rule is None:
                yield name, state[name]
                continue
            joined = torch.cat(list(state.values())) if len(state) > 1 else next(iter(state.values()))
            if rule.swap_halves:
                joined = torch.cat(joined.chunk(2)[::-1])
            yield name, joined


def plan(source: str, dtype: torch.dtype | None) -> Plan:
    """From a pipeline folder, its `transformer`, or any one of the shards. CheckpointError when shards or tensors are
    missing."""
    files = open_checkpoint(source, "transformer")
    prefix = "transformer." if any(key.startswith("transformer.transformer_blocks.") for key in files.shapes) else ""
    shapes = strip_prefix(files.shapes, prefix)
    if not is_diffusers_denoiser(shapes):
        raise CheckpointError(f"{source} is FLUX.1 in the original layout already; nothing is to be rewritten")
    depths = count_blocks(shapes, "transformer_blocks."), count_blocks(shapes, "single_transformer_blocks.")
    rules = {rule.original: rule for rule in denoiser_rules(*depths) if any(part in shapes for part in rule.parts)}
    lacking = [part for rule in rules.values() for part in rule.parts if part not in shapes]
    if lacking:
        raise CheckpointError(
            f"{source} lacks {len(lacking)} tensors, the first is {lacking[0]}; are all its parts there?"
        )
    converted = convert_diffusers_sd_to_bfl(shapes)
    infos = {
        key: (dtype if dtype and t.is_floating_point() else t.dtype, tuple(t.shape)) for key, t in converted.items()
    }
    return Plan(files, infos, rules, prefix)
