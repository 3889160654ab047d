"""One record per model family: strings only, so that reading the table imports nothing."""

from __future__ import annotations

from dataclasses import dataclass

from library.errors import ConfigError, did_you_mean


@dataclass(frozen=True)
class FamilyEntry:
    """`family`: class of library/training/families; `denoisers`: class names of the denoiser, by which a network module
    recognises the family; `targets`: the adapter target table."""

    family: str
    denoisers: tuple[str, ...]
    targets: str


FAMILIES: dict[str, FamilyEntry] = {
    "flux": FamilyEntry(
        "library.training.families.flux:FluxFamily", denoisers=("Flux",), targets="networks.lora_flux:TARGETS"
    ),
    "sd": FamilyEntry(
        "library.training.families.sd:SdFamily", denoisers=("UNet2DConditionModel",), targets="networks.lora_sd:TARGETS"
    ),
    "sdxl": FamilyEntry(
        "library.training.families.sdxl:SdxlFamily", denoisers=("SdxlUNet2DConditionModel",), targets="networks.lora_sdxl:TARGETS"
    ),
    "anima": FamilyEntry(
        "library.training.families.anima:AnimaFamily", denoisers=("Anima",), targets="networks.lora_anima:TARGETS"
    ),
}


def family_entry(name: str) -> FamilyEntry:
    """The record of a family; ConfigError with the nearest name when there is none."""
    if name not in FAMILIES:
        raise ConfigError(f"unknown model family '{name}'{did_you_mean(name, FAMILIES)} Known: {', '.join(FAMILIES)}")
    return FAMILIES[name]


def family_of_denoiser(class_name: str) -> str | None:
    """The family whose denoiser has this class name, or None."""
    return next((name for name, entry in FAMILIES.items() if class_name in entry.denoisers), None)
