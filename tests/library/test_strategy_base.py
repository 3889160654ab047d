"""What plug-ins know of the strategy bases."""

from __future__ import annotations

import pytest

from library.core.errors import UnsupportedCombination
from library.dataset.architectures import ARCHITECTURES
from library.strategy_base import LatentsCachingStrategy, PluginSlot, TokenizeStrategy, posterior_seed
from tests.library.dataset.small_family import SmallLatentsCaching, SmallTextEncoding, SmallTokenize


@pytest.fixture(autouse=True)
def empty_slots(monkeypatch):
    monkeypatch.setattr(PluginSlot, "_slots", {})


def test_there_is_one_slot_per_base():
    tokenize, latents = SmallTokenize(), SmallLatentsCaching(ARCHITECTURES["flux"], True)
    assert TokenizeStrategy.get_strategy() is None
    TokenizeStrategy.set_strategy(tokenize)
    LatentsCachingStrategy.set_strategy(latents)
    assert SmallTokenize.get_strategy() is tokenize and LatentsCachingStrategy.get_strategy() is latents
    with pytest.raises(RuntimeError, match="TokenizeStrategy is already set"):
        SmallTokenize.set_strategy(SmallTokenize())


def test_properties_of_the_caching_base():
    strategy = SmallLatentsCaching(ARCHITECTURES["hunyuan_image"], True, batch_size=3)
    assert (strategy.cache_to_disk, strategy.batch_size, strategy.cache_suffix) == (True, 3, "_hi.npz")
    assert strategy.get_latents_npz_path("d/a.b.png", (64, 32)) == "d/a.b_0064x0032_hi.npz"


def test_weights_of_words_are_refused_where_a_family_has_none():
    with pytest.raises(UnsupportedCombination, match="--weighted_captions"):
        SmallTokenize().tokenize_with_weights("(a:1.2)")
    with pytest.raises(UnsupportedCombination):
        SmallTextEncoding().encode_tokens_with_weights(SmallTokenize(), [], [], [])


def test_the_seed_of_a_posterior_depends_on_content_size_and_flip_alone():
    seeds = {
        posterior_seed(*key)
        for key in (("a", (64, 64), False), ("b", (64, 64), False), ("a", (64, 32), False), ("a", (64, 64), True))
    }
    assert len(seeds) == 4
    assert posterior_seed("a", (64, 64), False) == posterior_seed("a", (64, 64), False)
