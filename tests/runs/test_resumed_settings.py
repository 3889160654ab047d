"""A run that goes on from a state with other settings: the new ones hold from its first step, are told and recorded;
what cannot change is refused."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from library.training import loop, optimizers
from library.training.state_files import SUMS_FILE
from tests.runs.conftest import Work, fingerprint, read_parts
from tests.runs.families import refused_run, without

BRIEF = [
    "--t5xxl_max_token_length=32",
    "--network_train_unet_only",
    "--network_args",
    "train_blocks=single",
    "--max_train_steps=6",
]
SAVING = ["--save_every_n_steps=3", "--save_state"]
COSINE = ["--lr_scheduler=cosine_with_restarts", "--lr_scheduler_num_cycles=2"]


@pytest.fixture
def rates(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The settings of the first optimizer group at every step."""
    seen: list[dict[str, Any]] = []
    original = loop.update

    def noting(run):
        group = run.optimizer.param_groups[0]
        seen.append(
            {"step": run.progress.global_step + 1, **{key: value for key, value in group.items() if key != "params"}}
        )
        original(run)

    monkeypatch.setattr(loop, "update", noting)
    return seen


def interrupted(work: Work, *options: str, old: bool = False) -> Path:
    """The state after step 3 of a run of 6; `old`: as earlier versions wrote it."""
    work.train("first", *BRIEF, *SAVING, *options)
    state = work.folder / "first" / "lora-step00000003-state"
    if old:
        make_old(state)
    return state


def make_old(state: Path) -> None:
    for name in ("settings.json", SUMS_FILE):
        (state / name).unlink()


def go_on(work: Work, state: Path, *options: str) -> Path:
    return work.train("second", *BRIEF, f"--resume={state}", *options)


@pytest.mark.parametrize("old", [False, True], ids=["recorded", "earlier version"])
def test_new_rates_and_arguments_hold_from_the_first_step_on(
    work: Work, rates: list[dict[str, Any]], caplog: pytest.LogCaptureFixture, old: bool
) -> None:
    state = interrupted(work, "--optimizer_args", "weight_decay=0.1", old=old)
    rates.clear()
    with caplog.at_level(logging.INFO):
        file = go_on(
            work,
            state,
            "--learning_rate=1e-3",
            "--console_log_level=INFO",
            "--optimizer_args",
            "weight_decay=0.3",
            "betas=0.8,0.9",
        )
    assert [entry["step"] for entry in rates] == [4, 5, 6]
    assert all(
        (entry["lr"], entry["weight_decay"], tuple(entry["betas"])) == (1e-3, 0.3, (0.8, 0.9)) for entry in rates
    )
    told = [record.getMessage() for record in caplog.records if "settings that changed" in record.getMessage()]
    assert len(told) == 1 and "0.01 -> 0.001" in told[0] and "0.1 -> 0.3" in told[0] and "step 4" in told[0]
    metadata = read_parts(file)[0]
    assert metadata["ss_learning_rate"] == "0.001" and "weight_decay=0.3" in metadata["ss_optimizer"]
    history = json.loads(metadata["ss_resume_changes"])
    assert history[0]["step"] == 3 and [0.01, 0.001] in history[0]["changed"].values()


