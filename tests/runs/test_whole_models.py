"""Whole models learn: every script of the trainable, its files, exact resumes, frozen parts and ways to update."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from library.core.errors import ConfigError
from library.families.registry import FAMILIES
from library.safetensors_utils import load_pickled_tensors, load_safetensors
from library.training import cli
from library.training.optimizers.single_steps import COMPENSATION
from tests.families import CASES, marks_of
from tests.runs.conftest import Stopped, Work, fingerprint, losses_of, stop_after
from tests.runs.families import Tinies, without

TEXT = {
    "sd": ("--train_text_encoder", "--learning_rate_te=2e-3"),
    "sdxl": ("--train_text_encoder", "--learning_rate_te2=2e-3"),
    "sd3": (
        "--train_text_encoder", "--learning_rate_te1=2e-3", "--learning_rate_te2=0", "--train_t5xxl",
        "--learning_rate_te3=2e-3",
    ),
}
"""family -> options with which text encoders learn in its script `full`"""
VALIDATED = ("--validation_split=0.5", "--validate_every_n_steps=4")
UNET, TEXT_PARTS = "model.diffusion_model.", ("cond_stage_model.", "conditioner.embedders.")
CELLS = [
    pytest.param(case.name, trainable, id=f"{case.name}-{trainable}", marks=marks_of(case.name))
    for case in CASES.values() for trainable in FAMILIES[case.family].scripts
    if trainable in ("full", "dreambooth")
]


@pytest.fixture(scope="module")
def tinies(tmp_path_factory: pytest.TempPathFactory) -> Tinies:
    return Tinies(tmp_path_factory)


def metadata_file(work: Work) -> Path:
    """A dataset with a metadata file, which some scripts want."""
    entries = {str(path): {"caption": "a red cat"} for path in sorted(work.images.glob("*.png"))}
    (work.folder / "meta.json").write_text(json.dumps(entries), encoding="utf-8")
    text = work.dataset().read_text(encoding="utf-8") + f"metadata_file = '{work.folder / 'meta.json'}'\n"
    path = work.folder / "listed.toml"
    path.write_text(text.replace('caption_extension = ".txt"\n', ""), encoding="utf-8")
    return path


def argv(work: Work, trainable: str, out: str, *more: str) -> list[str]:
    script = FAMILIES[work.case.family].scripts[trainable].name
    dataset = metadata_file(work) if script == "fine_tune" else None
    words = work.argv(out, "--max_train_steps=3", "--learning_rate=1e-3", *more, dataset=dataset)
    return [word for word in words if not word.startswith("--network")]


def train(work: Work, trainable: str, out: str, *more: str) -> Path:
    cli.run(work.case.family, trainable, argv(work, trainable, out, *more))
    return work.folder / out / "lora.safetensors"


def changed(before: Path, after: Path) -> set[str]:
    """Keys of files of one layout whose values differ."""
    left, right = load_safetensors(before), load_safetensors(after)
    assert {key: tensor.shape for key, tensor in left.items()} == {key: tensor.shape for key, tensor in right.items()}
    return {key for key, tensor in left.items() if not torch.equal(tensor.float(), right[key].float())}


def side_files(model: Path) -> list[str]:
    """Options that name the text encoders beside a model's file."""
    beside = sorted(model.parent.glob(f"{model.stem}_*.safetensors"))
    return [f"--{path.stem.removeprefix(f'{model.stem}_')}={path}" for path in beside]


