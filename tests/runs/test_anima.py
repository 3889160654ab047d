"""What is special to Anima, through the command line: its metadata, exact resume in low precision and with caches,
dropped captions, options, rates of parts, wrong files. What holds for every family is in test_families.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from library.core.errors import ConfigError
from tests.families import CASES
from tests.runs.conftest import Stopped, Work, draw_pictures, fingerprint, losses_of, read_parts, stop_after
from tests.tiny import TinyAnima, build_tiny_anima, build_tiny_flux

SETTINGS = "shuffle_caption = true\nkeep_tokens = 1\nflip_aug = true\ncaption_dropout_rate = 0.2"
CACHED = ["--cache_latents", "--cache_text_encoder_outputs", "--network_train_unet_only"]
ON_DISK = ["--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk", "--network_train_unet_only"]


@pytest.fixture(scope="module")
def tiny_anima(tmp_path_factory) -> TinyAnima:
    return build_tiny_anima(tmp_path_factory.mktemp("tiny_anima"))


@pytest.fixture
def work(tmp_path: Path, tiny_anima: TinyAnima) -> Work:
    return Work(tmp_path, tiny_anima, draw_pictures(tmp_path / "images", -9), case=CASES["anima"])


def test_the_file_is_as_documented(work: Work) -> None:
    path = work.train("out", "--max_train_steps=2", *CACHED)
    metadata = read_parts(path)[0]
    assert metadata["ss_base_model_version"] == "anima" and metadata["ss_timestep_sampling"] == "sigmoid"
    assert metadata["ss_discrete_flow_shift"] == "1.0" and metadata["modelspec.architecture"] == "anima-preview/lora"
    state = load_file(path)
    modules = {key.partition(".")[0] for key in state}
    assert len(modules) == 30 and "lora_unet_blocks_0_cross_attn_k_proj" in modules
    assert all(tensor.abs().max() > 0 for key, tensor in state.items() if "lora_up" in key)


@pytest.mark.parametrize(
    "options", [CACHED, ON_DISK, ["--mixed_precision=bf16"], ["--network_args", "train_llm_adapter=True"]], ids=str
)
def test_a_resumed_run_ends_in_the_bytes_of_an_uninterrupted_one(work: Work, options: list[str]) -> None:
    data = work.dataset(subset_keys="caption_dropout_rate = 0.2" if options in (CACHED, ON_DISK) else SETTINGS)
    whole = work.train("whole", *options, dataset=data)
    saving = ["--save_every_n_steps=3", "--save_state"]
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(Stopped):
            work.train("parts", *options, *saving, dataset=data)
    resumed = work.train(
        "parts", *options, f"--resume={work.folder / 'parts' / 'lora-step00000003-state'}", dataset=data
    )
    assert fingerprint(resumed) == fingerprint(whole)


def test_caches_change_nothing_and_captions_are_dropped_live(work: Work) -> None:
    data = work.dataset(subset_keys="caption_dropout_rate = 0.5")
    live = losses_of(work.train("live", "--network_train_unet_only", dataset=data))
    for name, options in (("memory", CACHED), ("disk", ON_DISK), ("again", ON_DISK)):
        assert losses_of(work.train(name, *options, dataset=data)) == pytest.approx(live, rel=1e-4)
    never = work.dataset(subset_keys="caption_dropout_rate = 0.0", name="never.toml")  # the same cache files
    assert losses_of(work.train("never", *ON_DISK, dataset=never)) != pytest.approx(live, rel=1e-4)


CHANGING = [
    "--t5_max_token_length=16", "--qwen3_max_token_length=4", "--timestep_sampling=shift --discrete_flow_shift=5",
    "--timestep_sampling=flux_shift", "--weighting_scheme=cosmap", "--sigmoid_scale=2", "--self_attn_lr=0",
    "--mlp_lr=1e-4",
    "--cross_attn_lr=1e-4", "--ip_noise_gamma=0.3", "--loss_type=huber", "--mixed_precision=bf16 --fp8_base",
    "--network_args train_llm_adapter=True", "--network_args include_patterns=['.*adaln.*']",
]  # fmt: skip
EQUAL = [
    "--attn_mode=sdpa",
    "--attn_mode=torch_math",
    "--split_attn",
    "--vae_disable_cache",
    "--gradient_checkpointing",
    "--vae_chunk_size=4",
]


@pytest.fixture(scope="module")
def plain(tmp_path_factory, tiny_anima: TinyAnima) -> tuple[Work, dict[str, torch.Tensor]]:
    folder = tmp_path_factory.mktemp("plain")
    base = Work(folder, tiny_anima, draw_pictures(folder / "images", 4), case=CASES["anima"])
    return base, load_file(base.train("plain", "--max_train_steps=2", "--network_train_unet_only"))


@pytest.mark.parametrize("options", [*CHANGING, *EQUAL])
def test_what_an_option_does_to_the_result(plain, options: str) -> None:
    base, expected = plain
    name = options.replace("/", "_")
    result = load_file(base.train(name, "--max_train_steps=2", "--network_train_unet_only", *options.split(" ")))
    if options in CHANGING:
        assert set(result) != set(expected) or any(not torch.equal(result[key], expected[key]) for key in expected)
        return
    for key, tensor in expected.items():
        torch.testing.assert_close(result[key], tensor, rtol=1e-3, atol=1e-5, msg=key)


def test_a_part_with_rate_zero_stays_and_others_learn(work: Work) -> None:
    options = [
        "--network_train_unet_only",
        "--self_attn_lr=0",
        "--llm_adapter_lr=1e-3",
        "--network_args",
        "train_llm_adapter=True",
    ]
    state = load_file(work.train("out", *options))
    moved = {key: bool(tensor.abs().max() > 0) for key, tensor in state.items() if key.endswith("lora_up.weight")}
    still = {key for key, is_moved in moved.items() if not is_moved}
    assert still == {key for key in moved if key.startswith("lora_unet_blocks_") and "_self_attn_" in key}
    assert any("llm_adapter" in key for key in moved)


@pytest.mark.parametrize("name", ["llm_adapter_lr", "mod_lr"])
def test_a_rate_of_layers_that_do_not_learn_is_told(work: Work, name: str, caplog: pytest.LogCaptureFixture) -> None:
    from library.training.wiring.anima import RATE_SWITCHES

    options = ["--network_train_unet_only", "--max_train_steps=1", f"--{name}=1e-3", "--console_log_level=INFO"]
    work.train("out", *options)
    assert f"--{name}: has no effect" in caplog.text and "network_reg_lrs" not in caplog.text
    caplog.clear()
    work.train("on", *options, "--network_args", RATE_SWITCHES[name])
    assert f"--{name}: has no effect" not in caplog.text


def test_sample_images_and_a_negative_prompt(work: Work) -> None:
    prompts = work.folder / "prompts.txt"
    prompts.write_text(
        "a red cat --w 64 --h 48 --s 2 --d 3 --l 4 --n blue --fs 5\na dog --w 64 --h 48 --s 2 --d 3 --l 1\n",
        encoding="utf-8",
    )
    work.train("out", *CACHED, f"--sample_prompts={prompts}", "--sample_every_n_steps=4")
    from PIL import Image

    images = sorted((work.folder / "out" / "sample").glob("lora_000004_0*.png"))
    assert [Image.open(path).size for path in images] == [(64, 48), (64, 48)]


def test_the_sampler_of_sample_images(work: Work, caplog: pytest.LogCaptureFixture) -> None:
    prompts = work.folder / "prompts.txt"
    prompts.write_text("a cat --w 64 --h 48 --s 4 --d 3\na cat --w 64 --h 48 --s 4 --d 3 --ss heun\n", encoding="utf-8")
    given = [*CACHED, f"--sample_prompts={prompts}", "--sample_every_n_steps=4"]
    work.train("euler", *given)
    work.train("er_sde", *given, "--sample_sampler=er_sde")
    pictures = [
        path.read_bytes()
        for name in ("euler", "er_sde")
        for path in sorted((work.folder / name / "sample").glob("lora_000004_0*.png"))
    ]
    assert len(pictures) == 4 and pictures[1] == pictures[3] and len(set(pictures)) == 3
    work.train("as euler", *given, "--sample_sampler=euler_a")  # which front ends send whatever is trained
    assert "--sample_sampler euler_a: a sampler of SD models; flow models have ddim, lms," in caplog.text
    made = sorted((work.folder / "as euler" / "sample").glob("lora_000004_0*.png"))
    assert [path.read_bytes() for path in made] == pictures[:2]
    with pytest.raises(ConfigError, match="--sample_sampler is 'eulr'; did you mean 'euler'"):
        work.train("no", *given, "--sample_sampler=eulr")


def test_a_model_without_adapter_trains(work: Work, tmp_path: Path) -> None:
    work.tiny = build_tiny_anima(tmp_path / "without", adapter=False)
    assert len(load_file(work.train("out", "--network_train_unet_only"))) == 3 * 30


def test_another_adapter_is_loaded(work: Work, tmp_path: Path) -> None:
    other = build_tiny_anima(tmp_path / "other", seed=8)
    plain, given = (
        load_file(work.train(name, *CACHED, *more))
        for name, more in (("a", []), ("b", [f"--llm_adapter_path={other.anima}"]))
    )
    assert any(not torch.equal(plain[key], given[key]) for key in plain)


@pytest.mark.parametrize(
    ("slot", "wrong", "words"),
    [
        ("pretrained_model_name_or_path", "flux", "FLUX.1"), ("qwen3", "t5xxl", "T5"), ("vae", "ae", "autoencoder"),
        ("vae", "missing", "no such file"), ("llm_adapter_path", "ae", "LLM adapter"),
    ],
)  # fmt: skip
def test_wrong_files_are_named_before_anything_is_loaded(
    work: Work, tmp_path: Path, slot: str, wrong: str, words: str
) -> None:
    flux = build_tiny_flux(tmp_path / "flux")
    path = getattr(flux, wrong, tmp_path / "missing.safetensors")
    with pytest.raises(ConfigError, match=words) as error:
        work.train("out", f"--{slot}={path}")
    assert f"--{slot}" in str(error.value)


def test_too_many_swapped_blocks(work: Work) -> None:
    with pytest.raises(ConfigError, match="--blocks_to_swap is 2; this model has 3 blocks, at most 1"):
        work.train("out", "--blocks_to_swap=2")
    work.train("out", "--blocks_to_swap=1")
