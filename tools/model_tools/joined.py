"""A denoiser from the shards of a diffusers folder to the original layout, one original tensor at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch

from library.checkpoints.layout_rules import Rule, swapped_halves
from library.checkpoints.loading import CheckpointFiles
from library.core.errors import CheckpointError
from library.safetensors_utils import MemoryEfficientSafeOpen

Infos = dict[str, tuple[torch.dtype, tuple[int, ...]]]
"""what a file will hold, as stream_file_atomic takes it"""


def rules_of_file(rules: Iterable[Rule], shapes: Mapping[str, torch.Tensor], source: str) -> dict[str, Rule]:
    """Original name -> its rule, for the tensors that a file in the other layout has. CheckpointError when it has only
    some of the parts of one."""
    found = {rule.original: rule for rule in rules if any(part in shapes for part in rule.parts)}
    lacking = [part for rule in found.values() for part in rule.parts if part not in shapes]
    if lacking:
        raise CheckpointError(
            f"{source} lacks {len(lacking)} tensors, the first is {lacking[0]}; are all its parts there?"
        )
    return found


def infos_of(state: Mapping[str, torch.Tensor], dtype: torch.dtype | None) -> Infos:
    """Types and shapes of tensors that are cast to `dtype` (None: as they are)."""
    return {
        key: (dtype if dtype and tensor.is_floating_point() else tensor.dtype, tuple(tensor.shape))
        for key, tensor in state.items()
    }


def joined_items(
    files: CheckpointFiles, names: Iterable[str], rules: Mapping[str, Rule], prefix: str
) -> Iterator[tuple[str, torch.Tensor]]:
    """(original name, tensor) for each of `names`; names without a rule are the same in both layouts. `prefix` stands
    before the names in the files."""
    opened = {key: reader for reader in map(MemoryEfficientSafeOpen, files.files) for key in reader.keys()}
    for name in names:
        rule = rules.get(name)
        parts = [opened[prefix + part].get_tensor(prefix + part) for part in (rule.parts if rule else (name,))]
        joined = torch.cat(parts) if len(parts) > 1 else parts[0]
        yield name, swapped_halves(joined) if rule is not None and rule.swap_halves else joined