@pytest.mark.parametrize("name, trainable", CELLS)
def test_a_whole_model_learns_and_resumes_in_the_same_bytes(
    name: str, trainable: str, tinies: Tinies, tmp_path: Path
) -> None:
    """Denoiser and text encoders change and nothing else does; a run that begins with the file begins where this one
    ended: what it predicts is the same."""
    work = tinies.work(name, tmp_path)
    more = ["--ema", "--ema_decay=0.5", *(TEXT.get(work.case.family, ()) if trainable == "full" else ()), *VALIDATED]
    whole = train(work, trainable, "whole", "--max_train_steps=4", *more)
    losses = losses_of(whole)
    assert len(losses) == 4 and all(torch.tensor(losses).isfinite())
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(Stopped):
            train(work, trainable, "parts", "--max_train_steps=4", "--save_every_n_steps=2", "--save_state", *more)
    resumed = train(work, trainable, "parts", "--max_train_steps=4", "--resume=latest", *more)
    for stem in ("lora", "lora-ema"):
        assert fingerprint(resumed.with_name(f"{stem}.safetensors")) == fingerprint(whole.with_name(f"{stem}.safetensors"))
    if work.case.family in TEXT:
        parts = changed(work.tiny.model, whole)
        assert any(key.startswith(UNET) for key in parts)
        assert any(key.startswith(TEXT_PARTS) for key in parts) or side_files(whole)
        assert all(key.startswith((UNET, *TEXT_PARTS)) for key in parts)
    averaged = whole.with_name("lora-ema.safetensors")  # with which the held-out loss was computed
    base = [f"--pretrained_model_name_or_path={averaged}", *side_files(averaged)]
    still = [word.replace("=2e-3", "=1e-12") for word in (*more, *base, "--max_train_steps=1", "--learning_rate=2e-3")]
    again = train(work, trainable, "again", *still)
    assert losses_of(again, "validation")[-1] == pytest.approx(losses_of(whole, "validation")[-1], rel=1e-5)


@pytest.mark.parametrize("more", [
    ("--optimizer_type=AdamW", "--max_grad_norm=0"),
    ("--optimizer_type=AdaFactor", "--optimizer_args", "relative_step=False", "scale_parameter=False", "--max_grad_norm=0"),
    ("--mixed_precision=bf16", "--full_bf16", "--max_grad_norm=0", "--gradient_checkpointing"),
    ("--mixed_precision=bf16", "--full_bf16", "--max_grad_norm=0", "--bf16_update=kahan"),
], ids=["adamw", "adafactor", "bf16", "kahan"])  # fmt: skip
def test_updates_inside_the_backward_pass_give_the_same_bytes(
    more: Sequence[str], tinies: Tinies, tmp_path: Path
) -> None:
    """As long as nothing is clipped."""
    work = tinies.work("sdxl", tmp_path)
    words = [*more, *TEXT["sdxl"], "--max_train_steps=2"]
    option = "--fused_optimizer_groups=4" if more[0] == "--optimizer_type=AdamW" else "--fused_backward_pass"
    plain = train(work, "full", "plain", *words)
    assert len(changed(work.tiny.model, plain)) > 100
    assert changed(plain, train(work, "full", "fused", *words, option)) == set()


@pytest.mark.parametrize("way", ["stochastic", "kahan"])
def test_bfloat16_resumes_exactly_with_moments_of_float32(way: str, tinies: Tinies, tmp_path: Path) -> None:
    work = tinies.work("sd1", tmp_path)
    words = ["--mixed_precision=bf16", "--full_bf16", "--save_every_n_steps=2", "--save_state", f"--bf16_update={way}"]
    whole = train(work, "dreambooth", "whole", *words)
    state = whole.with_name("lora-step00000002-state")
    saved = torch.load(state / "optimizer.bin", weights_only=True)
    assert {entry["exp_avg"].dtype for entry in saved["state"].values()} == {torch.float32}
    kept = [entry[COMPENSATION] for entry in saved["state"].values() if COMPENSATION in entry]
    assert len(kept) == (len(saved["state"]) if way == "kahan" else 0) and all(bool(part.any()) for part in kept[:3])
    again = train(work, "dreambooth", "again", *words, f"--resume={state}")
    assert fingerprint(again) == fingerprint(whole)


def test_frozen_blocks_keep_their_bytes(tinies: Tinies, tmp_path: Path) -> None:
    work = tinies.work("sdxl", tmp_path)
    rates = ",".join("0" if block in (0, 1, 2, 22) else "1e-3" for block in range(23))
    final = train(work, "full", "out", f"--block_lr={rates}", "--layer_lrs=middle_block=0", "--max_train_steps=2")
    parts = {key.removeprefix(UNET) for key in changed(work.tiny.model, final)}
    frozen = ("time_embed.", "label_emb.", "input_blocks.0.", "input_blocks.1.", "middle_block.", "out.")
    assert parts and not any(key.startswith(frozen) for key in parts)
    assert any(key.startswith("input_blocks.2.") for key in parts) and any(key.startswith("output_blocks.") for key in parts)


