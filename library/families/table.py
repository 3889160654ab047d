"""One record per model family: strings only, so that reading the table imports nothing."""

from __future__ import annotations

from dataclasses import dataclass

from library.core.errors import ConfigError, did_you_mean


@dataclass(frozen=True)
class FamilyEntry:
    """`family`: class of library/training/wiring; `denoisers`: class names of the denoiser, by which a network module
    recognises the family; `targets`: the adapter target table; `kinds`: what its model files are called by
    library/checkpoints/kinds.py; `adapters`: who its adapters are for, as library/checkpoints/recognition.py says it; `prefix`: what the names of its scripts begin with;
    `pictures`: the script that makes images with it."""

    family: str
    denoisers: tuple[str, ...]
    targets: str
    kinds: tuple[str, ...] = ()
    adapters: str = ""
    prefix: str = ""
    pictures: str = ""

    @property
    def network_module(self) -> str:
        """The network module of its LoRAs."""
        return self.targets.partition(":")[0]


FAMILIES: dict[str, FamilyEntry] = {
    "flux": FamilyEntry(
        "library.training.wiring.flux:FluxFamily", denoisers=("Flux",), targets="networks.lora_flux:TARGETS",
        kinds=("flux",), adapters="FLUX.1 or Chroma", prefix="flux_",
        pictures="flux_minimal_inference.py",
    ),
    "sd": FamilyEntry(
        "library.training.wiring.sd:SdFamily", denoisers=("UNet2DConditionModel",), targets="networks.lora_sd:TARGETS",
        kinds=("sd1", "sd2"), adapters="Stable Diffusion 1 or 2", pictures="gen_img.py",
    ),
    "sdxl": FamilyEntry(
        "library.training.wiring.sdxl:SdxlFamily", denoisers=("SdxlUNet2DConditionModel",), targets="networks.lora_sdxl:TARGETS",
        kinds=("sdxl",), adapters="SDXL", prefix="sdxl_", pictures="sdxl_gen_img.py",
    ),
    "anima": FamilyEntry(
        "library.training.wiring.anima:AnimaFamily", denoisers=("Anima",), targets="networks.lora_anima:TARGETS",
        kinds=("anima", "cosmos"), adapters="Anima", prefix="anima_",
        pictures="anima_minimal_inference.py",
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


def script_name(family: str, kind: str = "train_network") -> str:
    """The script of a family that does what `train_network.py` does for the first one: its name without .py."""
    return family_entry(family).prefix + kind


def script_of_kind(kind: str, *, for_pictures: bool = False) -> str | None:
    """The script that trains adapters for a kind of model file, or makes images with it; None when no family here has it."""
    for name, entry in FAMILIES.items():
        if kind in entry.kinds:
            return entry.pictures if for_pictures else f"{script_name(name)}.py"
    return None
