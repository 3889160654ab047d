"""Clips on the data side: buckets with frames, latents of any rank and conditions through caches, batches and
workers."""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from library.core.errors import CheckpointError
from library.dataset.build import set_frames
from library.dataset.cache_index import CacheIndex
from library.dataset.cache_io import LatentArrays, save_latents
from library.dataset.caching import encode_latents, plan_latents
from library.dataset.collate import collate
from library.dataset.dataset import Dataset, DatasetGroup
from library.dataset.items import DatasetParams, SubsetParams
from library.dataset.npz_file import read_headers
from library.dataset.strategies import StrategySet
from library.families.latents import Bucket, LatentSpec
from library.strategy_base import posterior_seed
from tests.library.dataset.images import epoch_requests, make_item
from tests.toy_video.clips import draw_clip
from tests.toy_video.family import FIRST_FRAME, ToyLatentsCaching
from tests.toy_video.models import ToyVideoVae, seeded
from tests.toy_video.record import FAMILY

LENGTHS = (5, 6, 4, 1, 5)
"""frames of the files; of these 5, 5, 3, 1 and 5 are used"""
PARTS = {"first_frame_vae": seeded(ToyVideoVae(), 4)}


def group_of(folder: Path, strategy: ToyLatentsCaching, lengths=LENGTHS, **subset) -> DatasetGroup:
    settings = SubsetParams(image_dir=str(folder), label="datasets[0].subsets[0]", **subset)
    items = [
        make_item(draw_clip(folder / f"{i}.png", frames, alpha=settings.alpha_mask), (32, 32), subset=settings)
        for i, frames in enumerate(lengths)
    ]
    set_frames(items, FAMILY.latents, CacheIndex())
    params = DatasetParams(
        resolution=(32, 32),
        batch_size=2,
        enable_bucket=True,
        min_bucket_reso=16,
        max_bucket_reso=64,
        bucket_reso_steps=16,
        subsets=(settings,),
    )
    group = DatasetGroup([Dataset(params, items, index=0, architecture=FAMILY.architecture, seed=7)])
    group.set_strategies(StrategySet(None, None, strategy, None))
    return group


def fill(group: DatasetGroup, strategy: ToyLatentsCaching) -> int:
    jobs = plan_latents(group.items, strategy)
    encode_latents(jobs, strategy, seeded(ToyVideoVae(), 1), show_progress=False, parts=PARTS)
    return len(jobs)


@pytest.fixture(autouse=True)
def without_tokens(monkeypatch):
    monkeypatch.setattr(Dataset, "_needs_tokens", lambda *_: False)


def batches(group: DatasetGroup, **ranks) -> list:
    return [group.load(request) for request in epoch_requests(group, **ranks)]


@pytest.mark.parametrize("bucket, shape", [
    ((64, 32), (4, 4, 8)), ((64, 32, 1), (4, 4, 8)), (Bucket(64, 32, 5), (4, 3, 4, 8)), ((64, 32, 3), (4, 2, 4, 8)),
])  # fmt: skip
def test_the_record_knows_the_shape_of_latents(bucket, shape):
    assert FAMILY.latents.latent_shape(bucket) == shape


def test_frames_are_cut_to_what_the_vae_takes():
    assert [FAMILY.latents.usable_frames(n) for n in (1, 2, 3, 4, 5, 6)] == [1, 1, 3, 3, 5, 5]
    assert LatentSpec(channels=4, spatial_stride=8, temporal_stride=4).usable_frames(9) == 1, (
        "a family of pictures takes the first"
    )
    assert LatentSpec(channels=4, spatial_stride=8, clips=True).usable_frames(6) == 6


def test_clips_of_one_length_share_a_bucket_and_pictures_keep_their_names(tmp_path):
    group = group_of(tmp_path, ToyLatentsCaching(False, 2, False))
    assert [(b.bucket, len(b.samples)) for b in group.datasets[0].buckets] == [
        ((32, 32), 1),
        ((32, 32, 3), 1),
        ((32, 32, 5), 3),
    ]
    assert group.bucket_info[0]["buckets"][2] == {"resolution": (32, 32, 5), "count": 3}
    assert (
        posterior_seed("x", (32, 32), False)
        == posterior_seed("x", Bucket(32, 32).key, False)
        != posterior_seed("x", (32, 32, 5), False)
    )


@pytest.mark.parametrize("flip", [False, True])
def test_memory_disk_and_live_give_the_same_latents_and_conditions(tmp_path, flip):
    live = ToyLatentsCaching(False, 2, False)
    reference = batches(group_of(tmp_path, live, flip_aug=flip, num_repeats=4))
    assert not flip or any(any(batch.flippeds) for batch in reference)
    for on_disk in (False, True):
        strategy = ToyLatentsCaching(on_disk, 2, False)
        group = group_of(tmp_path, strategy, flip_aug=flip, num_repeats=4)
        assert fill(group, strategy) == 5
        for batch, wanted in zip(batches(group), reference, strict=True):
            latents, conditions = live.encode_samples(
                seeded(ToyVideoVae(), 1), PARTS, wanted.images, wanted.latent_seeds
            )
            assert torch.equal(batch.latents, latents) and batch.latents.ndim == wanted.images.ndim
            assert batch.conditions.keys() == conditions.keys() == {FIRST_FRAME}
            assert torch.equal(batch.conditions[FIRST_FRAME], conditions[FIRST_FRAME])