def test_a_text_encoder_stops_and_one_learns_alone(tinies: Tinies, tmp_path: Path) -> None:
    """With --learning_rate 0 the U-Net keeps its bytes; a stop before the first step is as if nothing learned."""
    work = tinies.work("sdxl", tmp_path)
    alone = train(
        work, "full", "alone", "--learning_rate=0", "--train_text_encoder", "--learning_rate_te1=0",
        "--learning_rate_te2=1e-3", "--cache_text_encoder_outputs",
    )
    parts = changed(work.tiny.model, alone)
    assert parts and all(key.startswith("conditioner.embedders.1.") for key in parts)
    stopped = train(work, "full", "stopped", *TEXT["sdxl"], "--stop_text_encoder_training=1", "--save_every_n_steps=1")
    first = changed(stopped.with_name("lora-step00000001.safetensors"), stopped)
    assert first and all(key.startswith(UNET) for key in first)
    assert any(key.startswith(TEXT_PARTS) for key in changed(work.tiny.model, stopped))


def test_a_run_that_is_refused_after_loading_leaves_earlier_files(tinies: Tinies, tmp_path: Path) -> None:
    """Which weights a pattern freezes is known when they are there."""
    work = tinies.work("lumina", tmp_path)
    train(work, "full", "out", "--max_train_steps=1")
    before = {path.name: path.read_bytes() for path in (work.folder / "out").iterdir() if path.is_file()}
    with pytest.raises(ConfigError, match="nothing to train"):
        train(work, "full", "out", "--layer_lrs", ".*=0")
    assert {path.name: path.read_bytes() for path in (work.folder / "out").iterdir() if path.is_file()} == before


def test_layouts_of_files(tinies: Tinies, tmp_path: Path) -> None:
    """A ckpt and a folder hold what the file holds; diffusers reads the folder, which is a base too."""
    work = tinies.work("sd1", tmp_path)
    words = ["--max_train_steps=1", "--save_every_n_steps=1", "--save_last_n_steps=0"]
    file = load_safetensors(train(work, "dreambooth", "file", *words))
    train(work, "dreambooth", "pickled", *words, "--save_model_as=ckpt")
    pickled = load_pickled_tensors(work.folder / "pickled" / "lora.ckpt")
    assert file.keys() == pickled.keys() and all(torch.equal(file[key], pickled[key]) for key in file)
    for layout, ending in (("diffusers_safetensors", ".safetensors"), ("diffusers", ".bin")):
        train(work, "dreambooth", layout, *words, f"--save_model_as={layout}")
        folder = work.folder / layout / "lora"
        assert (folder / "unet" / f"diffusion_pytorch_model{ending}").is_file()
        assert (folder / "scheduler" / "scheduler_config.json").is_file() and (folder / "tokenizer").is_dir()
    from diffusers import UNet2DConditionModel

    read = UNet2DConditionModel.from_pretrained(work.folder / "diffusers_safetensors" / "lora", subfolder="unet")
    assert torch.equal(read.conv_in.weight, file[f"{UNET}input_blocks.0.0.weight"])


