"""Gemma 2 and what Lumina-Image 2.0 makes of captions: its tokenizer from every place, its files, system prompts,
conditioning."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.checkpoints.loading import build_on_meta
from library.components.gemma_encoder_utils import gemma2_state, inspect_gemma2, load_gemma2
from library.components.gemma_tokenizer import gemma_tokenizer_from_sentencepiece, load_gemma2_tokenizer
from library.core.errors import CheckpointError, ConfigError
from library.strategy_lumina import LuminaTextEncodingStrategy, LuminaTokenizeStrategy
from library.tiny_models.lumina_tiny import GEMMA_CONFIG, TinyLumina, build_tiny_lumina
from library.tiny_models.vocabularies import gemma_pieces, sentencepiece_model
from tests.runs.families import key_table

TEXTS = (
    "a red cat on the sofa", "the blue  dog and\na green circle", "Photo of a girl, 1girl; (best:1.2)", "x = 3.14159",
    "naïve café — 東京", "   three spaces", "", "quick brown 🦊 jumps", "<turn>red 2024", " leading\ttab",
)  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> TinyLumina:
    return build_tiny_lumina(tmp_path_factory.mktemp("tiny_lumina"))


def strategy(tiny: TinyLumina, *args, **settings) -> LuminaTokenizeStrategy:
    return LuminaTokenizeStrategy(*args, gemma2_path=str(tiny.gemma2), **settings)


# -- the tokenizer -----------------------------------------------------------------------------------------------------


def trained_model() -> bytes:
    """A sentencepiece model of the kind of Gemma's, trained on a few texts."""
    sentencepiece = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([text.replace("\n", " ") for text in TEXTS if text] * 20), model_writer=model,
        vocab_size=380, model_type="bpe", byte_fallback=True, add_dummy_prefix=False, remove_extra_whitespaces=False,
        normalization_rule_name="identity", split_digits=True, allow_whitespace_only_pieces=True,
        hard_vocab_limit=False,
        pad_id=0, eos_id=1, bos_id=2, unk_id=3, pad_piece="<pad>", eos_piece="<eos>", bos_piece="<bos>",
        user_defined_symbols=["<turn>"], minloglevel=2,
    )  # fmt: skip
    return model.getvalue()


def test_the_ids_are_those_of_sentencepiece_behind_a_start_token() -> None:
    model = trained_model()
    theirs = pytest.importorskip("sentencepiece").SentencePieceProcessor(model_proto=model)
    ours = gemma_tokenizer_from_sentencepiece(model, "the model")
    for text in TEXTS:
        assert ours(text).input_ids == [2, *theirs.encode(text)], text


def test_every_place_of_a_tokenizer(tiny: TinyLumina, tmp_path: Path) -> None:
    """A folder or file, the cache folder (as transformers writes it too), the model's file or folder."""
    folder, cache, model = tmp_path / "folder", tmp_path / "cache", tmp_path / "model"
    folder.mkdir()
    model.mkdir()
    (folder / "tokenizer.model").write_bytes(sentencepiece_model(gemma_pieces()))
    found = load_gemma2_tokenizer(str(folder))
    found.save_pretrained(cache / "google_gemma-2-2b")
    found.save_pretrained(model)
    others = (
        load_gemma2_tokenizer(str(folder / "tokenizer.model")), load_gemma2_tokenizer(None, str(cache)),
        load_gemma2_tokenizer(None, None, str(tiny.gemma2)), load_gemma2_tokenizer(None, None, str(model)),
    )  # fmt: skip
    for other in others:
        assert [other(text).input_ids for text in TEXTS] == [found(text).input_ids for text in TEXTS]
        assert other.padding_side == "right" and other.pad_token_id == 0


def test_a_missing_tokenizer_is_told_with_the_command_that_fetches_it(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("library.huggingface_util.is_hub_reachable", lambda: False)
    with pytest.raises(ConfigError, match="hf download google/gemma-2-2b .*--local-dir FOLDER.*--gemma2_tokenizer"):
        load_gemma2_tokenizer(None, str(tmp_path))
    with pytest.raises(CheckpointError, match="without <bos>"):
        gemma_tokenizer_from_sentencepiece(sentencepiece_model(gemma_pieces()[3:] + gemma_pieces()[:2]), "the file")


def test_a_tokenizer_that_leaves_out_the_start_token_is_refused(tiny: TinyLumina, tmp_path: Path) -> None:
    tokenizer = load_gemma2_tokenizer(None, None, str(tiny.gemma2))
    core = tokenizer.backend_tokenizer
    from tokenizers.processors import TemplateProcessing

    core.post_processor = TemplateProcessing(single="$A")
    core.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ConfigError, match="does not begin texts with the start token"):
        load_gemma2_tokenizer(str(tmp_path))


# -- the text encoder --------------------------------------------------------------------------------------------------


