"""examples/self_flow as its page says: a hook on the command line, on every flow family."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch

from examples.self_flow.self_flow import SelfFlow, SelfFlowOptions
from library.core.errors import ConfigError
from library.safetensors_utils import load_safetensors
from library.training import cli
from library.training.loop import fit
from tests.runs.conftest import Stopped, Work, fingerprint, read_parts, stop_after
from tests.runs.families import Tinies

HOOK = [
    "--hook=examples.self_flow.self_flow:SelfFlow",
    "--student_feature_layer=0",
    "--teacher_feature_layer=1",
    "--self_flow_ema_decay=0.5",
]


@pytest.fixture(params=["flux", "anima"])
def work(request: pytest.FixtureRequest, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Work:
    return Tinies(tmp_path_factory).work(request.param, tmp_path)


def test_it_resumes_exactly_with_its_head_and_its_teacher(work: Work) -> None:
    whole = work.train("whole", *HOOK, "--max_train_steps=4")
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(Stopped):
            work.train("parts", *HOOK, "--max_train_steps=4", "--save_every_n_steps=2", "--save_state")
    resumed = work.train("parts", *HOOK, "--max_train_steps=4", "--resume=latest")
    for name in ("lora", "lora-ema", "lora-proj"):
        assert fingerprint(resumed.with_name(f"{name}.safetensors")) == fingerprint(
            whole.with_name(f"{name}.safetensors")
        )
    assert read_parts(whole)[1] != read_parts(whole.with_name("lora-ema.safetensors"))[1]
    metadata = read_parts(whole)[0]
    assert metadata["ss_self_flow_gamma"] == "0.8" and metadata["ss_self_flow_teacher_layer"] == "1"
    assert set(load_safetensors(whole.with_name("lora-proj.safetensors"))) == {
        "0.weight",
        "0.bias",
        "2.weight",
        "2.bias",
    }


def test_the_parts_of_a_step(work: Work) -> None:
    """Losses add up, the head learns in a group of its own, the teacher is as before, and both views come of one
    noise."""
    run = work.trainer("out", *HOOK, "--mask_ratio=0.5").prepare()
    hook = run.hooks.find(SelfFlow)
    assert run.optimizer.param_groups[-1]["name"] == "head"
    hook.on_train_start(run)
    batch = next(iter(run.data.batches(1, 0))).to(run.runtime.device)
    before = {name: tensor.clone() for name, tensor in hook.teacher.tensors.items()}
    output = run.step(batch)
    total = output.logs["loss/gen"] + 0.8 * output.logs["loss/rep"]
    assert (
        float(output.loss_sum / len(batch)) == pytest.approx(float(total), rel=1e-5)
        and -1 <= output.logs["loss/rep"] <= 1
    )
    run.step.trainable.modules()["network"].zero_grad()
    output.loss.backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in hook.head.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in hook.teacher.tensors.items())

    draws = run.step.draws_of(batch, None)
    latents = run.step.latents_of(batch)
    student, teacher = hook.views(run.step, latents, draws)
    assert student.sigmas.shape == (len(batch), latents.shape[-1] * latents.shape[-2] // 4)
    for row, cleaner in zip(student.sigmas, teacher.sigmas, strict=True):
        levels = row.unique()
        assert len(levels) == 2 and levels.min() == cleaner
    assert torch.equal(student.target, teacher.target) and torch.equal(student.noise, teacher.noise)


def test_the_teacher_may_be_told_the_noisier_time(work: Work) -> None:
    """In steps that are drawn, for tokens that the student sees at the cleaner level; what it sees stays the same."""
    run = work.trainer("out", *HOOK, "--mask_ratio=0.5").prepare()
    hook, options = run.hooks.find(SelfFlow), SelfFlowOptions(mask_ratio=0.5, self_flow_teacher_coupling_prob=1.0)
    batch = next(iter(run.data.batches(1, 0)))
    latents, draws = run.step.latents_of(batch), run.step.draws_of(batch, None)
    student, plain = hook.views(run.step, latents, draws)
    hook.opts = options
    _, told = hook.views(run.step, latents, draws)
    assert torch.equal(told.noisy_latents, plain.noisy_latents)
    for of_student, of_teacher, cleaner in zip(student.sigmas, told.sigmas, plain.sigmas, strict=True):
        wanted = torch.where(of_student == cleaner, of_student.max(), cleaner)
        assert torch.equal(of_teacher, wanted) and torch.equal(told.timesteps, told.sigmas * 1000)
    hook.opts = dataclasses.replace(options, self_flow_teacher_mismatch_ratio=0.0)
    assert (hook.views(run.step, latents, draws)[1].sigmas == plain.sigmas[:, None]).all()
    hook.opts = options
    hook.on_train_start(run)
    assert math.isfinite(run.step(batch).loss_sum)


@pytest.mark.parametrize(("decay", "shares"), [
    ("constant", [0.5, 0.5, 0.5]), ("linear", [0.5, 0.25, 0]), ("cosine", [0.5, 0.25, 0]), ("rex", [0.5, 0.25 / 0.55, 0]),
])  # fmt: skip
def test_the_share_of_such_steps_falls(decay: str, shares: list[float]) -> None:
    hook = SelfFlow(
        SelfFlowOptions(self_flow_teacher_coupling_prob=0.5, self_flow_teacher_coupling_decay=decay)
    )
    hook.decay_steps = 8
    assert [hook.coupling(step) for step in (0, 4, 8)] == pytest.approx(shares)
    assert hook.coupling(20) == pytest.approx(shares[-1])


def test_the_weight_grows_and_gamma_0_is_the_plain_run(work: Work) -> None:
    hook = SelfFlow(SelfFlowOptions(self_flow_gamma=0.5, self_flow_gamma_warmup_steps=4))
    assert [hook.gamma(step) for step in (0, 2, 4, 9)] == [0, 0.25, 0.5, 0.5]
    plain, without = (
        work.train("plain", "--max_train_steps=2"),
        work.train("out", *HOOK, "--self_flow_gamma=0", "--max_train_steps=2"),
    )
    assert read_parts(plain)[1] == read_parts(without)[1]


def test_the_teacher_follows_the_network(work: Work) -> None:
    run = work.trainer("out", *HOOK, "--max_train_steps=1").prepare()
    before = {name: p.detach().clone() for name, p in run.hooks.find(SelfFlow).teacher.parameters().items()}
    fit(run)
    teacher = run.hooks.find(SelfFlow).teacher
    for name, parameter in teacher.parameters().items():
        torch.testing.assert_close(teacher.tensors[name], (before[name] + parameter.detach()) / 2)
    assert math.isfinite(sum(float(tensor.sum()) for tensor in teacher.tensors.values()))


@pytest.mark.parametrize(("words", "told"), [
    (["--self_flow_teacher_coupling_prob=2"], "needed: a number from 0 to 1"),
    (["--self_flow_teacher_coupling_decay=fast"], "needed: one of constant, cosine, linear, rex"),
    (["--mask_ratio=0.6"], "--mask_ratio is 0.6"), (["--ema"], "--self_flow keeps an average of its own"),
    (["--teacher_feature_layer=0"], "the teacher's must be the later one"),
    (["--self_flow_gamma=-1"], "--self_flow_gamma is -1"),
])  # fmt: skip
def test_what_cannot_be(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, words: list[str], told: str) -> None:
    work = Tinies(tmp_path_factory).work("flux", tmp_path)
    with pytest.raises(ConfigError, match=told):
        cli.run("flux", "network", work.argv("out", *HOOK, *words))


def test_families_without_features_are_refused(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    work = Tinies(tmp_path_factory).work("sd", tmp_path)
    with pytest.raises(ConfigError, match="takes a time per token; sd does not"):
        cli.run("sd", "network", work.argv("out", *HOOK))
