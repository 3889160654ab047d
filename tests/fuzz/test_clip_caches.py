"""Damaged and strange caches of clips. A message or success, nothing else, and in time."""

from __future__ import annotations

from pathlib import Path

import torch

from library.dataset import tensor_cache_io
from library.dataset.cache_io import ImageIdentity, LatentArrays, LatentsNotFound, LatentsRecord
from library.dataset.cache_pruning import leftovers
from library.dataset.tensor_cache_keys import parse_key
from library.dataset.text_cache_io import TextLayout, TextRecord, caption_hash
from library.families.record import TextKey
from tests.fuzz.mutations import changed_safetensors
from tests.fuzz.running import corpus, generator
from tests.golden_tests.test_video_caches import architecture
from tests.library.dataset.images import make_item

WAN, BUCKET = architecture("wan"), (64, 64, 9)
RECORD = LatentsRecord(
    model="", latent_space="x", resized=(64, 64), interpolation=None, image=ImageIdentity(1, 2, "x"),
    made_with={"frames": "0-9"}, frame_count=9,
)
LAYOUT = TextLayout((TextKey("t5", encoders=(0,), varlen=True), TextKey("mask", rank=1, dtype="int64")))
TEXTS = {"t5": torch.zeros(4, 6, dtype=torch.bfloat16), "mask": torch.ones(4, dtype=torch.int64)}
CONDITIONS = {"latents_image": (20, 3, 8, 8), "clip": (5, 4)}


def text_record(caption: str = "a") -> TextRecord:
    return TextRecord(caption=caption_hash(caption), model="x")


def read_latents(path: Path) -> None:
    for needs in ({"flip_aug": False, "alpha_mask": False}, {"flip_aug": True, "alpha_mask": True}):
        problem = tensor_cache_io.latents_problem(
            str(path), WAN, BUCKET, **needs, expected=RECORD, image_path=str(path), conditions=CONDITIONS
        )
    if problem is None:
        arrays = tensor_cache_io.load_latents(str(path), WAN, BUCKET)
        torch.stack([arrays.latents.float(), arrays.latents_flipped.float()])
    try:
        tensor_cache_io.load_latents(str(path), WAN, BUCKET)
    except LatentsNotFound:
        pass
    tensor_cache_io.load_conditions(str(path), WAN, BUCKET, CONDITIONS, flipped=True)


def read_text(path: Path) -> None:
    suffix, _ = tensor_cache_io.find_text(str(path), WAN, LAYOUT, text_record(), needed=LAYOUT.names)
    tensor_cache_io.keys_problem(str(path), WAN, LAYOUT, text_record(), LAYOUT.names)
    if suffix is not None:
        tensor_cache_io.load_text(str(path), LAYOUT, suffix)
    item = make_item(path.with_suffix(".png"))
    assert leftovers([item], lambda _: str(path), ".safetensors", WAN) == []
    tensor_cache_io.save_text(
        str(path), WAN, LAYOUT, TEXTS, text_record("b"), caption="b", in_use=frozenset({caption_hash("a")})
    )


def test_caches_of_clips(tmp_path, cases, finds, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "a.safetensors"
    values = {name: torch.zeros(shape) for name, shape in CONDITIONS.items()}
    arrays = LatentArrays(
        latents=torch.zeros(16, 3, 8, 8), latents_flipped=torch.zeros(16, 3, 8, 8), original_size=(64, 64),
        crop_ltrb=(0, 0, 64, 64), alpha_mask=torch.ones(9, 64, 64), conditions=values, conditions_flipped=values,
    )  # fmt: skip
    tensor_cache_io.save_latents(str(path), WAN, BUCKET, arrays, RECORD)
    latents = path.read_bytes()
    tensor_cache_io.save_text(str(path), WAN, LAYOUT, TEXTS, text_record(), caption="a")
    in_use = frozenset({caption_hash("a"), caption_hash("c")})
    tensor_cache_io.save_text(str(path), WAN, LAYOUT, TEXTS, text_record("c"), caption="c", in_use=in_use)
    text = path.read_bytes()
    for number in cases(100):
        content, read = (latents, read_latents) if number % 2 else (text, read_text)
        path.write_bytes(changed_safetensors(content, generator("clip_caches", number)))
        finds.run(f"case {number}", lambda: read(path))
    for kept in corpus("clip_caches"):
        for read in (read_latents, read_text):
            path.write_bytes(kept.read_bytes())
            finds.run(kept.name, lambda: read(path))
    finds.assert_none()


def test_names_of_keys_are_any_texts(cases):
    for number in cases(200):
        draw = generator("keys", number)
        parts = ["latents", "_", "x", "3", "varlen_", "mask", "float16", ".", "", "é"]
        text = "".join(draw.choice(parts) for _ in range(8))
        assert text.removeprefix("varlen_").startswith(parse_key(text).name)
