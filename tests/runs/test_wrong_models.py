"""Model files in places where they do not belong: each is named for what it is, with what is needed and the way there,
before anything is loaded or written."""

from __future__ import annotations

import os
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from library.checkpoints.kinds import describe_checkpoint
from library.families.registry import FAMILIES, script_of_kind
from library.safetensors_utils import load_pickled_tensors
from networks.kinds.targets import targets_of_family
from tests.runs.families import (
    MODEL,
    SLOTS,
    FamilyWork,
    Tinies,
    key_table,
    refused_run,
    told_as,
    without,
    write_header_only,
)
from tests.tiny_sd import build_tiny_sd

SD1, SD2, SDXL = (
    ("Stable Diffusion 1", "train_network.py"),
    ("Stable Diffusion 2", "train_network.py"),
    ("SDXL", "sdxl_train_network.py"),
)
FLUX, NOBODY = ("FLUX.1", "flux_train_network.py"), "no script here"
DENOISERS: dict[str, tuple[str, str]] = {
    "sd15_checkpoint": SD1, "sd15_unet": SD1, "sd21_checkpoint": SD2, "sd21_unet": SD2, "sdxl_checkpoint": SDXL,
    "sdxl_unet": SDXL,
    "flux_dev": FLUX, "flux_schnell": FLUX, "anima": ("Anima", "anima_train_network.py"), "chroma": ("Chroma", ""),
    "sd3_medium_checkpoint": ("Stable Diffusion 3", "sd3_train_network.py"), "sd35_large": ("Stable Diffusion 3", ""),
    "lumina2": ("Lumina", ""),
    "hunyuan_image": ("HunyuanImage", ""), "hunyuan_video": ("HunyuanVideo", ""), "framepack": ("FramePack", ""),
    "wan_t2v_14b": ("Wan", ""), "wan_i2v_14b": ("Wan", ""),
}  # fmt: skip
"""key table -> what the message says that it is, and the script for it ("": what the family table says)"""
PARTS: dict[str, str] = {
    "vae_ldm4": "Stable Diffusion autoencoder", "vae_ldm16": "FLUX.1 or SD3 autoencoder",
    "vae_wan": "Wan or Qwen-Image autoencoder",
    "vae_qwen_image_diffusers": "Wan or Qwen-Image autoencoder", "vae_hunyuan_image": "HunyuanImage autoencoder",
    "vae_hunyuan_video": "HunyuanVideo autoencoder", "clip_l": "CLIP-L", "clip_g_hf": "CLIP-G",
    "clip_g_open_clip": "CLIP-G",
    "clip_h_open_clip": "CLIP", "t5xxl": "T5", "umt5_xxl_hf": "UMT5", "umt5_xxl_wan": "UMT5", "byt5_glyph": "ByT5",
    "gemma2_2b": "Gemma", "llama3_8b": "LLaMA", "qwen25_vl_7b": "Qwen2.5-VL", "qwen3_0_6b": "Qwen3",
    "siglip_so400m": "SigLIP image encoder", "wan_clip_vision_h": "CLIP image encoder",
}  # fmt: skip


@pytest.fixture(scope="session")
def tinies(tmp_path_factory) -> Tinies:
    return Tinies(tmp_path_factory)


@pytest.fixture(params=SLOTS)
def work(request, tmp_path: Path, tinies: Tinies) -> FamilyWork:
    return tinies.work(request.param, tmp_path)


def wrong_slots(family: str, table: str) -> list[str]:
    return [slot for slot, fitting in SLOTS[family].items() if table not in fitting]


def family_of_kind(table: str) -> str | None:
    """The family whose slot of the model a key table fits."""
    return next((family for family, slots in SLOTS.items() if table in slots[MODEL]), None)


EACH = [(family, table) for family in SLOTS for table in (*DENOISERS, *PARTS) if wrong_slots(family, table)]


