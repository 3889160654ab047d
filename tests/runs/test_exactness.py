"""Same command, same bytes; stopped and resumed, the same bytes; a batch cut in two, the same training."""

from __future__ import annotations

import pytest

from library.training.trainer_base import Trainer
from tests.runs.conftest import Work, fingerprint, largest_difference, read_parts

SETTINGS = "shuffle_caption = true\nkeep_tokens = 1\nflip_aug = true\ncaption_dropout_rate = 0.2\nnum_repeats = 2"
DROPOUTS = ["--network_dropout=0.1", "--network_args", "rank_dropout=0.1", "module_dropout=0.1"]
SCHEDULE = ["--lr_scheduler=cosine", "--lr_warmup_steps=2"]


def test_the_same_command_writes_the_same_bytes_with_any_number_of_workers(work: Work) -> None:
    data = work.dataset(subset_keys=SETTINGS)
    first = work.train("first", *SCHEDULE, *DROPOUTS, dataset=data)
    again = work.train("again", *SCHEDULE, *DROPOUTS, dataset=data)
    workers = work.train("workers", *SCHEDULE, *DROPOUTS, "--max_data_loader_n_workers=2", dataset=data)
    assert fingerprint(first) == fingerprint(again) == fingerprint(workers)


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


class Stopped(Exception):
    """Stands for a kill."""


def stop_after(patch: pytest.MonkeyPatch, step: int) -> None:
    """Let a run die right after an optimizer step, when its files are written."""
    from library.training import loop

    original = loop.micro_step

    def dying(run, batch):
        if run.progress.global_step >= step:
            raise Stopped
        return original(run, batch)

    patch.setattr(loop, "micro_step", dying)


def test_resuming_at_any_step_gives_the_same_bytes(work: Work) -> None:
    whole = work.train("whole", "--save_every_n_steps=1", "--save_state")
    for step in (1, 2, 4, 5, 6):
        out = f"from{step}"
        (work.folder / out).mkdir()
        resumed = work.train(out, f"--resume={work.folder / 'whole' / f'lora-step{step:08d}-state'}", "--save_every_n_steps=1", "--save_state")
        assert fingerprint(resumed) == fingerprint(whole), f"resumed at step {step}"


def test_accumulated_batches_train_like_one_larger_batch(work: Work) -> None:
    """Nine images of one bucket: 4 + 4 + 1 or, in twos, (2+2) + (2+2) + 1."""
    from tests.runs.conftest import draw_pictures

    work.images = draw_pictures(work.folder / "square", 9)
    large = work.dataset(batch_size=4, name="large.toml")
    small = work.dataset(batch_size=2, name="small.toml")
    options = ["--max_train_steps=3", "--optimizer_type=SGDNesterov", "--network_args", "rank_dropout=0.2"]
    one = work.train("one", *options, dataset=large)
    two = work.train("two", *options, "--gradient_accumulation_steps=2", dataset=small)
    assert largest_difference(one, two) < 1e-5


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
