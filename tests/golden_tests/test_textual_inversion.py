"""Textual inversion against the reference file: tokens, start rows, captions, words that exist, files."""

from __future__ import annotations

import importlib.util
import random

import pytest
import torch

from library.components.clip_prompt_utils import tokenize_rows
from library.components.tokenizers import load_clip_tokenizer
from library.core.errors import ConfigError
from library.dataset.captions import process_caption
from library.dataset.items import SubsetParams
from library.families.registry import FAMILIES
from library.strategy_sd import SdTokenizeStrategy
from library.strategy_sdxl import SECOND_PAD, SdxlTokenizeStrategy
from library.training.new_words import TextualInversionOptions, templates
from library.components.word_rows import start_rows
from library.training.parser_common import parse
from library.training.sampling_prompts import whole_word
from library.training.trainables.textual_inversion import TextualInversion
from tests.golden_dir import behaviour, behaviour_cases

FILE = "textual_inversion.json"
needs_vocabulary = pytest.mark.skipif(
    importlib.util.find_spec("open_clip") is None, reason="the vocabulary of CLIP lies in the package open_clip"
)


class Family:
    """What a Trainable asks of a family here."""

    def __init__(self, name: str) -> None:
        self.name, self.record = name, FAMILIES[name]


class Strategies:
    def __init__(self, name: str) -> None:
        first, second = load_clip_tokenizer(), load_clip_tokenizer(pad_token=SECOND_PAD)
        self.tokenize = (
            SdTokenizeStrategy(tokenizer=first) if name == "sd" else SdxlTokenizeStrategy(tokenizers=(first, second))
        )


def trainable_of(case: dict, family: str = "sd") -> TextualInversion:
    words = {
        name: case[name]
        for name in ("token_string", "num_vectors_per_token", "init_word")
        if case.get(name) is not None
    }
    return TextualInversion(parse([f"--{name}={value}" for name, value in words.items()], family, "textual_inversion"))


def caption_of(caption: str, trainable: TextualInversion) -> str:
    groups: list = []

    class Group:
        items: list = []

        def set_replacements(self, replacements) -> None:
            groups.append(replacements)

    class Data:
        train = Group()
        groups = [train]

    trainable.prepare_data(Data())
    return process_caption(
        caption, SubsetParams(), rng=random.Random(0), epoch=1, step=0, max_train_steps=1, replacements=groups[0]
    )


@needs_vocabulary
@pytest.mark.parametrize("case", behaviour_cases(FILE))
def test_words_and_captions(case, caplog):
    family, trainable = Family(case["family"]), trainable_of(case, case["family"])
    strategies = Strategies(case["family"])
    trainable.prepare_tokenizers(family, strategies)
    assert trainable.opts.words == case["token_strings"]
    for tokenizer in strategies.tokenize.tokenizers:
        assert tokenizer.convert_tokens_to_ids(case["token_strings"]) == case["token_ids"]
    assert any("--init_word" in record.message for record in caplog.records) == case["warns"]
    assert set(map(tuple, trainable.word.init_ids.values())) == ({tuple(case["init_ids"])} if case["init_ids"] else set())
    if case["init_rows"]:
        table = torch.nn.Embedding(49408, 1, _weight=torch.arange(49408.0)[:, None])
        ids = trainable.word.init_ids[family.record.embedding_keys[0]]
        rows = start_rows(table, ids, case["num_vectors_per_token"], torch.Generator())
        assert rows[:, 0].tolist() == case["init_rows"]
    for wanted in case["captions"]:
        text = caption_of(wanted["caption"], trainable)
        assert text == wanted["text"]
        for tokenizer, encoder in zip(strategies.tokenize.tokenizers, wanted["encoders"], strict=True):
            ids = tokenize_rows(tokenizer, [text], 1, is_weighted=False)[0][0, 0].tolist()
            padding = [encoder["then"]] * (encoder["length"] - len(encoder["ids"]))
            assert ids == encoder["ids"] + padding


def test_a_word_inside_a_longer_one_is_another():
    case = behaviour(FILE)["inside_word"]
    assert caption_of(case["caption"], trainable_of(case)) == case["text"]


@needs_vocabulary
def test_words_that_the_tokenizer_has_are_refused():
    for case in behaviour(FILE)["existing_tokens"]["cases"]:
        trainable = trainable_of(case)
        if case["accepted"]:
            trainable.prepare_tokenizers(Family("sd"), Strategies("sd"))
            continue
        with pytest.raises(ConfigError, match=f"has '{case['token_string']}' as a token"):
            trainable.prepare_tokenizers(Family("sd"), Strategies("sd"))


def test_templates_and_names():
    wanted = behaviour(FILE)
    for name in ("object", "style"):
        sentences = getattr(templates, name.upper())
        assert len(set(sentences)) == wanted["templates"][name] and all(text.count("{}") == 1 for text in sentences)
    for family in ("sd", "sdxl"):
        assert set(FAMILIES[family].embedding_keys) == set(wanted["files"][family])
        options = parse([], family, "textual_inversion")
        assert options.value("save_model_as") == wanted["files"]["default_extension"]
    assert TextualInversion.spec_kind == "textual-inversion"
    assert whole_word("zyx").sub("a", "zyx, zyxs") == "a, zyxs"


@pytest.mark.parametrize("values, told", [
    ({"num_vectors_per_token": 0}, "at least 1"),
    ({"token_string": "two words"}, "without blanks"),
    ({"use_object_template": True, "use_style_template": True}, "one of the two templates"),
])  # fmt: skip
def test_options_that_cannot_be(values, told):
    with pytest.raises(ConfigError, match=told):
        TextualInversionOptions(**values)
