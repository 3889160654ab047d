"""--dataset_class: a user's own batches behind the interface of DatasetGroup."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from library.core.errors import ConfigError
from library.dataset.custom import CustomDataset, load_custom_dataset
from library.dataset.plan import requests_of_epoch
from library.training.sampling_prompts import whole_word
from tests.library.dataset.small_family import small_strategies


class TenPictures:
    """Ten samples in batches of four; the sizes of the batches differ."""

    batch_size = 4
    num_train_images = 10

    def __init__(self, tokenizer, max_token_length, resolution, debug_dataset) -> None:
        assert tokenizer is None
        self.resolution = resolution

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> dict:
        numbers = range(index * 4, min(index * 4 + 4, 10))
        images = torch.stack([torch.full((3, 16 * (index + 1), 16), number / 10) for number in numbers])
        return {
            "images": images,
            "captions": [f"picture {number}" for number in numbers],
            "loss_weights": [0.5] * len(numbers),
        }


class NoLength:
    batch_size = 1
    num_train_images = 1

    def __init__(self, *args) -> None:
        pass


class WrongCount(TenPictures):
    num_train_images = 13


def group():
    return load_custom_dataset(f"{__name__}.TenPictures", resolution=(16, 16))


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_every_sample_once_an_epoch_for_any_number_of_processes(processes):
    data = group()
    data.set_strategies(small_strategies())
    assert isinstance(data.dataset, CustomDataset)
    seen = Counter()
    for rank in range(processes):
        plan = data.plan(1, 3, processes)
        for request in requests_of_epoch(plan, epoch=1, first_step=0, rank=rank, num_processes=processes):
            batch = data[request]
            seen.update(batch.captions)
            for caption, image, weight in zip(batch.captions, batch.images if len(batch) else (), batch.loss_weights):
                assert image[0, 0, 0].item() == pytest.approx(int(caption.split()[1]) / 10) and weight == 0.5
            if len(batch):
                assert len(batch.latent_seeds) == len(batch) and batch.input_ids_list[0].shape[0] == len(batch)
    assert seen == {f"picture {number}": 1 for number in range(10)}


def test_the_order_of_batches_changes_with_the_epoch():
    data = group()
    assert data.plan(1, 3, 1) == data.plan(1, 3, 1)
    assert len({tuple(data.plan(epoch, 3, 1)) for epoch in range(1, 7)}) > 1


@pytest.mark.parametrize(
    "name, message",
    [
        ("no_such_module.Class", "cannot be imported"),
        (f"{__name__}.Missing", "cannot be imported"),
        (f"{__name__}.NoLength", "has no __len__, __getitem__"),
        (f"{__name__}.WrongCount", "has 3 batches of 4 samples but num_train_images is 13"),
    ],
)
def test_a_class_that_does_not_fit_is_named(name, message):
    with pytest.raises(ConfigError, match=message):
        load_custom_dataset(name)


def test_words_of_captions_are_replaced():
    """What textual inversion puts in the place of its word holds for a user's own batches too."""
    data = group()
    data.set_strategies(small_strategies())
    data.set_replacements({whole_word("picture"): "new new1"})
    requests = list(requests_of_epoch(data.plan(1, 0, 1), epoch=1, first_step=0, rank=0, num_processes=1))
    captions = [caption for request in requests for caption in data.load(request).captions]
    assert len(captions) == 10 and all(caption.startswith("new new1 ") for caption in captions)