@pytest.mark.parametrize("family, table", EACH)
def test_every_slot_names_what_it_got(
    tinies: Tinies, tmp_path: Path, family: str, table: str, monkeypatch, capsys
) -> None:
    work, path, wrong = tinies.work(family, tmp_path), tmp_path / "given.safetensors", wrong_slots(family, table)
    write_header_only(path, key_table(table))
    argv = without(work.argv("out"), *wrong)
    message = refused_run(family, [*argv, *(f"--{slot}={path}" for slot in wrong)], monkeypatch, capsys)
    title, script = DENOISERS[table] if table in DENOISERS else (PARTS[table], None)
    for slot in wrong:
        (line,) = [line for line in message.splitlines() if f"--{told_as(family, slot)} is {path}" in line]
        assert slot == "vae" and "holds no" in line or title in line and "needed: " in line
        if slot == MODEL and script is not None:
            script = script or script_of_kind(describe_checkpoint(path).kind) or NOBODY
            is_variant = (FAMILIES[family].variant_of or ("",))[0] == family_of_kind(table)
            script += f" without --{FAMILIES[family].variant_of[1]}" if is_variant else ""
            assert f"; {script} trains such a model" in line
    assert not (tmp_path / "out").exists()


def changed(work: FamilyWork, name: str, **tensors: torch.Tensor | None) -> Path:
    """The model of `work` with other tensors at some places (None: left out), under another name."""
    model = work.tiny.model
    state = {**load_file(model), **{key: tensor for key, tensor in tensors.items() if tensor is not None}}
    state = {
        key: tensor
        for key, tensor in state.items()
        if not any(t is None and key.startswith(start) for start, t in tensors.items())
    }
    with safe_open(model, "pt") as file:
        metadata = file.metadata()
    save_file(state, work.folder / name, metadata)
    return work.folder / name


def told(work: FamilyWork, path: Path | str, monkeypatch, capsys, *more: str) -> str:
    argv = without(work.argv("out"), MODEL)
    return refused_run(work.family, [*argv, f"--{MODEL}={path}", *more], monkeypatch, capsys)


FIRST_LAYER = "model.diffusion_model.input_blocks.0.0.weight"


@pytest.mark.parametrize("family", ["sd", "sdxl"])
@pytest.mark.parametrize("channels, kind", [(9, "an inpainting model"), (8, "an image editing (instruct) model")])
def test_models_of_other_tasks(
    tinies: Tinies, tmp_path: Path, family: str, channels: int, kind: str, monkeypatch, capsys
) -> None:
    work = tinies.work(family, tmp_path)
    path = changed(work, "other.safetensors", **{FIRST_LAYER: torch.zeros(16, channels, 3, 3)})
    message = told(work, path, monkeypatch, capsys)
    assert (
        f"--{MODEL} is {path}: it is {kind} ({channels} input channels" in message
        and "a text-to-image model is needed" in message
    )


@pytest.mark.parametrize("family, prefix, part", [
    ("sd", "first_stage_model.", "autoencoder"), ("sd", "cond_stage_model.", "text encoder"),
    ("sdxl", "first_stage_model.", "autoencoder"),
    ("sdxl", "conditioner.embedders.0.", "CLIP text encoder"),
    ("sdxl", "conditioner.embedders.1.", "CLIP-G text encoder"),
])  # fmt: skip
def test_a_file_without_a_part(
    tinies: Tinies, tmp_path: Path, family: str, prefix: str, part: str, monkeypatch, capsys
) -> None:
    work = tinies.work(family, tmp_path)
    path = changed(work, "part.safetensors", **{prefix: None})
    message = told(work, path, monkeypatch, capsys)
    assert f"--{MODEL} is {path}: it holds no" in message and part in message


