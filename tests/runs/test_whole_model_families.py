"""What whole models of single families have beside others: text encoders with rates, files and caches of their own,
parts that stay as they are, blocks that wait; and what their scripts refuse."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from library.core.errors import ConfigError
from library.safetensors_utils import load_pickled_tensors, load_safetensors
from library.training import cli
from library.training.checkpoint import DEFAULT_FORMAT, Saving
from library.training.earlier_runs import is_output_of
from library.training.hooks.checkpoint import planned_lines
from library.training.option_groups import SavingOptions
from tests.option_sets import SCRIPTS
from tests.runs.conftest import Work
from tests.runs.families import MODEL, Tinies, told_as, without
from tests.runs.test_whole_models import argv, changed, train
from tests.simulated_device import simulated_device

BF16 = ("--mixed_precision=bf16", "--full_bf16")
DENOISER = "model.diffusion_model."
FIRST_BLOCK = {
    "chroma": "double_blocks.0.", "lumina": "layers.0.", "hunyuan_image": "double_blocks.0.", "sd3": "joint_blocks.0.",
}  # fmt: skip


@pytest.fixture(scope="module")
def tinies(tmp_path_factory: pytest.TempPathFactory) -> Tinies:
    return Tinies(tmp_path_factory)


def of_part(state: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    start = f"text_encoders.{part}.transformer."
    return {key.removeprefix(start): tensor for key, tensor in state.items() if key.startswith(start)}


def differing(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> set[str]:
    assert left.keys() == right.keys() and left
    return {key for key, tensor in left.items() if not torch.equal(tensor.float(), right[key].float())}


def learned_text(work: Work, out: str, *more: str) -> Path:
    """A run of SD3 whose CLIP-L learns beside frozen CLIP-G and T5, which is cached."""
    words = ("--train_text_encoder", "--learning_rate_te2=0", "--use_t5xxl_cache_only", "--save_every_n_steps=1")
    return train(work, "full", out, *words, *more)


def test_text_encoders_of_sd3_in_the_file_of_the_model(tinies: Tinies, tmp_path: Path) -> None:
    """CLIP-L learns for one step; the last block never does; all parts are in the pickled file, and none beside it."""
    work = tinies.work("sd3", tmp_path)
    words = ["--stop_text_encoder_training=1", "--num_last_block_to_freeze=1", "--save_clip", "--save_t5xxl"]
    final = learned_text(work, "out", *words, "--save_model_as=ckpt").with_suffix(".ckpt")
    assert {path.suffix for path in final.parent.iterdir()} == {".ckpt", ".csv", ".png"}
    first, last = (load_pickled_tensors(path) for path in (final.with_name("lora-step00000001.ckpt"), final))
    base = load_safetensors(work.tiny.model)
    clip_l = load_safetensors(work.tiny.clip_l)
    assert differing({key: of_part(first, "clip_l")[key] for key in clip_l}, clip_l)
    assert not differing(of_part(first, "clip_l"), of_part(last, "clip_l"))
    clip_g, t5 = load_safetensors(work.tiny.clip_g), of_part(last, "t5xxl")
    assert all(torch.equal(tensor, clip_g[key]) for key, tensor in of_part(last, "clip_g").items() if key in clip_g)
    assert "spiece_model" in t5 and not differing(t5, {key: load_safetensors(work.tiny.t5xxl)[key] for key in t5})
    parts = {key for key in base if not torch.equal(base[key].float(), last[key].float())}
    depth = 1 + max(int(key.split(".")[3]) for key in base if key.startswith(f"{DENOISER}joint_blocks."))
    assert any(key.startswith(f"{DENOISER}joint_blocks.0.") for key in parts)
    assert all(key.startswith(DENOISER) for key in parts)
    assert not any(key.startswith(f"{DENOISER}joint_blocks.{depth - 1}.") for key in parts)


def test_text_encoders_of_sd3_beside_the_model(tinies: Tinies, tmp_path: Path) -> None:
    """With a denoiser of rate 0, rounded in memory. Files of an outdated step go together; those of an earlier run are
    known as its own."""
    work = tinies.work("sd3", tmp_path)
    alone = learned_text(work, "out", "--learning_rate=0", "--learning_rate_te1=1e-3", "--save_last_n_steps=1", *BF16)
    assert changed(work.tiny.model, alone) == set()
    names = sorted(path.name for path in alone.parent.glob("*.safetensors"))
    stems = ("lora", "lora-step00000002", "lora-step00000003")
    assert names == sorted(f"{stem}{ending}.safetensors" for stem in stems for ending in ("", "_clip_l"))
    assert differing(load_safetensors(work.tiny.clip_l), load_safetensors(alone.with_name("lora_clip_l.safetensors")))
    with pytest.raises(ConfigError, match="of an earlier run would be replaced"):
        alone.unlink()
        for path in alone.parent.glob("lora-*"):
            path.unlink()
        learned_text(work, "out", "--on_existing=refuse")


def test_which_files_a_run_writes_beside_a_model() -> None:
    saving = SavingOptions(output_name="a", save_model_as="ckpt")
    names = ("a_clip_l", "a-ema_clip_l", "a-step00000007_clip_l", "a_clip_g", "b_clip_l", "a_clip_l-ema")
    found = [is_output_of(f"{name}.{DEFAULT_FORMAT}", saving, ("-ema",), ("_clip_l",)) for name in names]
    assert found == [True, True, True, False, False, False]
    lines = planned_lines([Saving("end", 7, "a.ckpt", None)], ["-ema", "-own"], ["_clip_l"])
    assert lines == ["a.ckpt", "a-ema.ckpt", "a-own.ckpt", "a_clip_l.safetensors", "a-ema_clip_l.safetensors"]


def test_the_approximator_of_chroma_learns_with_a_rate_of_its_own(tinies: Tinies, tmp_path: Path) -> None:
    work = tinies.work("chroma", tmp_path)
    still, rate = train(work, "full", "still"), "--layer_lrs=^distilled_guidance_layer=1e-3,^single_blocks=0"
    own = load_safetensors(train(work, "full", "learning", rate))
    parts = {key.partition(".")[0] for key in differing(load_safetensors(still), own)}
    assert {"distilled_guidance_layer", "single_blocks", "double_blocks"} <= parts
    base = load_safetensors(work.tiny.chroma)
    assert not any(key.startswith("distilled_guidance_layer") for key in differing(base, load_safetensors(still)))
    assert not any(key.startswith("single_blocks") for key in differing(base, own))


@pytest.mark.parametrize("name, saving", [
    ("sd3", "--blocks_to_swap=1"), ("lumina", "--blocks_to_swap=1"), ("chroma", "--gradient_checkpointing"),
    ("hunyuan_image", "--gradient_checkpointing"),
])  # fmt: skip
def test_updates_inside_the_backward_pass_give_the_same_bytes(
    name: str, saving: str, tinies: Tinies, tmp_path: Path
) -> None:
    """As long as nothing is clipped, beside a frozen block and what else saves memory."""
    work = tinies.work(name, tmp_path)
    words = ["--max_grad_norm=0", "--max_train_steps=2", f"--layer_lrs=^{FIRST_BLOCK[name]}=0"]
    plain = train(work, "full", "plain", *words)
    with simulated_device() as device:
        fused = train(work, "full", "fused", *words, "--blockwise_fused_optimizers", saving)
    assert changed(plain, fused) == set()
    assert bool(device.sent) == ("swap" in saving)


@pytest.mark.parametrize("name, words, told", [
    ("sd3", ["--train_t5xxl"], "--train_t5xxl is given without --train_text_encoder"),
    ("sd3", ["--train_text_encoder", "--cache_text_encoder_outputs"], "add --use_t5xxl_cache_only"),
    ("sd3", ["--train_text_encoder", "--train_t5xxl", "--use_t5xxl_cache_only"], "--train_t5xxl with cached outputs"),
    ("sd3", ["--train_text_encoder", "--learning_rate_te3=1e-4"], "that encoder learns with --train_t5xxl alone"),
    ("sd3", ["--learning_rate_te1=1e-4"], "no text encoder learns; add --train_text_encoder"),
    ("sd3", ["--num_last_block_to_freeze=99"], "--num_last_block_to_freeze is 99; the model has"),
    ("sd3", ["--num_last_block_to_freeze=-1"], "needed: 0 or more blocks"),
    ("sd3", ["--blocks_to_swap=1"], "add --fused_backward_pass"),
    (
        "sd3", ["--blocks_to_swap=1", "--fused_backward_pass", "--optimizer_type=AdamWScheduleFree"],
        "--blocks_to_swap with --optimizer_type AdamWScheduleFree",
    ),
    ("sd3", ["--save_model_as=diffusers"], "models of this family are not written as folders"),
    ("sd3", ["--network_train_unet_only"], "--network_train_unet_only is an option of other scripts"),
    ("chroma", ["--train_text_encoder"], "an option of other scripts for whole models; flux_train has"),
    ("lumina", ["--fp8_base"], "trained weights are not held in 8 or 4 bits"),
    ("lumina", ["--num_last_block_to_freeze=1"], "lumina_train has"),
    ("hunyuan_image", ["--fp8_scaled"], "trained weights are not held in 8 or 4 bits"),
    ("hunyuan_image", ["--network_args=a=1"], "--network_args is an option of other scripts"),
])  # fmt: skip
def test_what_cannot_be(name: str, words: list[str], told: str, tinies: Tinies, tmp_path: Path) -> None:
    work = tinies.work(name, tmp_path)
    given = without(argv(work, "full", "out"), *(word[2:].partition("=")[0] for word in words))
    with pytest.raises(ConfigError) as caught:
        cli.run(work.case.family, "full", [*given, *words])
    assert told in str(caught.value)
    assert not (work.folder / "out").exists()


@pytest.mark.parametrize("which", SCRIPTS, ids="_".join)
def test_a_model_that_is_not_given(which: tuple[str, str], tinies: Tinies, tmp_path: Path) -> None:
    """Beside pictures that are there."""
    work = tinies.work("chroma", tmp_path)
    words = [f"--dataset_config={work.dataset()}", f"--output_dir={work.folder / 'out'}"]
    words += ["--num_last_block_to_freeze=1"] if which == ("sd3", "full") else []
    with pytest.raises(ConfigError, match=f"--{told_as(which[0], MODEL)} is not given"):
        cli.run(*which, words)


def test_a_state_in_which_other_text_encoders_learned(tinies: Tinies, tmp_path: Path) -> None:
    work = tinies.work("sd3", tmp_path)
    learned_text(work, "out", "--save_state", "--max_train_steps=1")
    state = f"--resume={work.folder / 'out' / 'lora-step00000001-state'}"
    told = (
        "--train_text_encoder has text_encoder_1=False; .* has text_encoder_1=True, and what learns cannot change: .*"
        " with --pretrained"
    )
    with pytest.raises(ConfigError, match=told):
        learned_text(work, "other", state, "--learning_rate_te1=0")


def test_a_t5_that_is_not_there_does_not_learn(tinies: Tinies, tmp_path: Path) -> None:
    work = tinies.work("sd3", tmp_path)
    given = without(argv(work, "full", "out"), "t5xxl", "t5xxl_tokenizer")
    with pytest.raises(ConfigError, match="there is no T5"):
        cli.run("sd3", "full", [*given, "--train_text_encoder", "--train_t5xxl"])
    given = without(work.argv("adapter"), "t5xxl", "t5xxl_tokenizer")
    with pytest.raises(ConfigError, match="--network_args train_t5xxl=True is given, and there is no T5"):
        cli.run("sd3", "network", [*given, "--network_args", "train_t5xxl=True"])
