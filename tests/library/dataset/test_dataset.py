"""Batches: every field, exact epochs, the same batches with and without loader workers, no randomness in validation."""

from __future__ import annotations

import dataclasses
import logging
import pickle
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from library.core.errors import ConfigError
from library.dataset.batch import Batch
from library.dataset.caching import encode_latents, plan_latents
from library.dataset.clips.settings import ClipSettings
from library.dataset.dataset import subset_record
from library.dataset.items import SubsetParams
from library.dataset.text_caching import empty_caption_item, encode_text, plan_text
from tests.library.dataset.images import FLUX, epoch_requests, make_folder, make_group, make_image, make_item
from tests.library.dataset.small_family import (
    SmallLatentsCaching,
    SmallTextCaching,
    SmallTextEncoder,
    SmallVae,
    small_strategies,
)

RANDOM = SubsetParams(
    image_dir="x", flip_aug=True, color_aug=True, random_crop=True, shuffle_caption=True, caption_dropout_rate=0.3,
    caption_tag_dropout_rate=0.3, custom_attributes={"note": 1},
)


def assert_equal_batches(first: Batch, second: Batch) -> None:
    for field in dataclasses.fields(Batch):
        a, b = getattr(first, field.name), getattr(second, field.name)
        if isinstance(a, torch.Tensor):
            assert torch.equal(a, b) and a.dtype == b.dtype, field.name
        elif isinstance(a, list) and a and isinstance(a[0], torch.Tensor):
            assert all(torch.equal(x, y) for x, y in zip(a, b)), field.name
        elif isinstance(a, dict):
            assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a), field.name
        else:
            assert a == b, field.name


def test_an_epoch_shows_every_image_as_often_as_its_repeats(tmp_path):
    items = make_folder(tmp_path / "a", 9, SubsetParams(num_repeats=2)) + make_folder(tmp_path / "b", 4, SubsetParams())
    group = make_group(items, batch_size=4)
    for epoch in (1, 2):
        for processes in (1, 2, 3):
            seen = Counter(
                group.datasets[0].items[i].image_key
                for rank in range(processes)
                for request in epoch_requests(group, epoch, rank=rank, num_processes=processes)
                for i in request.items
            )
            assert seen == {item.image_key: item.num_repeats for item in items}
    assert group.num_train_images == 22


def test_epochs_have_different_orders_and_the_same_one_again(tmp_path):
    group = make_group(make_folder(tmp_path, 12), batch_size=1)
    first, again, second = (group.plan(epoch, 7, 1) for epoch in (1, 1, 2))
    assert first == again
    assert first != second


def test_a_batch_is_a_pure_function_of_its_request(tmp_path):
    group = make_group(make_folder(tmp_path, 6, RANDOM))
    group.set_strategies(small_strategies())
    requests = epoch_requests(group)
    forward = [group.load(request) for request in requests]
    for request, batch in reversed(list(zip(requests, forward))):
        assert_equal_batches(group.load(request), batch)


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_loader_workers_give_the_same_batches(tmp_path, context):
    group = make_group(make_folder(tmp_path, 6, RANDOM))
    group.set_strategies(small_strategies())
    requests = epoch_requests(group)
    expected = [group.load(request) for request in requests]
    loader = torch.utils.data.DataLoader(
        group, sampler=requests, batch_size=None, num_workers=2, multiprocessing_context=context
    )
    loaded = list(loader)
    assert len(loaded) == len(expected)
    for batch, wanted in zip(loaded, expected):
        assert_equal_batches(batch, wanted)


def test_a_batch_of_the_default_loader_needs_no_collate_function(tmp_path):
    group = make_group(make_folder(tmp_path, 3))
    group.set_strategies(small_strategies())
    requests = epoch_requests(group)
    for batch, request in zip(torch.utils.data.DataLoader(group, sampler=requests, batch_size=None), requests):
        assert_equal_batches(batch, group.load(request))