def test_versions_and_predictions_that_contradict_the_file(tinies: Tinies, tmp_path: Path, monkeypatch, capsys) -> None:
    sd, sdxl = tinies.work("sd", tmp_path), tinies.work("sdxl", tmp_path)
    message = told(sd, sd.tiny.model, monkeypatch, capsys, "--v2")
    assert message.count("\n") == 1 and "--v2 is set" in message and "leave --v2 out" in message
    second = build_tiny_sd(tmp_path / "sd2", "sd2").model
    message = told(sd, second, monkeypatch, capsys)
    assert message.count("\n") == 1 and "is Stable Diffusion 2; add --v2" in message
    velocity = changed(sdxl, "v.safetensors", v_pred=torch.zeros(1), ztsnr=torch.zeros(1))
    message = told(sdxl, velocity, monkeypatch, capsys)
    assert "says that it predicts velocity; add --v_parameterization" in message


@pytest.mark.parametrize("kind", ["cut", "cut header", "empty", "text", "folder", "missing", "gguf", "pickle", "image"])
def test_files_that_are_no_model(work: FamilyWork, kind: str, monkeypatch, capsys) -> None:
    slots, path = list(SLOTS[work.family]), work.folder / "given.safetensors"
    whole = Path(
        next(word for word in work.tiny.arguments() if word.startswith(f"--{MODEL}=")).partition("=")[2]
    ).read_bytes()
    contents = {
        "cut": whole[:-5000], "cut header": whole[:50], "empty": b"", "text": b"hello\n",
        "gguf": b"GGUF\3\0\0\0" + bytes(60),
        "image": next(work.images.glob("*.png")).read_bytes(),
    }  # fmt: skip
    if kind == "folder":
        path.mkdir()
    elif kind == "pickle":
        torch.save({"a": torch.zeros(3)}, path)
    elif kind in contents:
        path.write_bytes(contents[kind])
    words = {
        "cut": "truncated", "cut header": "truncated", "empty": "an empty file", "text": "a text file", "gguf": "GGUF",
        "folder": "a folder without safetensors files", "missing": "no such file", "pickle": "a pickle",
        "image": "not safetensors",
    }  # fmt: skip
    argv = without(work.argv("out"), *slots)
    message = refused_run(work.family, [*argv, *(f"--{slot}={path}" for slot in slots)], monkeypatch, capsys)
    for slot in slots:
        (line,) = [line for line in message.splitlines() if f"--{told_as(work.family, slot)} is {path}" in line]
        assert words[kind] in line and "needed: " in line