@pytest.mark.parametrize("name, trainable", [
    pytest.param("sd2", "full", id="sd2"), pytest.param("sdxl", "full", id="sdxl"),
])
def test_a_base_in_a_folder_gives_folders(
    name: str, trainable: str, tinies: Tinies, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Which a pipeline of diffusers loads, with the scheduler of the base; one file, when asked for, holds the same."""
    from diffusers import DiffusionPipeline, HeunDiscreteScheduler

    from tools import convert_model

    work = tinies.work(name, tmp_path)
    base = work.folder / "base"
    words = [str(work.tiny.model), str(base), "--to", "diffusers", "--tokenizer", str(work.tiny.tokenizer)]
    assert convert_model.main(words) == 0
    scheduler = HeunDiscreteScheduler(beta_start=0.001, prediction_type="sample", steps_offset=1)
    scheduler.save_pretrained(base / "scheduler")
    index = json.loads((base / "model_index.json").read_text(encoding="utf-8"))
    index["scheduler"] = ["diffusers", "HeunDiscreteScheduler"]
    (base / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    work.tiny = dataclasses.replace(work.tiny, model=base)
    words = ["--max_train_steps=2", "--save_every_n_steps=1", "--save_last_n_steps=0", "--ema", *TEXT.get(name, ())]
    folder = train(work, trainable, "out", *words).with_suffix("")
    assert sorted(path.name for path in folder.parent.glob("lora*") if path.suffix not in (".csv", ".png")) == [
        "lora", "lora-ema", "lora-step00000002", "lora-step00000002-ema",
    ]  # fmt: skip
    pipeline = DiffusionPipeline.from_pretrained(folder, safety_checker=None)
    assert isinstance(pipeline.scheduler, HeunDiscreteScheduler) and pipeline.scheduler.config.beta_start == 0.001
    assert pipeline.scheduler.config.prediction_type == ("v_prediction" if name == "sd2" else "epsilon")
    pads = [pipeline.tokenizer.pad_token, *([pipeline.tokenizer_2.pad_token] if name == "sdxl" else [])]
    assert pads == (["!"] if name == "sd2" else [pipeline.tokenizer.eos_token, "!"])
    assert not torch.equal(pipeline.unet.conv_in.weight, DiffusionPipeline.from_pretrained(base).unet.conv_in.weight)
    file = load_safetensors(train(work, trainable, "file", *words, "--save_model_as=safetensors"))
    assert torch.equal(pipeline.unet.conv_in.weight, file[f"{UNET}input_blocks.0.0.weight"])
    again = work.folder / "again.safetensors"
    assert convert_model.main([str(folder), str(again), "--to", "single"]) == 0
    assert all(torch.equal(tensor, file[key]) for key, tensor in load_safetensors(again).items() if key in file)


@pytest.mark.parametrize("words, told", [
    (["--fp8_base"], "--fp8_base is True; it is not available here: trained weights"),
    (["--block_lr=1e-4,1e-4"], "--block_lr has 2 numbers; needed: 23"),
    (["--block_lr=1e-4,,1"], "--block_lr is 1e-4,,1; needed: 23 numbers"),
    (["--learning_rate=0"], "every learning rate is 0"),
    (["--learning_rate=0", f"--block_lr={','.join(['1'] * 23)}"], "--block_lr is set with --learning_rate 0"),
    (["--learning_rate_te1=1e-3"], "no text encoder learns; add --train_text_encoder"),
    (["--train_text_encoder", "--cache_text_encoder_outputs"], "leave out --train_text_encoder or leave out --cache"),
    (["--fused_backward_pass", "--gradient_accumulation_steps=2"], "gradients are gone after each backward pass"),
    (["--fused_backward_pass", "--mixed_precision=fp16"], "scaled gradients"),
    (["--fused_backward_pass", "--fused_optimizer_groups=2"], "say the same"),
    (["--fused_backward_pass", "--optimizer_type=Prodigy", "--learning_rate=1"], "Prodigy needs the gradients of all"),
    (["--save_model_as=pt"], "--save_model_as is pt"),
    (["--bf16_update=kahn"], "bf16_update"),
    (["--strict", "--train_text_encoder", "--learning_rate_te1=0", "--learning_rate_te2=0"],
     "--train_text_encoder: has no effect: the learning rate"),
    (["--strict", "--bf16_update=kahan"], "--bf16_update: has no effect"),
    (["--network_dim=4"], "--network_dim is an option of other scripts"),
])  # fmt: skip
def test_what_cannot_be(words: list[str], told: str, tinies: Tinies, tmp_path: Path) -> None:
    work = tinies.work("sdxl", tmp_path)
    given = without(argv(work, "full", "out"), *(word[2:].partition("=")[0] for word in words))
    if any("Prodigy" in word for word in words):
        pytest.importorskip("prodigyopt")
    with pytest.raises(ConfigError, match=told.replace("(", r"\(")):
        cli.run("sdxl", "full", [*given, *words])


def test_messages_name_the_options_of_the_script(tinies: Tinies, tmp_path: Path) -> None:
    """DreamBooth has no switch that lets the text encoder learn; whole models have none that leaves out the denoiser."""
    work = tinies.work("sd1", tmp_path)
    still = ["--stop_text_encoder_training=-1", "--learning_rate_te=1e-5"]
    with pytest.raises(ConfigError, match="no text encoder learns; leave out --stop_text_encoder_training -1"):
        cli.run("sd", "dreambooth", [*argv(work, "dreambooth", "out"), *still])
    with pytest.raises(ConfigError) as caught:
        train(work, "full", "out", "--layer_lrs=.*=0")
    assert "every weight is left out or has a learning rate of 0" in str(caught.value)
    assert "--network" not in str(caught.value)


def test_an_adapter_is_no_folder(tinies: Tinies, tmp_path: Path) -> None:
    work: Any = tinies.work("sd1", tmp_path)
    with pytest.raises(ConfigError, match="what is trained here is one file"):
        work.train("out", "--save_model_as=diffusers")
