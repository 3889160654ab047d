"""The tools that fill the caches: whole runs on a tiny FLUX.1, and every option that they are known with."""

from __future__ import annotations

import dataclasses
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from library.core.errors import ConfigError
from library.families.registry import record_of
from library.training import cache_tools, parser_common
from tests.library.dataset.images import make_folder, make_image
from tests.planted import plant
from tests.tiny import build_tiny_flux

ROOT = Path(__file__).parents[2]
KNOWN_OPTIONS = """
adaptive_noise_scale ae alpha_mask apply_t5_attn_mask async_upload blocks_to_swap bucket_no_upscale
bucket_reso_steps cache_info cache_latents cache_latents_to_disk cache_text_encoder_outputs
cache_text_encoder_outputs_to_disk caption_dropout_every_n_epochs caption_dropout_rate caption_extension
caption_extention caption_prefix caption_separator caption_suffix caption_tag_dropout_rate clip_l clip_skip
color_aug conditioning_data_dir config_file console_log_file console_log_level console_log_simple
controlnet_model_name_or_path dataset_class dataset_config dataset_repeats ddp_gradient_as_bucket_view
ddp_static_graph ddp_timeout debug_dataset disable_mmap_load_safetensors discrete_flow_shift dynamo_backend
enable_bucket enable_wildcard face_crop_aug_range flip_aug flux fp8_base full_bf16 full_fp16
gradient_accumulation_steps gradient_checkpointing guidance_scale highvram huber_c huber_scale huber_schedule
huggingface_path_in_repo huggingface_repo_id huggingface_repo_type huggingface_repo_visibility huggingface_token
in_json ip_noise_gamma ip_noise_gamma_random_strength keep_tokens keep_tokens_separator log_config log_prefix
log_tracker_config log_tracker_name log_with logging_dir logit_mean logit_std loss_type lowram masked_loss
max_bucket_reso max_data_loader_n_workers max_timestep max_token_length max_train_epochs max_train_steps
mem_eff_attn metadata_author metadata_description metadata_is_negative_embedding metadata_license
metadata_merged_from metadata_preprocessor metadata_tags metadata_thumbnail metadata_title metadata_trigger_phrase
metadata_usage_hint min_bucket_reso min_timestep mixed_precision mode_scale model_prediction_type model_type
multires_noise_discount multires_noise_iterations no_half_vae noise_offset noise_offset_random_strength
output_config output_dir output_name persistent_data_loader_workers pretrained_model_name_or_path prior_loss_weight
random_crop reg_data_dir resize_interpolation resolution resume resume_from_huggingface sample_at_first
sample_every_n_epochs sample_every_n_steps sample_prompts sample_sampler save_every_n_epochs save_every_n_steps
save_last_n_epochs save_last_n_epochs_state save_last_n_steps save_last_n_steps_state save_n_epoch_ratio
save_precision save_state save_state_on_train_end save_state_to_huggingface sdpa sdxl secondary_separator seed
shuffle_caption sigmoid_scale skip_cache_check skip_existing t5xxl t5xxl_dtype t5xxl_max_token_length
text_encoder_batch_size timestep_sampling token_warmup_min token_warmup_step tokenizer_cache_dir torch_compile
train_batch_size train_data_dir v2 v_parameterization vae vae_batch_size wandb_api_key wandb_run_name
weighted_captions weighting_scheme xformers zero_terminal_snr
""".split()
VALUES = {"dataset_class": "a.B", "t5xxl_dtype": "bf16", "model_type": "chroma", "clip_skip": "2", "output_dir": "x"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return build_tiny_flux(tmp_path_factory.mktemp("flux"))


@pytest.fixture
def data(tmp_path) -> Path:
    """A configuration with a validation split, mirrored images and captions that are dropped at times."""
    folder = tmp_path / "images"
    make_folder(folder, 5)
    for path in folder.glob("*.png"):
        path.with_suffix(".txt").write_text(f"a red cat {path.stem}", encoding="utf-8")
    config = tmp_path / "data.toml"
    config.write_text(
        f"""
        [[datasets]]
        resolution = 64
        enable_bucket = true
        min_bucket_reso = 32
        max_bucket_reso = 128
        bucket_reso_steps = 16
        validation_split = 0.4
        [[datasets.subsets]]
        image_dir = '{folder}'
        caption_extension = ".txt"
        flip_aug = true
        caption_dropout_rate = 0.1
        """,
        encoding="utf-8",
    )
    return config


def latents_arguments(tiny, data: Path) -> list[str]:
    return ["--flux", f"--ae={tiny.ae}", f"--dataset_config={data}", "--vae_batch_size=2"]


def text_arguments(tiny, data: Path) -> list[str]:
    return [
        "--flux", f"--clip_l={tiny.clip_l}", f"--t5xxl={tiny.t5xxl}", f"--clip_l_tokenizer={tiny.clip_l_tokenizer}",
        "--t5xxl_max_token_length=24", f"--dataset_config={data}",
    ]  # fmt: skip


def test_latents_of_training_and_validation_images(tiny, data, caplog):
    caplog.set_level(logging.INFO)
    cache_tools.run("latents", latents_arguments(tiny, data))
    assert len(list((data.parent / "images").glob("*_flux.npz"))) == 5
    assert "0 images cached, 5 to encode" in caplog.text
    caplog.clear()
    make_image(data.parent / "images" / "02.png", seed=77)
    cache_tools.run("latents", latents_arguments(tiny, data))
    assert "4 images cached, 1 to encode (the image has changed)" in caplog.text
    assert "the cache of 5 images is complete" in caplog.text


def test_text_outputs_of_training_and_validation_images_and_of_the_empty_caption(tiny, data, caplog):
    caplog.set_level(logging.INFO)
    cache_tools.run("text", text_arguments(tiny, data))
    assert len(list((data.parent / "images").glob("0*_flux_te.npz"))) == 5
    assert (data.parent / "images" / "_empty_caption_flux_te.npz").exists()
    caplog.clear()
    cache_tools.run("text", text_arguments(tiny, data))
    assert "6 captions cached, 0 to encode" in caplog.text


def test_files_of_other_parts_may_be_named(tiny, data, caplog):
    caplog.set_level(logging.INFO)
    cache_tools.run("latents", [*latents_arguments(tiny, data), f"--t5xxl={tiny.t5xxl}", "--skip_existing"])
    assert "not needed for this cache: --t5xxl" in caplog.text
    assert "--skip_existing: cache files that are valid are never made again" in caplog.text


def test_the_configuration_file_of_a_training_serves_the_tools(tiny, data, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    (tmp_path / "train.toml").write_text(
        f"ae = '{tiny.ae}'\nlearning_rate = 1e-4\nmax_train_steps = 5\nnetwork_module = 'networks.lora_flux'\n"
        f"guidance_scale = 1.0\ncache_text_encoder_outputs = true\ndataset_config = '{data}'\n",
        encoding="utf-8",
    )
    cache_tools.run("latents", ["--family=flux", "--config_file", str(tmp_path / "train.toml")])
    assert "passed over: guidance_scale, learning_rate, max_train_steps, network_module" in caplog.text


@pytest.mark.parametrize("what", ["latents", "text"])
@pytest.mark.parametrize("name", KNOWN_OPTIONS)
def test_every_known_option_works_or_is_refused_by_name(what, name):
    script = cache_tools.tool_script("flux", what)
    if name == "flux" or name in script.owners and script.status(name) not in ("refused", "foreign"):
        return
    argument = f"--{name}={VALUES[name]}" if name in VALUES else f"--{name}"
    for value in ([argument], [argument, "7"]):
        with pytest.raises(ConfigError, match=rf"--{name}\b"):
            parser_common.parse_script(value, script)


def test_all_problems_at_once_and_before_a_model_is_loaded(tiny, data):
    text = data.read_text().replace("flip_aug", "random_crop")
    data.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as error:
        cache_tools.run("latents", ["--flux", "--ae", str(tiny.t5xxl), f"--dataset_config={data}"])
    assert "--ae is" in str(error.value) and "random_crop" in str(error.value)
    with pytest.raises(ConfigError, match="--clip_l is not given"):
        cache_tools.run("text", ["--flux", f"--dataset_config={data}"])
    with pytest.raises(ConfigError, match="--t5xxl_max_token_length"):
        cache_tools.run("text", ["--flux", f"--dataset_config={data}"])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--family", "flix"], "unknown model family 'flix'; did you mean 'flux'"),
        (["--family", "flux", "--sdxl"], "several model families are named"),
        (["--flux", "--no-cache_latents_to_disk"], "this tool does nothing but write these files"),
    ],
)
def test_what_the_tool_cannot_do(arguments, message):
    with pytest.raises(ConfigError, match=message):
        cache_tools.run("latents", arguments)


