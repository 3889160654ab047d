"""Textual inversion: text encoders learn a new word, and nothing else of the model changes."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from library.checkpoints.embeddings import read_inversion
from library.config_util import ScriptRules
from library.core.errors import CheckpointError, ConfigError, Problems, UnsupportedCombination
from library.core.keyed_random import keyed_generator
from library.core.options import Config, Ignored, without_effect
from library.training.accelerator_setup import is_main_process
from library.training.new_words import TextualInversionOptions, templates
from library.training.new_words.rows import EmbeddingRows, start_rows
from library.training.optimizers import OptimizerOptions
from library.training.sampling_prompts import replace_token, whole_word
from library.training.trainables.base import Trainable
from networks.files.network_files import write_adapter_file

if TYPE_CHECKING:
    from library.dataset.strategies import StrategySet
    from library.training.accelerator_setup import Runtime
    from library.training.data_phase import DataGroups
    from library.training.protocols import ParamGroup, Plain, TextEncoders
    from library.training.run import Models
    from library.training.sampling_prompts import SamplePrompt
    from library.training.wiring.base import ModelFamily

logger = logging.getLogger(__name__)

SHOWN = 5
"""captions that a message names"""


class TextualInversion(Trainable):
    """A new word of one vector or several. `rows` holds them by the name that the family's files have for each text
    encoder; it is filled when the text encoders are loaded."""

    name = "textual_inversion"
    options = TextualInversionOptions
    script = "train_textual_inversion"
    spec_kind = "textual-inversion"
    opts: TextualInversionOptions

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.rows = nn.ParameterDict()
        self._embeddings: list[EmbeddingRows] = []
        self._first: dict[str, int] = {}
        """id of the first new token of each tokenizer"""
        self._init_ids: dict[str, list[int]] = {}

    def check(self, family: ModelFamily) -> None:
        if not family.record.embedding_keys:
            raise UnsupportedCombination(f"{family.name} has no textual inversion: no words can be added to its text")
        problems = Problems()
        if not self.opts.token_string:
            problems.add("--token_string is not given; needed: the new word, as it stands in the captions")
        if self.opts.init_word is not None and not self.opts.init_word.strip():
            problems.add("--init_word is empty, the initial word gives no token; leave it out for random vectors")
        if not self.config[OptimizerOptions].learning_rate:
            problems.add("--learning_rate is 0: there is nothing to train")
        if self.opts.weights:
            problems.attempt(lambda: self._start_weights(family))
        problems.raise_if_any()

    def _start_weights(self, family: ModelFamily) -> dict[str, torch.Tensor]:
        """The vectors of --weights, by the names of the text encoders that they are for."""
        keys, wanted = family.record.embedding_keys, self.opts.num_vectors_per_token
        found = {
            key: rows
            for key, rows in zip(keys, read_inversion(self.opts.weights, keys, partly=True), strict=True)
            if rows is not None
        }
        for key, rows in found.items():
            if len(rows) != wanted:
                raise ConfigError(
                    f"--weights {self.opts.weights} has {len(rows)} vectors in {key}, --num_vectors_per_token is "
                    f"{wanted}; give the number of the file"
                )
        return found

    def idle(self, family: ModelFamily) -> list[Ignored]:
        if self.opts.weights and self.opts.init_word:
            return without_effect(["init_word"], "--weights gives the vectors to start from")
        return []

    def fixed_settings(self, family: ModelFamily) -> dict[str, Plain]:
        return {
            "token_string": self.opts.token_string, "num_vectors_per_token": self.opts.num_vectors_per_token,
        }

    def trains_text_encoders(self, family: ModelFamily) -> list[bool]:
        return [True] * len(family.record.embedding_keys)

    @classmethod
    def dataset_rules(cls, family: ModelFamily | type[ModelFamily]) -> str | ScriptRules:
        return ScriptRules(dropout=False)

    # -- the word in captions, prompts and tokenizers --------------------------------------------------------------

    def prepare_tokenizers(self, family: ModelFamily, strategies: StrategySet) -> None:
        """ConfigError when a tokenizer has the word already, or has no token for the initial one."""
        from tokenizers import AddedToken

        problems = Problems()
        for key, tokenizer in zip(family.record.embedding_keys, strategies.tokenize.tokenizers, strict=True):
            if tokenizer is None:  # of a text encoder that the run leaves out
                continue
            for word in self.opts.words:
                ids = _ids(tokenizer, word)
                if len(ids) == 1 and ids[0] != tokenizer.unk_token_id or word in tokenizer.get_vocab():
                    problems.add(
                        f"--token_string: the tokenizer has '{word}' as a token ({ids[0]}) already; needed: a word "
                        "that it does not know. A known word can be the --init_word"
                    )
            if self.opts.init_word is not None:
                self._init_ids[key] = _ids(tokenizer, self.opts.init_word)
                if not self._init_ids[key]:
                    problems.add(f"--init_word is '{self.opts.init_word}'; the initial word gives no token of {key}")
        problems.raise_if_any()
        for key, tokenizer in zip(family.record.embedding_keys, strategies.tokenize.tokenizers, strict=True):
            if tokenizer is not None:
                first = max(tokenizer.get_vocab().values()) + 1
                tokenizer.add_tokens([AddedToken(word, single_word=True, normalized=False) for word in self.opts.words])
                found = tokenizer.convert_tokens_to_ids(self.opts.words)
                if found != list(range(first, first + len(found))):
                    raise ConfigError(f"the tokenizer of {key} cannot be extended: its numbers have gaps")
                self._first[key] = first
        self._tell_init()

    def _tell_init(self) -> None:
        counts = {len(ids) for ids in self._init_ids.values()} - {1, self.opts.num_vectors_per_token}
        if counts and not self.opts.weights and is_main_process():
            logger.warning(
                "--init_word '%s' has %s tokens, --num_vectors_per_token is %d: they are %s", self.opts.init_word,
                " or ".join(map(str, sorted(counts))), self.opts.num_vectors_per_token,
                "cut off" if min(counts) > self.opts.num_vectors_per_token else "repeated in turn",
            )

    def prepare_data(self, data: DataGroups) -> None:
        opts, words = self.opts, " ".join(self.opts.words)
        sentences = templates.OBJECT if opts.use_object_template else templates.STYLE if opts.use_style_template else ()
        if sentences:
            replacements: Mapping[str | re.Pattern[str], Any] = {"": [text.format(words) for text in sentences]}
        else:
            replacements = {whole_word(opts.token_string): words}
            self._warn_missing(data)
        for group in data.groups:
            group.set_replacements(replacements)

    def _warn_missing(self, data: DataGroups) -> None:
        """Captions without the word teach nothing about it. Its place may be a prefix or suffix of the subset."""
        pattern = whole_word(self.opts.token_string)
        without = [
            item.image_key
            for item in data.train.items
            if not item.subset.is_reg
            and not any(
                pattern.search(part or "")
                for part in (item.caption, item.subset.caption_prefix, item.subset.caption_suffix)
            )
        ]
        if without and is_main_process():
            more = f" and {len(without) - SHOWN} more" if len(without) > SHOWN else ""
            logger.warning(
                "%d of %d captions do not hold the word '%s': %s%s", len(without), len(data.train.items),
                self.opts.token_string, ", ".join(without[:SHOWN]), more,
            )

    def sample_prompt(self, prompt: SamplePrompt) -> SamplePrompt:
        return replace_token(prompt, self.opts.token_string, self.opts.num_vectors_per_token)

    # -- the vectors ----------------------------------------------------------------------------------------------

    def prepare_text_encoders(self, family: ModelFamily, encoders: TextEncoders, runtime: Runtime) -> None:
        given = self._start_weights(family) if self.opts.weights else {}
        for key, encoder in zip(family.record.embedding_keys, encoders, strict=True):
            if encoder is None or key not in self._first:
                continue
            table = encoder.get_input_embeddings()
            rows = given.get(key)
            if rows is None:
                generator = keyed_generator(runtime.seed, "new word", key)
                rows = start_rows(table, self._init_ids.get(key), self.opts.num_vectors_per_token, generator)
            if rows.shape[1] != table.embedding_dim:
                raise CheckpointError(
                    f"--weights {self.opts.weights} holds vectors of {rows.shape[1]} values in {key}; the text encoder "
                    f"has {table.embedding_dim}. It belongs to another model"
                )
            self.rows[key] = nn.Parameter(rows.to(runtime.device, runtime.trained_dtype))
            self._embeddings.append(EmbeddingRows(table, self.rows[key], self._first[key]))
            encoder.set_input_embeddings(self._embeddings[-1])

    def attach(self, family: ModelFamily, models: Models, runtime: Runtime) -> None:
        for part in (models.denoiser, *models.text_encoders):
            if part is not None:
                part.requires_grad_(False)

    def param_groups(self) -> list[ParamGroup]:
        return [
            {
                "params": list(self.rows.values()), "lr": self.config[OptimizerOptions].learning_rate,
                "name": "embeddings",
            }
        ]

    def modules(self) -> dict[str, nn.Module]:
        return {"embeddings": self.rows}

    @contextmanager
    def disabled(self):
        with ExitStack() as stack:
            for embedding in self._embeddings:
                stack.enter_context(embedding.untouched())
            yield

    def description(self) -> str:
        count = self.opts.num_vectors_per_token
        vectors = "1 vector" if count == 1 else f"{count} vectors"
        return f"{vectors} for the word '{self.opts.token_string}' in {' and '.join(self.rows)}"

    # -- files ----------------------------------------------------------------------------------------------------

    def save(self, path: str, dtype: torch.dtype | None, metadata: dict[str, str]) -> None:
        write_adapter_file(path, {key: rows.detach() for key, rows in self.rows.items()}, dtype, metadata)

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


def _ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False).input_ids
