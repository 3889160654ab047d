"""Tokenizers from every source, in the documented order, without a network."""

from __future__ import annotations

import gzip
import json
import pickle
import random
import shutil
import sys
from pathlib import Path

import pytest
import torch

from library.components import tokenizers
from library.components.clip_prompt_utils import tokenize_rows
from library.components.tokenizers import (
    load_clip_tokenizer,
    load_t5_tokenizer,
    t5_tokenizer_from_sentencepiece,
    vocabulary_problem,
)
from library.core.errors import CheckpointError, ConfigError
from library.safetensors_utils import save_file_atomic
from tests.tiny import build_tiny_flux, sentencepiece_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return build_tiny_flux(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def no_open_clip(monkeypatch):
    """As if open_clip were not installed."""
    find = tokenizers.importlib.util.find_spec
    monkeypatch.setattr(
        tokenizers.importlib.util, "find_spec", lambda name: None if name == "open_clip" else find(name)
    )


def test_t5_from_the_model_file_and_from_its_folder_agree(tiny) -> None:
    from_blob = load_t5_tokenizer(model_path=str(tiny.t5xxl))
    from_folder = load_t5_tokenizer(str(tiny.t5xxl_tokenizer))
    from_file = load_t5_tokenizer(str(tiny.t5xxl_tokenizer / "spiece.model"))
    for text in ("a red cat", "", "  Two   Dogs. "):
        assert from_blob(text).input_ids == from_folder(text).input_ids == from_file(text).input_ids
    assert (from_blob.pad_token_id, from_blob.eos_token_id) == (0, 1)
    assert from_blob("", padding="max_length", max_length=4).input_ids == [1, 0, 0, 0]
    assert from_blob.decode(from_blob("a red cat").input_ids, skip_special_tokens=True) == "a red cat"


def test_blob_under_a_prefix(tiny, tmp_path) -> None:
    blob = torch.frombuffer(bytearray(sentencepiece_model()), dtype=torch.uint8)
    save_file_atomic({"text_encoders.t5xxl.spiece_model": blob}, tmp_path / "all.safetensors")
    assert load_t5_tokenizer(model_path=str(tmp_path / "all.safetensors"))("a").input_ids[-1] == 1


def test_order_of_the_sources(tiny, tmp_path) -> None:
    """Each source gets a vocabulary of its own size, so that the one in use shows."""
    cache = tmp_path / "google_t5-v1_1-xxl"
    load_t5_tokenizer(str(tiny.t5xxl_tokenizer)).save_pretrained(cache)
    pieces = [piece for piece, _, _ in tokenizers.read_sentencepiece_model(sentencepiece_model(), "x")[0]]
    option = tmp_path / "option"
    option.mkdir()
    tokenizer = json.loads((cache / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] = tokenizer["model"]["vocab"][:-1]
    (option / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert len(load_t5_tokenizer(str(option), str(tmp_path), str(tiny.t5xxl))) == len(pieces) - 1
    tokenizer["model"]["vocab"] = tokenizer["model"]["vocab"][:-1]
    (cache / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert len(load_t5_tokenizer(None, str(tmp_path), str(tiny.t5xxl))) == len(pieces) - 2
    assert len(load_t5_tokenizer(None, str(tmp_path / "none"), str(tiny.t5xxl))) == len(pieces)


def test_beside_the_weights_of_a_folder(tiny, tmp_path) -> None:
    shutil.copytree(tiny.t5xxl_tokenizer, tmp_path / "tokenizer_2")
    (tmp_path / "text_encoder_2").mkdir()
    for path in (tmp_path, tmp_path / "text_encoder_2"):
        assert load_t5_tokenizer(model_path=str(path)).eos_token_id == 1


def test_clip_from_vocabulary_and_merges_and_from_a_saved_tokenizer(tiny, tmp_path) -> None:
    first = load_clip_tokenizer(str(tiny.clip_l_tokenizer))
    first.save_pretrained(tmp_path / "openai_clip-vit-large-patch14")
    second = load_clip_tokenizer(None, str(tmp_path))
    rows = len(json.loads((tiny.clip_l_tokenizer / "vocab.json").read_text(encoding="utf-8")))
    assert first.eos_token_id == first.pad_token_id == second.pad_token_id == rows - 1
    ids = first("A red CAT", padding="max_length", max_length=77).input_ids
    assert ids == second("a red cat", padding="max_length", max_length=77).input_ids
    assert len(ids) == 77 and ids[0] == rows - 2 and ids[4] == rows - 1
    assert pickle.loads(pickle.dumps(first))("a red cat").input_ids == second("a red cat").input_ids


def test_pad_token_of_the_other_clip_models(tiny) -> None:
    tokenizer = load_clip_tokenizer(str(tiny.clip_l_tokenizer), pad_token="!")
    assert tokenizer.pad_token_id == 0 and tokenizer("a", padding="max_length", max_length=5).input_ids[-1] == 0


def test_vocabulary_inside_an_installed_package(tmp_path, monkeypatch) -> None:
    """A package folder of the same layout with few merges; the package is never imported."""
    folder = tmp_path / "open_clip"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise ImportError('must not be imported')")
    (folder / "bpe_simple_vocab_16e6.txt.gz").write_bytes(gzip.compress(b"#version: 0.2\nc a\nca t</w>\nd o\n"))
    monkeypatch.setattr(tokenizers, "_NUM_CLIP_MERGES", 2)  # the file holds more lines than are used
    monkeypatch.delitem(sys.modules, "open_clip", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    tokenizer = load_clip_tokenizer()
    assert len(tokenizer) == 512 + 2 + 2 and tokenizer.eos_token_id == 515
    assert tokenizer("CAT !").input_ids == [514, 513, 256, 515]
    assert "open_clip" not in sys.modules


def test_ids_of_the_real_clip_vocabulary() -> None:
    if tokenizers.importlib.util.find_spec("open_clip") is None:
        pytest.skip("open_clip is not installed")
    tokenizer = load_clip_tokenizer()
    assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert len(tokenizer) == 49408 and tokenizer.pad_token_id == 49407


def test_nothing_to_be_found_names_every_way(no_open_clip) -> None:
    with pytest.raises(ConfigError) as caught:
        load_clip_tokenizer()
    for way in (
        "--clip_l_tokenizer",
        "--tokenizer_cache_dir",
        "openai_clip-vit-large-patch14",
        "open-clip-torch",
        "hub",
    ):
        assert way in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        load_t5_tokenizer()
    for way in ("--t5xxl_tokenizer", "--tokenizer_cache_dir", "google_t5-v1_1-xxl", "spiece_model", "hub"):
        assert way in str(caught.value)


def test_wrong_folders_are_named(tmp_path) -> None:
    with pytest.raises(ConfigError, match="--clip_l_tokenizer is .*missing, which does not exist"):
        load_clip_tokenizer(str(tmp_path / "missing"))
    with pytest.raises(ConfigError, match="--t5xxl_tokenizer is .* holds no tokenizer"):
        load_t5_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="cannot be read as a tokenizer"):
        load_t5_tokenizer(str(tmp_path))


def test_a_tokenizer_that_does_not_end_texts_is_refused(tiny, tmp_path) -> None:
    load_t5_tokenizer(str(tiny.t5xxl_tokenizer)).save_pretrained(tmp_path)
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text())
    tokenizer["post_processor"] = None
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ConfigError, match="post-processor"):
        load_t5_tokenizer(str(tmp_path))


@pytest.mark.parametrize("blob", [b"", b"\xff" * 40, b"<html></html>", sentencepiece_model()[:-3]])
def test_bytes_that_are_no_sentencepiece_model(blob: bytes) -> None:
    with pytest.raises(CheckpointError, match="the blob is not a sentencepiece model"):
        t5_tokenizer_from_sentencepiece(blob, "the blob")


def test_vocabulary_larger_than_the_embedding(tiny) -> None:
    tokenizer = load_t5_tokenizer(str(tiny.t5xxl_tokenizer))
    assert vocabulary_problem(tokenizer, len(tokenizer), "T5", "t5.safetensors") is None
    message = vocabulary_problem(tokenizer, len(tokenizer) - 1, "T5", "t5.safetensors")
    assert str(len(tokenizer) - 1) in message and "t5.safetensors" in message and "T5" in message


@pytest.mark.parametrize("rule", ["nmt_nfkc", "identity", "nmt_nfkc_cf"])
def test_same_ids_as_sentencepiece(tmp_path: Path, rule: str) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    rng = random.Random(0)
    words = [
        "red",
        "Blue",
        "circle",
        "square",
        "a",
        "the",
        "photo",
        "of",
        "cat",
        "über",
        "日本語",
        "left",
        "right",
        ",",
        "3",
    ]
    texts = [" ".join(rng.choices(words, k=rng.randint(2, 14))) for _ in range(300)]
    (tmp_path / "texts.txt").write_text("\n".join(texts), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "texts.txt"), model_prefix=str(tmp_path / "spiece"), vocab_size=70, hard_vocab_limit=False,
        model_type="unigram", pad_id=0, eos_id=1, unk_id=2, bos_id=-1, normalization_rule_name=rule, minloglevel=2,
    )  # fmt: skip
    model = (tmp_path / "spiece.model").read_bytes()
    reference = sentencepiece.SentencePieceProcessor(model_proto=model)
    tokenizer = t5_tokenizer_from_sentencepiece(model, "spiece.model")
    odd = ["", " ", "  a   red  cat ", "zzz ☃☃ unknown"]
    odd += [] if rule == "identity" else ["ﬁne ３ ｆｕｌｌ", "a\u3000b\tc\nd", "ｶﾞ ½ ™", "▁a ▁ b"]
    for text in texts[:60] + odd:
        assert tokenizer(text).input_ids == reference.encode(text) + [1], text


def test_known_captions_are_read_anew_with_a_new_word(tiny):
    tokenizer = load_clip_tokenizer(str(tiny.clip_l_tokenizer))
    before, _ = tokenize_rows(tokenizer, ["a red zorbit"], 1, is_weighted=False)
    again, _ = tokenize_rows(tokenizer, ["a red zorbit"], 1, is_weighted=False)
    tokenizer.add_tokens(["zorbit"])
    after, _ = tokenize_rows(tokenizer, ["a red zorbit"], 1, is_weighted=False)
    assert torch.equal(before, again) and not torch.equal(before, after)
    assert tokenizer.convert_tokens_to_ids("zorbit") in after.tolist()[0][0]