def test_every_field_of_an_uncached_batch(tmp_path):
    subset = SubsetParams(
        image_dir=str(tmp_path), custom_attributes={"diff_output_preservation": True}, resize_interpolation="area"
    )
    items = [
        make_item(make_image(tmp_path / f"{i}.png", (100, 60), seed=i), (100, 60), f"picture {i}", subset)
        for i in range(2)
    ]
    group = make_group(items)
    group.set_strategies(small_strategies())
    (request,) = epoch_requests(group)
    batch = group.load(request)
    width, height = items[0].bucket_reso
    assert batch.images.shape == (2, 3, height, width)
    assert batch.images.is_contiguous() and -1 <= batch.images.min() and batch.images.max() <= 1
    assert batch.latents is None and batch.alpha_masks is None and batch.conditioning_images is None
    assert batch.text_encoder_outputs_list is None
    assert [ids.shape[0] for ids in batch.input_ids_list] == [2, 2]
    assert batch.original_sizes_hw.tolist() == [[60, 100]] * 2
    assert batch.target_sizes_hw.tolist() == [[height, width]] * 2
    left = (items[0].resized_size[0] - width) // 2
    top = (items[0].resized_size[1] - height) // 2
    assert batch.crop_top_lefts.tolist() == [[top, left]] * 2
    assert batch.loss_weights.tolist() == [1.0, 1.0]
    assert batch.custom_attributes == [{"diff_output_preservation": True}] * 2
    assert sorted(batch.captions) == ["picture 0", "picture 1"]
    assert len(set(batch.latent_seeds)) == 2
    assert batch["network_multipliers"].tolist() == [1.0, 1.0]
    batch.conditions = {"y": torch.ones(2, 3), "f_indices": torch.tensor([[0, 1], [0, 2]])}
    moved = batch.to("meta")
    assert moved.loss_weights.is_meta and moved.conditions["y"].is_meta
    assert moved.conditions["f_indices"].tolist() == [[0, 1], [0, 2]], "what is read as numbers stays"


def test_a_rank_without_samples_gets_an_empty_batch(tmp_path):
    group = make_group(make_folder(tmp_path, 1))
    group.set_strategies(small_strategies())
    (request,) = epoch_requests(group, rank=1, num_processes=2)
    batch = group.load(request)
    assert len(batch) == 0 and batch.loss_weights.shape == (0,) and batch.original_sizes_hw.shape == (0, 2)


def test_validation_has_no_random_operation(tmp_path):
    items = make_folder(tmp_path, 6, dataclasses.replace(RANDOM, num_repeats=3))
    group = make_group(items, is_training=False)
    group.set_strategies(small_strategies())
    assert group.plan(1, 7, 1) == group.plan(2, 8, 1)
    assert group.num_train_images == 6
    for first, second in zip(epoch_requests(group, 1), epoch_requests(group, 2)):
        a, b = group.load(first), group.load(dataclasses.replace(second))
        assert torch.equal(a.images, b.images) and a.captions == b.captions
        assert not any(a.flippeds)
        assert all(caption.endswith("red, round, shiny") for caption in a.captions)


def test_flip_mirrors_the_image_and_its_crop(tmp_path):
    subset = SubsetParams(image_dir=str(tmp_path), flip_aug=True)
    items = [
        make_item(make_image(tmp_path / f"{i}.png", (101, 64), seed=i), (101, 64), subset=subset) for i in range(8)
    ]
    group = make_group(items, enable_bucket=False, batch_size=8)
    plain = make_group(
        [dataclasses.replace(item, subset=SubsetParams()) for item in items], enable_bucket=False, batch_size=8
    )
    for g in (group, plain):
        g.set_strategies(small_strategies())
    (request,) = epoch_requests(group)
    batch, expected = group.load(request), plain.load(request)
    assert 0 < sum(batch.flippeds) < 8
    for i, flipped in enumerate(batch.flippeds):
        assert torch.equal(batch.images[i], expected.images[i].flip(-1) if flipped else expected.images[i])
        assert batch.crop_top_lefts[i].tolist() == [0, 19 if flipped else 18]  # 37 columns are cut: 18 left, 19 right


def test_random_crop_reports_what_it_cut(tmp_path):
    path = tmp_path / "a.png"
    ramp = np.zeros((64, 128, 3), np.uint8)
    ramp[..., 0] = np.arange(128) * 2
    Image.fromarray(ramp).save(path)
    group = make_group(
        [make_item(path, (128, 64), subset=SubsetParams(random_crop=True, num_repeats=20))], enable_bucket=False
    )
    group.set_strategies(small_strategies())
    lefts = set()
    for request in epoch_requests(group):
        batch = group.load(request)
        for i in range(len(batch)):
            left = batch.crop_top_lefts[i, 1].item()
            lefts.add(left)
            assert batch.images[i, 0, 0, 0].item() == pytest.approx(left * 2 / 127.5 - 1, abs=1e-5)
    assert len(lefts) > 5


def test_regularisation_images_have_the_prior_weight_and_match_the_training_images(tmp_path):
    train = make_folder(tmp_path / "t", 3, SubsetParams(num_repeats=2), sizes=((64, 64),))
    reg = make_folder(tmp_path / "r", 2, SubsetParams(is_reg=True), sizes=((64, 64),))
    group = make_group(train + reg)
    group.set_strategies(small_strategies())
    weights = [w for request in epoch_requests(group) for w in group.load(request).loss_weights.tolist()]
    assert Counter(weights) == {1.0: 6, 0.5: 6}
    assert (group.num_train_images, group.num_reg_images) == (6, 2)


