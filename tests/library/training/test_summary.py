"""The page at start says what a run will do."""

import dataclasses

from library.training.summary import BucketSummary, DatasetSummary, PackSummary, StartSummary, start_summary

BUCKETS = tuple(BucketSummary(width=64 * n, height=64, num_images=n, num_batches=1) for n in range(1, 11))
RUN = StartSummary(
    model="flux", files={"base model": "flux1-dev.safetensors"}, precision="computing in bfloat16",
    datasets=[
        DatasetSummary(
            name="datasets[0]", resolution=(512, 768), batch_size=2, num_images=10, num_samples=55,
            num_validation_images=3,
            buckets=BUCKETS,
        )
    ],
    num_epochs=2, max_train_steps=56, steps_per_epoch=28, gradient_accumulation_steps=2, num_processes=3, device="cuda",
    optimizer="torch.optim.adamw.AdamW", lr_scheduler="constant", learning_rates={"unet": 1e-4, "textencoder": 5e-5},
    network="network", parts={"unet": 1234567}, memory=["latents cached in memory"], seed=42,
    notes=["--sdpa: as always"],
)


def test_the_page_names_everything():
    page = start_summary(RUN)
    for words in (
        "flux1-dev.safetensors", "10 images, 55 per epoch, 512x768, 3 held out", "56 steps, 2 epochs of 28 steps",
        "2 per process, 3 processes on cuda, 2 batches per step: 12 images per step", "1,234,567 parameters",
        "unet 0.0001, textencoder 5e-05", "latents cached in memory", "--sdpa: as always", "seed         42",
    ):
        assert words in page, words
    assert "drawn" not in page and all(line == line.rstrip() for line in page.splitlines())


def test_many_buckets_are_summed():
    page = start_summary(RUN)
    assert "640x64" in page and "2 others" in page and "192x64" in page and "128x64" not in page


def test_clips_are_called_so_and_their_buckets_tell_frames():
    buckets = [
        BucketSummary(width=1280, height=720, num_images=1, num_batches=1, frames=129, word="clip"),
        BucketSummary(width=64, height=64, num_images=6, num_batches=3, frames=9, word="clip"),
        BucketSummary(width=64, height=64, num_images=5, num_batches=3, frames=1, word="sample"),
    ]
    mixed = DatasetSummary(
        name="d", resolution=(64, 64), batch_size=2, num_images=3, num_clips=9, num_videos=4, num_samples=12,
        buckets=tuple(buckets),
    )
    page = start_summary(dataclasses.replace(RUN, datasets=[mixed]))
    for words in (
        "3 images and 9 clips of 4 videos, 12 per epoch, 64x64", "64x64x9 6 clips 3 batches",
        "64x64x1 5 samples 3 batches", "1280x720x129 1 clip 1 batch", "12 samples per step",
    ):
        assert " ".join(words.split()) in " ".join(page.split()), (words, page)
    alone = dataclasses.replace(mixed, num_images=0, buckets=tuple(buckets[1:2]))
    page = start_summary(dataclasses.replace(RUN, datasets=[alone]))
    assert "9 clips of 4 videos, 12" in page and "64x64x9" in page


def test_packs_stand_in_the_place_of_batches():
    packs = PackSummary(count=12, token_budget=16384, fill=0.826, samples=(3, 9), left_out=2)
    packed = dataclasses.replace(RUN.datasets[0], packs=packs, keeps_sizes=True)
    page = start_summary(dataclasses.replace(RUN, datasets=[packed]))
    for words in (
        "55 per epoch, at their own sizes, 3 held out", "2 samples in the first epoch",
        "12 packs per epoch of 16384 tokens at most, 83% full in the mean, 3 to 9 samples each",
        "a pack per process, 3 processes on cuda, 2 packs per step: up to 54 images per step", "640x64         10 images\n",
    ):
        assert words in page, words
    assert "batches" not in page


def test_other_cases():
    page = start_summary(
        dataclasses.replace(
            RUN, seed_was_drawn=True, num_processes=1, first_step=7, learning_rates={"a": None, "b": None}
        )
    )
    assert "--seed to repeat" in page and "1 process on" in page and "going on at step 8" in page
    assert "learning rate chosen by the optimizer" in page