def test_a_second_run_finds_what_it_needs_and_makes_what_is_missing(tmp_path):
    strategy = ToyLatentsCaching(True, 2, False)
    assert fill(group_of(tmp_path, strategy), strategy) == 5
    headers = read_headers(tmp_path / "0_0032x0032_toy.npz")
    assert headers["latents_3x4x4"].shape == (4, 3, 4, 4) and headers["first_frame_3x4x4"].shape == (4, 4, 4)
    assert {"latents_4x4", "first_frame_4x4"} <= read_headers(tmp_path / "3_0032x0032_toy.npz").keys()
    group = group_of(tmp_path, strategy)
    assert fill(group, strategy) == 0
    assert fill(group_of(tmp_path, strategy, flip_aug=True), strategy) == 5
    assert "first_frame_flipped_3x4x4" in read_headers(tmp_path / "0_0032x0032_toy.npz")


def test_latents_that_others_wrote_anew_have_no_older_conditions_beside_them(tmp_path):
    strategy = ToyLatentsCaching(True, 2, False)
    group = group_of(tmp_path, strategy)
    fill(group, strategy)
    item = group.items[0]
    size, crop = np.array((32, 32)), np.array((0, 0, 32, 32))
    save_latents(
        item.latents_npz, "_3x4x4", LatentArrays(latents=np.zeros((4, 3, 4, 4)), original_size=size, crop_ltrb=crop)
    )
    assert strategy.problem_of(item, False, False) == "no first_frame_3x4x4"
    with pytest.raises(CheckpointError, match="no first_frame_3x4x4"):
        strategy.load_conditions_from_disk(item.latents_npz, item.bucket.key, False)


def test_wrong_shapes_of_conditions_are_told_before_they_are_stored(tmp_path):
    class Wrong(ToyLatentsCaching):
        def encode_conditions(self, vae, parts, images, seeds, pictures):
            return {FIRST_FRAME: torch.zeros(len(images), 4, 1, 1)}

    strategy = Wrong(True, 2, False)
    with pytest.raises(CheckpointError, match=r"first_frame has shape \[4, 1, 1\]; that of toy_video is \[4, 4, 4\]"):
        fill(group_of(tmp_path, strategy), strategy)
    assert not list(tmp_path.glob("*.npz"))


def test_masks_of_clips_have_frames(tmp_path):
    strategy = ToyLatentsCaching(True, 2, False)
    group = group_of(tmp_path, strategy, alpha_mask=True, flip_aug=True, num_repeats=3)
    reference = batches(
        group_of(tmp_path, ToyLatentsCaching(False, 2, False), alpha_mask=True, flip_aug=True, num_repeats=3)
    )
    fill(group, strategy)
    for batch, wanted in zip(batches(group), reference, strict=True):
        assert torch.equal(batch.alpha_masks, wanted.alpha_masks)
        assert tuple(batch.alpha_masks.shape[1:-2]) == tuple(wanted.images.shape[2:-2])


def test_ranks_cut_conditions_like_latents(tmp_path):
    strategy = ToyLatentsCaching(False, 2, False)
    group = group_of(tmp_path, strategy, lengths=(5, 5, 5))
    fill(group, strategy)
    parts = [batches(group, rank=rank, num_processes=2)[0] for rank in (0, 1)]
    assert [len(part) for part in parts] == [2, 1]
    for part in parts:
        for row, index in enumerate(part.request.items):
            item = group.datasets[0].items[index]
            assert torch.equal(part.latents[row], item.latents) and torch.equal(
                part.conditions[FIRST_FRAME][row], item.conditions[FIRST_FRAME]
            )
    second = parts[0].rows([1])
    assert torch.equal(second.conditions[FIRST_FRAME], parts[0].conditions[FIRST_FRAME][1:])
    assert parts[0].to("cpu").conditions[FIRST_FRAME].shape == (2, 4, 4, 4)


def test_conditions_in_memory_travel_to_workers_as_few_tensors(tmp_path):
    strategy = ToyLatentsCaching(False, 2, False)
    group = group_of(tmp_path, strategy, lengths=(5, 5, 5), flip_aug=True)
    fill(group, strategy)
    wanted = batches(group)
    copied = pickle.loads(pickle.dumps(group))
    assert len(copied.shared.tensors) == 2, "latents and conditions, mirrored ones among them"
    for batch, other in zip(batches(copied), wanted, strict=True):
        assert torch.equal(batch.latents, other.latents) and torch.equal(
            batch.conditions[FIRST_FRAME], other.conditions[FIRST_FRAME]
        )


def test_a_batch_names_its_conditions_and_keeps_the_public_one(tmp_path):
    group = group_of(tmp_path, ToyLatentsCaching(False, 2, False), lengths=(5, 5))
    (request,) = epoch_requests(group)
    samples = [group.datasets[0]._sample(group.items[i], request, position) for position, i in enumerate(request.items)]
    for number, sample in enumerate(samples):
        sample.conditioning = torch.full((3, 32, 32), float(number))
        sample.conditions["sizes"] = torch.tensor([number, 2])
    batch = collate(request, samples, None)
    assert "conditioning_images" in batch.keys() and torch.equal(
        batch["conditioning_images"], batch.conditions["conditioning_images"]
    )
    assert batch.conditions["sizes"].tolist() == [[0, 2], [1, 2]] and batch.rows([1]).conditioning_images.shape == (
        1,
        3,
        32,
        32,
    )
    del samples[0].conditions["sizes"]
    with pytest.raises(ValueError, match="with and without"):
        collate(request, samples, None)
    assert collate(dataclasses.replace(request, items=(), positions=()), [], None).conditions == {}
