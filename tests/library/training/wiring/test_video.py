"""What the families of videos share: caches on the disk by default, runs without the models that filled them, options of the
known scripts."""

from __future__ import annotations

import pytest

from library.core.errors import ConfigError
from library.training import cli, parser_common
from tests.planted import plant
from tests.runs.conftest import largest_difference
from tests.runs.test_video import VideoWork
from tests.toy_video.cached import RECORD, CachedToyFamily

MODELS = ("--vae=vae.safetensors", "--toy_text=text.safetensors")


@pytest.fixture
def work(tmp_path, monkeypatch) -> VideoWork:
    plant(monkeypatch, RECORD)
    monkeypatch.setattr(CachedToyFamily, "loaded", [])
    return VideoWork(tmp_path, (5, 3, 1))


def train(work: VideoWork, out: str, *more: str):
    CachedToyFamily.loaded.clear()
    return work.train(out, "--dit=toy.safetensors", "--max_train_steps=2", *more)


def config_of(*argv: str):
    return parser_common.parse_command(["--dit=toy.safetensors", *argv], RECORD.name, "network").config


def test_complete_caches_stand_for_the_models_that_filled_them(work):
    made = train(work, "made", *MODELS)
    assert CachedToyFamily.loaded == ["vae", "text_encoders"]
    assert len(list(work.clips.glob("*_toy.npz"))) == len(list(work.clips.glob("*_toy_te.npz"))) == 3
    again = train(work, "again")
    assert CachedToyFamily.loaded == [] and largest_difference(again, made) == 0
    live = train(work, "live", *MODELS, "--live_encoding")
    assert sorted(CachedToyFamily.loaded) == ["text_encoders", "vae"] and largest_difference(live, made) == 0


def test_what_the_caches_lack_is_told_at_once(work):
    """Both parts in one error, with the tools that make it, before a model is loaded; then each alone."""
    with pytest.raises(ConfigError) as error:
        train(work, "out")
    latents, text = error.value.problems
    assert "3 samples have no latents in the cache" in latents and "--vae is not given" in latents
    assert "tools/cache_latents.py --family toy_video" in latents
    assert "3 captions" in text and "--toy_text" in text and "tools/cache_text_encoder_outputs.py" in text
    train(work, "made", *MODELS)
    next(work.clips.glob("*_toy_te.npz")).unlink()
    with pytest.raises(ConfigError) as error:
        train(work, "out", "--on_existing=overwrite")
    assert len(error.value.problems) == 1 and "1 captions" in str(error.value)
    assert CachedToyFamily.loaded == []
    train(work, "out", "--toy_text=text.safetensors", "--on_existing=overwrite")
    assert CachedToyFamily.loaded == ["text_encoders"]


def test_models_that_a_run_needs_in_any_case_are_asked_for(work):
    prompts = work.folder / "prompts.txt"
    prompts.write_text("a red cat", encoding="utf-8")
    for options, reason in (
        (["--live_encoding"], "in every step"),
        (["--cache_latents", "--cache_text_encoder_outputs"], "at each start"),
        ([f"--sample_prompts={prompts}", "--sample_at_first"], "samples of --sample_prompts"),
    ):
        with pytest.raises(ConfigError) as error:
            train(work, "out", *options)
        told = [problem for problem in error.value.problems if reason in problem]
        assert [problem.split()[0] for problem in told] == ["--vae", "--toy_text"], options


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ([], {"cache_latents_to_disk": True, "cache_text_encoder_outputs_to_disk": True, "discrete_flow_shift": 1.0}),
        (["--live_encoding"], {"cache_latents_to_disk": False, "cache_text_encoder_outputs_to_disk": False}),
        (["--cache_latents"], {"cache_latents_to_disk": False, "cache_text_encoder_outputs_to_disk": True}),
        (["--live_encoding", "--cache_latents_to_disk"], {"cache_latents_to_disk": True, "cache_text_encoder_outputs": False}),
        ([], {"pretrained_model_name_or_path": "toy.safetensors"}),
        (["--fp8_base", "--mixed_precision=bf16"], {"fp8_base": False, "fp8_base_unet": True}),
        (["--gradient_checkpointing_cpu_offload"], {"cpu_offload_checkpointing": True}),
        (["--disable_numpy_memmap"], {"disable_mmap_load_safetensors": True}),
        (["--vae_dtype=bfloat16"], {"vae_dtype": "bf16"}),
        (["--dynamo_backend=INDUCTOR"], {"torch_compile": True, "dynamo_backend": "inductor"}),
        (["--dynamo_backend=NO", "--compile"], {"torch_compile": True, "dynamo_backend": "inductor"}),
        (["--dynamo_backend=NO"], {"torch_compile": False}),
        (
            "--compile --compile_backend=eager --compile_mode=max-autotune --compile_dynamic=false --compile_fullgraph".split(),
            {"torch_compile": True, "dynamo_backend": "eager", "dynamo_mode": "max-autotune", "dynamo_dynamic": False,
             "dynamo_fullgraph": True},
        ),
        (["--compile", "--compile_dynamic=auto"], {"dynamo_dynamic": None}),
        (["--save_precision=fp32"], {"save_precision": "float"}),
    ],
)
def test_options_stand_for_those_of_every_script(work, given, meant):
    config = config_of(*given)
    assert {name: config.value(name) for name in meant} == meant


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--vae_dtype=fp9"], "fp32, fp16, bf16 or fp8"),
        (["--vae_dtype=fp8"], "in which the VAE computes"),
        (["--sage_attn"], "no backward pass"),
        (["--guidance_scale=-1"], "0 or more"),
        (["--dit_dtype=bf16"], "--mixed_precision bf16"),
        (["--dit_dtype=fp8", "--mixed_precision=bf16"], "--fp8_base"),
    ],
)
def test_values_without_meaning_are_refused(work, given, told):
    with pytest.raises(ConfigError, match=told):
        cli.run(RECORD.name, "network", work.argv("out", "--dit=toy.safetensors", *MODELS, *given))