def test_the_family_may_be_left_out_where_another_option_tells_it(tmp_path):
    assert cache_tools.chosen_family(["--ae", "x", "--clip_l", "y"]) == "flux"
    assert cache_tools.chosen_family(["--qwen3=x"]) == "anima"
    assert cache_tools.chosen_family(["--gemma2=x", "--ae=y"]) == "lumina"
    (tmp_path / "train.toml").write_text('[model]\nqwen3 = "x"\n', encoding="utf-8")
    assert cache_tools.chosen_family(["--config_file", str(tmp_path / "train.toml")]) == "anima"
    with pytest.raises(ConfigError, match="no model family is named"):
        cache_tools.chosen_family(["--vae", "x"])
    with pytest.raises(ConfigError, match="several model families are named"):
        cache_tools.chosen_family(["--qwen3", "x", "--ae", "y"])
    with pytest.raises(ConfigError, match=r"several model families are named \(flux, lumina\)"):
        cache_tools.chosen_family(["--ae", "x"])
    assert cache_tools.chosen_family(["--flux"]) == cache_tools.chosen_family(["--family", "flux"]) == "flux"


@pytest.fixture
def second_family(monkeypatch):
    plant(monkeypatch, dataclasses.replace(record_of("flux"), name="second"))


def test_one_of_several_families_must_be_named_but_not_for_help(second_family, capsys):
    with pytest.raises(ConfigError, match="no model family is named; needed: --family with one of .*flux, .*second"):
        cache_tools.run("latents", ["--vae_batch_size", "2"])
    with pytest.raises(ConfigError, match="several model families are named"):
        cache_tools.run("latents", ["--flux", "--second"])
    assert cache_tools.chosen_family(["--second"]) == "second"
    cache_tools.main("latents", ["--help"])
    text = capsys.readouterr().out
    assert f"Options of the family {cache_tools.FIRST_FAMILY}" in text and "--second" in text and "--sdxl" in text


@pytest.mark.parametrize("tool", ["cache_latents.py", "cache_text_encoder_outputs.py"])
def test_help_needs_no_torch(tool, tmp_path):
    command = [sys.executable, "-X", "importtime", str(ROOT / "tools" / tool), "--help"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0 and "--vae_batch_size" in result.stdout
    imported = {
        line.rsplit("|", 1)[-1].strip().split(".")[0]
        for line in result.stderr.splitlines()
        if line.startswith("import time:")
    }
    assert not imported & {"torch", "numpy", "transformers", "accelerate", "PIL", "cv2", "diffusers"}


def test_an_error_is_one_line_and_a_status(tmp_path):
    result = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "cache_latents.py"), "--flux", "--vae_batch_sise", "2"],
        capture_output=True, text=True, cwd=tmp_path
    )
    assert result.returncode == 2
    assert result.stderr.strip() == "error: unknown option --vae_batch_sise; did you mean 'vae_batch_size'?"
