"""Damaged and strange files: caches, pictures, texts, pickles. A message or success, nothing else, and in time."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from library.checkpoints.embeddings import read_inversion
from library.checkpoints.kinds import describe_checkpoint
from library.components.tokenizers import load_clip_tokenizer, read_clip_folder, read_qwen_folder, read_t5_folder
from library.dataset import cache_io, text_cache_io
from library.dataset.info_cache import known_image, read_info
from library.dataset.items import SubsetParams
from library.dataset.media_utils import decode_image, image_size, verify_image
from library.dataset.metadata_files import read_metadata_file
from library.dataset.text_cache_io import TEXT_LAYOUTS
from library.generation.picture_files import read_texts
from library.safetensors_utils import MemoryEfficientSafeOpen, load_pickled_tensors, load_safetensors, save_file_atomic
from library.scripts.folder_tool import read_text_file
from library.sd_utils import inspect_sd_unet
from library.training.sampling_prompts import load_prompts
from tests.fuzz.mutations import as_json, changed_bytes, changed_safetensors, changed_value
from tests.fuzz.running import corpus, generator
from tests.library.dataset.images import FLUX
from tests.library.dataset.test_damaged_caches import flux_outputs, flux_record, npy
from tests.tiny import build_tiny_flux
from tests.tiny_sd import build_tiny_sd


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return build_tiny_flux(tmp_path_factory.mktemp("tiny"))


# ---- caches ----------------------------------------------------------------------------------------------------------


def read_latents_cache(path: Path) -> None:
    problem = None
    for flags in ({"flip_aug": False, "alpha_mask": False}, {"flip_aug": True, "alpha_mask": True}):
        problem = cache_io.latents_problem(str(path), FLUX, (64, 64), **flags, expected=RECORD, image_path=str(path))
    if problem is None:
        arrays = cache_io.load_latents(str(path), FLUX, (64, 64))
        torch.stack([torch.from_numpy(arrays.latents), torch.from_numpy(arrays.latents_flipped)]).float()
        torch.from_numpy(arrays.alpha_mask)
    try:
        cache_io.load_latents(str(path), FLUX, (64, 64))
    except cache_io.LatentsNotFound:
        pass
    cache_io.existing_arrays(str(path))


def read_text_cache(path: Path) -> None:
    layout = TEXT_LAYOUTS["flux"]
    suffix, _ = text_cache_io.find_text(str(path), layout, flux_record(), needed=tuple(flux_outputs()))
    text_cache_io.keys_problem(str(path), layout, flux_record(), tuple(flux_outputs()))
    if suffix is not None:
        for array in text_cache_io.load_text(str(path), layout, suffix).values():
            torch.from_numpy(array)
    text_cache_io.save_text(str(path), layout, flux_outputs(), flux_record())


RECORD = cache_io.LatentsRecord(
    model="", latent_space="x", resized=(64, 64), interpolation=None, image=cache_io.ImageIdentity(1, 2, "x")
)


def changed_npz(content: bytes, draw) -> bytes:
    """Other bytes, or another array, record or member in a sound archive."""
    if draw.random() < 0.4:
        return changed_bytes(content, draw)
    arrays = dict(np.load(io.BytesIO(content)))
    for _ in range(draw.randint(1, 2)):
        key = draw.choice(list(arrays))
        array, kind = arrays[key], draw.randrange(6)
        if kind == 0:
            arrays[key] = (
                array.astype(draw.choice(["i4", "f2", ">f4", "U3", "?", "c8"])) if array.dtype.kind in "fiub" else array
            )
        elif kind == 1:
            arrays[key] = array.reshape(-1)
        elif kind == 2:
            arrays[draw.choice(["x", "latents", "", f"{key}2", draw.choice(list(arrays))])] = arrays.pop(key)
        elif kind == 3 and "record" in key:
            arrays[key] = np.asarray(as_json(changed_value(json.loads(str(array)), draw)).decode())
        elif kind == 4:
            arrays[key] = np.zeros(draw.choice([(), (0,), (1, 2, 3), (2**10,)]), array.dtype)
        else:
            arrays[key] = array[..., None]
        if not arrays:
            break
    buffer = io.BytesIO()
    np.savez(buffer, **{name or "empty": array for name, array in arrays.items()})
    result = buffer.getvalue()
    return (
        result.replace(b"'fortran_order': False", draw.choice([b"'fortran_order': True ", b"'fortran_order': 1    "]))
        if draw.random() < 0.1
        else result
    )


def test_caches(tmp_path, cases, finds, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "a_0064x0064_flux.npz"
    arrays = cache_io.LatentArrays(
        latents=np.zeros((16, 8, 8)), original_size=(64, 64), crop_ltrb=(0, 0, 64, 64),
        latents_flipped=np.zeros((16, 8, 8)), alpha_mask=np.ones((64, 64)),
    )  # fmt: skip
    cache_io.save_latents(str(path), "_8x8", arrays, RECORD)
    latents = path.read_bytes()
    text_cache_io.save_text(str(path), TEXT_LAYOUTS["flux"], flux_outputs(), flux_record())
    text = path.read_bytes()
    for number in cases(500):
        draw = generator("caches", number)
        content, read = (latents, read_latents_cache) if number % 2 else (text, read_text_cache)
        path.write_bytes(changed_npz(content, draw))
        finds.run(f"case {number}", lambda: read(path))
    for kept in corpus("caches"):
        for read in (read_latents_cache, read_text_cache):
            shutil.copyfile(kept, path)
            finds.run(kept.name, lambda: read(path))
    finds.assert_none()


# ---- pictures --------------------------------------------------------------------------------------------------------


def pictures() -> dict[str, bytes]:
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_itxt("prompt", "a cat", zip=True)
    info.add_text("seed", "1")
    pixels = np.random.RandomState(0).randint(0, 255, (12, 10, 4), dtype=np.uint8)
    colour, clear = Image.fromarray(pixels[..., :3]), Image.fromarray(pixels)
    exif = Image.Exif()
    exif[0x0112] = 6
    wanted = [
        ("png", clear, {"pnginfo": info, "exif": exif, "icc_profile": b"x" * 200}),
        ("png", colour.convert("P"), {"transparency": 3}),
        ("png", Image.fromarray(np.arange(120, dtype=np.uint16).reshape(12, 10) * 500), {}),
        ("jpeg", colour, {"exif": exif}), ("jpeg", colour.convert("CMYK"), {}),
        ("webp", clear, {"exif": exif}), ("bmp", colour, {}), ("gif", colour.convert("P"), {}), ("tiff", colour, {}),
    ]  # fmt: skip
    found = {}
    for number, (kind, image, options) in enumerate(wanted):
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        found[f"{number}.{kind}"] = buffer.getvalue()
    return found


def read_picture(path: Path) -> None:
    """Every reader: one that accepts a file must not make the next one fail."""
    read_texts(path)
    image_size(path)
    verify_image(path)
    decode_image(path, with_alpha=True)


def test_pictures(tmp_path, cases, finds):
    whole = list(pictures().items())
    for number in cases(500):
        draw = generator("pictures", number)
        name, content = whole[number % len(whole)]
        path = tmp_path / f"a{Path(name).suffix if number % 3 else '.png'}"
        path.write_bytes(changed_bytes(content, draw))
        finds.run(f"case {number} ({name})", lambda: read_picture(path))
    for kept in corpus("pictures"):
        finds.run(kept.name, lambda: read_picture(kept))
    finds.assert_none()


# ---- texts -----------------------------------------------------------------------------------------------------------


def metadata_file(path: Path) -> None:
    read_metadata_file(str(path))


def info_file(path: Path) -> None:
    for name in (entries := read_info(str(path.parent))):
        known_image(entries, str(path.parent / name.replace("\0", "")), SubsetParams())


CLIP = {
    "vocab.json": as_json(
        {"a": 0, "b": 1, "a</w>": 2, "b</w>": 3, "ab</w>": 4, "<|startoftext|>": 5, "<|endoftext|>": 6}
    ),
    "merges.txt": b"#version: 0.2\na b</w>\n",
    "tokenizer_config.json": as_json({"pad_token": {"content": "<|endoftext|>"}, "unk_token": "<|endoftext|>"}),
}


def clip_folder(path: Path) -> None:
    tokenizer = load_clip_tokenizer(str(path.parent))
    tokenizer("a b ab", padding="max_length", truncation=True)


TEXTS = {
    "captions": ("a.txt", b"\xef\xbb\xbfa red cat, photo\n", lambda path: read_text_file(str(path))),
    "metadata": ("m.json", as_json({"a.png": {"caption": "a", "tags": ["b", "c"], "train_resolution": [64, 64]}, "b": {"tags": "x, y"}}), metadata_file),
    "metadata lines": ("m.jsonl", as_json({"image_path": "a.png", "caption": "a"}) + b"\n" + as_json({"image_path": "b.png"}), metadata_file),
    "info": (
        "metadata_cache.json",
        as_json({"a.png": {"caption": None, "resolution": [4, 4], "image": [1, 2], "caption_file": ["a.txt", [1, 2]], "lines": False}}), info_file,
    ),
    "prompts": ("p.txt", b"a cat --w 64 --h 64 --d 1 --s 3 --l 3.5 --n bad\n# no\nb --ss euler\n", load_prompts),
    "prompts toml": ("p.toml", b"[prompt]\nwidth = 64\n[[prompt.subset]]\nprompt = 'a'\nseed = 3\n", load_prompts),
    "prompts json": ("p.json", as_json([{"prompt": "a", "width": 64, "scale": 3.5}, "b --w 64"]), load_prompts),
}  # fmt: skip


def test_texts(tmp_path, cases, finds):
    kinds = list(TEXTS)
    for number in cases(300):
        draw = generator("texts", number)
        name, content, read = TEXTS[kinds[number % len(kinds)]]
        path = tmp_path / name
        is_json = name.endswith("json") and draw.random() < 0.6
        path.write_bytes(as_json(changed_value(json.loads(content), draw)) if is_json else changed_bytes(content, draw))
        finds.run(f"case {number} ({kinds[number % len(kinds)]})", lambda: read(path))
    for kept in corpus("texts"):
        name, _, read = TEXTS[kept.name.partition("-")[0]]
        shutil.copyfile(kept, tmp_path / name)
        finds.run(kept.name, lambda: read(tmp_path / name))
    finds.assert_none()


def test_tokenizer_folders(tmp_path, tiny, cases, finds, monkeypatch):
    from transformers import CLIPTokenizer

    folder = tmp_path / "clip"
    folder.mkdir()
    CLIPTokenizer(vocab=json.loads(CLIP["vocab.json"]), merges=[("a", "b</w>")])._tokenizer.save(
        str(tmp_path / "whole.json")
    )
    files = {**CLIP, "tokenizer.json": (tmp_path / "whole.json").read_bytes()}
    for number in cases(60):
        draw = generator("tokenizers", number)
        names = (
            [name for name in files if name != "tokenizer.json"]
            if number % 2
            else [name for name in files if "token" in name]
        )
        shutil.rmtree(folder)
        folder.mkdir()
        for name in names:
            (folder / name).write_bytes(files[name])
        chosen = draw.choice(names)
        content, kind = files[chosen], draw.random()
        (folder / chosen).write_bytes(
            as_json(changed_value(json.loads(content), draw))
            if chosen.endswith("json") and kind < 0.6
            else changed_bytes(content, draw)
        )
        finds.run(f"case {number} ({chosen})", lambda: clip_folder(folder / "x"))
        finds.run(
            f"case {number} ({chosen}) as another", lambda: (read_qwen_folder if number % 2 else read_t5_folder)(folder)
        )
    finds.assert_none()


# ---- model files -----------------------------------------------------------------------------------------------------


def read_weights(path: Path) -> None:
    describe_checkpoint(path, with_pickles=True)
    load_safetensors(path)
    with MemoryEfficientSafeOpen(path) as file:
        for key in file.keys():
            file.get_tensor(key)


def test_weights(tmp_path, cases, finds):
    path = tmp_path / "a.safetensors"
    tensors = {
        "a": torch.zeros(2, 3),
        "b.weight": torch.zeros(4, dtype=torch.bfloat16),
        "c": torch.zeros(0),
        "d": torch.tensor(1),
    }
    save_file_atomic(tensors, path, {"format": "pt"})
    whole = path.read_bytes()
    for number in cases(300):
        path.write_bytes(changed_safetensors(whole, generator("weights", number)))
        finds.run(f"case {number}", lambda: read_weights(path))
    for kept in corpus("weights"):
        finds.run(kept.name, lambda: read_weights(kept))
    finds.assert_none()


def read_pickle(path: Path) -> None:
    describe_checkpoint(path, with_pickles=True)
    try:
        load_pickled_tensors(path)
    finally:
        read_inversion(str(path), ("emb_params",))


def test_pickles(tmp_path, cases, finds):
    path = tmp_path / "a.pt"
    contents = []
    for protocol in (True, False):
        for value in (
            {"state_dict": {"a": torch.zeros(2, 3), "b": torch.ones(1)}, "epoch": 3},
            {"emb_params": torch.zeros(2, 8)},
        ):
            torch.save(value, path, _use_new_zipfile_serialization=protocol)
            contents.append(path.read_bytes())
    for number in cases(200):
        path.write_bytes(changed_bytes(contents[number % len(contents)], generator("pickles", number)))
        finds.run(f"case {number}", lambda: read_pickle(path))
    for kept in corpus("pickles"):
        finds.run(kept.name, lambda: read_pickle(kept))
    finds.assert_none()


def test_model_folders(tmp_path, cases, finds):
    """config.json, index and scheduler of a folder in the layout of diffusers."""
    model = build_tiny_sd(tmp_path / "sd", "sd1").model
    folder = tmp_path / "folder"
    (folder / "unet").mkdir(parents=True)
    (folder / "scheduler").mkdir()
    shutil.copyfile(model, folder / "unet" / "diffusion_pytorch_model.safetensors")
    weights = load_safetensors(model)
    unet = {
        key.removeprefix("model.diffusion_model."): tensor
        for key, tensor in weights.items()
        if key.startswith("model.diffusion_model.")
    }
    save_file_atomic(unet, folder / "unet" / "diffusion_pytorch_model.safetensors")
    files = {
        "unet/config.json": {
            "attention_head_dim": 8,
            "cross_attention_dim": 768,
            "block_out_channels": [32, 64],
            "sample_size": 8,
        },
        "scheduler/scheduler_config.json": {"prediction_type": "epsilon", "rescale_betas_zero_snr": False},
        "model_index.json": {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]},
        "unet/diffusion_pytorch_model.safetensors.index.json": {
            "weight_map": {"a": "diffusion_pytorch_model.safetensors"}
        },
    }
    for number in cases(80):
        draw = generator("folders", number)
        for name, value in files.items():
            (folder / name).write_bytes(as_json(value))
        chosen = draw.choice(list(files))
        content = as_json(files[chosen])
        (folder / chosen).write_bytes(
            as_json(changed_value(files[chosen], draw)) if draw.random() < 0.7 else changed_bytes(content, draw)
        )

        def look() -> None:
            describe_checkpoint(folder, with_pickles=True)
            describe_checkpoint(folder / "unet", with_pickles=True)
            inspect_sd_unet(str(folder))

        finds.run(f"case {number} ({chosen})", look)
    finds.assert_none()
