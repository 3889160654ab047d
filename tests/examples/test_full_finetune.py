"""examples/full_finetune as its page says: all weights of a tiny FLUX learn, and the run resumes exactly."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from library.core.errors import ConfigError
from library.core.learning_rates import parse_block_curves, parse_rates, rate_groups
from library.flux_utils import load_flux
from library.safetensors_utils import load_safetensors
from library.training import cli
from tests.docs.commands import ROOT
from tests.runs.conftest import Stopped, Work, fingerprint, stop_after
from tests.runs.families import Tinies

TRAINABLE = "examples.full_finetune.full_finetune:FullFinetune"


@pytest.fixture
def work(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Work:
    return Tinies(tmp_path_factory).work("flux", tmp_path)


def argv(work: Work, out: str, *more: str) -> list[str]:
    return [
        word
        for word in work.argv(out, "--max_train_steps=4", "--learning_rate=1e-3", *more)
        if not word.startswith("--network")
    ]


def train(work: Work, out: str, *more: str) -> Path:
    cli.run(work.case.family, TRAINABLE, argv(work, out, *more))
    return work.folder / out / "lora.safetensors"


def test_it_resumes_in_the_bytes_of_an_uninterrupted_run(work: Work) -> None:
    whole = train(work, "whole", "--ema", "--ema_decay=0.5")
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(Stopped):
            train(work, "parts", "--ema", "--ema_decay=0.5", "--save_every_n_steps=2", "--save_state")
    resumed = train(work, "parts", "--ema", "--ema_decay=0.5", "--resume=latest")
    for name in ("lora", "lora-ema"):
        assert fingerprint(resumed.with_name(f"{name}.safetensors")) == fingerprint(
            whole.with_name(f"{name}.safetensors")
        )
    base = next(word.partition("=")[2] for word in argv(work, "x") if word.startswith("--pretrained_model_name_or_path"))
    before, after = load_flux(base, torch.float32, "cpu"), load_flux(whole, torch.float32, "cpu")
    changed = {name for name, p in after.named_parameters() if not torch.equal(p, before.get_parameter(name))}
    assert len(changed) == len(dict(before.named_parameters()))


def test_layers_have_rates_of_their_own(work: Work) -> None:
    final = train(work, "out", "--layer_lrs=double_blocks=0,final_layer=1e-2", "--max_train_steps=1")
    base = next(
        word.partition("=")[2] for word in argv(work, "x") if word.startswith("--pretrained_model_name_or_path")
    )
    before, after = load_flux(base, torch.float32, "cpu").state_dict(), load_safetensors(final)
    step = {name: (after[name].float() - tensor).abs().max().item() for name, tensor in before.items()}
    assert all(size == 0 for name, size in step.items() if name.startswith("double_blocks"))
    assert step["img_in.weight"] == pytest.approx(1e-3, rel=0.2) and step["final_layer.linear.weight"] == pytest.approx(
        1e-2, rel=0.2
    )


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_models_in_one_file_keep_what_has_not_learned(
    name: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The U-Net is another, everything else the base's to the bit, also where it is computed with in 16 bits."""
    work = Tinies(tmp_path_factory).work(name, tmp_path)
    words = ("--mixed_precision=bf16", "--max_train_steps=1")
    final = train(work, "out", *words)
    before, after = load_safetensors(work.tiny.model), load_safetensors(final)
    assert {key: (t.shape, t.dtype) for key, t in before.items()} == {key: (t.shape, t.dtype) for key, t in after.items()}
    changed = {key for key, tensor in before.items() if not torch.equal(tensor, after[key])}
    own = {key for key in before if key.startswith("model.diffusion_model.")}
    assert changed <= own and len(changed) > 0.9 * len(own)
    small = load_safetensors(train(work, "small", *words, "--save_precision=fp16"))
    assert {tensor.dtype for tensor in small.values() if tensor.is_floating_point()} == {torch.float16}
    work.tiny = dataclasses.replace(work.tiny, model=final)
    assert train(work, "again", *words).is_file()


