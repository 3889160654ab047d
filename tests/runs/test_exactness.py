"""Exact runs under many options: another seed, resuming at any step, each image once. What holds for every family is in
test_families.py."""

from __future__ import annotations

import pytest

from library.core.errors import ConfigError
from library.training.trainer_base import Trainer
from tests.runs.conftest import Stopped, Work, fingerprint, read_parts, stop_after

SETTINGS = "shuffle_caption = true\nkeep_tokens = 1\nflip_aug = true\ncaption_dropout_rate = 0.2\nnum_repeats = 2"
DROPOUTS = ["--network_dropout=0.1", "--network_args", "rank_dropout=0.1", "module_dropout=0.1"]
SCHEDULE = ["--lr_scheduler=cosine", "--lr_warmup_steps=2"]


def test_another_seed_trains_otherwise_and_a_drawn_one_is_recorded(work: Work) -> None:
    first, other = work.train("first"), work.train("other", "--seed=6")
    assert read_parts(first)[1] != read_parts(other)[1]
    argv = [argument for argument in work.argv("drawn") if not argument.startswith("--seed")]
    from library.training import cli

    cli.run("flux", "network", argv)
    drawn = read_parts(work.folder / "drawn" / "lora.safetensors")[0]["ss_seed"]
    repeated = work.train("repeated", f"--seed={drawn}")
    assert read_parts(repeated)[1] == read_parts(work.folder / "drawn" / "lora.safetensors")[1]


OPTIMIZERS = {
    "adamw": [],
    "cosine": SCHEDULE,
    "accumulation": ["--gradient_accumulation_steps=2", "--max_train_steps=5"],
    "dropout": DROPOUTS,
    "adafactor": ["--optimizer_type=AdaFactor"],
    "sgd": ["--optimizer_type=SGDNesterov", "--learning_rate=1e-3"],
    "cached": ["--cache_latents", "--cache_text_encoder_outputs", "--network_train_unet_only"],
    "on disk": ["--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk", "--network_train_unet_only"],
    "bf16": ["--mixed_precision=bf16"],
    "checkpointing": ["--gradient_checkpointing"],
}


WITH_WORKERS = ("adamw", "cosine", "accumulation", "on disk")


@pytest.mark.parametrize(
    ("name", "workers"), [*((name, 0) for name in OPTIMIZERS), *((name, 2) for name in WITH_WORKERS)]
)
def test_a_resumed_run_ends_in_the_bytes_of_an_uninterrupted_one(work: Work, name: str, workers: int) -> None:
    """The epoch has 5 batches, so step 3 lies inside an epoch; 7 steps end inside the second."""
    options = OPTIMIZERS[name]
    cached = any("cache_text" in option for option in options)
    data = work.dataset(subset_keys="flip_aug = true" if cached else SETTINGS.replace("num_repeats = 2", ""))
    more = [*options, f"--max_data_loader_n_workers={workers}"]
    whole = work.train("whole", *more, dataset=data)
    saving = ["--save_every_n_steps=3", "--save_state"]
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(Stopped):
            work.train("parts", *more, *saving, dataset=data)
    resumed = work.train("parts", *more, f"--resume={work.folder / 'parts' / 'lora-step00000003-state'}", dataset=data)
    assert fingerprint(resumed) == fingerprint(whole)


def test_resuming_at_any_step_gives_the_same_bytes(work: Work) -> None:
    whole = work.train("whole", "--save_every_n_steps=1", "--save_state")
    for step in (1, 2, 4, 5, 6):
        out = f"from{step}"
        (work.folder / out).mkdir()
        resumed = work.train(
            out,
            f"--resume={work.folder / 'whole' / f'lora-step{step:08d}-state'}",
            "--save_every_n_steps=1",
            "--save_state",
        )
        assert fingerprint(resumed) == fingerprint(whole), f"resumed at step {step}"


def test_each_image_is_seen_once_per_epoch_with_workers(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, str]] = []
    from library.training import loop

    original = loop.micro_step

    def noting(run, batch):
        seen.extend((batch.request.epoch, key) for key in batch.image_keys)
        return original(run, batch)

    monkeypatch.setattr(loop, "micro_step", noting)
    work.train("out", "--max_train_epochs=3", "--max_data_loader_n_workers=2")
    for epoch in (1, 2, 3):
        keys = [key for e, key in seen if e == epoch]
        assert len(keys) == 9 and len(set(keys)) == 9


def test_trainer_is_the_only_loop() -> None:
    assert Trainer.run.__module__ == "library.training.trainer_base"


def test_with_a_source_date_the_whole_file_is_the_same(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    short = ["--max_train_steps=1", "--t5xxl_max_token_length=32", "--network_train_unet_only"]
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    files = [work.train(name, *short).read_bytes() for name in ("first", "again")]
    assert files[0] == files[1]
    metadata = read_parts(work.folder / "first" / "lora.safetensors")[0]
    assert metadata["ss_training_started_at"] == metadata["ss_training_finished_at"] == "1700000000.000000"
    assert metadata["modelspec.date"] == "2023-11-14T22:13:20+00:00"
    other = read_parts(work.train("other", *short, "--seed=6"))[0]
    assert other["ss_session_id"] != metadata["ss_session_id"] and len(other["ss_session_id"]) == 10
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "yesterday")
    with pytest.raises(ConfigError, match="SOURCE_DATE_EPOCH is 'yesterday'; needed: seconds"):
        work.train("bad", *short)
