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

from library.family_table import FAMILIES, family_entry
from library.registry import import_target
from library.training import cli
from tests.runs.conftest import Work, draw_pictures
from tests.tiny import build_tiny_flux
from tests.tiny_anima import build_tiny_anima
from tests.tiny_sd import build_tiny_sd

KEY_TABLES = Path(__file__).parents[1] / "golden" / "checkpoints"
BUILDERS = {
    "flux": build_tiny_flux,
    "sd": lambda folder: build_tiny_sd(folder, "sd1"),
    "sdxl": lambda folder: build_tiny_sd(folder, "sdxl"),
    "anima": build_tiny_anima,
}
MODEL = "pretrained_model_name_or_path"
SLOTS: dict[str, dict[str, set[str]]] = {
    "flux": {MODEL: {"flux_dev", "flux_schnell"}, "clip_l": {"clip_l"}, "t5xxl": {"t5xxl"}, "ae": {"vae_ldm16"}},
    "sd": {MODEL: {"sd15_checkpoint", "sd15_unet", "sd21_checkpoint", "sd21_unet"}, "vae": {"vae_ldm4", "sd15_checkpoint", "sd21_checkpoint"}},
    "sdxl": {MODEL: {"sdxl_checkpoint", "sdxl_unet"}, "vae": {"vae_ldm4", "sdxl_checkpoint"}},
    "anima": {MODEL: {"anima"}, "qwen3": {"qwen3_0_6b"}, "vae": {"vae_wan", "vae_qwen_image_diffusers"}},
}
"""family -> option that names a model file -> key tables that fit it"""


@dataclass
class FamilyWork(Work):
    """A folder with pictures and the options of a short run of one family."""

    family: str = "flux"

    def argv(self, out: str, *more: str, dataset: Path | None = None) -> list[str]:
        usual = f"--network_module={family_entry(self.family).network_module}"
        argv = super().argv(out, dataset=dataset)
        return [*(usual if word.startswith("--network_module=") else word for word in argv), *more]

    def dataset(self, *args: Any, **kwargs: Any) -> Path:
        """With the bucket step of the family, which most have larger than the one of FLUX.1."""
        path = super().dataset(*args, **kwargs)
        step = import_target(family_entry(self.family).family).architecture.bucket_step
        path.write_text(path.read_text(encoding="utf-8").replace("bucket_reso_steps = 16", f"bucket_reso_steps = {step}"), encoding="utf-8")
        return path

    def train(self, out: str, *more: str, dataset: Path | None = None) -> Path:
        cli.run(self.family, "network", self.argv(out, *more, dataset=dataset))
        return self.folder / out / "lora.safetensors"


class Tinies:
    """Tiny models, made when first asked for and kept."""

    def __init__(self, factory: pytest.TempPathFactory) -> None:
        self.factory = factory
        self.made: dict[str, Any] = {}

    def __getitem__(self, family: str) -> Any:
        if family not in self.made:
            self.made[family] = BUILDERS[family](self.factory.mktemp(f"tiny_{family}"))
        return self.made[family]

    def work(self, family: str, folder: Path) -> FamilyWork:
        return FamilyWork(folder, self[family], draw_pictures(folder / "images", 4), family)


def refused_run(family: str, argv: Sequence[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> str:
    """Run the command line; assert that it ends with exit code 2 and one message, before a model is loaded."""
    family_class = import_target(FAMILIES[family].family)
    with monkeypatch.context() as patch:
        for name in ("load_vae", "load_text_encoders", "load_denoiser"):
            patch.setattr(family_class, name, lambda *_: pytest.fail("a model is loaded"))
        patch.setenv("HF_HUB_OFFLINE", "1")
        with pytest.raises(SystemExit) as ended:
            cli.main(family, "network", list(argv))
    assert ended.value.code == 2
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
