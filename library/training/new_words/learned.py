"""A word whose vectors learn: in tokenizers, captions, sample prompts and text encoders, and in files."""

from __future__ import annotations

import logging
import re
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from library.checkpoints.embeddings import Widths, read_inversion
from library.components.word_rows import EmbeddingRows, add_tokens, start_rows
from library.core.errors import CheckpointError, ConfigError, Problems, UnsupportedCombination
from library.core.keyed_random import keyed_generator
from library.core.options import Ignored, without_effect
from library.training.accelerator_setup import is_main_process
from library.training.new_words import TextualInversionOptions, templates
from library.training.sampling_prompts import replace_words, whole_word

if TYPE_CHECKING:
    from library.dataset.strategies import StrategySet
    from library.strategy_base import TokenizeStrategy
    from library.training.accelerator_setup import Runtime
    from library.training.data_phase import DataGroups
    from library.training.protocols import Plain, TextEncoders
    from library.training.sampling_prompts import SamplePrompt
    from library.training.wiring.base import ModelFamily

logger = logging.getLogger(__name__)

SHOWN = 5
"""captions that a message names"""


class LearnedWord:
    """A new word of one vector or several, for every text encoder of a family. `rows` holds the vectors [n, D] by the
    name that the family's files have for each encoder; it is filled when the encoders are loaded."""

    def __init__(self, opts: TextualInversionOptions) -> None:
        self.opts = opts
        self.rows = nn.ParameterDict()
        self._embeddings: list[EmbeddingRows] = []
        self._first: dict[str, int] = {}
        """id of the first new token of each tokenizer"""
        self.init_ids: dict[str, list[int]] = {}
        """tokens of the initial word, by encoder"""

    # -- checks, before models are loaded ------------------------------------------------------------------------------

    def problems(self, family: ModelFamily) -> list[str]:
        """What is wrong with the options, and with the file to start from."""
        if not family.record.embedding_keys:
            raise UnsupportedCombination(f"{family.name} has no textual inversion: no words can be added to its text")
        problems = Problems()
        if not self.opts.token_string:
            problems.add("--token_string is not given; needed: the new word, as it stands in the captions")
        if self.opts.init_word is not None and not self.opts.init_word.strip():
            problems.add("--init_word is empty, the initial word gives no token; leave it out for random vectors")
        if self.start_file:
            problems.attempt(lambda: self.check_start(family))
        return problems.messages

    def check_start(self, family: ModelFamily) -> None:
        """ConfigError or CheckpointError when the file to start from does not fit the word, or the text encoders as far
        as they can be told."""
        found = self.given_rows(family.record.embedding_keys)
        try:
            widths: Widths = family.embedding_widths()
        except (CheckpointError, OSError, TypeError):
            return  # files of the model that are missing or wrong are told by the family
        for key, rows in found.items():
            if widths[key] is not None and rows.shape[1] != widths[key]:
                raise CheckpointError(
                    f"{self.start_file} holds vectors of {rows.shape[1]} values in {key}; the text encoder has "
                    f"{widths[key]}. It belongs to another model"
                )

    @property
    def start_file(self) -> str:
        """The option that names the file to start from, with it; empty when the word begins anew."""
        return f"--weights {self.opts.weights}" if self.opts.weights else ""

    def given_rows(self, keys: Sequence[str]) -> dict[str, torch.Tensor]:
        """The vectors of the file to start from, by the names of the text encoders that they are for. CheckpointError,
        ConfigError."""
        found = self.read_start(keys)
        for key, rows in found.items():
            count = len(rows) // self.parts
            if count != self.opts.num_vectors_per_token:
                raise ConfigError(
                    f"{self.start_file} has {count} vectors in {key}, --num_vectors_per_token is "
                    f"{self.opts.num_vectors_per_token}; give the number of the file"
                )
        return found

    @property
    def parts(self) -> int:
        """How many times the word has its vectors."""
        return 1

    def read_start(self, keys: Sequence[str]) -> dict[str, torch.Tensor]:
        """Rows [n, D] of the file to start from, as they are."""
        if not self.opts.weights:
            return {}
        read = zip(keys, read_inversion(self.opts.weights, keys, partly=True), strict=True)
        return {key: rows for key, rows in read if rows is not None}

    def idle(self) -> list[Ignored]:
        if self.start_file and self.opts.init_word:
            return without_effect(["init_word"], f"{self.start_file} gives the vectors to start from")
        return []

    def fixed_settings(self) -> dict[str, Plain]:
        return {
            "token_string": self.opts.token_string, "num_vectors_per_token": self.opts.num_vectors_per_token,
        }

    # -- the word in captions, prompts and tokenizers ------------------------------------------------------------------

    @property
    def words(self) -> list[str]:
        """What stands in the place of the word in captions: a token for each vector."""
        return self.opts.words

    @property
    def tokens(self) -> list[str]:
        """The tokens of all rows, in their order."""
        return self.words

    def prepare_tokenizers(self, keys: Sequence[str], tokenizers: Sequence[Any]) -> None:
        """ConfigError when a tokenizer has the word already, or has no token for the initial one. A tokenizer that is
        None belongs to a text encoder that the run leaves out."""
        known, problems = dict(zip(keys, tokenizers, strict=True)), Problems()
        there = {key: tokenizer for key, tokenizer in known.items() if tokenizer is not None}
        for key, tokenizer in there.items():
            for word in self.opts.words:
                ids = _ids(tokenizer, word)
                if len(ids) == 1 and ids[0] != tokenizer.unk_token_id or word in tokenizer.get_vocab():
                    problems.add(
                        f"--token_string: the tokenizer has '{word}' as a token ({ids[0]}) already; needed: a word "
                        "that it does not know. A known word can be the --init_word"
                    )
            if self.opts.init_word is not None:
                self.init_ids[key] = _ids(tokenizer, self.opts.init_word)
                if not self.init_ids[key]:
                    problems.add(f"--init_word is '{self.opts.init_word}'; the initial word gives no token of {key}")
        problems.raise_if_any()
        for key, tokenizer in there.items():
            self._first[key] = add_tokens(tokenizer, self.tokens, key)
        self._tell_init()

    def check_length(self, tokenize: TokenizeStrategy) -> None:
        """ConfigError when a caption has no room for all vectors of the word: the last ones would never be read. The
        tokenizers know the word."""
        count, words = self.opts.num_vectors_per_token, self.words
        if tokenize.overlong(" ".join(words)):
            room = bisect_left(range(1, count), True, key=lambda n: tokenize.overlong(" ".join(words[:n])))
            raise ConfigError(
                f"--num_vectors_per_token is {count}, and a caption has room for {room} tokens: the other vectors would "
                "never be read; give fewer, or a larger --max_token_length or --t5xxl_max_token_length where the "
                "script has it"
            )

    def _tell_init(self) -> None:
        counts = {len(ids) for ids in self.init_ids.values()} - {1, self.opts.num_vectors_per_token}
        if counts and not self.start_file and is_main_process():
            logger.warning(
                "--init_word '%s' has %s tokens, --num_vectors_per_token is %d: they are %s", self.opts.init_word,
                " or ".join(map(str, sorted(counts))), self.opts.num_vectors_per_token,
                "cut off" if min(counts) > self.opts.num_vectors_per_token else "repeated in turn",
            )

    def text_strategies(self, strategies: StrategySet) -> StrategySet:
        """How texts are encoded, once the tokenizers know the word."""
        return strategies

    def prepare_data(self, data: DataGroups) -> None:
        opts, words = self.opts, " ".join(self.words)
        sentences = templates.OBJECT if opts.use_object_template else templates.STYLE if opts.use_style_template else ()
        if sentences:
            replacements: Mapping[str | re.Pattern[str], Any] = {"": [text.format(words) for text in sentences]}
        else:
            replacements = {whole_word(opts.token_string): words}
            self._tell_captions(data)
        for group in data.groups:
            group.set_replacements(replacements)

    def _tell_captions(self, data: DataGroups) -> None:
        """Captions without the word teach nothing about it (its place may be a prefix or suffix of the subset), and in
        a longer word it is another."""
        token, pattern = self.opts.token_string or "", whole_word(self.opts.token_string or "")
        without, longer = [], []
        for item in data.train.items:
            texts = [item.caption or "", item.subset.caption_prefix or "", item.subset.caption_suffix or ""]
            if not item.subset.is_reg and not any(map(pattern.search, texts)):
                without.append(item.image_key)
            if any(token in pattern.sub("", text) for text in texts):
                longer.append(item.image_key)
        if not is_main_process():
            return
        if without:
            logger.warning(
                "%d of %d captions do not hold the word '%s': %s", len(without), len(data.train.items), token,
                _some(without),
            )
        if longer:
            logger.warning(
                "'%s' stands inside longer words, which stay as they are (known scripts put the tokens there), in %d "
                "captions: %s", token, len(longer), _some(longer),
            )

    def sample_prompt(self, prompt: SamplePrompt) -> SamplePrompt:
        return replace_words(prompt, self.opts.token_string, self.words)

    # -- the vectors ---------------------------------------------------------------------------------------------------

    def prepare_text_encoders(self, keys: Sequence[str], encoders: TextEncoders, runtime: Runtime) -> None:
        """The rows, with their values of the start, in the text encoders."""
        given = self.given_rows(keys)
        for key, encoder in zip(keys, encoders, strict=True):
            if encoder is None or key not in self._first:
                continue
            table = encoder.get_input_embeddings()
            rows = given[key] if key in given else self.fresh_rows(key, table, runtime)
            if rows.shape[1] != table.embedding_dim:
                raise CheckpointError(
                    f"{self.start_file} holds vectors of {rows.shape[1]} values in {key}; the text encoder has "
                    f"{table.embedding_dim}. It belongs to another model"
                )
            self.rows[key] = nn.Parameter(rows.to(runtime.device, runtime.trained_dtype))
            self._embeddings.append(EmbeddingRows(table, self.rows[key], self._first[key]))
            encoder.set_input_embeddings(self._embeddings[-1])

    def fresh_rows(self, key: str, table: nn.Embedding | EmbeddingRows, runtime: Runtime) -> torch.Tensor:
        """Rows [n, D] of a word that begins anew."""
        generator = keyed_generator(runtime.seed, "new word", key)
        return start_rows(table, self.init_ids.get(key), self.opts.num_vectors_per_token, generator)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside, the rows are those of the start."""
        with ExitStack() as stack:
            for embedding in self._embeddings:
                stack.enter_context(embedding.untouched())
            yield

    @property
    def description(self) -> str:
        count = self.opts.num_vectors_per_token
        vectors = "1 vector" if count == 1 else f"{count} vectors"
        return f"{vectors} for the word '{self.opts.token_string}' in {' and '.join(self.rows)}"

    # -- files ---------------------------------------------------------------------------------------------------------

    def file_tensors(self) -> dict[str, torch.Tensor]:
        """The vectors under their names in a file of the word."""
        return {key: rows.detach() for key, rows in self.rows.items()}

    def load(self, path: str) -> None:
        keys = list(self.rows)
        with torch.no_grad():
            for key, rows in zip(keys, read_inversion(path, keys), strict=True):
                self.rows[key].copy_(rows)

    def metadata(self) -> dict[str, Plain]:
        return {
            "ss_token_string": self.opts.token_string,
            "ss_num_vectors_per_token": self.opts.num_vectors_per_token,
            "ss_init_word": self.opts.init_word,
            "ss_use_object_template": self.opts.use_object_template,
            "ss_use_style_template": self.opts.use_style_template,
        }


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{', '.join(names[:SHOWN])}{more}"


def _ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False).input_ids
