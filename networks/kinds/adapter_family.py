"""Which model family an adapter file was made for: what the user says, then its metadata, then its keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from library.checkpoints.recognition import KeyTable, adapter_family, adapter_record, told_by_metadata
from library.core.errors import CheckpointError, ConfigError, did_you_mean
from library.families.registry import FAMILIES, adapter_family_of, records

if TYPE_CHECKING:
    import torch


def aliases() -> dict[str, str]:
    """Names of variants that share the adapters of a family."""
    found = {}
    for name, record in records().items():
        family = adapter_family_of(record).name
        if family in FAMILIES and record.adapters is not None:
            found |= {alias: family for alias in (*record.adapters.aliases, *([name] if name != family else []))}
    return found


def family_by_name(name: str) -> str:
    """The family that `--family` means; ConfigError with the nearest name."""
    family = aliases().get(name.lower(), name.lower())
    if family not in FAMILIES:
        known = [*FAMILIES, *aliases()]
        raise ConfigError(
            f"--family is {name}, which is not known{did_you_mean(name, known) or ';'} known: {', '.join(known)}"
        )
    return family


def nothing_fits(label: str, layers: Mapping[str, Mapping[str, torch.Tensor]], family: str) -> str:
    """The message for an adapter of which no layer is in a model of this family. It names a family only where the
    adapter is known to be made for it."""
    shapes = {
        f"{name}.{key}": tuple(tensor.shape) for name, tensors in layers.items() for key, tensor in tensors.items()
    }
    title = adapter_family(KeyTable(shapes))
    told = f"{label} has no layer of this model (it begins with {next(iter(layers), 'nothing')})"
    if title is not None:
        return f"{told}; it is an adapter for {title}: use a model of that kind, the one that it was made for"
    return f"{told}; its names are in no {family} model that is known. Use the model that it was made for, or another file of it"


def family_of_adapter(
    shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str], label: str, given: str | None = None
) -> str:
    """The family of an adapter file from its header. `given` is what --family says.

    CheckpointError when it is made for a family that is not there, or when nothing tells.
    """
    if given:
        return family_by_name(given)
    told = told_by_metadata(metadata)
    if told is not None and adapter_family_of(told).name in FAMILIES:
        return adapter_family_of(told).name
    record = adapter_record(KeyTable(shapes))
    if record is not None and adapter_family_of(record).name in FAMILIES:
        return adapter_family_of(record).name
    if record is not None:
        title = record.adapters.title
        raise CheckpointError(
            f"{label} is an adapter for {title}, a family that is not there yet; there are {', '.join(FAMILIES)}"
        )
    some = ", ".join(list(shapes)[:3]) or "no tensors"
    raise CheckpointError(
        f"{label}: its names do not tell the model family (it begins with {some}); name it with --family"
    )
