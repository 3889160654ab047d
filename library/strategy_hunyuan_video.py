"""HunyuanVideo: captions to conditioning [states of LLaMA, their mask, CLIP-L's state of the whole, its mask], and the
caches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from library.dataset.latent_cache import LatentEncoder
from library.strategy_base import TextEncodingStrategy
from library.strategy_llama_clip import (
    HIDDEN_LAYER,
    TEXT_LENGTH,
    LlamaClipTokenizeStrategy,
    llama_states,
    padded,
    pooled_clip,
)


class HunyuanVideoTokenizeStrategy(LlamaClipTokenizeStrategy):
    """LLaMA with the template of videos, for pictures too, and CLIP-L."""


class HunyuanVideoTextEncodingStrategy(TextEncodingStrategy):
    """A caption's states do not depend on its batch. `hidden_layer`, `final_norm`: see `llama_states`."""

    def __init__(self, hidden_layer: int = HIDDEN_LAYER, final_norm: bool = False) -> None:
        self.hidden_layer, self.final_norm = hidden_layer, final_norm

    def encode_tokens(
        self, tokenize_strategy: HunyuanVideoTokenizeStrategy, models: list[Any], tokens: list[Tensor]
    ) -> list[Tensor | None]:
        """[states [B, 256, D] without those of the template's head, 0 where there is no token, their mask [B, 256],
        state of the caption as a whole [B, E], CLIP's mask [B, 77]]; states are None where a model is absent.

        `models` = [LLaMA, CLIP-L]. ConfigError when an id has no embedding row.
        """
        ids, mask, clip_ids, clip_mask = tokens
        llama, clip_l = models[0] if models else None, models[1] if len(models) > 1 else None
        how = (TEXT_LENGTH, self.hidden_layer, self.final_norm)
        states = None if llama is None else llama_states(tokenize_strategy, llama, ids, mask, *how)
        pooled = None if clip_l is None else pooled_clip(tokenize_strategy, clip_l, clip_ids)
        return [states, padded(mask[:, tokenize_strategy.num_head :], TEXT_LENGTH), pooled, clip_mask]


class HunyuanVideoLatentEncoder(LatentEncoder):
    """Latents of the causal video autoencoder, one posterior draw per sample and size, stored without the scale."""

    tile_size: int | None = None
    """pixels of a side of tiles in which the autoencoder was loaded to compute larger frames"""

    def pieces(self, bucket: Sequence[int]) -> str:
        tiled = self.tile_size is not None and max(bucket[:2]) > self.tile_size
        return f"in tiles of {self.tile_size} pixels" if tiled else ""

    def encode(self, vae: Any, images: Tensor, seeds: Sequence[int]) -> Tensor:
        return vae.encode_raw(images, seeds)
