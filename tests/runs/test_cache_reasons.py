"""Why cached text outputs are made anew, for every family: each setting that they hang on is told by its name. No model
runs: a file with the record of one command line is looked at with another."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.dataset.cache_stores import text_store
from library.dataset.text_cache import TextCache
from library.dataset.text_cache_io import TextLayout
from library.safetensors_utils import read_header
from tests.families import CASES
from tests.runs.families import Tinies

CAPTION = "a red cat"
ON_DISK = ("--cache_text_encoder_outputs_to_disk", "--network_train_unet_only")
SETTINGS: dict[str, dict[str, str]] = {
    "flux": {
        "--t5xxl_max_token_length=32": "t5_out has 64 tokens, 32 are needed",
        "--apply_t5_attn_mask": "made with another apply_t5_attn_mask",
    },
    "chroma": {"--t5xxl_max_token_length=32": "t5_out has 64 tokens, 32 are needed"},
    "sd3": {
        "--t5xxl_max_token_length=32": "t5_out has 48 tokens, 32 are needed",
        "--apply_lg_attn_mask": "made with another apply_lg_attn_mask",
        "--apply_t5_attn_mask": "made with another apply_t5_attn_mask",
    },
    "lumina": {
        "--system_prompt=the girl": "made with another system_prompt",
        "--gemma2_max_token_length=16": "hidden_state has 32 tokens, 16 are needed",
    },
    "anima": {
        "--qwen3_max_token_length=16": "prompt_embeds has {} tokens, 16 are needed",
        "--t5_max_token_length=16": "made with another t5_max_token_length",
    },
    "sdxl": {
        "--max_token_length=150": "made with another max_token_length",
        "--weighted_captions": "made with another weighted_captions",
    },
    "hunyuan_image": {},
    "hunyuan_video": {},
    "wan": {},
    "framepack": {},
}
"""family -> option -> why files that were made without it cannot be used"""
ENCODER = {"sdxl": "pretrained_model_name_or_path", "lumina": "gemma2", "anima": "qwen3", "hunyuan_image": "byt5"} | {
    "hunyuan_video": "text_encoder2", "wan": "t5", "framepack": "text_encoder2"
}  # fmt: skip
"""family -> the option of a text encoder's file, where it has none of T5"""


@pytest.fixture(scope="module")
def tinies(tmp_path_factory: pytest.TempPathFactory) -> Tinies:
    return Tinies(tmp_path_factory)


def test_every_family_with_such_a_cache_takes_part() -> None:
    assert SETTINGS.keys() == {case.family for case in CASES.values() if case.caches_text}


def write(cache: TextCache, layout: TextLayout, path: Path) -> None:
    """A file of this cache, of zeros."""
    length = cache.max_token_length or 4
    kinds = {"float": torch.float32, "float32": torch.float32, "bool": torch.bool}
    outputs = {
        key.name: torch.zeros([length, 2][: key.rank], dtype=kinds.get(key.dtype, torch.int64)) for key in layout.keys
    }  # fmt: skip
    store = text_store(cache.architecture)
    store.save(str(path), cache.architecture, layout, outputs, cache.record_of(CAPTION), caption=CAPTION)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_that_makes_a_cache_stale_is_named(name: str, tinies: Tinies, tmp_path: Path) -> None:
    work, path = tinies.work(name, tmp_path), tmp_path / "a"

    def strategies_of(*options: str):
        return work.trainer("out", *ON_DISK, *options).family.strategies()

    plain = strategies_of()
    first = plain.text_encoder_outputs_caching
    write(first, plain.layout, path)
    assert first.find(str(path), CAPTION) == ("", "")
    for option, reason in SETTINGS[name].items():
        found = strategies_of(option).text_encoder_outputs_caching.find(str(path), CAPTION)
        assert found == (None, reason.format(first.max_token_length)), option
    slot = ENCODER.get(name, "t5xxl")
    (file,) = [Path(word.partition("=")[2]) for word in work.tiny.arguments() if word.startswith(f"--{slot}=")]
    changed = {key: tensor + 1 if tensor.is_floating_point() else tensor for key, tensor in load_file(file).items()}
    save_file(changed, tmp_path / "other.safetensors", read_header(file)[1])
    other = strategies_of(f"--{slot}={tmp_path / 'other.safetensors'}").text_encoder_outputs_caching
    assert other.find(str(path), CAPTION) == (None, "made with other text encoders")
    plain.mark_text_models("an adapter")
    assert first.find(str(path), CAPTION) == (None, "made with another adapter merged into the text encoders")
