"""What is special to Chroma in a run: its place in the scripts of FLUX.1, captions through T5 alone, caches."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from library.dataset.npz_file import read_arrays, write_arrays
from library.tiny_models.vocabularies import T5_ROWS
from library.tiny_models.weights import save_part, t5_state
from library.training import cache_tools, cli
from tests.runs.conftest import read_parts
from tests.runs.families import FamilyWork, Tinies, refused_run, without


@pytest.fixture(scope="module")
def tinies(tmp_path_factory) -> Tinies:
    return Tinies(tmp_path_factory)


@pytest.fixture
def work(tinies: Tinies, tmp_path: Path) -> FamilyWork:
    return tinies.work("chroma", tmp_path)


def trained(work: FamilyWork, out: str, *more: str) -> Path:
    """Train as a user does, in the script of FLUX.1."""
    cli.run("flux", "network", work.argv(out, "--network_train_unet_only", "--max_train_steps=2", *more))
    return work.folder / out / "lora.safetensors"


def test_the_script_of_flux_trains_it_and_the_file_says_so(work: FamilyWork, caplog) -> None:
    with caplog.at_level(logging.INFO):
        first = trained(work, "first", "--strict", "--console_log_level=INFO")
    metadata, tensors = read_parts(first)
    told = ("ss_base_model_version", "ss_model_type", "modelspec.architecture", "ss_guidance_scale")
    assert [metadata[name] for name in told] == ["chroma", "chroma", "chroma/lora", "0.0"]
    assert metadata["modelspec.implementation"] == "https://huggingface.co/lodestones/Chroma"
    assert metadata["ss_apply_t5_attn_mask"] == "True" and "CLIP-L" not in caplog.text
    masked = trained(work, "masked", "--apply_t5_attn_mask", "--guidance_scale=3.5", f"--clip_l={work.tiny.t5xxl}")
    assert read_parts(masked)[1] == tensors
    (work.folder / "run.toml").write_text('model_type = "chroma"\n', encoding="utf-8")
    in_file = work.argv("in_file", "--network_train_unet_only", "--max_train_steps=2")
    cli.run("flux", "network", [*without(in_file, "model_type"), f"--config_file={work.folder / 'run.toml'}"])
    assert read_parts(work.folder / "in_file" / "lora.safetensors")[1] == tensors


CACHES = ("--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk")


def test_cache_files_are_those_of_flux_without_a_pooled_caption(work: FamilyWork) -> None:
    made = read_parts(trained(work, "made", *CACHES))[1]
    for path in work.images.glob("*_flux_te.npz"):
        arrays = read_arrays(path)
        assert {"l_pooled", "t5_out", "txt_ids", "t5_attn_mask", "apply_t5_attn_mask"} <= arrays.keys()
        assert arrays["l_pooled"] == 0 and arrays["apply_t5_attn_mask"] and arrays["t5_out"].shape == (64, 24)
    assert len(list(work.images.glob("*_flux_te.npz"))) == 4 and len(list(work.images.glob("*_flux.npz"))) == 4
    assert read_parts(trained(work, "again", *CACHES))[1] == made


@pytest.mark.parametrize("pooled", [(768,), (77, 1)])
def test_files_of_another_trainer_are_used_whatever_their_pooled_caption_is(work: FamilyWork, pooled: tuple) -> None:
    """The trainers that have Chroma store some zeros there. Files made without the mask are made anew."""
    trained(work, "made", *CACHES)
    files = sorted(work.images.glob("*_flux_te.npz"))
    for number, path in enumerate(files):
        kept = {name: array for name, array in read_arrays(path).items() if name in ("txt_ids", "t5_attn_mask")}
        theirs = {"l_pooled": np.zeros(pooled, np.float32), "t5_out": np.full((64, 24), 0.5, np.float32)}
        write_arrays(path, {**kept, **theirs, "apply_t5_attn_mask": np.asarray(number > 0)})
    run = work.trainer("out", "--network_train_unet_only", *CACHES).prepare()
    batches = list(run.data.batches(1))
    states = torch.cat([batch.conditioning["t5_out"] for batch in batches])
    assert "l_pooled" not in batches[0].conditioning
    assert (states == 0.5).flatten(1).all(dim=1).sum() == len(files) - 1


@pytest.mark.parametrize("words", [["--family", "flux", "--model_type", "chroma"], ["--chroma"]])
def test_the_caching_tools_fill_them(work: FamilyWork, words: list[str]) -> None:
    data, tiny = f"--dataset_config={work.dataset()}", work.tiny
    cache_tools.run("latents", [*words, f"--ae={tiny.ae}", data])
    cache_tools.run("text", [*words, f"--t5xxl={tiny.t5xxl}", "--t5xxl_max_token_length=64", data])
    assert len(list(work.images.glob("*_flux_te.npz"))) == 4 and len(list(work.images.glob("*_flux.npz"))) == 4
    before = {path: path.read_bytes() for path in work.images.glob("*.npz")}
    trained(work, "out", *CACHES)
    assert {path: path.read_bytes() for path in work.images.glob("*.npz")} == before


def test_an_option_that_a_variant_has_too_still_tells_the_family(work: FamilyWork) -> None:
    assert cache_tools.chosen_family(["--ae", "a", "--clip_l", "b"]) == "flux"


def test_files_that_do_not_belong_together_are_named(work: FamilyWork, tmp_path: Path, monkeypatch, capsys) -> None:
    message = refused_run("chroma", work.argv("out", "--blocks_to_swap=3"), monkeypatch, capsys)
    assert "1 double and 2 single blocks allows at most 0" in message
    other = tmp_path / "other.safetensors"
    state = t5_state(torch.Generator().manual_seed(0), d_model=40, d_kv=8, heads=2, d_ff=40, layers=1, vocab=T5_ROWS)
    save_part(state, other, {}, torch.float32)
    argv = [*without(work.argv("out"), "t5xxl"), f"--t5xxl={other}", f"--t5xxl_tokenizer={work.tiny.t5xxl_tokenizer}"]
    message = refused_run("chroma", argv, monkeypatch, capsys)
    assert f"--t5xxl is {other}: its width is 40, the denoiser" in message and "takes 24" in message
