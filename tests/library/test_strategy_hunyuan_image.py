"""HunyuanImage 2.1: the template of captions, what is quoted, ragged captions, and what is stored of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from library.components.tokenizers import byt5_ids, load_qwen25_vl_tokenizer
from library.core.errors import ConfigError
from library.dataset.text_cache import row_as_stored
from library.dataset.text_cache_io import TEXT_LAYOUTS
from library.hunyuan_image_utils import load_encoders
from library.strategy_hunyuan_image import (
    TEMPLATE_HEAD,
    TEMPLATE_TAIL,
    HunyuanImageTextEncodingStrategy,
    HunyuanImageTokenizeStrategy,
    glyph_text,
)
from library.tiny_models.hunyuan_image_tiny import TinyHunyuanImage, build_tiny_hunyuan_image

CAPTIONS = ["a red cat", "", 'a sign that says "open" and “closed”, with a dog', "the circle"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyHunyuanImage:
    return build_tiny_hunyuan_image(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def tokenize(tiny: TinyHunyuanImage) -> HunyuanImageTokenizeStrategy:
    return HunyuanImageTokenizeStrategy(tokenizer=str(tiny.tokenizer))


@pytest.fixture(scope="module")
def encoders(tiny: TinyHunyuanImage) -> list[torch.nn.Module]:
    return load_encoders(tiny.text_encoder, tiny.byt5, torch.float32, "cpu")


def encoded(tokenize: HunyuanImageTokenizeStrategy, models: list, texts: list[str]) -> list[torch.Tensor]:
    with torch.no_grad():
        return HunyuanImageTextEncodingStrategy().encode_tokens(tokenize, models, tokenize.tokenize(texts))


@pytest.mark.parametrize(("caption", "text"), [
    ("a cat", ""), ("it's a cat's", ""), ('says "hi"', 'Text "hi". '),
    ('"a" ‘b’ “c” "d"', 'Text "a". Text "d". Text "b". Text "c". '),
    ('an open " only', ""), ('""', 'Text "". '), ('“one” and “two”', 'Text "one". Text "two". '),
    ('"say “x”"', 'Text "say “x”". Text "x". '),
])  # fmt: skip
def test_what_is_quoted(caption: str, text: str) -> None:
    assert glyph_text(caption) == text


@pytest.mark.parametrize("text", ["", "abc", 'Text "öпä店". ', "x" * 300])
def test_bytes_are_those_of_transformers(text: str) -> None:
    from transformers import ByT5Tokenizer

    assert byt5_ids(text, 128) == ByT5Tokenizer()(text, truncation=True, max_length=128).input_ids


def test_the_template_stands_around_a_caption_and_its_head_is_left_out(tokenize) -> None:
    ids, mask, glyph_ids, glyph_mask = tokenize.tokenize(CAPTIONS)
    texts = tokenize.vlm.batch_decode([row[: int(length)] for row, length in zip(ids, mask.sum(dim=1))])
    assert texts == [TEMPLATE_HEAD + caption + TEMPLATE_TAIL for caption in CAPTIONS]
    assert mask[1].sum() == tokenize.num_head + 1, "of an empty caption the end of the template is left"
    assert glyph_mask.sum(dim=1).tolist() == [0, 0, len('Text "open". Text "closed". ') + 1, 0]
    assert tokenize.tokenize("a cat")[2].tolist() == tokenize.tokenize("a cat")[3].tolist() == [[0]]


def test_long_captions_are_cut_and_told(tokenize) -> None:
    long = "cat " * 1100
    ids, _, glyph_ids, _ = tokenize.tokenize([long, f'"{"x" * 200}"'])
    assert ids.shape[1] == tokenize.num_head + 1024 and glyph_ids.shape[1] == 128
    assert tokenize.overlong(long) and tokenize.overlong(f'"{"x" * 200}"')
    assert not tokenize.overlong("a cat") and not tokenize.overlong(f'"{"x" * 110}"')


def test_states_do_not_depend_on_the_batch(tokenize, encoders) -> None:
    """Byte for byte, and nothing is there where no token is; the layer is the third from the last."""
    together = encoded(tokenize, encoders, CAPTIONS)
    states, mask, glyphs, glyph_mask, has_glyphs = together
    assert has_glyphs.tolist() == [False, False, True, False]
    assert not states[mask == 0].any() and not glyphs[glyph_mask == 0].any() and glyphs[2].any()
    for number, caption in enumerate(CAPTIONS):
        alone = encoded(tokenize, encoders, [caption])
        length = alone[0].shape[1]
        assert torch.equal(states[number, :length], alone[0][0]) and mask[number].sum() == length
        assert torch.equal(glyphs[number, : alone[2].shape[1]], alone[2][0])
    ids = tokenize.tokenize("a red cat")[0]
    with torch.no_grad():
        hidden = encoders[0](ids, output_hidden_states=True).hidden_states
    assert len(hidden) == 5 and torch.equal(
        hidden[2][:, tokenize.num_head :], encoded(tokenize, encoders, ["a red cat"])[0]
    )


def test_a_cache_stores_a_caption_without_padding(tokenize, encoders) -> None:
    layout = TEXT_LAYOUTS["hunyuan_image"]
    batch = layout.named(encoded(tokenize, encoders, CAPTIONS))
    for number, caption in enumerate(CAPTIONS):
        alone = row_as_stored(layout.named(encoded(tokenize, encoders, [caption])), 0, layout)
        row = row_as_stored(batch, number, layout)
        assert row.keys() == alone.keys() and all(torch.equal(row[name], alone[name]) for name in row)
    assert row["byt5_embed"].shape[0] == row["byt5_mask"].shape[0] == 1 and not row["byt5_mask"].any()
    assert row["ocr_mask"].dtype == torch.bool and row["ocr_mask"].ndim == 0


def test_a_tokenizer_of_a_larger_vocabulary_is_told(tiny, tokenize, encoders) -> None:
    encoders[0].get_input_embeddings().num_embeddings = 100
    with pytest.raises(ConfigError, match="Qwen2.5-VL"):
        encoded(tokenize, encoders, ["a cat"])


def test_a_missing_tokenizer_is_told_with_the_command_that_fetches_it(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError, match="hf download Qwen/Qwen2.5-VL-7B-Instruct"):
        load_qwen25_vl_tokenizer(None, str(tmp_path))


def test_eight_bits_of_the_language_model_alone(tiny) -> None:
    vlm, byt5 = load_encoders(tiny.text_encoder, tiny.byt5, torch.float16, "cpu", form="fp8")
    assert vlm.layers[0].self_attn.q_proj.weight.dtype == torch.float8_e4m3fn
    assert vlm.embed_tokens.weight.dtype == byt5.shared.weight.dtype == torch.bfloat16, "float16 on a CPU"
