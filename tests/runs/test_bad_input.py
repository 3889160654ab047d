"""Bad input through the command line: one clear message, exit code 2, no traceback, and no model is loaded."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.training import cli
from library.training.wiring.flux import FluxFamily
from tests.runs.conftest import Work, draw_pictures
from tests.waiting import PATIENCE

ROOT = Path(__file__).parents[2]
FOLDER = "[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = '{}'\n"
BUCKETS = "[general]\nenable_bucket = true\nmin_bucket_reso = 32\nbucket_reso_steps = 16\ncaption_extension = '.txt'\n"


@pytest.fixture
def refused(work: Work, monkeypatch, capsys) -> Callable[..., str]:
    """Run the command line with `argv`; assert that it ends with exit code 2 before models, and return its message."""
    for name in ("load_vae", "load_text_encoders", "load_denoiser"):
        monkeypatch.setattr(FluxFamily, name, lambda *_: pytest.fail("a model is loaded"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def run(argv: list[str]) -> str:
        with pytest.raises(SystemExit) as ended:
            cli.main("flux", "network", argv)
        assert ended.value.code == 2
        message = capsys.readouterr().err
        errors = [line for line in message.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and "Traceback" not in message
        return message[message.index("error: ") :]

    return run


def without(argv: list[str], *names: str) -> list[str]:
    return [word for word in argv if not word.startswith(tuple(f"--{name}=" for name in names))]


# ---- options ---------------------------------------------------------------------------------------------------------

OPTIONS: list[tuple[str, list[str]]] = [
    ("--learing_rate=1", ["unknown option --learing_rate", "did you mean 'learning_rate'"]),
    ("--gemma2=/x", ["--gemma2 is an option of other scripts"]),
    ("--resolution=512,512,512", ["--resolution", "1024,768"]),
    ("--learning_rate=1e-4x", ["--learning_rate is '1e-4x'", "a number"]),
    ("--learning_rate=nan", ["--learning_rate is nan"]),
    ("--learning_rate", ["--learning_rate", "expected one argument"]),
    ("--max_train_steps=0", ["--max_train_steps is 0", "1 or more"]),
    ("--seed=-1", ["--seed is -1"]),
    ("--save_every_n_steps=-2 --save_every_n_epochs=-1", ["--save_every_n_steps is -2", "--save_every_n_epochs is -1"]),
    ("--gradient_accumulation_steps=0", ["--gradient_accumulation_steps is 0"]),
    ("--output_name=a/b", ["--output_name is 'a/b'"]),
    ("--console_log_level=LOUD", ["--console_log_level is 'LOUD'", "DEBUG"]),
    ("--optimizer_type=AdamWW", ["unknown optimizer 'AdamWW'", "did you mean 'AdamW'"]),
    ("--optimizer_type=nowhere.Adam", ["needs the package nowhere", "pip install"]),
    ("--optimizer_args foo", ["--optimizer_args has the argument 'foo'", "key=value"]),
    ("--optimizer_args decay=0.1", ["sets decay, which AdamW does not have", "weight_decay"]),
    ("--optimizer_args betas=0.9", ["--optimizer_args is betas=0.9, which AdamW refuses"]),
    ("--use_8bit_adam --use_lion_optimizer", ["--use_8bit_adam and --use_lion_optimizer"]),
    ("--fused_backward_pass --strict", ["--fused_backward_pass: gradients of a network are few", "--strict is set"]),
    ("--optimizer_type=automagik", ["unknown optimizer 'automagik'", "did you mean 'Automagic'"]),
    ("--optimizer_type=soap_sf --optimizer_args betas=0,0.9", ["--optimizer_args is betas=(0, 0.9), which SOAP_sf"]),
    ("--optimizer_type=schedulefree.AdamWScheduleFree --offload_optimizer", ["--offload_optimizer is set with"]),
    ("--lr_scheduler=none --lr_warmup_steps=5", ["--lr_warmup_steps is 5; none has no warm-up"]),
    ("--lr_scheduler=adafactor", ["--lr_scheduler adafactor goes only with --optimizer_type AdaFactor"]),
    ("--infonoise_enabled --loss_type=huber", ["--infonoise_enabled", "--loss_type"]),
    ("--timestep_sampling=infonois", ["--timestep_sampling is 'infonois'", "Known: "]),
    ("--loss_type=l3", ["--loss_type is 'l3'", "Known: l1"]),
    ("--loss_weight cosmap", ["use --loss_weighting cosmap"]),
    ("--network_module=networks.lora_fa --network_args loraplus_lr_ratio=2", ["loraplus_lr_ratio"]),
    ("--network_args excludes_weight_decay=(", ["--network_args excludes_weight_decay=(", "not a regular expression"]),
    ("--lr_scheduler=cosin", ["unknown learning rate scheduler 'cosin'", "did you mean 'cosine'"]),
    (
        "--lr_scheduler=cosine_with_restart --lr_scheduler_args T_0=5",
        ["error: unknown learning", "here it is called cosine_with_warm_restarts"],
    ),
    ("--lr_scheduler_type=StepL", ["torch.optim.lr_scheduler has no class StepL", "StepLR"]),
    ("--lr_scheduler_type=StepLR", ["StepLR needs step_size"]),
    (
        "--lr_scheduler_type=StepLR --lr_scheduler_args step_size=abc",
        ["--lr_scheduler_args is step_size=abc; StepLR refuses it"],
    ),
    ("--lr_warmup_steps=10%x", ["--lr_warmup_steps", "10%"]),
    ("--network_module=networks.lora_fluxx", ["there is no such module", "did you mean 'networks.lora_flux'"]),
    ("--network_module=json", ["--network_module is json, which has no function create_network"]),
    ("--network_args conv_dimm=3", ["there is no argument 'conv_dimm'", "did you mean 'conv_dim'"]),
    ("--network_args train_blocks=some", ["train_blocks=some", "double"]),
    ("--network_dim=0", ["--network_dim is 0"]),
    ("--network_dropout=1.5", ["--network_dropout is 1.5"]),
    ("--network_weights=/nope.safetensors", ["--network_weights is /nope.safetensors", "no such file"]),
    ("--dim_from_weights", ["--dim_from_weights is set without --network_weights"]),
    ("--network_train_unet_only --network_train_text_encoder_only", ["leave nothing to train"]),
    ("--base_weights_multiplier 1.0", ["--base_weights_multiplier has 1 values for 0 --base_weights"]),
    ("--scale_weight_norms=-1", ["--scale_weight_norms is -1.0"]),
    ("--full_fp16", ["--full_fp16 is set with --mixed_precision no", "--mixed_precision fp16"]),
    ("--full_bf16 --mixed_precision=fp16", ["--full_bf16", "--mixed_precision bf16"]),
    ("--fp8_base", ["--fp8_base is set with --mixed_precision no"]),
    ("--blocks_to_swap=50", ["--blocks_to_swap is 50", "1 double and 2 single blocks allows at most 0"]),
    ("--blocks_to_swap=-1", ["--blocks_to_swap is -1"]),
    ("--cpu_offload_checkpointing --strict", ["without --gradient_checkpointing"]),
    ("--torch_compile --dynamo_backend=foo", ["--dynamo_backend is 'foo'", "inductor"]),
    ("--deepspeed", ["--deepspeed", "not available here"]),
    ("--sample_every_n_steps=1 --strict", ["--sample_every_n_steps: makes no sample images without --sample_prompts"]),
    ("--sample_every_n_steps=1 --sample_prompts=/nope.txt", ["--sample_prompts is /nope.txt; there is no such file"]),
    ("--learning_rate=0", ["every learning rate is 0"]),
    ("--unet_lr=0 --text_encoder_lr=0", ["every learning rate is 0"]),
    ("--resume=/nope", ["--resume is /nope; there is no such folder"]),
    ("--resume=/", ["--resume is /, which holds no train_state.json and no folder with one"]),
    ("--initial_step=7", ["--initial_step is 7", "no step is left"]),
    ("--initial_step=70 --max_train_epochs=1", ["--initial_step 70 leaves nothing to train"]),
    ("--initial_epoch=70", ["--initial_epoch 70", "leaves nothing to train"]),
    ("--min_timestep=500 --max_timestep=400", ["--min_timestep is 500", "min < max"]),
    ("--weighting_scheme=bar", ["--weighting_scheme is 'bar'", "logit_normal"]),
    (
        "--prior_loss_weight=-1 --caption_dropout_rate=1.5",
        ["--prior_loss_weight is -1.0", "--caption_dropout_rate is 1.5"],
    ),
    ("--validation_split=2", ["--validation_split is 2.0"]),
    ("--log_with=tensorboard", ["--log_with is tensorboard without --logging_dir"]),
    ("--log_tracker_config=/nope.toml", ["--log_tracker_config is /nope.toml"]),
    ("--metadata_thumbnail=foo", ["--metadata_thumbnail is foo", "image file"]),
    ("--huggingface_repo_id=foo", ["--huggingface_repo_id is foo", "owner/name"]),
    (
        "--min_snr_gamma=5 --clip_skip=2 --strict",
        ["--min_snr_gamma 5: FLUX.1 learns by flow matching", "--clip_skip 2: ", "(--strict"],
    ),
    ("--weighted_captions", ["--weighted_captions is True; it is not available here"]),
    ("--model_type=chroma", [": this is a FLUX.1 denoiser", "needed: a Chroma denoiser"]),
    ("--config_file=/nope.toml", ["there is no file /nope.toml"]),
    ("--dataset_class=json.JSONDecoder", ["--dataset_class", "--dataset_config"]),
    ("--clip_l_tokenizer=/nope", ["--clip_l_tokenizer is /nope, which does not exist"]),
]


@pytest.mark.parametrize("options, words", OPTIONS, ids=[options for options, _ in OPTIONS])
def test_option(work: Work, refused, options: str, words: list[str]):
    message = refused([*work.argv("out"), *options.split()])
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    "content, words",
    [
        ("learing_rate = 1e-4", ["unknown key learing_rate", "did you mean 'learning_rate'"]),
        ("network_dim = 'a'", ["cfg.toml: network_dim is 'a'", "a whole number"]),
        ("cache_latents = 'yess'", ["cfg.toml: cache_latents is 'yess'", "true or false"]),
        ("loss_type = 'l3'", ["loss_type is 'l3'", "huber"]),
        ("strict = true\nepoch = 5\nsingle_blocks_to_swap = 3", ["epoch = 5", "max_train_epochs", "blocks_to_swap"]),
        ("strict = true\nnoise_offset = '0.1'", ["noise_offset = '0.1'", "(--strict is set"]),
        ("deepspeed = true", ["--deepspeed is True", "not available here"]),
        ("[model\nseed = 3", ["cfg.toml is not valid TOML", "line 1"]),
        ("[a.b]\nseed = 3", ["table inside a table"]),
    ],
)
def test_configuration_file(work: Work, refused, content: str, words: list[str]):
    (work.folder / "cfg.toml").write_text(content, encoding="utf-8")
    message = refused([*work.argv("out"), f"--config_file={work.folder / 'cfg'}"])
    for word in words:
        assert word in message


def test_keys_of_other_families_that_ask_for_nothing_are_let_through(work: Work, refused):
    """Front ends write them into every file, as texts too; the run is stopped by another key here."""
    neutral = (
        "clip_skip = 1\nepoch = 1\nv2 = 'false'\nmax_token_length = '75'\ngemma2 = ''\nnoise_offset_type = 'Original'\n"
    )
    own = "learning_rate = '1e-4'\nlr_warmup_steps = '10%'\nresolution = '512,512'\ncache_latents = 'true'\nsave_every_n_steps = '-1'\n"
    (work.folder / "cfg.toml").write_text(neutral + own, encoding="utf-8")
    message = refused([*work.argv("out"), f"--config_file={work.folder / 'cfg.toml'}"])
    assert message.strip().splitlines() == [
        "error: --save_every_n_steps is -1; needed: 1 or more; leave it out to save at the end only"
    ]


def test_a_package_that_is_not_there(work: Work, refused, monkeypatch):
    monkeypatch.setattr("library.training.checks.importlib.util.find_spec", lambda name: None)
    message = refused([*work.argv("out"), "--log_with=wandb", f"--logging_dir={work.folder}"])
    assert "needs the package wandb" in message and "pip install 'atelier[wandb]'" in message


# ---- needed options and files ----------------------------------------------------------------------------------------


def test_nothing_given(refused):
    message = refused([])
    for name in (
        "output_dir",
        "pretrained_model_name_or_path",
        "clip_l",
        "t5xxl",
        "ae",
        "network_module",
        "train_data_dir",
    ):
        assert f"--{name}" in message


def make_lora(work: Work, path: Path) -> None:
    stem = "lora_unet_double_blocks_0_img_attn_proj"
    tensors = {f"{stem}.lora_down.weight": torch.zeros(4, 32), f"{stem}.lora_up.weight": torch.zeros(32, 4)}
    save_file({**tensors, f"{stem}.alpha": torch.tensor(4.0)}, path)


def make_sdxl(work: Work, path: Path) -> None:
    names = {
        "model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3),
        "model.diffusion_model.label_emb.0.0.weight": (8, 2816),
        "conditioner.embedders.0.transformer.text_model.embeddings.token_embedding.weight": (10, 768),
        "conditioner.embedders.1.model.token_embedding.weight": (10, 1280),
    }
    save_file({name: torch.zeros(shape) for name, shape in names.items()}, path)


WRONG_FILES: dict[str, tuple[Callable[[Work, Path], object], str]] = {
    "sdxl": (make_sdxl, "an SDXL checkpoint"),
    "lora": (make_lora, "a LoRA-type adapter"),
    "cut": (lambda work, path: path.write_bytes(work.tiny.flux.read_bytes()[:-5000]), "truncated"),
    "cut header": (lambda work, path: path.write_bytes(work.tiny.flux.read_bytes()[:50]), "truncated"),
    "empty": (lambda work, path: path.write_bytes(b""), "an empty file"),
    "web page": (lambda work, path: path.write_text("<!DOCTYPE html><html>"), "a web page"),
    "git-lfs": (
        lambda work, path: path.write_text("version https://git-lfs.github.com/spec/v1\n"),
        "a git-lfs pointer",
    ),
    "pickle": (lambda work, path: torch.save({"a": torch.zeros(3)}, path), "a pickle"),
    "folder": (lambda work, path: path.mkdir(), "a folder without safetensors files"),
    "missing": (lambda work, path: None, "no such file"),
    "autoencoder": (lambda work, path: shutil.copy(work.tiny.ae, path), "autoencoder"),
}
SLOTS = ("pretrained_model_name_or_path", "clip_l", "t5xxl", "ae", "network_weights")


@pytest.mark.parametrize("kind", WRONG_FILES)
def test_wrong_file_in_every_slot(work: Work, refused, kind: str):
    """All slots in one run: each is named, with what the file is and what is needed."""
    make, told = WRONG_FILES[kind]
    path = work.folder / "given.safetensors"
    make(work, path)
    fits = {"lora": "network_weights", "autoencoder": "ae"}.get(kind)
    slots = [slot for slot in SLOTS if slot != fits]
    argv = without(work.argv("out"), *slots)
    message = refused([*argv, *(f"--{slot}={path}" for slot in slots)])
    for slot in slots:
        line = next(line for line in message.splitlines() if f"--{slot} is {path}" in line)
        assert told in line and "needed: " in line


def test_adapter_of_another_rank(work: Work, refused):
    make_lora(work, work.folder / "a.safetensors")
    message = refused([*work.argv("out"), "--network_dim=8", f"--network_weights={work.folder / 'a.safetensors'}"])
    assert "--network_dim is 8" in message and "has rank 4" in message and "--dim_from_weights" in message


def test_tokenizers_that_are_nowhere(work: Work, refused, monkeypatch):
    """Offline, without folders: the message names the ways to give one, for both at once."""
    state = load_file(work.tiny.t5xxl)
    save_file({key: value for key, value in state.items() if key != "spiece_model"}, work.folder / "t5.safetensors")
    monkeypatch.setattr("library.components.tokenizers._clip_from_installed_package", lambda: None)
    monkeypatch.setattr("library.components.tokenizers.from_hub", lambda *_: None)
    message = refused(
        [*without(work.argv("out"), "clip_l_tokenizer", "t5xxl"), f"--t5xxl={work.folder / 't5.safetensors'}"]
    )
    for word in (
        "--clip_l_tokenizer",
        "--t5xxl_tokenizer",
        "--tokenizer_cache_dir",
        "open-clip-torch",
        "spiece_model",
        "hub",
    ):
        assert word in message


def test_tokenizer_of_another_model(work: Work, refused):
    (work.folder / "broken").write_text("no tokenizer")
    argv = without(work.argv("out"), "clip_l_tokenizer")
    message = refused([*argv, f"--t5xxl_tokenizer={work.folder / 'broken'}"])
    assert "gives ids up to 49407" in message and "--clip_l_tokenizer" in message
    assert f"--t5xxl_tokenizer is {work.folder / 'broken'}, whose tokenizer cannot be read" in message


def test_files_of_an_earlier_run(work: Work, refused):
    (work.folder / "out").mkdir()
    (work.folder / "out" / "lora-000002.safetensors").write_bytes(b"x")
    message = refused(work.argv("out", "--on_existing=refuse"))
    assert "lora-000002.safetensors of an earlier run would be replaced" in message and "--overwrite" in message


def test_output_folder_that_is_a_file(work: Work, refused):
    (work.folder / "out").write_text("x")
    assert f"--output_dir is {work.folder / 'out'}; files cannot be written there" in refused(work.argv("out"))


def test_prompt_lines(work: Work, refused):
    """One bad line does not end a run; a file without a good one is refused."""
    path = work.folder / "prompts.txt"
    path.write_text("\n# comment\na dog --w abc\na bird --l x\n")
    message = refused([*work.argv("out"), "--sample_every_n_steps=1", f"--sample_prompts={path}"])
    assert "prompts.txt line 3: --w is 'abc'" in message and "prompts.txt line 4: --l is 'x'" in message


# ---- datasets --------------------------------------------------------------------------------------------------------

DATASETS: list[tuple[str, str, list[str]]] = [
    ("", "num_repeat = 2\nflip_augs = true", ["datasets[0].subsets[0].num_repeat", "'num_repeats'", "'flip_aug'"]),
    (
        "",
        "num_repeats = 'x'\nflip_aug = 3",
        ['num_repeats: is "x"', "a whole number", "flip_aug: is 3", "true or false"],
    ),
    ("", "caption_dropout_rate = 2\nkeep_tokens = -1", ["caption_dropout_rate: is 2", "0 to 1", "keep_tokens: is -1"]),
    ("", "validation_split = 1.5", ["validation_split: is 1.5"]),
    (
        "",
        "color_aug = true\nrandom_crop = true --cache_latents",
        ["subsets[0].color_aug", "subsets[0].random_crop", "--cache_latents"],
    ),
    (
        "",
        "shuffle_caption = true\ncaption_tag_dropout_rate = 0.1\ntoken_warmup_step = 3 --cache_text_encoder_outputs",
        ["subsets[0].shuffle_caption", "subsets[0].caption_tag_dropout_rate", "subsets[0].token_warmup_step"],
    ),
    ("", "conditioning_data_dir = '/nope/c' --masked_loss", ["the folder /nope/c does not exist"]),
    ("", "caption_extension = '.nope' --fail_on_missing_captions", ["5 images have no caption", "00.png"]),
    ("", "is_reg = true\nclass_tokens = 'cat'", ["only regularisation images"]),
    ("resolution = '64x'\nbatch_size = 0", "", ['datasets[0].resolution: is "64x"', "datasets[0].batch_size: is 0"]),
    ("max_bucket_reso = 32", "", ["max_bucket_reso: is 32", "resolution (64)"]),
    ("min_bucket_reso = 128", "", ["min_bucket_reso: is 128"]),
    ("bucket_reso_steps = 10", "", ["bucket_reso_steps: is 10", "a multiple of 16"]),
    ("bucket_reso_steps = 0", "", ["bucket_reso_steps: is 0"]),
    ("bucket_reso_steps = 128", "", ["lower bucket_reso_steps"]),
]


@pytest.mark.parametrize(
    "dataset, subset, words", DATASETS, ids=[f"{d} {s}".strip().replace("\n", "; ") for d, s, _ in DATASETS]
)
def test_dataset_settings(work: Work, refused, dataset: str, subset: str, words: list[str]):
    subset, _, option = subset.partition(" --")
    images = draw_pictures(work.folder / "five", 5)
    resolution = "" if "resolution =" in dataset else "resolution = 64\n"
    text = f"{BUCKETS}[[datasets]]\n{resolution}{dataset}\n[[datasets.subsets]]\nimage_dir = '{images}'\n{subset}\n"
    (work.folder / "d.toml").write_text(text, encoding="utf-8")
    message = refused(work.argv("out", *([f"--{option}"] if option else []), dataset=work.folder / "d.toml"))
    for word in words:
        assert word in message


def test_bucket_settings_that_no_image_fits(work: Work, refused):
    images = draw_pictures(work.folder / "small", 3, size=(8, 8))
    text = f"{BUCKETS}[[datasets]]\nresolution = 64\nbucket_no_upscale = true\n[[datasets.subsets]]\nimage_dir = '{images}'\n"
    (work.folder / "d.toml").write_text(text, encoding="utf-8")
    message = refused(work.argv("out", dataset=work.folder / "d.toml"))
    assert (
        "of every image one side would be shorter than one bucket step (16 px)" in message
        and "bucket_no_upscale" in message
    )


@pytest.mark.parametrize(
    "text, words",
    [
        ("", ["has no [[datasets]]"]),
        ("[[datasets]]\nresolution = 64\n", ["the dataset has no subsets"]),
        ("[[datasets]\n", ["d.toml is not valid TOML", "line 1"]),
        (FOLDER.format("/nope"), ["the folder /nope does not exist"]),
        (FOLDER.format("EMPTY"), ["holds no images", ".png"]),
        (FOLDER.format("IMAGES").replace("resolution = 64", ""), ["the dataset has no resolution"]),
        (FOLDER.format("IMAGES").replace("64", "60"), ["is 60x60", "multiples of 16"]),
        (
            FOLDER.format("IMAGES") + "[[datasets.subsets]]\nimage_dir = 'IMAGES'\nnum_repeats = 3\n",
            ["is used by datasets[0].subsets[0]"],
        ),
        (FOLDER.format("IMAGES") + "metadata_file = '/nope.json'", ["the metadata file /nope.json does not exist"]),
    ],
)
def test_dataset_file(work: Work, refused, text: str, words: list[str]):
    (work.folder / "empty").mkdir()
    text = text.replace("EMPTY", str(work.folder / "empty")).replace("IMAGES", str(work.images))
    (work.folder / "d.toml").write_text(text, encoding="utf-8")
    message = refused(work.argv("out", dataset=work.folder / "d.toml"))
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    "folder, words",
    [
        ("/nope", ["--train_data_dir /nope is not a folder"]),
        ("images", ["no sub-folders named N_name", "holds 9 images itself", "1_name"]),
        ("unnumbered", ["no sub-folders named N_name", "10_mydog"]),
        ("1_empty", ["no images"]),
    ],
)
def test_folders_without_configuration(work: Work, refused, folder: str, words: list[str]):
    draw_pictures(work.folder / "unnumbered" / "cat", 1)
    (work.folder / "1_empty" / "1_cat").mkdir(parents=True)
    argv = without(work.argv("out"), "dataset_config")
    message = refused([*argv, "--resolution=64", f"--train_data_dir={work.folder / folder}"])
    for word in words:
        assert word in message


def spoil(folder: Path) -> list[str]:
    """Three files that are no whole image; their names."""
    (folder / "corrupt.png").write_bytes(b"not an image")
    (folder / "zero.jpg").write_bytes(b"")
    whole = (folder / "00.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    return ["corrupt.png", "zero.jpg", "cut.png"]


@pytest.mark.parametrize("more", [[], ["--cache_latents"]])
def test_images_that_cannot_be_read_are_all_named(work: Work, refused, more: list[str]):
    names = spoil(work.images)
    (work.images / "01.txt").write_bytes("caf\xe9".encode("latin-1"))
    message = refused(work.argv("out", *more))
    for name in (*names, "01.txt is not UTF-8"):
        assert name in message


@pytest.mark.parametrize("more", [[], ["--cache_latents"]])
def test_the_rest_goes_on_with_skip_bad_images(work: Work, capsys, more: list[str]):
    spoil(work.images)
    (work.images / "01.txt").write_text("")
    (work.images / "02.txt").unlink()
    path = work.train("out", "--skip_bad_images", "--max_train_steps=1", *more)
    told = capsys.readouterr().err
    assert path.is_file() and "corrupt.png" in told and "zero.jpg" in told and "cut.png" in told
    assert "have no caption" in told and "have an empty caption" in told


# ---- everything at once ----------------------------------------------------------------------------------------------


def test_problems_of_options_files_and_data_come_together(work: Work, refused):
    spoil(work.images)
    (work.folder / "cfg.toml").write_text("network_dimm = 3\nnetwork_alpha = 'x'\n")
    text = FOLDER.format("/nope") + f"resolutoin = 3\n[[datasets.subsets]]\nimage_dir = '{work.images}'\n"
    (work.folder / "d.toml").write_text(text)
    argv = without(work.argv("out", dataset=work.folder / "d.toml"), "ae", "output_dir", "seed")
    message = refused([
        *argv, f"--config_file={work.folder / 'cfg.toml'}", "--learing_rate=3", "--save_every_n_steps=-1",
        "--optimizer_type=foo",
        "--mixed_precision=fp99", "--full_fp16", "--sample_prompts=/nope.txt", f"--t5xxl={work.tiny.ae}",
    ])  # fmt: skip
    wanted = (
        "--learing_rate", "network_dimm", "network_alpha is 'x'", "--mixed_precision is 'fp99'", "--save_every_n_steps is -1",
        "--output_dir is not given", "unknown optimizer 'foo'", "--ae is not given", "/nope.txt", "--t5xxl is",
        "resolutoin",
        "the folder /nope does not exist", "corrupt.png", "zero.jpg", "cut.png",
    )  # fmt: skip
    missing = [word for word in wanted if word not in message]
    assert not missing, message
    assert "--full_fp16" not in message  # judged when --mixed_precision can be read


@pytest.mark.parametrize("option", ["--netwrk_dim=4", "--ae=/nope.safetensors"])
def test_as_a_command(work: Work, option: str):
    argv = [*without(work.argv("out"), "console_log_level"), option]
    result = subprocess.run(
        [sys.executable, "flux_train_network.py", *argv], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode == 2
    assert "error: " in result.stderr and "Traceback" not in result.stderr
    assert "loading FLUX" not in result.stderr and "caching" not in result.stderr


def test_a_bad_prompt_line_does_not_end_the_run(work: Work, caplog):
    path = work.folder / "prompts.txt"
    path.write_text("a cat -- asleep --w 64 --h 64 --s 1 --d -1\na dog --w abc\n")
    work.train("out", "--max_train_steps=1", "--sample_every_n_steps=1", f"--sample_prompts={path}")
    assert "prompts.txt line 2: --w is 'abc'" in caplog.text and "left out" in caplog.text
    assert len(list((work.folder / "out" / "sample").glob("*_00_*.png"))) == 1