class Harmful:
    """Makes a folder when it is opened in the usual way."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


class Callback:
    """What training frameworks put beside the weights."""

    __module__, __qualname__ = "pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint"


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_ckpt_files(tinies: Tinies, tmp_path: Path, family: str, monkeypatch, capsys) -> None:
    work, path = tinies.work(family, tmp_path), tmp_path / "model.ckpt"
    state = load_file(work.tiny.model)
    torch.save({"state_dict": state, "callback": Harmful(tmp_path / "it ran")}, path)
    message = told(work, path, monkeypatch, capsys)
    assert (
        f"--{MODEL} is {path}: it holds more than weights" in message and "mkdir" in message and "needed: " in message
    )
    assert not (tmp_path / "it ran").exists()
    torch.save({"state_dict": state}, path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-4000])
    assert f"--{MODEL} is {path}: it is truncated" in told(work, path, monkeypatch, capsys)
    path.write_bytes(b"hello")
    assert "a text file" in told(work, path, monkeypatch, capsys)
    torch.save({"steps": 3}, path)
    assert "it holds no tensors" in told(work, path, monkeypatch, capsys)
    path.write_bytes(whole)
    other = "sdxl" if family == "sd" else "sd"
    message = told(tinies.work(other, tmp_path), path, monkeypatch, capsys)
    assert SDXL[0] in message if family == "sdxl" else SD1[0] in message
    assert f"; {'sdxl_' if family == 'sdxl' else ''}train_network.py trains such a model" in message


def test_objects_of_the_framework_beside_the_weights_are_left_out(tmp_path: Path) -> None:
    """Released .ckpt files of Stable Diffusion 1 hold such an object."""
    path = tmp_path / "old.ckpt"
    module = types.ModuleType(Callback.__module__)
    module.ModelCheckpoint = Callback
    with pytest.MonkeyPatch.context() as patch:
        for name in ("pytorch_lightning", "pytorch_lightning.callbacks", Callback.__module__):
            patch.setitem(sys.modules, name, module if name == Callback.__module__ else types.ModuleType(name))
        torch.save({"state_dict": {"a": torch.ones(2)}, "callbacks": {Callback: {"best": Callback()}}}, path)
    assert torch.equal(load_pickled_tensors(path)["a"], torch.ones(2))


ADAPTERS = {
    "flux": "lora_unet_double_blocks_0_img_attn_proj", "sd": "lora_unet_down_blocks_0_attentions_0_proj_in",
    "sdxl": "lora_unet_input_blocks_4_1_proj_in", "anima": "lora_unet_blocks_0_cross_attn_q_proj",
    "sd3": "lora_unet_joint_blocks_0_context_block_attn_proj",
    "wan": "lora_unet_blocks_0_cross_attn_q", "lumina": "lora_unet_noise_refiner_0_attention_qkv",
    "video": "lora_unet_double_blocks_0_img_mlp_fc1",
}  # fmt: skip
OWNERS = {
    "flux": "FLUX.1 or Chroma", "chroma": "FLUX.1 or Chroma", "sd": "Stable Diffusion 1 or 2", "sdxl": "SDXL",
    "anima": "Anima",
    "sd3": "Stable Diffusion 3", "wan": "Wan",
    "lumina": "Lumina-Image 2.0", "video": "HunyuanImage or HunyuanVideo",
    "hunyuan_image": "HunyuanImage or HunyuanVideo", "hunyuan_video": "HunyuanImage or HunyuanVideo",
    "framepack": "FramePack",
}  # fmt: skip


@pytest.mark.parametrize("slot", ["network_weights", "base_weights"])
def test_adapters_of_other_families(work: FamilyWork, slot: str, monkeypatch, capsys) -> None:
    readable = {OWNERS[name] for name in (work.family, *targets_of_family(work.family).reads)}
    for maker in {maker for maker in ADAPTERS if OWNERS[maker] not in readable}:
        path, stem = work.folder / f"{maker}.safetensors", ADAPTERS[maker]
        width = 3072 if maker == "flux" else 8  # the name alone could be that of HunyuanImage
        state = {f"{stem}.lora_down.weight": torch.zeros(4, width), f"{stem}.lora_up.weight": torch.zeros(width, 4)}
        save_file(state, path)
        message = refused_run(work.family, [*work.argv("out"), f"--{slot}={path}"], monkeypatch, capsys)
        assert (
            f"--{slot} is {path}: this is a LoRA-type adapter for {OWNERS[maker]}; needed: one for {OWNERS[work.family]}"
            in message
        )


def test_network_modules_of_other_families(work: FamilyWork, monkeypatch, capsys) -> None:
    own = FAMILIES[work.family].network_module
    for module in {entry.network_module for entry in FAMILIES.values()} - {own}:
        message = refused_run(work.family, [*work.argv("out"), f"--network_module={module}"], monkeypatch, capsys)
        assert f"--network_module is {module}, which is for " in message and f"use {own} or networks.lora" in message


def test_nothing_given_names_every_needed_option(work: FamilyWork, monkeypatch, capsys) -> None:
    live = ["--live_encoding"] if FAMILIES[work.family].clips else []  # otherwise caches may hold what parts make
    message = refused_run(work.family, live, monkeypatch, capsys)
    needed = {slot for slot in SLOTS[work.family] if work.family not in ("sd", "sdxl", "sd3") or slot == MODEL}
    needed = {told_as(work.family, slot) for slot in needed}
    for name in (*needed, "output_dir", "network_module", "train_data_dir"):
        assert f"--{name}" in message
    assert f"--network_module {FAMILIES[work.family].network_module}" in message
