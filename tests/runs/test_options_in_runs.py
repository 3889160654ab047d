"""Options that no other test tries in a whole run: each does what it says, seen in the files of a step or two."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from library.training import cli
from tests.runs.conftest import (
    Work,
    draw_pictures,
    fingerprint,
    largest_difference,
    losses_of,
    read_parts,
    sample_pictures,
)
from tests.simulated_device import simulated_device
from tests.tiny import TinyFlux, build_tiny_flux


@pytest.fixture(autouse=True)
def root_logger_as_before():
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    yield
    root.setLevel(level)
    root.handlers[:] = handlers


@pytest.fixture(scope="module")
def base(tiny: TinyFlux, tmp_path_factory) -> Work:
    """A folder of six pictures, with the result of one plain step under the name `base`."""
    folder = tmp_path_factory.mktemp("options")
    work = Work(folder, tiny, draw_pictures(folder / "images", 6))
    work.train("base", "--max_train_steps=1")
    return work


def run(work: Work, name: str, *options: str, steps: int = 1, **settings: str) -> Path:
    dataset = work.dataset(name=f"{name}.toml", **settings)
    return work.train(name, f"--max_train_steps={steps}", *options, dataset=dataset)


CHANGING = [
    "--loss_type=l1", "--loss_type=huber --huber_c=0.5", "--loss_type=huber --huber_schedule=constant",
    "--timestep_sampling=uniform",
    "--timestep_sampling=shift --discrete_flow_shift=9", "--sigmoid_scale=3 --timestep_sampling=sigmoid",
    "--max_timestep=100",
    "--min_timestep=900", "--weighting_scheme=logit_normal --logit_mean=2", "--model_prediction_type=sigma_scaled",
    "--ip_noise_gamma=0.5", "--guidance_scale=1", "--apply_t5_attn_mask", "--t5xxl_max_token_length=8", "--seed=6",
    "--mixed_precision=bf16", "--mixed_precision=bf16 --fp8_base", "--caption_dropout_rate=1", "--caption_prefix=blue",
    "--color_aug",
]  # fmt: skip


@pytest.mark.parametrize("options", CHANGING)
def test_the_first_loss_is_another_one(base: Work, options: str):
    path = run(base, f"changed{CHANGING.index(options)}", *options.split())
    assert losses_of(path) != losses_of(base.folder / "base" / "lora.safetensors")


def test_flip_aug(base: Work):
    """Of six pictures some are mirrored."""
    plain, flipped = run(base, "three", steps=3), run(base, "flipped", "--flip_aug", steps=3)
    assert losses_of(plain) != losses_of(flipped)


EQUAL = [
    "--sdpa --xformers --mem_eff_attn --lowram --highvram", "--disable_mmap_load_safetensors --no_half_vae",
    "--gradient_checkpointing --cpu_offload_checkpointing", "--torch_compile --dynamo_backend=eager",
    "--noise_offset=0 --clip_skip=1",
    "--max_data_loader_n_workers=1 --persistent_data_loader_workers", "--cache_latents --vae_batch_size=2",
    "--blocks_to_swap=0",
]  # fmt: skip


@pytest.mark.parametrize("options", EQUAL)
def test_the_result_is_the_same(base: Work, options: str):
    path = run(base, f"equal{EQUAL.index(options)}", *options.split())
    assert largest_difference(path, base.folder / "base" / "lora.safetensors") < 1e-4


def test_swapped_blocks_give_the_same_result(tmp_path: Path):
    tiny = build_tiny_flux(tmp_path / "deep", depth=4, depth_single_blocks=4)
    work = Work(tmp_path, tiny, draw_pictures(tmp_path / "images", 2))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red square --w 32 --h 32 --s 2\n")
    # the last digit of a product with one row hangs on where its matrix begins, which in mapped files is anywhere
    words = [f"--sample_prompts={prompts}", "--sample_every_n_steps=1", "--disable_mmap_load_safetensors"]
    whole = run(work, "whole", *words, steps=2)
    for number, more in enumerate((
        "--block_swap_ring_size=1", "--gradient_checkpointing --cpu_offload_checkpointing",
        "--torch_compile --dynamo_backend=eager",
    )):  # fmt: skip
        name = f"swapped{number}"
        with simulated_device() as device:
            swapped = run(work, name, "--blocks_to_swap=2", *more.split(), *words, steps=2)
        assert device.buffers, more
        assert largest_difference(swapped, whole) < 1e-6, more
        pictures = [sample_pictures(work.folder / one) for one in ("whole", name)]
        assert len(pictures[0]) == 2
        assert all(one.read_bytes() == other.read_bytes() for one, other in zip(*pictures, strict=True))


def test_auto_swaps_what_the_device_makes_necessary(base: Work, caplog: pytest.LogCaptureFixture):
    """On a CPU nothing."""
    path = run(base, "auto", "--blocks_to_swap=auto", "--console_log_level=INFO")
    assert "--blocks_to_swap auto: 0, as the run computes in main memory" in caplog.text
    assert largest_difference(path, base.folder / "base" / "lora.safetensors") == 0


@pytest.mark.parametrize(
    "precision, dtype", [("fp16", torch.float16), ("bf16", torch.bfloat16), ("float", torch.float32)]
)
def test_save_precision(base: Work, precision: str, dtype: torch.dtype):
    path = run(base, precision, f"--save_precision={precision}")
    assert {tensor.dtype for key, tensor in load_file(path).items() if "lora_" in key.split(".")[1]} == {dtype}


@pytest.mark.parametrize("ending", ["ckpt", "pt"])
def test_save_model_as(base: Work, ending: str):
    path = run(base, ending, f"--save_model_as={ending}").with_suffix(f".{ending}")
    assert torch.load(path, weights_only=True).keys() == load_file(base.folder / "base" / "lora.safetensors").keys()


@pytest.mark.parametrize(
    "name, options, kept",
    [
        ("ratio", "--save_n_epoch_ratio=2 --max_train_epochs=4", ["-000002"]),
        ("epochs", "--save_every_n_epochs=1 --save_last_n_epochs=1 --max_train_epochs=3", ["-000002"]),
        (
            "steps",
            "--save_every_n_steps=1 --save_last_n_steps=1 --max_train_steps=4",
            ["-step00000003", "-step00000004"],
        ),
    ],
)
def test_files_that_stay(base: Work, name: str, options: str, kept: list[str]):
    path = run(base, name, *options.split(), batch_size=6)
    stems = sorted(file.stem for file in path.parent.glob("*.safetensors"))
    assert stems == sorted(["lora", *(f"lora{ending}" for ending in kept)])


def test_tensorboard_folder(base: Work):
    logs = base.folder / "logs"
    run(
        base,
        "logged",
        "--log_with=tensorboard",
        f"--logging_dir={logs}",
        "--log_prefix=mine_",
        "--log_tracker_name=cat",
        "--log_config",
    )
    assert [path.name[:5] for path in logs.iterdir()] == ["mine_"]
    (events,) = logs.rglob("events.out.tfevents.*")
    assert events.parent.name == "cat" and b"networks.lora_flux" in events.read_bytes()
    assert str(base.folder).encode() not in events.read_bytes(), "paths are not recorded"


def test_start_files(base: Work):
    """--network_weights alone goes on, --dim_from_weights takes over the ranks, --base_weights changes the model."""
    small = run(base, "small", "--network_dim=2", steps=2)
    went_on = run(base, "went_on", "--network_dim=2", f"--network_weights={small}")
    assert losses_of(went_on) != losses_of(small)[:1]
    path = run(base, "ranks", "--dim_from_weights", f"--network_weights={small}")
    assert {t.shape[0] for key, t in load_file(path).items() if key.endswith("lora_down.weight")} == {2}
    merged = [run(base, f"merged{m}", "--base_weights", str(small), "--base_weights_multiplier", m) for m in ("0", "1")]
    plain = losses_of(base.folder / "base" / "lora.safetensors")
    assert losses_of(merged[0]) == pytest.approx(plain, rel=1e-5) and losses_of(merged[1]) != pytest.approx(
        plain, rel=1e-5
    )


@pytest.mark.parametrize(
    "name, options, parts",
    [
        ("te", "--network_train_text_encoder_only", {"lora_te1"}),
        ("unet", "--network_train_unet_only", {"lora_unet"}),
        ("t5", "--network_args train_t5xxl=True", {"lora_te1", "lora_te3", "lora_unet"}),
        ("te lr", "--text_encoder_lr 0", {"lora_unet"}),
        ("unet lr", "--unet_lr=0", {"lora_te1"}),
        ("each", "--network_args train_t5xxl=True --text_encoder_lr 1e-3 0", {"lora_te1", "lora_unet"}),
    ],
)
def test_parts_that_learn(base: Work, name: str, options: str, parts: set[str]):
    state = load_file(run(base, f"part {name}", *options.split()))
    moved = {"_".join(key.split("_")[:2]) for key, t in state.items() if key.endswith("lora_up.weight") and t.any()}
    assert moved == parts


def test_scale_weight_norms(base: Work):
    state = load_file(run(base, "norms", "--scale_weight_norms=0.01", steps=2))
    for key, up in state.items():
        if key.endswith("lora_up.weight"):
            stem = key.removesuffix("lora_up.weight")
            down = state[stem + "lora_down.weight"]
            assert (up.flatten(1) @ down.flatten(1)).norm() * state[stem + "alpha"] / len(down) <= 0.01 * 1.001


def test_dora_with_dropout_and_limited_norms(base: Work):
    """--network_dropout reaches the low-rank part of DoRA; a limit shrinks it and the lengths without driving either to
    nothing."""
    words = ["--network_args", "dora_wd=True"]
    plain = load_file(run(base, "dora", *words, steps=3))
    dropped = load_file(run(base, "dora dropout", "--network_dropout=0.5", *words, steps=3))
    assert any(not torch.equal(plain[key], dropped[key]) for key in plain)
    limited = load_file(run(base, "dora norms", "--scale_weight_norms=0.01", *words, steps=3))
    for key, up in limited.items():
        if key.endswith("lora_up.weight"):
            down = limited[key.replace("lora_up", "lora_down")]
            change, before = (up @ down).norm(), (plain[key] @ plain[key.replace("lora_up", "lora_down")]).norm()
            assert 0 < float(change) <= float(before) * 1.01, key


def folders(work: Work, name: str, **options: object) -> list[str]:
    """Arguments without a dataset configuration."""
    argv = [word for word in work.argv(name) if not word.startswith("--dataset_config")]
    given = [f"--{key}={value}" for key, value in options.items()]
    return [*argv, "--max_train_steps=2", "--resolution=64", "--caption_extension=.txt", "--train_batch_size=2", *given]


def test_data_without_configuration(base: Work):
    train, reg = draw_pictures(base.folder / "train" / "2_cat", 2), draw_pictures(base.folder / "reg" / "1_pet", 2)
    cli.run("flux", "network", folders(base, "with reg", train_data_dir=train.parent, reg_data_dir=reg.parent))
    metadata, _ = read_parts(base.folder / "with reg" / "lora.safetensors")
    assert json.loads(metadata["ss_dataset_dirs"]) == {"2_cat": {"n_repeats": 2, "img_count": 2}}
    assert int(metadata["ss_num_reg_images"]) > 0 and metadata["ss_num_train_images"] == "4"
    names = {path.stem: {"caption": "a cat"} for path in train.glob("*.png")}
    (base.folder / "meta.json").write_text(json.dumps(names))
    cli.run(
        "flux",
        "network",
        folders(base, "from json", train_data_dir=train, in_json=base.folder / "meta.json", dataset_repeats=3),
    )
    metadata, _ = read_parts(base.folder / "from json" / "lora.safetensors")
    assert metadata["ss_num_train_images"] == "6"


def test_configuration_file_round_trip(base: Work):
    """What --output_config writes trains the same file as the command line that it was written from."""
    more = [
        "--optimizer_args",
        "weight_decay=0.1",
        "--text_encoder_lr",
        "1e-4",
        "--max_train_steps=1",
        "--resolution=64,64",
    ]
    argv = [*base.argv("from line"), *more]
    cli.run("flux", "network", argv)
    file = f"--config_file={base.folder / 'written.toml'}"
    cli.run("flux", "network", [*argv, file, "--output_config"])
    cli.run("flux", "network", [file, f"--output_dir={base.folder / 'from file'}"])
    files = [base.folder / name / "lora.safetensors" for name in ("from line", "from file")]
    assert fingerprint(files[0]) == fingerprint(files[1])


@pytest.mark.parametrize("ending", ["txt", "toml", "json"])
def test_sample_prompts(base: Work, ending: str):
    texts = {
        "txt": "a red cat --w 64 --h 64 --s 1\n",
        "toml": "[prompt]\nwidth = 64\nheight = 64\nsample_steps = 1\n[[prompt.subset]]\nprompt = 'a dog'\n",
        "json": '[{"prompt": "a cat", "width": 64, "height": 64, "sample_steps": 1}]',
    }
    prompts = base.folder / f"prompts.{ending}"
    prompts.write_text(texts[ending], encoding="utf-8")
    path = run(
        base, f"samples {ending}", f"--sample_prompts={prompts}", "--sample_every_n_steps=1", "--sample_at_first"
    )
    images = sample_pictures(path.parent)
    assert sorted(image.name[:12] for image in images) == ["lora_000001_", "lora_e000000"]
    assert all(Image.open(image).size == (64, 64) for image in images)


def test_metadata_and_log_file(base: Work):
    log = base.folder / "log.txt"
    options = [
        "--training_comment=hello",
        "--metadata_title=T",
        "--metadata_author=A",
        "--metadata_tags=x,y",
        "--metadata_license=L",
    ]
    more = ["--console_log_level=INFO", f"--console_log_file={log}", "--console_log_simple"]
    metadata, _ = read_parts(run(base, "told", *options, *more))
    found = [metadata.get(f"modelspec.{key}") for key in ("title", "author", "tags", "license")]
    assert found == ["T", "A", "x,y", "L"] and metadata["ss_training_comment"] == "hello"
    assert log.read_text(encoding="utf-8").splitlines()[0].startswith("--model_prediction_type is raw")
    metadata, _ = read_parts(run(base, "untold", "--no_metadata", "--training_comment=hello"))
    assert "hello" not in metadata.values()


@pytest.mark.parametrize(
    "options, told",
    [
        (
            "--log_prefix=a --wandb_run_name=b",
            ["--log_prefix: has no effect without --logging_dir", "--wandb_run_name"],
        ),
        (
            "--min_snr_gamma=5 --noise-offset 0.1",
            ["ignored", "--strict", "--min_snr_gamma 5: FLUX.1 learns", "--noise_offset 0.1: "],
        ),
        ("--ip_noise_gamma_random_strength", ["has no effect without --ip_noise_gamma"]),
        (
            "--network_train_unet_only --text_encoder_lr 1",
            ["--text_encoder_lr: has no effect: --network_train_unet_only is set"],
        ),
        ("--text_encoder_lr 1e-3 0 1e-5", ["--text_encoder_lr 1e-05: has no effect: flux has 2 text encoders"]),
        ("--text_encoder_lr 1e-3 1e-4", ["0.0001: has no effect", "train_t5xxl=True"]),
        ("--max_train_steps=2 --lr_scheduler=cosine --lr_warmup_steps=5", ["the full learning rate is never reached"]),
        ("--validate_every_n_steps=1 --save_last_n_steps=2", ["--save_last_n_steps: has no effect"]),
        (
            "--lr_scheduler_num_cycles=3 --huber_c=0.5",
            ["--lr_scheduler_num_cycles: has no effect", "--huber_c: has no effect"],
        ),
        ("--train_data_dir=/x", ["--train_data_dir: has no effect with --dataset_config"]),
    ],
)
def test_options_without_effect_are_named(base: Work, capsys, options: str, told: list[str]):
    run(base, "idle " + told[-1][:12].strip("-"), *options.split())
    shown = capsys.readouterr().err
    for text in told:
        assert text in shown


def test_a_negative_network_multiplier_trains_the_opposite(base: Work) -> None:
    """At the start the change is zero either way; the gradient of the second matrix has the sign of the multiplier."""
    data = base.dataset(dataset_keys="network_multiplier = -1", name="negative.toml")
    plain, opposite = (
        load_file(base.folder / "base" / "lora.safetensors"),
        load_file(base.train("opposite", "--max_train_steps=1", dataset=data)),
    )
    ups = [key for key in plain if "lora_up" in key]
    assert (
        ups
        and all(torch.equal(plain[key], -opposite[key]) for key in ups)
        and any(bool(plain[key].any()) for key in ups)
    )
