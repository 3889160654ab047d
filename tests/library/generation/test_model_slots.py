"""Every image script names what is no model, or another one, in each of its slots, before anything is loaded."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

from library import generation
from library.core.errors import ConfigError
from tests.runs.families import key_table, write_header_only

SLOTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "flux": ((), ("ckpt_path", "clip_l", "t5xxl", "ae")),
    "chroma": (("--model_type=chroma",), ("ckpt_path", "t5xxl", "ae")),
    "sdxl": ((), ("ckpt_path", "vae")),
    "sd3": ((), ("ckpt_path", "clip_l", "clip_g", "t5xxl", "vae")),
    "lumina": ((), ("pretrained_model_name_or_path", "gemma2_path", "ae_path")),
    "anima": ((), ("dit", "vae", "text_encoder")),
    "hunyuan_image": ((), ("dit", "vae", "text_encoder", "byt5")),
}
"""family -> (words that choose it in its script, options that name model files)"""
SCRIPTS = {"chroma": "flux"}
"""a variant -> whose script it is in"""
OUT = dict.fromkeys(("anima", "hunyuan_image"), "save_path")
"""family -> the option of the folder of pictures, where it has another name than output_dir"""
GGUF = b"GGUF\x03\0\0\0" + bytes(64)


def quantised(folder: Path) -> Path:
    (folder / "given.gguf").write_bytes(GGUF)
    return folder / "given.gguf"


def quantised_in_parts(folder: Path) -> Path:
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for name in names:
        (folder / name).write_bytes(GGUF)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {f"t{number}": name for number, name in enumerate(names)}}))
    return index


def image_encoder(folder: Path) -> Path:
    write_header_only(folder / "given.safetensors", key_table("siglip_so400m"))
    return folder / "given.safetensors"


FILES = [(quantised, "a quantised GGUF file"), (quantised_in_parts, "GGUF"), (image_encoder, "a SigLIP image encoder")]


def test_every_image_script_takes_part() -> None:
    folder = Path(generation.__file__).parent
    assert {path.stem.removesuffix("_inference") for path in folder.glob("*_inference.py")} == set(SLOTS)


@pytest.mark.parametrize("family", SLOTS)
@pytest.mark.parametrize(("make", "word"), FILES, ids=[make.__name__ for make, _ in FILES])
def test_a_wrong_file_is_named_in_every_slot(family: str, make, word: str, tmp_path: Path) -> None:
    module = importlib.import_module(f"library.generation.{SCRIPTS.get(family, family)}_inference")
    chosen, slots = SLOTS[family]
    path = make(tmp_path)
    with pytest.raises(ConfigError) as caught:
        module.SCRIPT.run(
            [*chosen, *(f"--{slot}={path}" for slot in slots), f"--{OUT.get(family, 'output_dir')}={tmp_path}"]
        )
    for slot in slots:
        (told,) = [text for text in caught.value.problems if text.startswith(f"--{slot} is {path}")]
        assert word in told and "needed" in told or slot == "vae" and "holds no" in told, told