def test_alpha_masks_of_a_mixed_batch(tmp_path):
    masked, plain = SubsetParams(alpha_mask=True, flip_aug=False), SubsetParams()
    a = make_item(make_image(tmp_path / "a.png", alpha=51), subset=masked)
    b = make_item(make_image(tmp_path / "b.png"), subset=plain)
    group = make_group([a, b])
    group.set_strategies(small_strategies())
    (request,) = epoch_requests(group)
    batch = group.load(request)
    means = {key: mask.mean().item() for key, mask in zip(batch.image_keys, batch.alpha_masks)}
    assert means[a.image_key] == pytest.approx(0.2) and means[b.image_key] == 1.0


def test_an_alpha_channel_is_no_mask_when_the_subset_does_not_ask(tmp_path):
    item = make_item(make_image(tmp_path / "a.png", alpha=51))
    group = make_group([item])
    strategy = SmallLatentsCaching(FLUX, cache_to_disk=True)
    with_mask = dataclasses.replace(item, subset=dataclasses.replace(item.subset, alpha_mask=True))
    make_group([with_mask])
    encode_latents(plan_latents([with_mask], strategy), strategy, SmallVae(FLUX), show_progress=False)
    assert plan_latents(group.items, strategy) == []
    group.set_strategies(small_strategies(strategy))
    (request,) = epoch_requests(group)
    batch = group.load(request)
    assert batch.latents is not None and batch.alpha_masks is None


def test_an_empty_mask_is_named(tmp_path, caplog):
    group = make_group(
        [make_item(make_image(tmp_path / "a.png", alpha=0), subset=SubsetParams(alpha_mask=True, num_repeats=3))]
    )
    group.set_strategies(small_strategies())
    with caplog.at_level(logging.WARNING):
        for request in epoch_requests(group):
            group.load(request)
    assert [record.message for record in caplog.records if "zero everywhere" in record.message].__len__() == 1
    assert "a.png" in caplog.text


def test_mask_images_are_flipped_with_their_image(tmp_path):
    make_image(tmp_path / "mask.png", (64, 64), seed=5)
    subset = SubsetParams(flip_aug=True, num_repeats=6)
    item = make_item(
        make_image(tmp_path / "a.png", (64, 64), seed=5), (64, 64), subset=subset, cond_path=str(tmp_path / "mask.png")
    )
    group = make_group([item], kind="CN", batch_size=6)
    group.set_strategies(small_strategies())
    (request,) = epoch_requests(group)
    batch = group.load(request)
    assert 0 < sum(batch.flippeds) < 6
    assert torch.equal(batch.conditioning_images, batch.images)


@pytest.mark.parametrize("to_disk", [True, False])
def test_cached_latents_equal_live_encoding(tmp_path, to_disk):
    subset = SubsetParams(flip_aug=True)
    items = make_folder(tmp_path, 5, subset)
    vae, strategy = SmallVae(FLUX), SmallLatentsCaching(FLUX, to_disk)
    live = make_group([dataclasses.replace(item) for item in items])
    cached = make_group(items)
    encode_latents(plan_latents(items, strategy), strategy, vae, show_progress=False)
    cached.set_strategies(small_strategies(strategy))
    live.set_strategies(small_strategies())
    flips = 0
    for request in epoch_requests(live, 1) + epoch_requests(live, 2):
        a, b = live.load(request), cached.load(request)
        assert b.images is None and a.flippeds == b.flippeds
        flips += sum(a.flippeds)
        with torch.no_grad():
            torch.testing.assert_close(strategy.encode(vae, a.images, a.latent_seeds), b.latents, atol=1e-6, rtol=1e-5)
        assert torch.equal(a.crop_top_lefts, b.crop_top_lefts)
    assert flips


@pytest.mark.parametrize("to_disk", [True, False])
def test_a_dropped_caption_takes_the_cached_outputs_of_the_empty_one(tmp_path, to_disk):
    subset = SubsetParams(caption_dropout_every_n_epochs=2)
    group = make_group(make_folder(tmp_path, 2, subset, sizes=((64, 64),)))
    strategy = SmallTextCaching(to_disk)
    strategies = small_strategies(text=strategy)
    empty = empty_caption_item(group.items)
    encoder = SmallTextEncoder()
    encode_text(plan_text([*group.items, empty], strategy), strategies, [encoder, encoder], show_progress=False)
    group.set_strategies(strategies)
    group.set_empty_caption(empty)
    expected = strategies.text_encoding.encode_tokens(
        strategies.tokenize, [encoder, encoder], strategies.tokenize.tokenize(["", ""])
    )
    (first,), (second,) = epoch_requests(group, 1), epoch_requests(group, 2)
    assert all(group.load(first).captions)
    dropped = group.load(second)
    assert dropped.captions == ["", ""] and dropped.input_ids_list is None
    for found, wanted in zip(dropped.text_encoder_outputs_list, expected):
        assert torch.equal(found, wanted) and found.dtype == wanted.dtype


