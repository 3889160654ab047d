"""Embedding files that diffusers loads give the states that our training and image scripts compute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from library.checkpoints.embeddings import read_inversion, read_word
from library.core.registry import import_target
from library.families.registry import FAMILIES
from library.generation.words import PromptWords
from library.safetensors_utils import load_safetensors
from library.training.new_words import TextualInversionOptions
from library.training.new_words.learned import LearnedWord
from library.training.parser_common import parse
from networks.files.network_files import write_adapter_file
from tests.families import CASES
from tests.golden_dir import behaviour

COUNT = 3
CASES_WITH_WORDS = [
    pytest.param(name, marks=pytest.mark.full) if name == "sd2" else name  # as Stable Diffusion 1
    for name, case in CASES.items()
    if FAMILIES[case.family].embedding_keys
]


class Runtime:
    """What loading text encoders asks of a runtime."""

    device = torch.device("cpu")
    weight_dtype = text_encoder_dtype = trained_dtype = torch.float32
    text_form = None
    seed = 1


class Sample:
    """A model with its strategies and text encoders, loaded anew each time."""

    def __init__(self, name: str, tiny: Any, folder: Path) -> None:
        self.case = CASES[name]
        argv = [*tiny.arguments(), *self.case.options(), f"--output_dir={folder}", "--token_string=zyx"]
        self.argv = [word for word in argv if not word.startswith("--network")]

    def load(self) -> tuple[Any, Any, list[Any]]:
        config = parse(self.argv, self.case.family, "textual_inversion")
        family = import_target(FAMILIES[self.case.family].family)(config)
        return family, family.strategies(), list(family.load_text_encoders(Runtime()))


def as_published(tokenizer: Any) -> None:
    """The tokenizer.json of the published T5 splits at blanks first. One that is built of spiece.model does not, and
    writes a token for the blank before a word that diffusers adds."""
    from tokenizers.pre_tokenizers import Metaspace, Sequence, WhitespaceSplit

    tokenizer.backend_tokenizer.pre_tokenizer = Sequence([WhitespaceSplit(), Metaspace()])


def diffusers_words(file: Path, keys: tuple[str, ...], strategies: Any, encoders: list[Any]) -> str:
    """Load the file with diffusers, each tensor into its text encoder; the prompt as diffusers writes it."""
    from diffusers.loaders import TextualInversionLoaderMixin

    class Pipeline(TextualInversionLoaderMixin):
        hf_device_map = None
        components: dict = {}

    pipeline, tensors, text = Pipeline(), load_safetensors(str(file)), ""
    for key, tokenizer, encoder in zip(keys, strategies.tokenize.tokenizers, encoders, strict=True):
        pipeline.tokenizer, pipeline.text_encoder = tokenizer, encoder
        if key == "t5xxl":
            as_published(tokenizer)
        given = {"emb_params": tensors[key]} if len(keys) == 1 else tensors[key]
        pipeline.load_textual_inversion(given, token="zyx", text_encoder=encoder, tokenizer=tokenizer)
        text = pipeline.maybe_convert_prompt("a zyx, cat", tokenizer)
    return text


@pytest.mark.parametrize("name", CASES_WITH_WORDS)
def test_diffusers_computes_the_states_of_training_and_image_scripts(name, tmp_path):
    from library.tiny_models import build_tiny

    sample = Sample(name, build_tiny(name, tmp_path / "tiny"), tmp_path)
    keys, file = FAMILIES[sample.case.family].embedding_keys, tmp_path / "zyx.safetensors"
    family, strategies, encoders = sample.load()
    without = strategies.encode(encoders, strategies.tokenize.tokenize("a zyx, cat"))

    word = LearnedWord(TextualInversionOptions(token_string="zyx", num_vectors_per_token=COUNT))
    word.prepare_tokenizers(keys, strategies.tokenize.tokenizers)
    word.prepare_text_encoders(keys, encoders, Runtime())
    write_adapter_file(str(file), word.file_tensors(), None, {})
    learned = strategies.encode(encoders, strategies.tokenize.tokenize("a zyx zyx1 zyx2, cat"))

    _, strategies, encoders = sample.load()
    prompts = PromptWords(strategies.tokenize.tokenizers, encoders, keys)
    prompts.add(read_word(str(file), "zyx", family.embedding_widths(), "textual_inversion_embeddings"))
    read = strategies.encode(encoders, strategies.tokenize.tokenize(prompts.text("a zyx, cat")))

    _, strategies, encoders = sample.load()
    text = diffusers_words(file, keys, strategies, encoders)
    theirs = strategies.encode(encoders, strategies.tokenize.tokenize(text))
    for key, states in theirs.items():
        assert torch.equal(states, learned[key]) and torch.equal(states, read[key]), key
    assert any(not torch.equal(states, without[key]) for key, states in theirs.items())


@pytest.mark.parametrize(
    "form", behaviour("textual_inversion.json")["diffusers_loading"], ids=lambda form: form["form"]
)
def test_every_recorded_form_is_read_as_diffusers_reads_it(form, tmp_path):
    """Names of tokens and vectors, with and without the argument `token`."""
    from library.tiny_models import build_tiny

    sample = Sample("sd1", build_tiny("sd1", tmp_path / "tiny"), tmp_path)
    _, strategies, (encoder,) = sample.load()
    (tokenizer,), width = strategies.tokenize.tokenizers, encoder.get_input_embeddings().embedding_dim
    rows = torch.randn(form["rows"], width, generator=torch.Generator().manual_seed(2))
    ending = {"sd safetensors": "safetensors", "web UI .pt": "pt", "diffusers .bin": "bin"}[form["form"]]
    path = tmp_path / f"zyx.{ending}"
    if ending == "safetensors":
        write_adapter_file(str(path), {"emb_params": rows}, None, {})
    elif "string_to_param" in form["keys"]:
        torch.save({"name": form["diffusers_token_names"][0], "string_to_param": {"*": rows}}, path)
    else:
        torch.save({form["keys"][0]: rows}, path)
    (ours,) = read_inversion(str(path), FAMILIES["sd"].embedding_keys)
    assert torch.equal(ours, rows)

    from diffusers.loaders import TextualInversionLoaderMixin

    class Pipeline(TextualInversionLoaderMixin):
        hf_device_map = None
        components: dict = {}

    pipeline = Pipeline()
    pipeline.tokenizer, pipeline.text_encoder = tokenizer, encoder
    pipeline.load_textual_inversion(str(path), token=form["token_argument"])
    ids = tokenizer.convert_tokens_to_ids(form["diffusers_token_names"])
    assert torch.equal(encoder.get_input_embeddings().weight[ids], ours)
