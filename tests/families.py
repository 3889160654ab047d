"""What the tests of all families know of each: one record, its tiny models and its command line in
library/tiny_models."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from library.dataset.architectures import ARCHITECTURES, DataArchitecture
from library.tiny_models import TinyEntry, tiny_entry


@dataclass(frozen=True)
class FamilyCase:
    """`name`: of the tiny set; `version`: ss_base_model_version of its adapters; `text_parts`: beginnings of the keys
    of text encoders that learn, none where they never do; `text_options`: without which none does; `caches_text`: their
    outputs can be cached;
    `brief`: options that make prompts as short as those of the tests, where the family computes with all places of a
    long prompt;
    `like`: the case that shows what data and loop do for this one too: the model is of the same classes."""

    name: str
    version: str
    text_parts: tuple[str, ...]
    caches_text: bool = True
    text_options: tuple[str, ...] = ()
    brief: tuple[str, ...] = ()
    like: str = ""

    @property
    def entry(self) -> TinyEntry:
        return tiny_entry(self.name)

    @property
    def family(self) -> str:
        """Its name in the family table."""
        return self.entry.family

    @property
    def architecture(self) -> DataArchitecture:
        """What the data side knows of it."""
        return ARCHITECTURES[self.family]

    @property
    def bucket_step(self) -> int:
        return self.architecture.bucket_step

    def options(self) -> list[str]:
        """Of every run, beside those that name the model's files."""
        return [f"--network_module={self.entry.network_module}", *self.entry.options, *self.brief]

    def letters(self, pictures: Path) -> str:
        """What every line of sample prompts needs, with pictures of this folder."""
        return f" --i {pictures / '00.png'}" if self.entry.first_frame else ""

    def caches(self, *, on_disk: bool) -> list[str]:
        """Options that cache all that can be cached."""
        kinds = ["latents", *(["text_encoder_outputs"] if self.caches_text else [])]
        return ["--network_train_unet_only", *(f"--cache_{kind}{'_to_disk' if on_disk else ''}" for kind in kinds)]


CASES = {
    case.name: case
    for case in (
        FamilyCase("flux", "flux1", ("lora_te1_",), brief=("--t5xxl_max_token_length=64",)),
        FamilyCase("sd1", "sd_v1", ("lora_te_",), caches_text=False),
        FamilyCase("sd2", "sd_v2_v", ("lora_te_",), caches_text=False, like="sd1"),
        FamilyCase("sdxl", "sdxl_base_v1-0", ("lora_te1_", "lora_te2_")),
        FamilyCase("sd3", "5-medium", ("lora_te1_", "lora_te2_")),
        FamilyCase("anima", "anima", ("lora_te_",)),
        FamilyCase("hunyuan_image", "hunyuan-image-2.1", ()),
        FamilyCase(
            "chroma", "chroma", ("lora_te3_",), text_options=("--network_args", "train_t5xxl=True"),
            brief=("--t5xxl_max_token_length=64",), like="flux",
        ),
        FamilyCase("lumina", "lumina2", ("lora_te_",)),
        FamilyCase("hunyuan_video", "hunyuan_video", ()),
        FamilyCase("framepack", "framepack", ()),
        FamilyCase("wan", "wan", ()),
        FamilyCase("wan_i2v", "wan", (), like="wan"),
        FamilyCase("wan22", "wan", (), like="wan"),
    )
}


def marks_of(name: str) -> list[pytest.MarkDecorator]:
    """Of a case in tests of what is learned, which are alike for families of the same classes."""
    return [pytest.mark.full] if name in CASES and CASES[name].like else []
