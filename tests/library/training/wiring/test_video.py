"""What the families of videos share: caches on the disk by default, runs without the models that filled them, options of the
known scripts."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from library.core.errors import ConfigError
from library.training import cli, idle_options, parser_common, timestep_samplers
from library.training.timestep_samplers import TimestepOptions
from library.training.wiring.video import VideoFamily
from tests.planted import plant
from tests.runs.conftest import largest_difference
from tests.runs.test_video import VideoWork
from tests.toy_video.cached import RECORD, CachedToyFamily
from tests.toy_video.family import ToyVideoFamily
from tests.toy_video.models import ToyVideoDit, seeded

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
    assert "tools/cache_latents.py --family toy_video" in latents and "_toy.npz: no file)" in latents
    assert "3 captions" in text and "--toy_text" in text and "tools/cache_text_encoder_outputs.py" in text
    train(work, "made", *MODELS)
    next(work.clips.glob("*_toy_te.npz")).unlink()
    with pytest.raises(ConfigError) as error:
        train(work, "out", "--on_existing=overwrite")
    assert len(error.value.problems) == 1 and "1 caption has no text encoder outputs" in str(error.value)
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
        (["--flash_attn"], "--flash_attn asks .* flash-attn is not installed; .* --attn_mode torch_flash"),
        (["--attn_mode=flash3"], "flash-attn 3 .* is not installed"),
        (["--sdpa", "--flash_attn", "--strict"], "--flash_attn: has no effect beside --sdpa"),
        (["--guidance_scale=-1"], "0 or more"),
        (["--dit_dtype=bf16"], "--mixed_precision bf16"),
        (["--dit_dtype=fp8", "--mixed_precision=bf16"], "--fp8_base"),
    ],
)
def test_values_without_meaning_are_refused(work, given, told):
    with pytest.raises(ConfigError, match=told):
        cli.run(RECORD.name, "network", work.argv("out", "--dit=toy.safetensors", *MODELS, *given))


@pytest.mark.parametrize("given", [("qkv",), ("qkv", "patch_in"), (".",)])
def test_of_a_whole_model_the_named_parts_learn(work, given):
    before = seeded(ToyVideoDit(), 3).state_dict()
    words = ["--dit=toy.safetensors", "--max_train_steps=1", *MODELS, "--trainable_modules", *given]
    argv = [word for word in work.argv("whole", *words) if not word.startswith("--network")]
    cli.run(RECORD.name, "full", argv)
    after = load_file(work.folder / "whole" / "lora.safetensors")
    learned = {name for name in before if not torch.equal(before[name], after[name])}
    assert learned and learned <= {name for name in before if "." in given or any(part in name for part in given)}
    wanted = ("qkv", "positions") if "." in given else given
    assert all(any(part in name for name in learned) for part in wanted)


def test_parts_that_no_path_has_are_told(work):
    words = work.argv("whole", "--dit=toy.safetensors", *MODELS, "--trainable_modules", "img_attn")
    with pytest.raises(ConfigError, match="--trainable_modules is img_attn.*no parameter"):
        cli.run(RECORD.name, "full", [word for word in words if not word.startswith("--network")])


def test_the_precision_of_the_launcher_is_the_default(work, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert config_of().value("mixed_precision") == "bf16"
    assert config_of("--mixed_precision=no").value("mixed_precision") == "no"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    assert config_of().value("mixed_precision") == "no"


def test_an_epoch_draws_evenly_and_goes_on_so(work, monkeypatch):
    """The noise levels of the steps of each epoch fill as many parts as there are samples; a resumed run draws the same."""
    from library.training.objective import FlowMatchingObjective

    seen, corrupt = [], FlowMatchingObjective.corrupt

    def noted(self, latents, noise, times, draws):
        seen.extend(times.tolist())
        return corrupt(self, latents, noise, times, draws)

    monkeypatch.setattr(FlowMatchingObjective, "corrupt", noted)
    monkeypatch.setattr(ToyVideoFamily, "objective", VideoFamily.objective)
    options = [*MODELS, "--timestep_sampling=uniform", "--num_timestep_buckets=3", "--save_every_n_steps=2", "--save_state"]
    whole = work.train("whole", "--dit=toy.safetensors", *options, "--max_train_steps=6")
    drawn = list(seen)
    assert len(drawn) == 6 and all({int(3 * t) for t in drawn[i : i + 3]} == {0, 1, 2} for i in (0, 3))
    seen.clear()
    state = whole.with_name("lora-step00000002-state")
    resumed = work.train("resumed", "--dit=toy.safetensors", *options, "--max_train_steps=6", f"--resume={state}")
    assert seen == drawn[2:] and largest_difference(whole, resumed) == 0


def test_how_models_are_loaded_that_no_run_loads_is_told(work):
    def told(*argv: str) -> str:
        config = config_of("--vae_dtype=bf16", *argv)
        return " ".join(map(str, idle_options.ignored(config, CachedToyFamily(config))))

    assert "--vae_dtype: has no effect: what is made by --vae is in the caches" in told()
    assert "--vae_dtype" not in told(*MODELS)


def test_metadata_are_those_of_the_known_trainer(work, monkeypatch):
    """Every key that it writes, with its values: samples are items, --fp8_base is that of the denoiser."""
    monkeypatch.setattr(
        CachedToyFamily, "metadata", lambda self: {"ss_base_model_version": "toy_video", **self.timestep_metadata()}
    )
    options = ["--guidance_scale=2.5", "--gradient_checkpointing", "--gradient_checkpointing_cpu_offload"]
    options += ["--metadata_reso=320,192", "--metadata_arch=toy-12b", "--min_timestep=100", "--network_dropout=0.1"]
    made = train(work, "made", *MODELS, *options)
    with safe_open(made, framework="pt") as file:
        found = file.metadata()
    names = (
        "session_id training_started_at output_name learning_rate num_train_items num_batches_per_epoch num_epochs"
        " gradient_checkpointing gradient_checkpointing_cpu_offload gradient_accumulation_steps max_train_steps"
        " lr_warmup_steps lr_scheduler base_model_version network_module network_dim network_alpha network_dropout"
        " mixed_precision seed training_comment optimizer max_grad_norm fp8_base full_fp16 full_bf16 weighting_scheme"
        " logit_mean logit_std mode_scale guidance_scale timestep_sampling sigmoid_scale discrete_flow_shift datasets"
        " sd_model_name vae_name training_finished_at steps epoch"
    ).split()
    assert {f"ss_{name}" for name in names} - found.keys() == set()
    wanted = {
        "ss_num_train_items": "3", "ss_fp8_base": "False", "ss_guidance_scale": "2.5", "ss_timestep_sampling": "sigma",
        "ss_gradient_checkpointing_cpu_offload": "True", "ss_discrete_flow_shift": "1.0", "ss_weighting_scheme": "none",
        "modelspec.architecture": "toy-12b/lora", "modelspec.resolution": "320x192", "modelspec.timestep_range": "100,1000",
    }
    assert {name: found.get(name) for name in wanted} == wanted


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--min_timestep=200"], "bound the noise levels of --timestep_sampling sigma"),
        (["--discrete_flow_shift=7"], "--discrete_flow_shift: has no effect: the falling table"),
        (["--num_timestep_buckets=4"], "--num_timestep_buckets: has no effect"),
        (["--preserve_distribution_shape", "--timestep_sampling=shift"], "neither --min_timestep nor --max_timestep"),
        (["--timestep_sampling=shift", "--sigma_table=falling", "--logit_mean=1"], "--sigma_table: has no effect"),
        (["--img_in_txt_in_offloading"], "--img_in_txt_in_offloading: has no effect"),
    ],
)
def test_what_is_special_about_noise_levels_is_told_at_start(work, given, told):
    config = config_of(*given)
    lines = [*timestep_samplers.notices(config[TimestepOptions])]
    lines += [str(item) for item in idle_options.ignored(config, CachedToyFamily(config))]
    assert any(told in line for line in lines), lines


def test_captions_that_change_ask_for_live_encoding(work):
    with pytest.raises(ConfigError, match="shuffle_caption: .*--live_encoding"):
        work.train("out", "--dit=toy.safetensors", *MODELS, subset_keys="shuffle_caption = true")
    work.train("out", "--dit=toy.safetensors", *MODELS, "--live_encoding", subset_keys="shuffle_caption = true")
