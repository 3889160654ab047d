"""Which model family an adapter file was made for: what the user says, then its metadata, then its keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from library.checkpoints.recognition import KeyTable, adapter_family
from library.core.errors import CheckpointError, ConfigError, did_you_mean
from library.families.table import FAMILIES
from networks.files.file_names import NAME_TABLES

if TYPE_CHECKING:
    import torch

FAMILY_ALIASES = {"sd1": "sd", "sd2": "sd", "sd15": "sd", "sd21": "sd", "flux1": "flux", "chroma": "flux"}
"""names of variants that share the adapters of a family"""
BASE_VERSIONS = (("sdxl", "sdxl"), ("sd_v", "sd"), ("flux", "flux"), ("chroma", "flux"), ("anima", "anima"))
"""beginning of ss_base_model_version -> family"""
ARCHITECTURES = (
    ("stable-diffusion-xl", "sdxl"), ("stable-diffusion-v1", "sd"), ("stable-diffusion-v2", "sd"), ("flux-1", "flux"), ("chroma", "flux"),
    ("anima", "anima"),
)  # fmt: skip
"""beginning of modelspec.architecture -> family"""
BY_TITLE = {"FLUX.1 or Chroma": "flux", "SDXL": "sdxl", "Stable Diffusion 1 or 2": "sd", "Anima": "anima"}


def family_by_name(name: str) -> str:
    """The family that `--family` means; ConfigError with the nearest name."""
    family = FAMILY_ALIASES.get(name.lower(), name.lower())
    if family not in FAMILIES:
        known = [*FAMILIES, *FAMILY_ALIASES]
        raise ConfigError(f"--family is {name}, which is not known{did_you_mean(name, known) or ';'} known: {', '.join(known)}")
    return family


def nothing_fits(label: str, layers: Mapping[str, Mapping[str, torch.Tensor]], family: str) -> str:
    """The message for an adapter of which no layer is in a model of this family. It names a family only where the adapter is known
    to be made for it."""
    shapes = {f"{name}.{key}": tuple(tensor.shape) for name, tensors in layers.items() for key, tensor in tensors.items()}
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
    for key, table in (("ss_base_model_version", BASE_VERSIONS), ("modelspec.architecture", ARCHITECTURES)):
        told = metadata.get(key, "").lower()
        found = next((family for start, family in table if told.startswith(start)), None)
        if found:
            return found
    title = adapter_family(KeyTable(shapes))
    if title in BY_TITLE:
        return BY_TITLE[title]
    if title:
        raise CheckpointError(f"{label} is an adapter for {title}, a family that is not there yet; there are {', '.join(FAMILIES)}")
    some = ", ".join(list(shapes)[:3]) or "no tensors"
    raise CheckpointError(f"{label}: its names do not tell the model family (it begins with {some}); name it with --family")


NAMED = {"hunyuan_image": ("hunyuan-image", "hunyuan_image")}
"""family of NAME_TABLES -> beginnings of ss_base_model_version and modelspec.architecture"""


def family_of_names(
    shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str], label: str, given: str | None = None
) -> str:
    """As family_of_adapter, families included that have names alone (networks/files/file_names.py: NAME_TABLES)."""
    if given in NAME_TABLES:
        return given
    if given is None:
        told = (metadata.get("ss_base_model_version", "").lower(), metadata.get("modelspec.architecture", "").lower())
        for family, starts in NAMED.items():
            if any(text.startswith(starts) for text in told):
                return family
        if adapter_family(KeyTable(shapes)) == "HunyuanImage or HunyuanVideo" and not any("individual_token_refiner" in key for key in shapes):
            return "hunyuan_image"
    return family_of_adapter(shapes, metadata, label, given)
