"""Captions of Anima: tokens, states, the empty caption, and the cache file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from library.components.llm_encoder_utils import load_qwen3
from library.components.tokenizers import load_qwen3_tokenizer
from library.core.errors import ConfigError
from library.dataset.strategies import StrategySet
from library.strategy_anima import (
    AnimaTextEncoderOutputsCachingStrategy,
    AnimaTextEncodingStrategy,
    AnimaTokenizeStrategy,
)
from tests.tiny_anima import TinyAnima, build_tiny_anima


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> TinyAnima:
    return build_tiny_anima(tmp_path_factory.mktemp("tiny"))


def strategy(tiny: TinyAnima, **lengths: int) -> AnimaTokenizeStrategy:
    sizes = {"qwen3_max_length": 12, "t5_max_length": 16, **lengths}
    return AnimaTokenizeStrategy(
        **sizes, qwen3_tokenizer=str(tiny.qwen3_tokenizer), t5_tokenizer=str(tiny.t5_tokenizer)
    )


def test_tokens_are_padded_and_t5_ends_with_its_end_token(tiny: TinyAnima) -> None:
    tokenize = strategy(tiny)
    ids, mask, t5_ids, t5_mask = tokenize.tokenize(["a red cat", ""])
    assert ids.shape == mask.shape == (2, 12) and t5_ids.shape == t5_mask.shape == (2, 16)
    assert mask[0].sum() == 3 and (ids[0][mask[0] == 0] == tokenize.qwen3.pad_token_id).all()
    assert mask[1].sum() == 0  # the tokenizer adds nothing
    assert t5_ids[1].tolist() == [1] + [0] * 15 and t5_mask[1].tolist() == [1] + [0] * 15
    assert t5_ids[0][t5_mask[0].sum() - 1] == 1


def test_overlong_captions_are_known(tiny: TinyAnima) -> None:
    assert not strategy(tiny).overlong("a red cat")
    assert strategy(tiny, qwen3_max_length=2).overlong("a red cat") and strategy(tiny, t5_max_length=3).overlong(
        "a red cat"
    )


def test_states_are_those_of_the_caption_alone_and_zero_behind_it(tiny: TinyAnima) -> None:
    qwen3 = load_qwen3(tiny.qwen3, torch.float32, "cpu")
    tokenize, encoding = strategy(tiny), AnimaTextEncodingStrategy()
    states, mask, t5_ids, t5_mask = encoding.encode_tokens(
        tokenize, [qwen3], tokenize.tokenize(["a red cat", "", "the blue dog 12"])
    )
    assert states.isfinite().all() and states[1].abs().max() == 0
    assert states[0, 3:].abs().max() == 0 and states[0, :3].abs().min() > 0
    alone = qwen3(tokenize.qwen3("a red cat", return_tensors="pt").input_ids).last_hidden_state
    torch.testing.assert_close(states[:1, :3], alone)
    assert encoding.encode_tokens(tokenize, [None], tokenize.tokenize("a"))[0] is None


def test_the_cache_file_has_the_known_keys_and_no_dropout_rate(tiny: TinyAnima, tmp_path: Path) -> None:
    qwen3 = load_qwen3(tiny.qwen3, torch.bfloat16, "cpu")
    caching = AnimaTextEncoderOutputsCachingStrategy(True, 1, False)
    outputs = caching.encode(
        StrategySet(strategy(tiny), AnimaTextEncodingStrategy(), None, caching), [qwen3], ["a red cat"]
    )
    assert [tuple(output.shape) for output in outputs.values()] == [(1, 12, 24), (1, 12), (1, 16), (1, 16), (1,)]
    assert float(outputs["caption_dropout_rate"]) == 0


def test_a_tokenizer_of_another_model_is_an_error(tiny: TinyAnima) -> None:
    qwen3 = load_qwen3(tiny.qwen3, torch.float32, "cpu")
    tokens = strategy(tiny).tokenize("a")
    tokens[0][0, 0] = 5000
    with pytest.raises(ConfigError, match="5000"):
        AnimaTextEncodingStrategy().encode_tokens(strategy(tiny), [qwen3], tokens)


def test_where_the_tokenizer_is_looked_for(tiny: TinyAnima, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError, match="--qwen3_tokenizer"):
        load_qwen3_tokenizer(None, str(tmp_path), str(tiny.qwen3))
    load_qwen3_tokenizer(str(tiny.qwen3_tokenizer)).save_pretrained(tmp_path / "Qwen_Qwen3-0.6B-Base")
    from_cache = load_qwen3_tokenizer(None, str(tmp_path))
    beside = load_qwen3_tokenizer(None, None, str(tiny.qwen3_tokenizer))
    text = "a red cat, No. 12!"
    expected = load_qwen3_tokenizer(str(tiny.qwen3_tokenizer))(text).input_ids
    assert from_cache(text).input_ids == beside(text).input_ids == expected
    assert np.array_equal(from_cache.decode(expected), text)
