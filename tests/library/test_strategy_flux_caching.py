"""The caches of FLUX.1 with its own models."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from library.dataset.caching import encode_latents, plan_latents
from library.dataset.npz_file import read_arrays
from library.dataset.text_caching import encode_text, plan_text
from library.flux_utils import load_ae, load_clip_l, load_t5xxl
from library.strategy_base import StrategySet
from library.strategy_flux import (
    FluxLatentsCachingStrategy,
    FluxTextEncoderOutputsCachingStrategy,
    FluxTextEncodingStrategy,
    FluxTokenizeStrategy,
)
from tests.library.dataset.images import make_folder, make_group
from tests.tiny import build_tiny_flux


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return build_tiny_flux(tmp_path_factory.mktemp("flux"))


def strategies(tiny, mask: bool, partial: bool = False) -> StrategySet:
    text = FluxTextEncoderOutputsCachingStrategy(True, 2, False, is_partial=partial, apply_t5_attn_mask=mask)
    text.max_token_length = 24
    tokenize = FluxTokenizeStrategy(24, clip_l_tokenizer=str(tiny.clip_l_tokenizer), t5xxl_path=str(tiny.t5xxl))
    return StrategySet(tokenize, FluxTextEncodingStrategy(mask), FluxLatentsCachingStrategy(True, 2, False), text)


def test_latents_do_not_depend_on_batches_or_the_global_generator(tiny, tmp_path):
    vae = load_ae(str(tiny.ae), torch.float32, "cpu")
    stored = []
    for batch_size, seed in ((1, 1), (4, 2)):
        items = make_folder(tmp_path / str(batch_size), 4)
        make_group(items)
        torch.manual_seed(seed)
        strategy = FluxLatentsCachingStrategy(True, batch_size, False)
        encode_latents(plan_latents(items, strategy), strategy, vae, show_progress=False)
        stored.append([strategy.load_latents_from_disk(item.latents_npz, item.bucket_reso)[0] for item in items])
        for item, latents in zip(items, stored[-1]):
            width, height = item.bucket_reso
            assert latents.shape == (16, height // 8, width // 8) and latents.dtype == np.float32
    for one, four in zip(*stored):
        np.testing.assert_allclose(one, four, atol=1e-4)


def test_text_outputs_equal_live_encoding(tiny, tmp_path):
    (item,) = make_folder(tmp_path, 1)
    item.caption = "a photo of the red cat"
    encoders = [load_clip_l(str(tiny.clip_l), torch.float32, "cpu"), load_t5xxl(str(tiny.t5xxl), torch.float32, "cpu")]
    family = strategies(tiny, mask=True)
    caching = family.text_encoder_outputs_caching
    encode_text(plan_text([item], caching), family, encoders, show_progress=False)
    with torch.no_grad():
        live = family.encode(encoders, family.tokenize.tokenize(item.caption))
    cached = caching.outputs_of(item)
    assert cached.keys() == live.keys()
    for name, tensor in cached.items():
        torch.testing.assert_close(tensor, live[name][0], atol=0, rtol=0)
    assert bool(read_arrays(item.text_encoder_outputs_npz)["apply_t5_attn_mask"]) is True
    other = strategies(tiny, mask=False).text_encoder_outputs_caching
    assert [job.caption for job in plan_text([dataclasses.replace(item)], other).jobs] == [item.caption]


def test_a_partial_cache_needs_no_clip(tiny, tmp_path):
    (item,) = make_folder(tmp_path, 1)
    family = strategies(tiny, mask=False, partial=True)
    caching = family.text_encoder_outputs_caching
    encoders = [None, load_t5xxl(str(tiny.t5xxl), torch.float32, "cpu")]
    encode_text(plan_text([item], caching), family, encoders, show_progress=False)
    outputs = caching.outputs_of(item)
    assert (
        "l_pooled" not in outputs and outputs["t5_out"].shape[0] == 24 and outputs["t5_attn_mask"].dtype == torch.int64
    )
