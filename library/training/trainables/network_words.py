"""An adapter and, with --token_string, the vectors of a new word, in one run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import nn

from library.core.errors import Problems
from library.core.options import Config, Ignored, option_fields, without_effect
from library.training.hooks.base import Hook
from library.training.new_words import AddedWordOptions
from library.training.new_words.added import AddedWord, WordFile, unused_words
from library.training.option_groups import EmaOptions
from library.training.optimizers import OptimizerOptions
from library.training.trainables.network import NetworkTrainable

if TYPE_CHECKING:
    from library.dataset.strategies import StrategySet
    from library.training.accelerator_setup import Runtime
    from library.training.data_phase import DataGroups
    from library.training.protocols import ParamGroup, Plain, TextEncoders
    from library.training.sampling_prompts import SamplePrompt
    from library.training.wiring.base import ModelFamily


class NetworkWithWords(NetworkTrainable):
    """`word` is None where no new word is learned: the run is that of the adapter alone."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        options = config[AddedWordOptions] if AddedWordOptions in config else None
        self.word = AddedWord(options, self.opts.network_weights) if options and options.token_string else None
        if self.word is not None:
            reason = "the text encoders read the vectors of --token_string, so leave that out,"
            self.keeps_text_still = reason  # type: ignore[misc]  # of this run

    def check(self, family: ModelFamily) -> None:
        problems = Problems()
        problems.attempt(lambda: super(NetworkWithWords, self).check(family))
        if self.word is not None:
            for problem in self.word.problems(family):
                problems.add(problem)
        problems.raise_if_any()

    def idle(self, family: ModelFamily) -> list[Ignored]:
        found = super().idle(family)
        if self.word is not None:
            found += self.word.idle()
        elif AddedWordOptions in self.config:
            given = [name for name in option_fields(AddedWordOptions) if name in self.config.explicit]
            found += without_effect([name for name in given if name != "token_string"], "--token_string is not given")
        return [*found, *unused_words(self.opts.network_weights, self.word and self.word.opts.token_string)]

    def fixed_settings(self, family: ModelFamily) -> dict[str, Plain]:
        word = self.word.fixed_settings() if self.word is not None else {"token_string": None}
        return {**super().fixed_settings(family), **word}

    def follows_text_encoders(self, family: ModelFamily) -> list[bool]:
        if self.word is None:
            return super().follows_text_encoders(family)
        return [True] * len(family.record.embedding_keys)

    @property
    def _word_rate(self) -> float | None:
        rate = self.config[AddedWordOptions].embedding_lr
        return self.config[OptimizerOptions].learning_rate if rate is None else rate

    def _rates(self, family: ModelFamily) -> list[float]:
        return [*super()._rates(family), *([self._word_rate] if self.word is not None else [])]

    def _has_a_rate(self, family: ModelFamily) -> bool:
        return super()._has_a_rate(family) or (self.word is not None and bool(self._word_rate))

    # -- the word in captions, prompts, tokenizers and text encoders ---------------------------------------------------

    def prepare_tokenizers(self, family: ModelFamily, strategies: StrategySet) -> None:
        if self.word is not None:
            self.word.prepare_tokenizers(family.record.embedding_keys, strategies.tokenize.tokenizers)
            self.word.check_length(strategies.tokenize)

    def prepare_data(self, data: DataGroups) -> None:
        if self.word is not None:
            self.word.prepare_data(data)

    def sample_prompt(self, prompt: SamplePrompt) -> SamplePrompt:
        return prompt if self.word is None else self.word.sample_prompt(prompt)

    def prepare_text_encoders(self, family: ModelFamily, encoders: TextEncoders, runtime: Runtime) -> None:
        if self.word is not None:
            self.word.prepare_text_encoders(family.record.embedding_keys, encoders, runtime)

    # -- training ------------------------------------------------------------------------------------------------------

    def param_groups(self) -> list[ParamGroup]:
        if self.word is None:
            return super().param_groups()
        rate, rows = self._word_rate, list(self.word.rows.values())
        self.word.rows.requires_grad_(bool(rate))
        if not rate:
            return super().param_groups()
        return [*self.adapter_groups(), {"params": rows, "lr": rate, "name": "embeddings"}]

    def modules(self) -> dict[str, nn.Module]:
        return {**super().modules(), **({"embeddings": self.word.rows} if self.word is not None else {})}

    @contextmanager
    def disabled(self) -> Iterator[None]:
        with super().disabled(), nullcontext() if self.word is None else self.word.disabled():
            yield

    def hooks(self) -> list[Hook]:
        own = self.word is not None and bool(self.word.opts.companions)
        return [*super().hooks(), *([WordFile(self.word, self.config[EmaOptions].ema)] if own else [])]

    def description(self) -> str:
        own = super().description()
        return own if self.word is None else f"{own}, and {self.word.description}"

    # -- files ---------------------------------------------------------------------------------------------------------

    def beside(self) -> dict[str, torch.Tensor]:
        return {**super().beside(), **(self.word.bundle() if self.word is not None else {})}

    def load(self, path: str) -> None:
        super().load(path)
        if self.word is not None:
            self.word.load(path)

    def metadata(self) -> dict[str, Plain]:
        return {**super().metadata(), **(self.word.metadata() if self.word is not None else {})}
