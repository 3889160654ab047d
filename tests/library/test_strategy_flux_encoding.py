"""Captions to tokens and tokens to conditioning, with the tiny checkpoint set."""

from __future__ import annotations

import pickle

import pytest
import torch

from library.components.tokenizers import load_clip_tokenizer
from library.core.errors import ConfigError
from library.flux_utils import load_clip_l, load_t5xxl
from library.strategy_flux import FluxTextEncodingStrategy, FluxTokenizeStrategy, pool_at_first_eos
from tests.tiny import TinyFlux, build_tiny_flux

TEXTS = ["a red cat", "photo of the blue dog"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> TinyFlux:
    return build_tiny_flux(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def tokenize(tiny) -> FluxTokenizeStrategy:
    return FluxTokenizeStrategy(20, clip_l_tokenizer=str(tiny.clip_l_tokenizer), t5xxl_path=str(tiny.t5xxl))


@pytest.fixture(scope="module")
def encoders(tiny) -> list[torch.nn.Module]:
    return [load_clip_l(tiny.clip_l, torch.float32, "cpu"), load_t5xxl(tiny.t5xxl, torch.float32, "cpu")]


def test_tokens(tokenize) -> None:
    clip, t5, mask = tokenize.tokenize(TEXTS)
    assert clip.shape == (2, 77) and t5.shape == mask.shape == (2, 20)
    eos = tokenize.clip_l.eos_token_id
    assert clip[0].tolist()[4:] == [eos] * 73
    assert mask.sum(1).tolist() == [4, 6] and torch.equal(t5 != 0, mask.bool())
    assert all(torch.equal(one, both[:1]) for one, both in zip(tokenize.tokenize(TEXTS[0]), tokenize.tokenize(TEXTS)))


def test_strategy_travels_to_other_processes(tokenize) -> None:
    again = pickle.loads(pickle.dumps(tokenize))
    assert all(torch.equal(*pair) for pair in zip(again.tokenize(TEXTS), tokenize.tokenize(TEXTS)))


def test_ready_tokenizers_are_taken(tiny, tokenize) -> None:
    clip_l = load_clip_tokenizer(str(tiny.clip_l_tokenizer))
    strategy = FluxTokenizeStrategy(20, clip_l_tokenizer=clip_l, t5xxl_tokenizer=tokenize.t5xxl)
    assert strategy.clip_l is clip_l and torch.equal(strategy.tokenize(TEXTS)[1], tokenize.tokenize(TEXTS)[1])


def test_long_texts_are_cut_with_their_end_token_kept(tokenize) -> None:
    text = "red cat " * 60
    assert tokenize.overlong(text) and not tokenize.overlong(TEXTS[0])
    clip, t5, mask = tokenize.tokenize(text)
    assert clip.shape == (1, 77) and clip[0, -1] == tokenize.clip_l.eos_token_id
    assert t5.shape == (1, 20) and t5[0, -1] == tokenize.t5xxl.eos_token_id and mask.all()


@torch.no_grad()
@pytest.mark.parametrize("masked", [False, True])
def test_conditioning(tokenize, encoders, masked: bool) -> None:
    tokens = tokenize.tokenize(TEXTS)
    pooled, states, text_ids, mask = FluxTextEncodingStrategy(masked).encode_tokens(tokenize, encoders, tokens)
    assert pooled.shape == (2, 32) and states.shape == (2, 20, 24)
    assert text_ids.shape == (2, 20, 3) and not text_ids.any() and torch.equal(mask, tokens[2])
    hidden = encoders[0].text_model(input_ids=tokens[0]).last_hidden_state
    assert torch.equal(pooled, hidden[[0, 1], [4, 6]])
    expected = encoders[1](tokens[1], attention_mask=tokens[2] if masked else None).last_hidden_state
    assert torch.equal(states, expected)
    alone = encoders[1](tokens[1][:, :4], attention_mask=None).last_hidden_state
    assert torch.allclose(states[0, :4], alone[0], atol=1e-5) is masked  # padding takes no part only with the mask


@torch.no_grad()
def test_absent_encoders_give_none_in_place(tokenize, encoders) -> None:
    tokens = tokenize.tokenize(TEXTS)
    strategy = FluxTextEncodingStrategy()
    assert [part is None for part in strategy.encode_tokens(tokenize, [None, encoders[1]], tokens)] == [
        True,
        False,
        False,
        False,
    ]
    assert [part is None for part in strategy.encode_tokens(tokenize, [encoders[0], None], tokens)] == [
        False,
        True,
        True,
        True,
    ]
    assert strategy.encode_tokens(tokenize, [None, None], tokens) == [None] * 4


@torch.no_grad()
def test_pooling_looks_for_the_first_end_token_not_the_largest_id(encoders) -> None:
    rows = encoders[0].get_input_embeddings().weight.shape[0]
    ids = torch.tensor([[rows - 2, 4, rows - 3, rows - 1, rows - 3]])
    states = encoders[0].text_model(input_ids=ids).last_hidden_state
    assert torch.equal(pool_at_first_eos(encoders[0], ids, rows - 3), states[:, 2])


def test_ids_without_an_embedding_row_are_refused(tokenize, encoders, tiny) -> None:
    small = load_clip_l(build_tiny_flux(tiny.folder / "other").clip_l, torch.float32, "cpu")
    small.set_input_embeddings(torch.nn.Embedding(300, 32))
    with pytest.raises(ConfigError, match="CLIP-L tokenizer gives ids up to .* has 300 rows"):
        FluxTextEncodingStrategy().encode_tokens(tokenize, [small, None], tokenize.tokenize(TEXTS))