SCHEDULES = {
    "length": (COSINE, [*COSINE, "--max_train_steps=8"]),
    "a class": (["--lr_scheduler=linear"], ["--lr_scheduler_type=StepLR", "--lr_scheduler_args", "step_size=2", "gamma=0.5"]),
    "own rates to given ones": (
        ["--optimizer_type=AdaFactor"],
        ["--optimizer_type=AdaFactor", "--optimizer_args", "relative_step=False", "scale_parameter=False", "--lr_scheduler=linear"],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("name", "old"), [*((name, False) for name in SCHEDULES), ("length", True)])
def test_a_changed_schedule_goes_on_where_it_would_be(
    work: Work, rates: list[dict[str, Any]], name: str, old: bool
) -> None:
    """The rates of the remaining steps are those of a run that had the new schedule from the start."""
    before, after = SCHEDULES[name]
    state = interrupted(work, *before, old=old)
    rates.clear()
    work.train("whole", *BRIEF, *after)
    wanted = [entry["lr"] for entry in rates][3:]
    rates.clear()
    go_on(work, state, *after)
    assert [entry["lr"] for entry in rates] == wanted


@pytest.mark.parametrize(
    "options",
    [
        COSINE,
        ["--lr_scheduler_type=CosineAnnealingLR", "--lr_scheduler_args", "T_max=7"],
        ["--optimizer_type=AdaFactor"],
    ],
    ids=["curve", "class", "own rates"],
)
def test_a_state_of_an_earlier_version_goes_on_to_the_same_bytes(work: Work, options: list[str]) -> None:
    state = interrupted(work, *options, old=True)
    assert fingerprint(go_on(work, state, *options)) == fingerprint(work.folder / "first" / "lora.safetensors")


@pytest.mark.parametrize("old", [False, True], ids=["recorded", "earlier version"])
def test_weights_that_moved_one_by_one_go_on_so(work: Work, monkeypatch: pytest.MonkeyPatch, old: bool) -> None:
    with monkeypatch.context() as earlier:
        earlier.setattr(optimizers, "FUSED", ())
        state = interrupted(work, old=old)
    file = go_on(work, state)
    assert fingerprint(file) == fingerprint(work.folder / "first" / "lora.safetensors")
    assert "ss_resume_changes" not in read_parts(file)[0]


def test_rates_that_group_the_parameters_otherwise(work: Work, rates: list[dict[str, Any]]) -> None:
    """LoRA+ splits a group in two: every parameter keeps what the optimizer knows of it."""
    state = interrupted(work)
    kept: dict[int, float] = {}
    original = loop.update

    with pytest.MonkeyPatch.context() as patch:
        def noting(run):
            if not kept:
                for group in run.optimizer.param_groups:
                    kept.update({p.numel(): float(run.optimizer.state[p]["step"]) for p in group["params"]})
                assert len({group["lr"] for group in run.optimizer.param_groups}) == 2
                moments = {
                    id(p): run.optimizer.state[p]["exp_avg"].shape == p.shape
                    for g in run.optimizer.param_groups
                    for p in g["params"]
                }
                assert all(moments.values())
            original(run)

        patch.setattr(loop, "update", noting)
        go_on(work, state, "--network_args", "train_blocks=single", "loraplus_lr_ratio=4")
    assert set(kept.values()) == {3.0}


def test_a_part_that_was_not_trained_joins(work: Work) -> None:
    both = [option for option in BRIEF if "unet_only" not in option]
    work.train("first", *both, *SAVING, "--text_encoder_lr=0")
    state = work.folder / "first" / "lora-step00000003-state"
    file = work.train("second", *both, f"--resume={state}", "--text_encoder_lr=1e-3")
    tensors = {key: value for key, value in load_file(file).items() if "lora_te" in key and "lora_up" in key}
    assert tensors and any(float(value.abs().max()) > 0 for value in tensors.values())


def test_history_goes_on_in_later_states(work: Work) -> None:
    state = interrupted(work)
    work.train("second", *BRIEF, f"--resume={state}", "--learning_rate=1e-3", "--save_every_n_steps=5", "--save_state")
    file = work.train(
        "third",
        *BRIEF,
        f"--resume={work.folder / 'second' / 'lora-step00000005-state'}",
        "--learning_rate=1e-3",
        "--unet_lr=1e-4",
    )
    assert [entry["step"] for entry in json.loads(read_parts(file)[0]["ss_resume_changes"])] == [3, 5]
    assert "ss_resume_changes" not in read_parts(work.folder / "first" / "lora.safetensors")[0]
    recorded = (state / "settings.json").read_text(encoding="utf-8")
    assert json.loads(recorded)["options"]["dataset_config"] == "data.toml" and str(work.folder) not in recorded
    assert (
        not {"output_dir", "cache_latents", "huggingface_token", "sample_prompts"}
        & json.loads(recorded)["options"].keys()
    )


FIXED = {
    "--network_dim=8": "--network_dim is 8; the run of --resume",
    "--network_alpha=2": "--network_alpha is 2.0; the run of --resume",
    "--network_module=networks.loha": "--network_module is networks.loha; the run of --resume",
    "--optimizer_type=SGDNesterov": "--optimizer_type is torch.optim.SGD; the run of --resume",
    "--seed=6": "--seed is 6; the run of --resume",
    "--token_string=zyx": "--token_string is zyx; the run of --resume",
    "--network_args=train_blocks=double": "--network_args has train_blocks=double; the run of --resume",
}


def test_what_cannot_change_is_told_before_models_are_loaded(
    work: Work, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    state = interrupted(work)
    for option, message in FIXED.items():
        told = refused_run("flux", work.argv("second", *BRIEF, f"--resume={state}", option), monkeypatch, capsys)
        assert message in told, told
    (state / SUMS_FILE).unlink()
    recorded = json.loads((state / "settings.json").read_text(encoding="utf-8"))
    assert recorded["fixed"]["learned"] == "network of flux"
    recorded["fixed"]["learned"] = "full of sdxl"
    (state / "settings.json").write_text(json.dumps(recorded), encoding="utf-8")
    told = refused_run("flux", work.argv("second", *BRIEF, f"--resume={state}", "--network_dim=8"), monkeypatch, capsys)
    assert "another training (full of sdxl); this one is network of flux" in told and "--network_dim" not in told
    (state / "settings.json").write_text('{"fixed": [', encoding="utf-8")
    told = refused_run("flux", work.argv("second", *BRIEF, f"--resume={state}"), monkeypatch, capsys)
    assert "settings.json cannot be read" in told and "damaged" in told


def test_the_seed_is_that_of_the_state_when_none_is_given(work: Work) -> None:
    state = interrupted(work)
    from library.training import cli

    cli.run("flux", "network", without(work.argv("second", *BRIEF, f"--resume={state}"), "seed"))
    assert fingerprint(work.folder / "second" / "lora.safetensors") == fingerprint(
        work.folder / "first" / "lora.safetensors"
    )


def test_the_state_of_another_optimizer_is_refused_also_where_nothing_is_recorded(
    work: Work, capsys: pytest.CaptureFixture
) -> None:
    from library.core.errors import CheckpointError

    state = interrupted(work, old=True)
    with pytest.raises(CheckpointError, match="state of --resume is that of another optimizer"):
        go_on(work, state, "--optimizer_type=SGDNesterov")


def test_schedule_free_rates_change_too(work: Work, rates: list[dict[str, Any]]) -> None:
    pytest.importorskip("schedulefree")
    options = ["--optimizer_type=AdamWScheduleFree"]
    state = interrupted(work, *options)
    torch.manual_seed(0)
    rates.clear()
    go_on(work, state, *options, "--learning_rate=1e-3")
    assert {entry["lr"] for entry in rates} == {1e-3} and [entry["k"] for entry in rates] == [3, 4, 5]


def test_weights_to_begin_with_are_no_change_of_a_run_that_goes_on(
    work: Work, caplog: pytest.LogCaptureFixture
) -> None:
    """The state has the weights: the same command with other start weights ends in the same ones and tells of no
    change."""
    state = interrupted(work)
    plain = go_on(work, state)
    with caplog.at_level(logging.INFO):
        other = work.train(
            "third", *BRIEF, f"--resume={state}", f"--network_weights={work.folder / 'first' / 'lora.safetensors'}"
        )
    assert fingerprint(other) == fingerprint(plain) and "network_weights " not in caplog.text


def test_an_option_that_the_configuration_shadows_has_not_changed(work: Work, caplog: pytest.LogCaptureFixture) -> None:
    """data.toml has a batch size; a resolution or a dropout of captions on the command line would count."""
    state = interrupted(work)
    with caplog.at_level(logging.INFO):
        go_on(work, state, "--train_batch_size=7", "--caption_dropout_rate=0.5", "--console_log_level=INFO")
    told = [record.getMessage() for record in caplog.records if "settings that changed" in record.getMessage()]
    assert len(told) == 1 and "caption_dropout_rate" in told[0] and "batch_size" not in told[0]
