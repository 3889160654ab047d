"""Self-Flow, SRA and Leap through the command line: their losses fall, files have no foreign keys, resumed runs are the
same, and a step of Self-Flow is what a second computation gives."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path

import pytest
import torch

from library.core.errors import ConfigError
from library.safetensors_utils import load_safetensors
from library.training import cli
from library.training.alignment.self_flow import SelfFlow
from library.training.loop import fit
from library.training.run import Run
from library.wan_expert_utils import TwoExperts
from tests.runs.conftest import Stopped, Work, fingerprint, stop_after
from tests.runs.families import Tinies, refused_run

SELF_FLOW = ("--self_flow", "--student_feature_layer=0", "--teacher_feature_layer=1", "--self_flow_ema_decay=0.5")
SRA = ("--sra_enabled", "--sra_decay=none", "--sra_weight=1")
LEAP = ("--leap_enabled", "--leap_ratio=1")
WAYS = {
    "self_flow": (SELF_FLOW, "loss/rep"), "sra": (SRA, "loss/sra"),
    **{name: ((*LEAP, f"--leap_variant={name}"), "loss/leap") for name in ("original", "bridge", "sparse", "lagrange")},
}  # fmt: skip
UNWEIGHED = {"anima": ("--weighting_scheme=none",), "sd3": ("--weighting_scheme=none",)}


@pytest.fixture(scope="module")
def tinies(tmp_path_factory: pytest.TempPathFactory) -> Tinies:
    return Tinies(tmp_path_factory)


def column(final: Path, name: str) -> list[float]:
    with open(final.with_name("lora-loss.csv"), encoding="utf-8") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


class Noted:
    """A hook that keeps a value of every step."""

    def __init__(self, name: str) -> None:
        self.name, self.values = name, []

    def __call__(self, losses) -> None:
        self.values += [entry.logs[self.name] for entry in losses if self.name in entry.logs]


@pytest.mark.parametrize("family", ["flux", "anima", "wan"])
@pytest.mark.parametrize("way", [
    "self_flow", "sra", "original", *(pytest.param(name, marks=pytest.mark.full) for name in ("bridge", "lagrange")), "sparse",
])  # fmt: skip
def test_the_loss_falls_and_the_file_is_that_of_an_adapter(tinies: Tinies, tmp_path: Path, family: str, way: str) -> None:
    """One batch again and again, with a rate at which something is learned."""
    from library.training.hooks.losses import LossReader

    words, name = WAYS[way]
    work = tinies.work(family, tmp_path)
    more = ("--max_train_steps=30", "--learning_rate=5e-3", "--network_dim=8", "--timestep_sampling=uniform")
    run = work.prepare("out", *words, *UNWEIGHED.get(family, ()), *more)
    noted = Noted(name)
    run.hooks.find(LossReader).listen(noted)
    fit(run)
    assert len(noted.values) == 30
    assert sum(noted.values[-10:]) < 0.97 * sum(noted.values[:10]) if name != "loss/rep" else (
        sum(noted.values[-10:]) < sum(noted.values[:10])
    )
    plain = work.prepare("plain", "--max_train_steps=1")
    assert set(load_safetensors(work.folder / "out" / "lora.safetensors")) == set(plain.trainable.network.state_dict())


@pytest.mark.parametrize("way", ["sra", "original", "sparse"])
def test_a_resumed_run_is_the_same(tinies: Tinies, tmp_path: Path, way: str) -> None:
    work, words = tinies.work("flux", tmp_path), (*WAYS[way][0], "--max_train_steps=4")
    whole = work.train("whole", *words)
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(Stopped):
            work.train("parts", *words, "--save_every_n_steps=2", "--save_state")
    assert fingerprint(work.train("parts", *words, "--resume=latest")) == fingerprint(whole)
    assert [path.name for path in whole.parent.glob("*.safetensors")] == ["lora.safetensors"]


def test_a_step_of_self_flow_computed_again_on_flux(tinies: Tinies, tmp_path: Path) -> None:
    """From the equations alone: two levels for tokens, teacher at the cleaner one, cosine of head and teacher."""
    from library.flux_train_utils import predict_velocity

    run = tinies.work("flux", tmp_path).prepare("out", *SELF_FLOW, "--mask_ratio=0.5", "--network_args", "rank_dropout=0")
    hook = run.hooks.find(SelfFlow)
    hook.on_train_start(run)
    network, denoiser, step = run.trainable.network, run.models.denoiser, run.step
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    batch = next(iter(run.data.batches(1)))
    found = step(batch)

    draws, latents = step.draws_of(batch, None), step.latents_of(batch)  # [B, 16, h, w]
    b, _, h, w = latents.shape
    noise = draws.normal("noise", latents.shape[1:])
    t, s = (step.timestep_sampler.sample(tuple(latents.shape), d) for d in (draws, draws.apart("self flow")))
    masked = draws.uniform("self flow mask", (h // 2 * w // 2,)) < 0.5
    tau = torch.stack([torch.where(m, s[i], t[i]) for i, m in enumerate(masked)])  # [B, L]
    conditioning, guidance = step.conditioning_of(batch), run.family.opts.guidance_scale

    def noised(levels: torch.Tensor) -> torch.Tensor:  # [B, L]
        squares = levels.view(b, h // 2, 1, w // 2, 1).expand(b, h // 2, 2, w // 2, 2).reshape(b, 1, h, w)
        return (1 - squares) * latents + squares * noise

    student = {name: p.detach().clone() for name, p in network.named_parameters()}
    cleaner = torch.minimum(t, s)
    with torch.no_grad():
        for name, p in network.named_parameters():
            p.copy_(hook.teacher.tensors[f"network.{name}"])
        x = noised(cleaner[:, None].expand_as(tau))
        _, z = predict_velocity(denoiser, x, cleaner * 1000, conditioning, guidance=guidance, feature_layer=1)
        for name, p in network.named_parameters():
            p.copy_(student[name])
        v, f = predict_velocity(denoiser, noised(tau), tau * 1000, conditioning, guidance=guidance, feature_layer=0)
        head = hook.head.state_dict()
        told = torch.nn.functional.gelu(f @ head["0.weight"].T + head["0.bias"]) @ head["2.weight"].T + head["2.bias"]
        cosine = (told * z).sum(-1) / (told.norm(dim=-1) * z.norm(dim=-1))
        wanted = ((v - (noise - latents)) ** 2).mean() - 0.8 * cosine.mean()
    assert float(found.loss_sum / b) == pytest.approx(float(wanted), rel=2e-4)
    assert float(found.logs["loss/rep"]) == pytest.approx(-float(cosine.mean()), rel=2e-4)


def test_teacher_and_head_of_an_earlier_run_are_read_back(tinies: Tinies, tmp_path: Path) -> None:
    work = tinies.work("flux", tmp_path)
    first = work.train("first", *SELF_FLOW, "--max_train_steps=2", "--self_flow_head=silu")
    files = {name: first.with_name(f"lora-{name}.safetensors") for name in ("ema", "proj")}
    words = (*SELF_FLOW, f"--network_weights={first}", *(f"--network_weights_{name}={path}" for name, path in files.items()))
    run = work.prepare("second", *words, "--self_flow_head=silu")
    hook = run.hooks.find(SelfFlow)
    hook.on_train_start(run)
    kept = load_safetensors(files["ema"])
    for name, tensor in hook.teacher.tensors.items():
        if f"{name.removeprefix('network.')}" in kept:
            torch.testing.assert_close(tensor, kept[name.removeprefix("network.")])
    weights = load_safetensors(first)
    assert all(torch.equal(p, weights[name]) for name, p in run.trainable.network.named_parameters())
    assert all(torch.equal(p, load_safetensors(files["proj"])[name]) for name, p in hook.head.state_dict().items())
    with pytest.raises(ConfigError, match="which is no head gelu"):
        cli.run("flux", "network", work.argv("third", *words))


def test_files_that_are_no_teacher_and_no_head_are_refused_before_models_are_loaded(tinies: Tinies, tmp_path: Path) -> None:
    work = tinies.work("flux", tmp_path)
    first = work.train("first", *SELF_FLOW, "--max_train_steps=1")
    text = work.folder / "text.toml"
    text.write_text("a = 1", encoding="utf-8")

    def told(*words: str, trainable: str = "network") -> str:
        with pytest.raises(ConfigError) as error, pytest.MonkeyPatch.context() as patch:
            patch.setattr("library.training.wiring.flux.FluxFamily.load_denoiser", None)
            of_network = ("--network_",) if trainable == "full" else ()
            argv = [word for word in work.argv("out", *SELF_FLOW) if not word.startswith(of_network)]
            cli.run("flux", trainable, [*argv, *words])
        return str(error.value)

    both = told(f"--network_weights={first}", f"--network_weights_ema={text}", f"--network_weights_proj={text}")
    assert "--network_weights_ema: " in both and "--network_weights_proj: " in both
    head = first.with_name("lora-proj.safetensors")
    assert "none of the layers" in told(f"--network_weights={first}", f"--network_weights_ema={head}")
    assert "no head gelu" in told(f"--network_weights_proj={first}")
    ema = first.with_name("lora-ema.safetensors")
    assert "(--resume)" in told(f"--network_weights_ema={ema}", trainable="full")


@pytest.mark.parametrize(("words", "told"), [
    ((*SELF_FLOW, *SRA), "--self_flow, --sra_enabled all replace process_batch"), ((*SELF_FLOW, "--num_timestep_buckets=4"), "two noise levels"),
    ((*LEAP, "--loss_type=huber"), "use l2"), ((*SRA, "--sra_block=9"), "--sra_block is 9"),
    ((*LEAP, "--loss_weighting=cosmap"), "leave the weight out"), ((*LEAP, "--infonoise_enabled"), "step of its own"),
    ((*LEAP, "--max_timestep=500", "--leap_variant=lagrange"), "leave 0 to 500 of 1000; use another variant"),
    ((*LEAP, "--leap_min_gap=0.3", "--min_timestep=500", "--max_timestep=600"), "0.1 or less"),
    ((*LEAP, "--leap_variant=sparse", "--leap_min_gap=0.2", "--strict"), "--leap_min_gap: has no effect with --leap_variant"),
    (("--self_flow", "--network_weights_ema=none.safetensors"), "which is not there"),
])  # fmt: skip
def test_what_cannot_be(tinies: Tinies, tmp_path: Path, words: tuple[str, ...], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        cli.run("flux", "network", tinies.work("flux", tmp_path).argv("out", *words))


@pytest.mark.parametrize("words", [SELF_FLOW[:1], SRA[:1], LEAP[:1]])
def test_families_with_a_table_are_refused(
    tinies: Tinies, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, words: tuple[str, ...]
) -> None:
    told = refused_run("sd", tinies.work("sd", tmp_path).argv("out", *words), monkeypatch, capsys)
    assert "flow model" in told


def test_sra_goes_with_infonoise_and_is_gone_when_its_weight_is(tinies: Tinies, tmp_path: Path) -> None:
    work: Work = tinies.work("flux", tmp_path)
    work.train("both", *SRA, "--infonoise_enabled", "--max_train_steps=2")
    off = work.train("off", "--sra_enabled", "--sra_weight=0", "--max_train_steps=2")
    assert fingerprint(off) == fingerprint(work.train("plain", "--max_train_steps=2"))


def test_settings_of_what_is_off_are_told(tinies: Tinies, tmp_path: Path) -> None:
    words = ("--sra_weight=0.5", "--leap_ratio=0.1", "--mask_ratio=0.1", "--infonoise_K=32", "--strict")
    with pytest.raises(ConfigError) as told:
        tinies.work("flux", tmp_path).prepare("out", *words)
    words = (
        "--self_flow", "--self_flow_teacher_mismatch_ratio=0.5", "--self_flow_gamma=0", "--mask_ratio=0.1", "--strict"
    )  # fmt: skip
    with pytest.raises(ConfigError, match="coupling_prob 0, no share of the steps(.|\\n)*--self_flow_gamma 0"):
        tinies.work("flux", tmp_path).prepare("out", *words)
    for words in (("--leap_enabled", "--leap_ratio=0"), ("--sra_enabled", "--sra_weight=0")):
        with pytest.raises(ConfigError, match=f"{words[0]}: has no effect with"):
            tinies.work("flux", tmp_path).prepare("out", *words, "--strict")
    for option, switch in (("sra_weight", "sra_enabled"), ("leap_ratio", "leap_enabled"), ("mask_ratio", "self_flow"),
                           ("infonoise_K", "infonoise_enabled")):  # fmt: skip
        assert f"--{option}: has no effect without --{switch}" in str(told.value)


def test_a_family_without_a_time_per_token_has_the_others(tinies: Tinies, tmp_path: Path) -> None:
    work = tinies.work("chroma", tmp_path)
    with pytest.raises(ConfigError, match="takes a time per token; chroma does not"):
        work.prepare("out", *SELF_FLOW)
    for way in ("sra", "original"):
        work.train(way, *WAYS[way][0], "--max_train_steps=1")


def test_blocks_are_counted_without_refiners(tinies: Tinies, tmp_path: Path) -> None:
    """Layers that `feature_layer` cannot name are no blocks of these options, whatever else is compiled with them."""
    work = tinies.work("lumina", tmp_path)
    run = work.prepare("out", "--self_flow")
    denoiser = run.models.denoiser
    assert len(denoiser.repeated_blocks()) > len(denoiser.layers) == 3
    assert run.hooks.find(SelfFlow).layers == (0, 2)
    with pytest.raises(ConfigError, match="has 3 blocks, 0 to 2"):
        work.prepare("far", *SRA, "--sra_block=3")


def test_the_levels_of_sparse_steps_lie_in_the_range_of_the_run(tinies: Tinies, tmp_path: Path) -> None:
    words = (*WAYS["sparse"][0], "--min_timestep=500", "--max_timestep=800")
    run, asked = tinies.work("flux", tmp_path).prepare("out", *words), []
    predict = run.step.predict
    run.step.predict = lambda sample, *given, **more: asked.append(sample.timesteps) or predict(sample, *given, **more)
    run.step(next(iter(run.data.batches(1))))
    first, second, third = (times.tolist() for times in asked)
    assert all(700 <= t <= 800 for t in first) and all(600 <= t <= 700 for t in second) and all(500 <= t <= 600 for t in third)


def begun(work: Work, *words: str) -> Run:
    """A run before its first step, whose adapter has learned something."""
    run = work.prepare("out", *words)
    for hook in run.hooks:
        hook.on_train_start(run)
    with torch.no_grad():
        for name, parameter in run.trainable.network.named_parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    run.trainable.network.train()
    return run


@pytest.mark.parametrize(("family", "way"), [
    ("flux", "self_flow"), ("wan", "original"),
    *(pytest.param("wan", way, marks=pytest.mark.full) for way in ("sparse", "lagrange")),
])  # fmt: skip
def test_what_is_computed_again_has_the_ranks_of_its_own_forward(
    tinies: Tinies, tmp_path: Path, family: str, way: str
) -> None:
    """Ranks by noise level, several forwards in a step: gradients had those of the last one, or the step failed."""
    found = []
    for more in ((), ("--gradient_checkpointing",)):
        run = begun(tinies.work(family, tmp_path), *WAYS[way][0], "--network_module=networks.tlora", *more)
        run.step(next(iter(run.data.batches(1)))).loss.backward()
        found.append({name: p.grad for name, p in run.trainable.network.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and len(found[0]) > 4
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("coupling", ["0", "1"])
def test_two_experts_do_not_change_places_within_a_step(
    tinies: Tinies, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, coupling: str
) -> None:
    work, words = tinies.work("wan22", tmp_path), ("--timestep_sampling=uniform", "--mask_ratio=0.5")
    with pytest.raises(ConfigError, match="only one of them learns in a step"):
        work.prepare("out", *LEAP)
    run = begun(work, *SELF_FLOW, *words, f"--self_flow_teacher_coupling_prob={coupling}")
    sides: list[bool] = []
    use = TwoExperts.use

    def watched(self: TwoExperts, *, high_noise: bool) -> None:
        sides.append(high_noise)
        use(self, high_noise=high_noise)

    monkeypatch.setattr(TwoExperts, "use", watched)
    batch, found = next(iter(run.data.batches(1))), set()
    for number in range(25):
        sides.clear()
        run.step(dataclasses.replace(batch, request=dataclasses.replace(batch.request, step=number)))
        assert len(set(sides)) == 1, number
        found.update(sides)
    assert found == {True, False}


def test_weights_of_samples_hold_for_what_is_told_of_the_teacher(tinies: Tinies, tmp_path: Path) -> None:
    run = begun(tinies.work("flux", tmp_path), *SELF_FLOW)
    batch = next(iter(run.data.batches(1)))
    whole, half = (
        run.step(dataclasses.replace(batch, loss_weights=torch.full_like(batch.loss_weights, weight))).loss_sum
        for weight in (1.0, 0.5)
    )
    assert float(half) == pytest.approx(float(whole) / 2, rel=1e-5)


@pytest.mark.parametrize("family", [
    "flux", "wan", *(pytest.param(name, marks=pytest.mark.full) for name in (
        "chroma", "sd3", "lumina", "anima", "hunyuan_image", "hunyuan_video", "framepack",
    )),
])  # fmt: skip
def test_blocks_that_a_model_does_not_have_are_told_before_it_is_loaded(
    tinies: Tinies, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, family: str
) -> None:
    work = tinies.work(family, tmp_path)
    told = refused_run(family, work.argv("out", *SRA, "--sra_block=99"), monkeypatch, capsys)
    assert "--sra_block is 99; the model has" in told
    if family != "chroma":
        words = ("--self_flow", "--teacher_feature_layer=99")
        assert "must be the later one" in refused_run(family, work.argv("out", *words), monkeypatch, capsys)
    run = work.prepare("out")
    assert run.family.num_blocks == run.models.denoiser.depth


def test_samples_that_keep_what_the_untouched_model_predicts_are_refused_at_once_where_there_is_none(
    tinies: Tinies, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    work = tinies.work("flux", tmp_path)
    data = work.dataset(subset_keys="custom_attributes = {diff_output_preservation = true}")
    told = refused_run("flux", work.argv("out", *LEAP, dataset=data), monkeypatch, capsys)
    assert "diff_output_preservation in the dataset configuration needs a prediction at one noise level" in told
    words = [word for word in work.argv("whole", dataset=data) if not word.startswith("--network_")]
    with pytest.raises(ConfigError, match="not kept where the whole model learns"):
        cli.run("flux", "full", words)
    work.train("self_flow", *SELF_FLOW, "--max_train_steps=1", dataset=data)