def test_the_full_size_model_has_the_keys_and_shapes_of_the_real_file(tmp_path: Path) -> None:
    from transformers import Gemma2Config, Gemma2Model

    model = build_on_meta(lambda: Gemma2Model(Gemma2Config()))
    assert {f"model.{key}": list(tensor.shape) for key, tensor in model.state_dict().items()} == key_table("gemma2_2b")


@torch.no_grad()
def test_files_under_every_prefix_and_folders_agree_with_transformers(tiny: TinyLumina, tmp_path: Path) -> None:
    reference = load_gemma2(tiny.gemma2, torch.float32, "cpu")
    ids, mask = torch.tensor([[2, 5, 9, 30, 0], [2, 300, 0, 0, 0]]), torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]])
    expected = reference(input_ids=ids, attention_mask=mask).last_hidden_state[mask.bool()]
    reference.save_pretrained(tmp_path / "folder")
    state = gemma2_state(load_file(tiny.gemma2))
    places = {"folder": tmp_path / "folder"}
    for number, prefix in enumerate(("", "model.", "text_encoders.gemma2_2b.transformer.model.")):
        places[prefix] = tmp_path / f"{number}.safetensors"
        config = '{"head_dim": 16, "query_pre_attn_scalar": 16}'
        save_file({prefix + key: t for key, t in state.items()}, places[prefix], {"model_config": config})
    for name, path in places.items():
        model = load_gemma2(path, torch.float32, "cpu")
        found = model(input_ids=ids, attention_mask=mask).last_hidden_state[mask.bool()]
        torch.testing.assert_close(found, expected, msg=name)
    assert inspect_gemma2(tmp_path / "folder")["query_pre_attn_scalar"] == 16


def test_what_is_no_gemma_2(tiny: TinyLumina, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no Gemma 2 text encoder"):
        inspect_gemma2(tiny.lumina)
    save_file(load_file(tiny.gemma2), tmp_path / "a.safetensors")  # without its configuration
    with pytest.raises(CheckpointError, match="no multiples of the head size 256"):
        inspect_gemma2(tmp_path / "a.safetensors")
    assert gemma2_state(load_file(tiny.lumina)) == {}


# -- captions ----------------------------------------------------------------------------------------------------------


def test_a_system_prompt_stands_before_captions_and_not_before_negative_prompts(tiny: TinyLumina) -> None:
    plain, system = strategy(tiny), strategy(tiny, "the girl")
    caption, whole = "a red cat", "the girl <Prompt Start> a red cat"
    for ours, text in ((system.tokenize(caption), whole), (system.tokenize([caption])[:2], whole)):
        assert all(torch.equal(a, b) for a, b in zip(ours, plain.tokenize(text), strict=True))
    assert torch.equal(system.tokenize_negative(caption)[0], plain.tokenize(caption)[0])
    assert not plain.negative_differs and system.negative_differs
    both = strategy(tiny, "the girl", system_prompt_for_negative=True)
    assert torch.equal(both.tokenize_negative(caption)[0], plain.tokenize(whole)[0])
    assert torch.equal(strategy(tiny, "").tokenize(caption)[0], plain.tokenize(caption)[0])


def test_lengths_count_the_system_prompt_and_the_start_token(tiny: TinyLumina) -> None:
    system = strategy(tiny, "the girl", 8)
    ids, mask = system.tokenize(["a cat", ""])
    assert ids.shape == mask.shape == (2, 8) and mask[:, 0].all()
    assert strategy(tiny, None, 8).tokenize("")[1].sum() == 1  # the start token alone
    assert system.overlong("a cat") and not strategy(tiny, None, 8).overlong("a cat")


@torch.no_grad()
def test_the_conditioning_is_the_state_before_the_last_layer(tiny: TinyLumina) -> None:
    tokenize, model = strategy(tiny, None, 12), load_gemma2(tiny.gemma2, torch.float32, "cpu")
    ids, mask = tokenize.tokenize(["a red cat", "dog"])
    states, found_ids, found_mask = LuminaTextEncodingStrategy().encode_tokens(tokenize, [model], [ids, mask])
    assert torch.equal(found_ids, ids) and torch.equal(found_mask, mask)
    model.layers = model.layers[:-1]
    model.config.num_hidden_layers -= 1
    model.norm = torch.nn.Identity()
    shorter = model(input_ids=ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(states[mask.bool()], shorter[mask.bool()])
    assert LuminaTextEncodingStrategy().encode_tokens(tokenize, [None], [ids, mask])[0] is None


def test_a_tokenizer_of_another_model_is_named(tiny: TinyLumina) -> None:
    tokenize, model = strategy(tiny), load_gemma2(tiny.gemma2, torch.float32, "cpu")
    ids, mask = tokenize.tokenize("a")
    ids[0, 0] = len(gemma_pieces())
    with pytest.raises(ConfigError, match="Gemma 2"):
        LuminaTextEncodingStrategy().encode_tokens(tokenize, [model], [ids, mask])
    assert GEMMA_CONFIG["head_dim"] == inspect_gemma2(tiny.gemma2)["head_dim"]
