"""Textual inversion: text encoders learn a new word, and nothing else of the model changes."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch
from torch import nn

from library.config_util import ScriptRules
from library.core.errors import Problems
from library.core.options import Config, Ignored
from library.training.new_words import TextualInversionOptions
from library.training.new_words.layered import LayeredWord
from library.training.new_words.learned import LearnedWord
from library.training.optimizers import OptimizerOptions
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


class TextualInversion(Trainable):
    """A new word of one vector or several, for each text encoder."""

    name = "textual_inversion"
    options = TextualInversionOptions
    script, begins_with = "train_textual_inversion", "--weights"
    spec_kind = "textual-inversion"
    opts: TextualInversionOptions
    word_class: type[LearnedWord] = LearnedWord

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.word = self.word_class(self.opts)

    @property
    def rows(self) -> nn.ParameterDict:
        """What is learned: vectors [n, D] by text encoder."""
        return self.word.rows

    def check(self, family: ModelFamily) -> None:
        problems = Problems()
        for problem in self.word.problems(family):
            problems.add(problem)
        if not self.config[OptimizerOptions].learning_rate:
            problems.add("--learning_rate is 0: there is nothing to train")
        problems.raise_if_any()

    def idle(self, family: ModelFamily) -> list[Ignored]:
        return self.word.idle()

    def fixed_settings(self, family: ModelFamily) -> dict[str, Plain]:
        return self.word.fixed_settings()

    def trains_text_encoders(self, family: ModelFamily) -> list[bool]:
        return [True] * len(family.record.embedding_keys)

    @classmethod
    def dataset_rules(cls, family: ModelFamily | type[ModelFamily]) -> str | ScriptRules:
        return ScriptRules(dropout=False)

    def prepare_tokenizers(self, family: ModelFamily, strategies: StrategySet) -> None:
        self.word.prepare_tokenizers(family.record.embedding_keys, strategies.tokenize.tokenizers)
        self.word.check_length(strategies.tokenize)

    def text_strategies(self, strategies: StrategySet) -> StrategySet:
        return self.word.text_strategies(strategies)

    def prepare_data(self, data: DataGroups) -> None:
        self.word.prepare_data(data)

    def sample_prompt(self, prompt: SamplePrompt) -> SamplePrompt:
        return self.word.sample_prompt(prompt)

    def prepare_text_encoders(self, family: ModelFamily, encoders: TextEncoders, runtime: Runtime) -> None:
        self.word.prepare_text_encoders(family.record.embedding_keys, encoders, runtime)

    def attach(self, family: ModelFamily, models: Models, runtime: Runtime) -> None:
        for part in (models.denoiser, *models.text_encoders):
            if part is not None:
                part.requires_grad_(False)

    def param_groups(self) -> list[ParamGroup]:
        rate = self.config[OptimizerOptions].learning_rate
        return [{"params": list(self.rows.values()), "lr": rate, "name": "embeddings"}]

    def modules(self) -> dict[str, nn.Module]:
        return {"embeddings": self.rows}

    def disabled(self) -> AbstractContextManager[None]:
        return self.word.disabled()

    def description(self) -> str:
        return self.word.description

    def save(self, path: str, dtype: torch.dtype | None, metadata: dict[str, str]) -> None:
        write_adapter_file(path, self.word.file_tensors(), dtype, metadata)

    def load(self, path: str) -> None:
        self.word.load(path)

    def metadata(self) -> dict[str, Plain]:
        return self.word.metadata()


class LayeredTextualInversion(TextualInversion):
    """A new word with vectors of its own for each layer with cross-attention (XTI)."""

    name = "textual_inversion_xti"
    script = "train_textual_inversion_XTI"
    word_class = LayeredWord

    def notices(self) -> list[str]:
        if self.opts.num_vectors_per_token == 1 or not self.opts.init_word or self.opts.weights:
            return []
        return [
            "--init_word: each vector starts from its own token of it in every layer; train_textual_inversion_XTI.py "
            "of sd-scripts takes one token for 16 rows in turn"
        ]
