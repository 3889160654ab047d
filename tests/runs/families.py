"""The tiny model of every family with the command line that trains it, for tests that hold for all families."""

from __future__ import annotations

import gzip
import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from library.core.registry import import_target
from library.families.registry import FAMILIES
from library.tiny_models import build_tiny
from library.training import cli
from tests.families import CASES, FamilyCase
from tests.runs.conftest import Work, draw_pictures

KEY_TABLES = Path(__file__).parents[1] / "golden" / "checkpoints"
MODEL = "pretrained_model_name_or_path"
SLOTS: dict[str, dict[str, set[str]]] = {
    "flux": {
        MODEL: {"flux_dev", "flux_schnell"}, "clip_l": {"clip_l", "sd3_medium_checkpoint"},
        "t5xxl": {"t5xxl", "sd3_medium_checkpoint"}, "ae": {"vae_ldm16"},
    },
    "sd": {
        MODEL: {"sd15_checkpoint", "sd15_unet", "sd21_checkpoint", "sd21_unet"},
        "vae": {"vae_ldm4", "sd15_checkpoint", "sd21_checkpoint"},
    },
    "sdxl": {MODEL: {"sdxl_checkpoint", "sdxl_unet"}, "vae": {"vae_ldm4", "sdxl_checkpoint"}},
    "chroma": {MODEL: {"chroma"}, "t5xxl": {"t5xxl", "sd3_medium_checkpoint"}, "ae": {"vae_ldm16"}},
    "sd3": {
        MODEL: {"sd3_medium_checkpoint", "sd35_large"}, "clip_l": {"clip_l", "sd3_medium_checkpoint"},
        "t5xxl": {"t5xxl", "sd3_medium_checkpoint"}, "vae": {"vae_ldm16", "sd3_medium_checkpoint"},
        "clip_g": {"clip_g_hf", "clip_g_open_clip", "sd3_medium_checkpoint"},
    },
    "lumina": {MODEL: {"lumina2"}, "gemma2": {"gemma2_2b"}, "ae": {"vae_ldm16"}},
    "hunyuan_image": {
        MODEL: {"hunyuan_image"},
        "text_encoder": {"qwen25_vl_7b"},
        "byt5": {"byt5_glyph"},
        "vae": {"vae_hunyuan_image"},
    },
    "hunyuan_video": {
        MODEL: {"hunyuan_video"}, "vae": {"vae_hunyuan_video"}, "text_encoder1": {"llama3_8b"},
        "text_encoder2": {"clip_l", "sd3_medium_checkpoint"},
    },
    "framepack": {
        MODEL: {"framepack"}, "vae": {"vae_hunyuan_video"}, "text_encoder1": {"llama3_8b"},
        "text_encoder2": {"clip_l", "sd3_medium_checkpoint"}, "image_encoder": {"siglip_so400m"},
    },
    "wan": {
        MODEL: {"wan_t2v_1_3b", "wan_t2v_14b", "wan_i2v_14b", "wan22_i2v_a14b"}, "t5": {"umt5_xxl_wan", "umt5_xxl_hf"},
        "vae": {"vae_wan", "vae_qwen_image_diffusers"},
    },
    "anima": {MODEL: {"anima"}, "qwen3": {"qwen3_0_6b"}, "vae": {"vae_wan", "vae_qwen_image_diffusers"}},
}
"""family -> option that names a model file -> key tables that fit it"""


def told_as(family: str, slot: str) -> str:
    """The option by which messages call a slot."""
    own = getattr(import_target(FAMILIES[family].family), "denoiser_option", MODEL)
    return own if slot == MODEL else slot


@dataclass
class FamilyWork(Work):
    """A folder with pictures and the options of a short run of one family."""

    @property
    def family(self) -> str:
        return self.case.family


class Tinies:
    """Tiny models by family, made when first asked for and kept."""

    def __init__(self, factory: pytest.TempPathFactory) -> None:
        self.factory = factory
        self.made: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self.made:
            self.made[name] = build_tiny(case_of(name).name, self.factory.mktemp(f"tiny_{name}"))
        return self.made[name]

    def work(self, name: str, folder: Path) -> FamilyWork:
        """`name`: a family, or one of its tiny sets."""
        return FamilyWork(folder, self[name], draw_pictures(folder / "images", 4), case=case_of(name))


def case_of(name: str) -> FamilyCase:
    return CASES.get(name) or next(case for case in CASES.values() if case.family == name)


def refused_run(
    family: str, argv: Sequence[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> str:
    """Run the command line; assert that it ends with exit code 2 and one message, before a model is loaded."""
    family_class = import_target(FAMILIES[family].family)
    folders = [Path(word.partition("=")[2]) for word in argv if word.startswith("--output_dir=")]
    new = [folder for folder in folders if str(folder) != "." and not folder.exists()]
    with monkeypatch.context() as patch:
        for name in ("load_vae", "load_text_encoders", "load_denoiser"):
            patch.setattr(family_class, name, lambda *_: pytest.fail("a model is loaded"))
        patch.setenv("HF_HUB_OFFLINE", "1")
        with pytest.raises(SystemExit) as ended:
            cli.main(family, "network", list(argv))
    assert ended.value.code == 2
    assert not any(folder.exists() for folder in new), "a run that is refused leaves no folder"
    message = capsys.readouterr().err
    errors = [line for line in message.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in message
    return message[message.index("error: ") :]


def without(argv: Sequence[str], *names: str) -> list[str]:
    return [word for word in argv if not word.startswith(tuple(f"--{name}=" for name in names))]


def key_table(name: str) -> dict[str, list[int]]:
    """Names and shapes of a real file."""
    return json.loads(gzip.decompress((KEY_TABLES / f"{name}.json.gz").read_bytes()))


def write_header_only(path: Path, shapes: Mapping[str, Sequence[int]]) -> None:
    """A safetensors file of these shapes in float16 whose data is a hole: it takes no place on the disk."""
    header, position = {}, 0
    for name, shape in shapes.items():
        size = 2
        for length in shape:
            size *= length
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + position)
