"""Caching strategies of a user's own, written against the known signatures alone: the run calls their methods."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

from library.core.errors import TrainingError
from library.dataset.caching import encode_latents, plan_latents
from library.dataset.latent_cache import LatentCache
from library.dataset.text_cache import TextCache
from library.dataset.text_caching import encode_text, plan_text
from library.families.flux import FAMILY
from library.strategy_base import LatentsCachingStrategy, latents_strategy_of, text_strategy_of
from tests.library.dataset.images import make_folder, make_group
from tests.library.dataset.small_family import (
    SmallLatentsCaching,
    SmallTextCaching,
    SmallTextEncoder,
    SmallVae,
    small_strategies,
)

FLUX = FAMILY.architecture


class OwnLatents(SmallLatentsCaching):
    """Keeps its files as it likes; `calls` says what it was asked."""

    def __init__(self, to_disk: bool) -> None:
        super().__init__(FLUX, to_disk)
        self.calls: list[str] = []

    def get_latents_npz_path(self, absolute_path, image_size):
        return absolute_path + ".own.npy"

    def is_disk_cached_latents_expected(self, bucket_reso, npz_path, flip_aug, alpha_mask):
        self.calls.append("expected")
        return os.path.exists(npz_path)

    def cache_batch_latents(self, vae, image_infos, flip_aug, alpha_mask, random_crop):
        self.calls.append(f"cache {len(image_infos)}")
        for info in image_infos:
            latents = torch.full((16, info.bucket_reso[1] // 8, info.bucket_reso[0] // 8), 7.0)
            if self.cache_to_disk:
                np.save(info.latents_npz, latents.numpy())
            else:
                info.latents = latents

    def load_latents_from_disk(self, npz_path, bucket_reso):
        self.calls.append("load")
        return np.load(npz_path), [64, 64], [0, 0, 64, 64], None, None


@pytest.mark.parametrize("to_disk", [True, False])
def test_an_own_latent_cache_is_asked_filled_and_read(tmp_path, to_disk):
    items = make_folder(tmp_path, 3, sizes=((64, 64),))
    group = make_group(items, batch_size=3)
    own, vae = OwnLatents(to_disk), SmallVae(FLUX)
    assert encode_latents(plan_latents(items, own), own, vae, show_progress=False) == []
    assert own.calls == (["expected"] * 3 if to_disk else []) + ["cache 2", "cache 1"] and vae.calls == 0
    own.calls.clear()
    assert plan_latents(items, own) == [] and own.calls == (["expected"] * 3 if to_disk else [])
    group.set_strategies(small_strategies(own))
    batch = group.load(group_request(group))
    assert torch.equal(batch.latents, torch.full((3, 16, 8, 8), 7.0)) and own.calls.count("load") == (
        3 if to_disk else 0
    )


class OwnText(SmallTextCaching):
    """Outputs of its own, in the list of the family; no suffix, no records."""

    calls: list[str]

    def get_outputs_npz_path(self, image_abs_path):
        return image_abs_path + ".own.npz"

    def is_disk_cached_outputs_expected(self, npz_path):
        self.calls.append("expected")
        return os.path.exists(npz_path)

    def outputs(self) -> list[np.ndarray]:
        return [
            np.full(8, 3.0, np.float32),
            np.ones((5, 8), np.float32),
            np.zeros((5, 3), np.float32),
            np.ones(5, np.int64),
        ]

    def load_outputs_npz(self, npz_path):
        self.calls.append("load")
        with np.load(npz_path) as file:
            return [file[f"arr_{i}"] for i in range(4)]

    def cache_batch_outputs(self, tokenize_strategy, models, text_encoding_strategy, infos):
        self.calls.append(f"cache {len(infos)}")
        for info in infos:
            if self.cache_to_disk:
                np.savez(info.text_encoder_outputs_npz, *self.outputs())
            else:
                info.text_encoder_outputs = [torch.from_numpy(array) for array in self.outputs()]


@pytest.mark.parametrize("to_disk", [True, False])
def test_an_own_text_cache_is_asked_filled_and_read(tmp_path, to_disk):
    items = make_folder(tmp_path, 3, sizes=((64, 64),))
    for number, item in enumerate(items):
        item.caption = f"picture {number}"
    group, own, encoder = make_group(items, batch_size=3), OwnText(to_disk), SmallTextEncoder()
    own.calls = []
    strategies = small_strategies(text=own)
    encode_text(plan_text(items, own), strategies, [encoder, encoder], show_progress=False)
    assert own.calls == (["expected"] * 3 if to_disk else []) + ["cache 2", "cache 1"] and not encoder.encoded
    assert plan_text(items, own).jobs == []
    group.set_strategies(strategies)
    batch = group.load(group_request(group))
    assert list(batch.conditioning) == ["l_pooled", "t5_out", "txt_ids", "t5_attn_mask"]
    assert torch.equal(batch.conditioning["l_pooled"], torch.full((3, 8), 3.0)) and own.calls.count("load") == (
        3 if to_disk else 0
    )


def test_outputs_of_an_own_text_cache_that_are_not_those_of_the_family_are_refused(tmp_path):
    items, encoder = make_folder(tmp_path, 1, sizes=((64, 64),)), SmallTextEncoder()
    own = OwnText(False)
    own.calls, own.outputs = [], lambda: [np.ones((2, 8), np.float32)] * 4
    with pytest.raises(TrainingError, match=r"OwnText gave l_pooled of shape \[2, 8\]; needed: 1 dimensions"):
        encode_text(plan_text(items, own), small_strategies(text=own), [encoder, encoder], show_progress=False)


def test_the_caches_of_a_run_have_the_known_interface_too(tmp_path):
    latents = latents_strategy_of(LatentCache(FLUX, SmallLatentsCaching(FLUX, False), to_disk=True, batch_size=2))
    assert (
        isinstance(latents, LatentsCachingStrategy)
        and latents.cache_suffix == "_flux.npz"
        and not latents.stores_batches
    )
    items = make_folder(tmp_path, 2, sizes=((64, 64),))
    make_group(items)
    latents.cache_batch_latents(SmallVae(FLUX), items, False, False, False)
    assert plan_latents(items, latents) == [] and latents_strategy_of(latents) is latents
    text = text_strategy_of(TextCache(FLUX, to_disk=True, trained=[True, False], flags={"apply_t5_attn_mask": False}))
    strategies, encoder = small_strategies(text=text), SmallTextEncoder()
    text.cache_batch_outputs(strategies.tokenize, [encoder, encoder], strategies.text_encoding, items)
    assert text.is_partial and [
        array is None for array in text.load_outputs_npz(items[0].text_encoder_outputs_npz)
    ] == [True, False, False, False]
    assert text_strategy_of(None) is None


def group_request(group):
    from library.dataset.plan import requests_of_epoch

    return next(iter(requests_of_epoch(group.plan(1, 0, 1), epoch=1, first_step=0, rank=0, num_processes=1)))