def test_a_partial_cache_leaves_the_place_of_the_live_encoder_empty_and_makes_tokens(tmp_path):
    group = make_group(make_folder(tmp_path, 2, sizes=((64, 64),)))
    strategy = SmallTextCaching(True, is_partial=True)
    strategies = small_strategies(text=strategy)
    encode_text(plan_text(group.items, strategy), strategies, [None, SmallTextEncoder()], show_progress=False)
    group.set_strategies(strategies)
    (request,) = epoch_requests(group)
    batch = group.load(request)
    assert batch.text_encoder_outputs_list[0] is None and batch.text_encoder_outputs_list[1] is not None
    assert batch.input_ids_list is not None
    assert batch.to("cpu").text_encoder_outputs_list[0] is None


def test_caches_in_memory_travel_to_spawned_workers_as_few_tensors(tmp_path):
    items = make_folder(tmp_path, 8, SubsetParams(flip_aug=True), sizes=((64, 64),))
    group = make_group(items)
    latents, text = SmallLatentsCaching(FLUX, False), SmallTextCaching(False)
    strategies = small_strategies(latents, text)
    encoder = SmallTextEncoder()
    encode_latents(plan_latents(items, latents), latents, SmallVae(FLUX), show_progress=False)
    encode_text(plan_text(items, text), strategies, [encoder, encoder], show_progress=False)
    group.set_strategies(strategies)
    requests = epoch_requests(group)
    expected = [group.load(request) for request in requests]
    copied = pickle.loads(pickle.dumps(group))
    assert len(copied.shared.tensors) <= 6
    for request, batch in zip(requests, expected):
        assert_equal_batches(copied.load(request), batch)
        assert_equal_batches(group.load(request), batch)
    loader = torch.utils.data.DataLoader(
        group, sampler=requests, batch_size=None, num_workers=2, multiprocessing_context="spawn"
    )
    for batch, wanted in zip(loader, expected):
        assert_equal_batches(batch, wanted)


def test_dropping_unusable_images_makes_the_buckets_anew(tmp_path):
    items = make_folder(tmp_path, 4)
    group = make_group(items)
    group.drop([items[0]])
    assert group.num_train_images == 3 and items[0] not in group.items
    with pytest.raises(ConfigError, match="no image is left"):
        group.drop(items)


def test_token_warm_up_follows_the_step_of_the_request(tmp_path):
    subset = SubsetParams(token_warmup_step=0.5, token_warmup_min=1)
    group = make_group([make_item(make_image(tmp_path / "a.png"), caption="a, b, c, d, e", subset=subset)])
    group.set_strategies(small_strategies())
    group.set_max_train_steps(20)
    (request,) = epoch_requests(group)
    captions = [group.load(dataclasses.replace(request, step=step)).captions[0] for step in (0, 5, 10)]
    assert captions == ["a", "a, b, c", "a, b, c, d, e"]


def test_the_record_for_metadata(tmp_path):
    subset = SubsetParams(image_dir=str(tmp_path / "10_cat"), num_repeats=2, class_tokens="cat")
    group = make_group(make_folder(tmp_path / "10_cat", 3, subset, sizes=((64, 64),)))
    (record,) = group.metadata()
    assert record["num_train_images"] == 6 and record["is_dreambooth"] is True
    assert record["subsets"][0]["img_count"] == 3 and record["subsets"][0]["image_dir"] == "10_cat"
    assert record["tag_frequency"]["10_cat"]["red"] == 3
    assert record["bucket_info"]["buckets"][0] == {"resolution": (64, 64), "count": 6}


def test_the_record_of_videos():
    clips = ClipSettings(target_frames=(1, 25), source_fps=30.0)
    record = subset_record(SubsetParams(video_directory="a/v/", control_directory="a/c", clips=clips), 4)
    wanted = {"video_directory": "v", "control_directory": "c", "img_count": 4, "source_fps": 30.0, "max_frames": 129}
    assert wanted.items() <= record.items() and record["target_frames"] == (1, 25)


def test_the_recorded_limits_are_those_in_force(tmp_path):
    items = make_folder(tmp_path, 1)
    (record,) = make_group(items, bucket_rule="area").metadata()
    assert (record["min_bucket_reso"], record["max_bucket_reso"]) == (None, None)
    (record,) = make_group(items, min_bucket_reso=40, max_bucket_reso=120).metadata()
    assert (record["min_bucket_reso"], record["max_bucket_reso"]) == (32, 128)
    (record,) = make_group(items, enable_bucket=False).metadata()
    assert (record["min_bucket_reso"], record["max_bucket_reso"]) == (None, None)
