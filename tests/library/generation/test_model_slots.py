"""Every image script names what is no model, or another one, in each of its slots, before anything is loaded, and takes
one file of all models in each."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

from library import generation
from library.checkpoints.kinds import check_slot
from library.core.errors import ConfigError
from library.generation.adapter_files import AdapterFile, parse_adapter_argument
from tests.runs.families import key_table, write_header_only

SLOTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "flux": ((), ("ckpt_path", "clip_l", "t5xxl", "ae")),
    "chroma": (("--model_type=chroma",), ("ckpt_path", "t5xxl", "ae")),
    "sdxl": ((), ("ckpt_path", "vae")),
    "sd3": ((), ("ckpt_path", "clip_l", "clip_g", "t5xxl", "vae")),
    "lumina": ((), ("pretrained_model_name_or_path", "gemma2_path", "ae_path")),
    "anima": ((), ("dit", "vae", "text_encoder")),
    "hunyuan_image": ((), ("dit", "vae", "text_encoder", "byt5")),
    "hunyuan_video": ((), ("dit", "vae", "text_encoder1", "text_encoder2")),
    "framepack": ((), ("dit", "vae", "text_encoder1", "text_encoder2")),
    "wan": (("--task=i2v-14B",), ("dit", "vae", "t5", "clip")),
}
"""family -> (words that choose it in its script, options that name model files)"""
SCRIPTS = {"chroma": "flux"}
"""a variant -> whose script it is in"""
OUT = dict.fromkeys(("anima", "hunyuan_image", "hunyuan_video", "framepack", "wan"), "save_path")
"""family -> the option of the folder of pictures, where it has another name than output_dir"""
_T5, _CLIP_L = {"text_encoders.t5xxl.transformer.": "t5xxl"}, {"text_encoders.clip_l.transformer.": "clip_l"}
_AE = {"vae.": "vae_ldm16"}
BUNDLES: dict[str, dict[str, str]] = {
    "flux": {"model.diffusion_model.": "flux_dev", **_AE, **_T5, **_CLIP_L},
    "chroma": {"model.diffusion_model.": "chroma", **_AE, **_T5},
    "sdxl": {"": "sdxl_checkpoint"},
    "sd3": {"": "sd3_medium_checkpoint"},
    "lumina": {
        "model.diffusion_model.": "lumina2", **_AE, "text_encoders.gemma2_2b.transformer.": "gemma2_2b",
    },
    "anima": {
        "model.diffusion_model.": "anima", "vae.": "vae_wan", "text_encoders.qwen3_06b.transformer.": "qwen3_0_6b",
    },
    "hunyuan_image": {
        "model.diffusion_model.": "hunyuan_image", "vae.": "vae_hunyuan_image",
        "text_encoders.qwen25_7b.transformer.": "qwen25_vl_7b", "text_encoders.byt5_small.transformer.": "byt5_glyph",
    },
    "hunyuan_video": {
        "model.diffusion_model.": "hunyuan_video", "vae.": "vae_hunyuan_video",
        "text_encoders.llama.transformer.": "llama3_8b", **_CLIP_L,
    },
}  # fmt: skip
"""family -> what its file of all models holds: what stands before the names of a model -> key table"""
ADAPTER = dict.fromkeys(OUT, "lora_weight")
"""family -> the option of adapters, where it has another name than lora_weights"""
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


def script_of(family: str):
    return importlib.import_module(f"library.generation.{SCRIPTS.get(family, family)}_inference").SCRIPT


def test_every_image_script_takes_part() -> None:
    folder = Path(generation.__file__).parent
    assert {path.stem.removesuffix("_inference") for path in folder.glob("*_inference.py")} == set(SLOTS)


@pytest.mark.parametrize("family", SLOTS)
@pytest.mark.parametrize(("make", "word"), FILES, ids=[make.__name__ for make, _ in FILES])
def test_a_wrong_file_is_named_in_every_slot(family: str, make, word: str, tmp_path: Path) -> None:
    script = script_of(family)
    chosen, slots = SLOTS[family]
    path = make(tmp_path)
    with pytest.raises(ConfigError) as caught:
        script.run(
            [*chosen, *(f"--{slot}={path}" for slot in slots), f"--{OUT.get(family, 'output_dir')}={tmp_path}"]
        )
    for slot in slots:
        (told,) = [text for text in caught.value.problems if text.startswith(f"--{slot} is {path}")]
        assert word in told and "needed" in told or slot == "vae" and "holds no" in told, told


@pytest.mark.parametrize("family", sorted(SLOTS.keys() - OUT.keys()))  # the others' slots hang on what is written
def test_a_wrong_file_is_told_beside_a_wrong_number(family: str, tmp_path: Path) -> None:
    (chosen, slots), path = SLOTS[family], quantised(tmp_path)
    with pytest.raises(ConfigError) as caught:
        script_of(family).run([*chosen, f"--{slots[0]}={path}", "--steps=0", f"--output_dir={tmp_path}"])
    for word in ("--steps is 0", f"--{slots[0]} is {path}"):
        assert [text for text in caught.value.problems if text.startswith(word)], (word, caught.value.problems)


@pytest.mark.parametrize("family", BUNDLES)
def test_a_file_of_all_models_is_taken_in_every_slot(family: str, tmp_path: Path) -> None:
    script, (chosen, slots), path = script_of(family), SLOTS[family], tmp_path / "all.safetensors"
    tables = BUNDLES[family].items()
    shapes = {p + name.removeprefix("net."): shape for p, table in tables for name, shape in key_table(table).items()}
    write_header_only(path, shapes)
    adapter = f"--{ADAPTER.get(family, 'lora_weights')}=none.safetensors"
    options = [f"--{OUT.get(family, 'output_dir')}={tmp_path}", adapter]
    with pytest.raises(ConfigError) as caught:  # the adapter ends it before anything is loaded
        script.run([*chosen, *(f"--{slot}={path}" for slot in slots), *options, "--prompt=a"])
    problems = [text for text in caught.value.problems if "none.safetensors" not in text]
    assert len(problems) < len(caught.value.problems)
    assert all("tokenizer" in problem for problem in problems), problems  # none is here for models of this size


def test_the_strength_of_an_adapter_is_a_finite_number() -> None:
    assert parse_adapter_argument("a;b.safetensors;-0.5") == AdapterFile("a;b.safetensors", -0.5)
    for word in ("x", "", "nan", "inf"):
        with pytest.raises(ConfigError, match="--lora_weights has .* is the multiplier"):
            parse_adapter_argument(f"a.safetensors;{word}")


def test_files_beside_the_usual_slots_are_told_with_the_others(tmp_path: Path) -> None:
    from library.generation.gen_img.script import run

    path = quantised(tmp_path)
    with pytest.raises(ConfigError) as caught:
        slots = (*SLOTS["anima"][1], "llm_adapter_path")
        script_of("anima").run([*(f"--{slot}={path}" for slot in slots), "--save_path=x"])
    assert [text for text in caught.value.problems if text.startswith("--llm_adapter_path: ") and "GGUF" in text]
    assert len([text for text in caught.value.problems if "GGUF" in text]) == 4
    with pytest.raises(ConfigError) as caught:
        run([f"--ckpt={path}", f"--vae={path}", "--prompt=a", f"--outdir={tmp_path}"])
    assert len([text for text in caught.value.problems if "GGUF" in text]) == 2


def test_an_autoencoder_in_a_file_of_another_model_is_named(tmp_path: Path) -> None:
    path = tmp_path / "all.safetensors"
    write_header_only(path, key_table("sd3_medium_checkpoint"))
    told = check_slot(path, "ae", {"vae_flux"})
    assert "a Stable Diffusion 3 checkpoint" in told and "with an autoencoder of its own; needed: " in told
    assert check_slot(path, "t5xxl", {"t5"}) is None and check_slot(path, "clip_g", {"clip_g"}) is None
