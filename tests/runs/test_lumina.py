"""What is special to Lumina-Image 2.0, through the command line: its metadata, sign and times, the system prompt in
caches, Gemma that learns beside a cache, files with all parts, samples made together. What holds for every family is in
test_families.py."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from library.core.errors import ConfigError
from library.tiny_models.lumina_tiny import TinyLumina, build_tiny_lumina
from library.training.parser_common import parse
from tests.families import CASES
from tests.runs.conftest import Work, draw_pictures, losses_of, read_parts, sample_pictures
from tests.runs.families import refused_run, without

CACHED = ["--cache_latents", "--cache_text_encoder_outputs"]
ON_DISK = ["--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk"]
DENOISER = "--network_train_unet_only"


@pytest.fixture(scope="module")
def tiny_lumina(tmp_path_factory) -> TinyLumina:
    return build_tiny_lumina(tmp_path_factory.mktemp("tiny_lumina"))


@pytest.fixture
def work(tmp_path: Path, tiny_lumina: TinyLumina) -> Work:
    return Work(tmp_path, tiny_lumina, draw_pictures(tmp_path / "images", 4), case=CASES["lumina"])


def test_the_file_is_as_documented(work: Work) -> None:
    path = work.train("out", "--max_train_steps=2", DENOISER, *CACHED, "--system_prompt=the girl")
    metadata = read_parts(path)[0]
    expected = {
        "ss_base_model_version": "lumina2", "ss_timestep_sampling": "shift", "ss_discrete_flow_shift": "6.0",
        "ss_model_prediction_type": "raw", "ss_system_prompt": "the girl", "modelspec.architecture": "lumina-2/lora",
        "modelspec.implementation": "https://github.com/Alpha-VLLM/Lumina-Image-2.0",
    }  # fmt: skip
    assert {key: metadata[key] for key in expected} == expected and "modelspec.prediction_type" not in metadata
    assert len({key.partition(".")[0] for key in load_file(path)}) == 3 * 6 + 6 + 5 + 2


def test_the_sign_and_the_time_of_the_model(work: Work) -> None:
    """It sees 1 - sigma and is compared with data - noise; sigma_scaled is the same loss over sigma^2."""
    run = work.trainer("out", DENOISER).prepare()
    batch, times, seen = next(run.data.batches(1)), torch.tensor([0.25, 0.75]), []
    run.models.denoiser.register_forward_hook(lambda module, args, output: seen.append((args[1], output)))
    raw = run.step(batch, times).loss_sum
    ((model_times, velocity),) = seen
    torch.testing.assert_close(model_times, 1 - times)
    draws = run.step.draws_of(batch, times)
    latents = run.step.latents_of(batch)
    noise = run.step.noise_of(latents, draws)
    torch.testing.assert_close(raw, (velocity - (latents - noise)).square().flatten(1).mean(dim=1).sum())
    scaled = work.trainer("scaled", DENOISER, "--model_prediction_type=sigma_scaled").prepare()
    by_sample = (velocity - (latents - noise)).square().flatten(1).mean(dim=1) * times.square()
    torch.testing.assert_close(scaled.step(batch, times).loss_sum, by_sample.sum(), rtol=1e-4, atol=1e-5)


def test_a_system_prompt_belongs_to_its_cache(work: Work) -> None:
    """Another one makes the text caches anew; cached and live are the same."""
    options = [DENOISER, "--max_train_steps=3", "--system_prompt=the girl"]
    live = losses_of(work.train("live", *options))
    assert losses_of(work.train("first", *options, *ON_DISK)) == live
    assert losses_of(work.train("other", DENOISER, "--max_train_steps=3", *ON_DISK)) != pytest.approx(live, rel=1e-4)
    assert losses_of(work.train("again", *options, *ON_DISK)) == live
    assert len(list(work.images.glob("*_lumina_te.npz"))) == len(list(work.images.glob("*_lumina.npz"))) == 4
    names = ("hidden_state", "input_ids", "attention_mask")
    with np.load(min(work.images.glob("*_lumina_te.npz"))) as file:
        shapes = {name: (file[name].shape, file[name].dtype) for name in names}
    assert shapes == {
        "hidden_state": ((32, 24), np.float32), "input_ids": ((32,), np.int64), "attention_mask": ((32,), np.int64),
    }  # fmt: skip


def test_gemma_learns_beside_a_cache_as_without(work: Work) -> None:
    options = ["--max_train_steps=3", "--text_encoder_lr=1e-3"]
    live = read_parts(work.train("live", *options))[1]
    assert read_parts(work.train("cached", *options, *CACHED))[1] == live
    assert read_parts(work.train("on disk", *options, *ON_DISK))[1] == live
    state = load_file(work.folder / "live" / "lora.safetensors")
    moved = [key for key, tensor in state.items() if "lora_up" in key and tensor.any()]
    assert any(key.startswith("lora_te_layers_0_self_attn_q_proj") for key in moved)


def test_a_file_with_all_parts_trains_the_same(work: Work, tmp_path: Path) -> None:
    apart = read_parts(work.train("apart", "--max_train_steps=2", DENOISER))[1]
    work.tiny = build_tiny_lumina(tmp_path / "whole", whole=True)
    assert read_parts(work.train("whole", "--max_train_steps=2", DENOISER))[1] == apart
    named = [f"--gemma2={work.tiny.lumina}", f"--ae={work.tiny.lumina}"]
    assert read_parts(work.train("named", "--max_train_steps=2", DENOISER, *named))[1] == apart


CHANGING = [
    "--gemma2_max_token_length=4", "--timestep_sampling=nextdit_shift", "--timestep_sampling=flux_shift",
    "--timestep_sampling=sigma", "--discrete_flow_shift=1", "--model_prediction_type=sigma_scaled",
    "--weighting_scheme=sigma_sqrt --model_prediction_type=sigma_scaled", "--system_prompt=girl",
    "--ip_noise_gamma=0.3",
    "--mixed_precision=bf16 --fp8_base", "--network_args train_blocks=transformer",
    "--network_args embedder_dims=[2,2,2]", "--network_args split_qkv=True",
]  # fmt: skip
EQUAL = ["--mem_eff_attn --split_attn", "--gradient_checkpointing", "--blocks_to_swap=1"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory, tiny_lumina: TinyLumina) -> tuple[Work, dict[str, torch.Tensor]]:
    folder = tmp_path_factory.mktemp("plain")
    base = Work(folder, tiny_lumina, draw_pictures(folder / "images", 4), case=CASES["lumina"])
    return base, load_file(base.train("plain", "--max_train_steps=2", DENOISER))


@pytest.mark.parametrize("options", [*CHANGING, *EQUAL])
def test_what_an_option_does_to_the_result(plain, options: str) -> None:
    base, expected = plain
    result = load_file(base.train(options, "--max_train_steps=2", DENOISER, *options.split(" ")))
    if options in CHANGING:
        assert set(result) != set(expected) or any(not torch.equal(result[key], expected[key]) for key in expected)
        return
    for key, tensor in expected.items():
        torch.testing.assert_close(result[key], tensor, rtol=1e-3, atol=1e-5, msg=key)


def test_samples_with_equal_settings_are_made_together(work: Work, monkeypatch) -> None:
    """Four at once at most; a picture is the one that it is alone, but for rounding. Negative prompts have no system
    prompt."""
    from library.generation.lumina_pipeline import LuminaPipeline

    prompts, sizes = work.folder / "prompts.txt", []
    lines = (
        "a cat --d 1", "the dog --d 2", "a girl --d 3 --n blue", "blue --d 4 --ctr 0.6", "red --d 5", "a cat --d 6",
    )  # fmt: skip
    prompts.write_text("\n".join(f"{line} --w 40 --h 32 --s 2 --l 3" for line in lines), encoding="utf-8")
    together = LuminaPipeline.latents_together

    def noting(self, requests, *given):
        sizes.append([request.seed for request in requests])
        return together(self, requests, *given)

    monkeypatch.setattr(LuminaPipeline, "latents_together", noting)
    around = [DENOISER, "--max_train_steps=1", f"--sample_prompts={prompts}", "--sample_every_n_steps=1"]
    pictures = {}
    for name, more in (("four", ["--sample_batch_size=4"]), ("one", ["--sample_batch_size=1"]), ("batch", [])):
        work.train(name, *around, *more, "--system_prompt=the girl")
        pictures[name] = [np.asarray(Image.open(path), dtype=int) for path in sample_pictures(work.folder / name)]
    assert sizes[:3] == [[1, 2, 3, 5], [4], [6]]
    assert sizes[3:9] == [[number] for number in range(1, 7)] and len(sizes) == 9 + 6  # --train_batch_size is 1
    for name in ("four", "batch"):
        assert all(abs(a - b).max() <= 1 for a, b in zip(pictures[name], pictures["one"], strict=True))
    assert {picture.shape for picture in pictures["one"]} == {(32, 40, 3)}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model_prediction_type=additive"], "use raw"), (["--gemma2_max_token_length=0"], "1 or more"),
        (["--sample_batch_size=0"], "1 or more"), (["--weighted_captions"], "no way to weigh words"),
        (["--timestep_sampling=qwen_shit"], "qwen_shift"),
    ],
)  # fmt: skip
def test_what_is_refused(words: list[str], message: str, work: Work) -> None:
    with pytest.raises(ConfigError, match=message):
        work.trainer("out", *words).prepare()


def test_files_that_do_not_belong_together_are_named_before_anything_is_loaded(work: Work, monkeypatch, capsys) -> None:
    other = build_tiny_lumina(work.folder / "other", dim=72)
    argv = without(work.argv("out"), "pretrained_model_name_or_path", "gemma2_max_token_length")
    more = [f"--pretrained_model_name_or_path={other.lumina}", "--gemma2_max_token_length=300", "--blocks_to_swap=2"]
    message = refused_run("lumina", [*argv, *more], monkeypatch, capsys)
    assert "--gemma2_max_token_length is 300" in message and "positions for 299 tokens" in message
    assert "--blocks_to_swap is 2; this model has 3 blocks, at most 1 can be swapped" in message
    without_tokenizer = build_without_tokenizer(work)
    message = refused_run("lumina", [*work.argv("out"), f"--gemma2={without_tokenizer}"], monkeypatch, capsys)
    assert "no Gemma 2 tokenizer" in message and "hf download google/gemma-2-2b" in message
    message = refused_run("lumina", [*work.argv("out"), f"--ae={work.tiny.lumina}"], monkeypatch, capsys)
    assert f"--ae is {work.tiny.lumina}: this is a Lumina-Image 2.0 denoiser; needed: a FLUX.1 or SD3 autoencoder" in message


def build_without_tokenizer(work: Work) -> Path:
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(work.tiny.gemma2, "pt") as file:
        state = {key: file.get_tensor(key) for key in file.keys() if key != "spiece_model"}
        save_file(state, work.folder / "gemma2.safetensors", file.metadata())
    return work.folder / "gemma2.safetensors"


def test_what_differs_from_known_trainers_is_told(work: Work, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        work.trainer("out", "--model_prediction_type=sigma_scaled", "--console_log_level=INFO").prepare()
    assert "the time reaches the network in float32" in caplog.text and "with the sign of other models" in caplog.text


def test_defaults_of_the_known_script() -> None:
    config = parse([], "lumina", "network")
    assert config.value("timestep_sampling") == "shift" and config.value("discrete_flow_shift") == 6.0
