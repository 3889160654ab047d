"""The strategies of one run: who turns captions into tokens and tokens into conditioning, and the caches of what comes
out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from library.checkpoints.identity import combined_identity
from library.dataset.text_cache_io import MERGED

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

    from library.dataset.latent_cache import LatentCache
    from library.dataset.text_cache import TextCache
    from library.dataset.text_cache_io import TextLayout
    from library.strategy_base import TextEncodingStrategy, TokenizeStrategy

Conditioning = dict[str, "Tensor"]
"""what the denoiser is given beside latents and times: name of a TextKey -> [B, ...]"""


@dataclass(frozen=True)
class NegativeText:
    """The name of a negative prompt's conditioning where such texts are read otherwise than prompts."""

    text: str


Texts = dict["str | NegativeText", Conditioning]
"""conditioning of the texts of sample prompts"""


@dataclass(frozen=True)
class StrategySet:
    """The strategies of one run, made by the family and handed to dataset and step. A cache that is None is off."""

    tokenize: TokenizeStrategy
    text_encoding: TextEncodingStrategy
    latents_caching: LatentCache | None = None
    text_encoder_outputs_caching: TextCache | None = None
    text_layout: TextLayout | None = None
    """what the text encoding gives; None: that of the cache"""

    prompt_text: Callable[[str], str] = str
    """a sample prompt as it is tokenized, where words of embedding files stand for their tokens"""

    @property
    def layout(self) -> TextLayout:
        return self.text_layout or self.text_encoder_outputs_caching.layout

    def negative_key(self, text: str) -> str | NegativeText:
        """The name of a negative prompt among `Texts`."""
        return NegativeText(text) if getattr(self.tokenize, "negative_differs", False) else text

    def encode(
        self, models: Sequence[Module | None], tokens: list[Tensor], weights: list[Tensor] | None = None
    ) -> Conditioning:
        """The conditioning that the models make; keys of models that are None are not there."""
        outputs = encoded(self.text_encoding, self.tokenize, models, tokens, weights)
        return self.layout.named(outputs, type(self.text_encoding).__name__)

    def mark_text_models(self, mark: str) -> None:
        """Tell cached text outputs of encoders that `mark` stands for (changed ones) from those of others; "" =
        unchanged."""
        caching = self.text_encoder_outputs_caching
        if caching is not None and mark:
            caching.model_identity = combined_identity([caching.model_identity, mark])
            caching.settings = {**caching.settings, MERGED: mark}


def encoded(
    text_encoding: TextEncodingStrategy, tokenize: TokenizeStrategy, models: Sequence[Module | None],
    tokens: list[Tensor], weights: list[Tensor] | None,
) -> list[Tensor | None]:
    """What a text encoding strategy gives for tokens and, where captions carry them, their weights: the list of its
    family."""
    if weights is None:
        return text_encoding.encode_tokens(tokenize, list(models), tokens)
    return text_encoding.encode_tokens_with_weights(tokenize, list(models), tokens, weights)