def test_self_flow_joins_it(work: Work) -> None:
    hook = [
        "--hook=examples.self_flow.self_flow:SelfFlow",
        "--student_feature_layer=0",
        "--teacher_feature_layer=1",
        "--self_flow_ema_decay=0.5",
    ]
    final = train(work, "out", *hook, "--max_train_steps=1")
    assert (
        fingerprint(final) != fingerprint(final.with_name("lora-ema.safetensors"))
        and final.with_name("lora-proj.safetensors").exists()
    )


@pytest.mark.parametrize(("words", "told"), [
    (["--block_lr_curves=double_blocks=sine"], "has no group for the number of a block"),
    (["--block_lr_curves=b(.)=sin"], "there is no curve 'sin'; did you mean 'sine'"),
    (["--layer_lrs=double_blocks"], "--layer_lrs is double_blocks"),
    (["--fp8_base", "--mixed_precision=bf16"], "--fp8_base holds weights in 8 bits"),
    (["--network_dim=4"], "unknown option --network_dim|--network_dim is an option of other scripts"),
])  # fmt: skip
def test_what_cannot_be(work: Work, words: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        cli.run("flux", TRAINABLE, [*argv(work, "out"), *words])


def test_the_script_shows_its_options() -> None:
    shown = subprocess.run(
        [sys.executable, ROOT / "examples/full_finetune/flux_train.py", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "--layer_lrs" in shown.stdout and "--network_dim" not in shown.stdout


def test_the_first_pattern_in_a_path_counts_and_rate_0_freezes() -> None:
    module = torch.nn.ModuleDict({"a": torch.nn.Linear(1, 1), "b": torch.nn.Linear(1, 1), "c": torch.nn.Linear(1, 1)})
    groups = rate_groups(module.named_parameters(), 0.1, parse_rates(r"^a\.=0,bias=0.5,b=0.2", "layer_lrs"), name="it")
    assert [(group["name"], group["lr"], len(group["params"])) for group in groups] == [
        ("it", 0.1, 1),
        ("it bias", 0.5, 2),
        ("it b", 0.2, 1),
    ]
    assert not module["a"].weight.requires_grad and not module["a"].bias.requires_grad


def test_numbered_blocks_follow_a_curve_and_patterns_win() -> None:
    module = torch.nn.ModuleDict(
        {name: torch.nn.ModuleList(torch.nn.Linear(1, 1) for _ in range(3)) for name in ("a", "b")}
        | {"out": torch.nn.Linear(1, 1)}
    )
    rates = parse_rates(r"^b\.2\.bias=7", "layer_lrs")
    curves = parse_block_curves(r"a\.(\d+)=linear+0.25,b\.(\d+)=0.5", "block_lr_curves")
    groups = rate_groups(module.named_parameters(), 4.0, rates, curves, name="it")
    assert [(group["name"], group["lr"], len(group["params"])) for group in groups] == [
        ("it", 4.0, 2), ("it_block0", 1.0, 2), ("it_block1", 3.0, 2), ("it_block2", 5.0, 2),
        *((f"it_block{block}", 2.0, 1 if block == 5 else 2) for block in (3, 4, 5)), (r"it ^b\.2\.bias", 7.0, 1),
    ]  # fmt: skip
    frozen = rate_groups(module.named_parameters(), 4.0, (), parse_block_curves(r"a\.(\d+)=linear", "x"), name="it")
    assert len(frozen) == 3 and not module["a"][0].weight.requires_grad and module["a"][1].weight.requires_grad


def test_a_model_learns_along_a_curve(work: Work) -> None:
    final = train(work, "out", r"--block_lr_curves=single_blocks\.(\d+)\.=linear", "--max_train_steps=1")
    before, after = load_safetensors(work.tiny.flux), load_safetensors(final)
    step = {name: (after[name].float() - tensor.float()).abs().max().item() for name, tensor in before.items()}
    blocks = [max(size for name, size in step.items() if name.startswith(f"single_blocks.{i}.")) for i in (0, 1)]
    assert blocks == [0, pytest.approx(1e-3, rel=0.2)]
