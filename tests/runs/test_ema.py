"""The moving average of the weights (--ema) through the command line: its values, its files, and nothing else
changes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from library.core.errors import ConfigError
from library.safetensors_utils import load_safetensors
from library.training.hooks.ema import decay_at
from library.training.optimizers import switches_weights
from library.training.option_groups import EmaOptions
from library.training.run import Run
from tests.runs.conftest import Work, fingerprint, read_parts
from tests.runs.families import Tinies, refused_run
from tests.runs.test_exactness import Stopped, stop_after
from tests.runs.test_no_side_effects import AveragingSGD

EVERY = ["--save_every_n_steps=1"]


def files(work: Work, out: str, ending: str = "") -> list[dict[str, torch.Tensor]]:
    return [load_safetensors(work.folder / out / f"lora-step{step:08d}{ending}.safetensors") for step in range(1, 8)]


@pytest.mark.parametrize(("words", "how"), [
    (["--ema_decay=0.8"], {}), (["--ema_decay=0.9", "--ema_power=0.5"], {"power": 0.5}),
    (["--ema_decay=0.5", "--ema_every_n_steps=2", "--ema_start_step=2"], {"every": 2, "start": 2}),
])  # fmt: skip
def test_the_average_follows_the_weights(work: Work, words: list[str], how: dict) -> None:
    """Computed from the files of every step, by hand. The weights themselves are those of a run without --ema."""
    decay, start = float(words[0].partition("=")[2]), how.get("start", 0)
    plain = work.train("plain")
    final = work.train("out", "--ema", *words, *EVERY)
    assert read_parts(final)[1] == read_parts(plain)[1]
    steps, averages = files(work, "out"), files(work, "out", "-ema")
    wanted = None
    if start == 0:  # the start weights: up is zero, down is the drawn one, which no file holds
        up = {key: torch.zeros_like(tensor) for key, tensor in steps[0].items() if "lora_up" in key}
        wanted, updates = up, 0
    for number, (weights, average) in enumerate(zip(steps, averages, strict=True), 1):
        if start and number <= start:
            wanted, updates = dict(weights), 0
        elif (number - start) % how.get("every", 1) == 0:
            share = decay if "power" not in how else min(decay, 1 - (updates + 1) ** -how["power"])
            wanted = {key: share * tensor + (1 - share) * weights[key] for key, tensor in wanted.items()}
            updates += 1
        for key, tensor in wanted.items():
            if not key.endswith("alpha"):
                torch.testing.assert_close(average[key], tensor, rtol=1e-5, atol=1e-7)
    assert fingerprint(work.folder / "out" / "lora-ema.safetensors") != fingerprint(final)
    metadata = read_parts(work.folder / "out" / "lora-ema.safetensors")[0]
    assert float(metadata["ss_ema_decay"]) == decay
    assert metadata["ss_ema_updates"] == str(updates)
    early = read_parts(work.folder / "out" / "lora-step00000001.safetensors")[0]
    assert early["ss_ema_updates"] == ("0" if start else "1") != metadata["ss_ema_updates"]


@pytest.mark.parametrize("more", [[], ["--ema_on_cpu", "--ema_power=0.75"], ["--ema_every_n_steps=2"]])
def test_a_resumed_run_has_the_same_average(work: Work, more: list[str]) -> None:
    options = ["--ema", "--ema_decay=0.7", *more]
    whole = work.train("whole", *options)
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(Stopped):
            work.train("parts", *options, "--save_every_n_steps=3", "--save_state")
    resumed = work.train("parts", *options, f"--resume={work.folder / 'parts' / 'lora-step00000003-state'}")
    for name in ("lora", "lora-ema"):
        assert fingerprint(resumed.with_name(f"{name}.safetensors")) == fingerprint(
            whole.with_name(f"{name}.safetensors")
        )


def test_samples_and_validation_use_the_average(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    original = Run.weights_for_eval

    def noting(self, averaged=True):
        asked.append(averaged)
        return original(self, averaged)

    monkeypatch.setattr(Run, "weights_for_eval", noting)
    prompts = work.folder / "prompts.txt"
    prompts.write_text("a dog --w 32 --h 32 --s 1 --d 1\n", encoding="utf-8")
    sampling = [f"--sample_prompts={prompts}", "--sample_every_n_steps=7"]
    final = work.train("out", "--ema", "--ema_decay=0.9", *sampling)
    assert asked.count(False) == 1 and asked.count(True) >= 2  # the file; its companion and the samples
    with_average = [path.read_bytes() for path in sorted((final.parent / "sample").glob("*.png"))]
    other = work.train("other", *sampling)
    assert read_parts(other)[1] == read_parts(final)[1]
    assert with_average != [path.read_bytes() for path in sorted((other.parent / "sample").glob("*.png"))]


def test_outdated_companions_go_and_none_is_overwritten(work: Work) -> None:
    final = work.train("out", "--ema", *EVERY, "--save_last_n_steps=2")
    steps = {path.name for path in final.parent.glob("lora-step*")}
    assert (
        {name.replace("-ema", "") for name in steps} == {name for name in steps if "-ema" not in name}
        and len(steps) % 2 == 0
        and len(steps) < 14
    )
    final.unlink()
    for path in final.parent.glob("lora-step*"):
        path.unlink()
    from library.training import cli

    with pytest.raises(ConfigError, match="lora-ema.safetensors"):
        cli.run("flux", "network", work.argv("out", "--on_existing=refuse"))


@pytest.mark.parametrize("family", ["sd", "sdxl", "anima", "lumina"])
def test_other_families(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, family: str) -> None:
    work = Tinies(tmp_path_factory).work(family, tmp_path)
    final = work.train("out", "--ema", "--ema_decay=0.5", "--max_train_steps=3", *EVERY)
    steps = [load_safetensors(final.with_name(f"lora-step{step:08d}.safetensors")) for step in (1, 2, 3)]
    average = load_safetensors(final.with_name("lora-ema.safetensors"))
    for key in (key for key in average if "lora_up" in key):  # zero at the start
        wanted = 0.125 * steps[0][key] + 0.25 * steps[1][key] + 0.5 * steps[2][key]
        torch.testing.assert_close(average[key], wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("words", "told"), [
    (["--ema_decay=0.9"], "without --ema"), (["--ema", "--ema_decay=1"], "below 1"),
    (["--ema", "--ema_every_n_steps=0"], "1 or more"),
    (["--ema", "--ema_power=2"], "up to 1"), (["--ema", "--ema_start_step=-1"], "0 or more"),
])  # fmt: skip
def test_bad_settings(work: Work, words: list[str], told: str) -> None:
    from library.training import cli

    with pytest.raises(ConfigError, match=told):
        cli.run("flux", "network", work.argv("out", *words))


def test_the_share_grows_to_its_limit() -> None:
    options = EmaOptions(ema=True, ema_decay=0.9, ema_power=0.75)
    assert (
        decay_at(options, 0) == 0
        and decay_at(options, 1) == pytest.approx(1 - 2**-0.75)
        and decay_at(options, 10**6) == 0.9
    )


def test_fp16_wraps_the_optimizer_and_is_no_schedule_free_one(
    work: Work, scaled: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """accelerate's wrapper has train and eval around every optimizer; only what it wraps says whether weights are
    switched."""
    copies = []
    original = Run.weights_for_eval
    monkeypatch.setattr(
        Run,
        "weights_for_eval",
        lambda run, averaged=True: copies.append(switches_weights(run.optimizer)) or original(run, averaged),
    )
    options = ["--mixed_precision=fp16", "--max_train_steps=5"]
    plain = work.train("plain", *options)
    final = work.train("out", *options, "--ema", "--ema_decay=0.5")
    assert scaled and any(scaled)
    assert copies and not any(copies)
    assert read_parts(final)[1] == read_parts(plain)[1]
    assert read_parts(final.with_name("lora-ema.safetensors"))[1] != read_parts(final)[1]


def test_the_wrapper_hands_on_a_schedule_free_optimizer(work: Work, scaled: list[bool]) -> None:
    optimizer = f"--optimizer_type={AveragingSGD.__module__}.AveragingSGD"
    options = ["--mixed_precision=fp16", "--max_train_steps=4", optimizer]
    seldom = work.train("seldom", *options)
    assert not all(scaled)
    often = work.train("often", *options, "--save_every_n_steps=1")
    assert read_parts(seldom)[1] == read_parts(often)[1]


def test_a_schedule_free_optimizer_is_refused_before_models_are_loaded(
    work: Work, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    words = work.argv("out", "--ema", f"--optimizer_type={AveragingSGD.__module__}.AveragingSGD")
    assert "--ema is set with --optimizer_type" in refused_run("flux", words, monkeypatch, capsys)
