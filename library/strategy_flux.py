"""FLUX.1: captions to tokens, tokens to conditioning [pooled CLIP state, T5 states, text ids, T5 mask], and the
caches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from library.components import text_encoder_utils
from library.components.tokenizers import check_ids, load_clip_tokenizer, load_t5_tokenizer
from library.dataset.latent_cache import LatentEncoder
from library.device_utils import to_device
from library.families.flux import FAMILY
from library.strategy_base import (
    LatentsCachingStrategy,
    TextEncoderOutputsCachingStrategy,
    TextEncodingStrategy,
    TokenizeStrategy,
)

CLIP_L_MAX_LENGTH = 77


class FluxTokenizeStrategy(TokenizeStrategy):
    """CLIP-L (77 tokens) and T5 (`t5xxl_max_length`: 512 for dev, 256 for schnell).

    The tokenizers come from a folder (`clip_l_tokenizer`, `t5xxl_tokenizer`; ready tokenizer objects are taken as they
    are), `tokenizer_cache_dir`, the T5 file `t5xxl_path`, an installed package, or the hub, in this order. ConfigError
    when one cannot be found.
    """

    def __init__(
        self,
        t5xxl_max_length: int = 512,
        tokenizer_cache_dir: str | None = None,
        clip_l_tokenizer: Any | None = None,
        t5xxl_tokenizer: Any | None = None,
        t5xxl_path: str | None = None,
    ) -> None:
        self.t5xxl_max_length = t5xxl_max_length
        self.clip_l = (
            clip_l_tokenizer
            if callable(clip_l_tokenizer)
            else load_clip_tokenizer(clip_l_tokenizer, tokenizer_cache_dir)
        )
        self.t5xxl = (
            t5xxl_tokenizer
            if callable(t5xxl_tokenizer)
            else load_t5_tokenizer(t5xxl_tokenizer, tokenizer_cache_dir, t5xxl_path)
        )
        self.t5xxl.model_max_length = t5xxl_max_length

    @property
    def tokenizers(self) -> list[Any]:
        return [self.clip_l, self.t5xxl]

    def tokenize(self, text: str | list[str]) -> list[Tensor]:
        """[CLIP ids [B, 77], T5 ids [B, L], T5 mask [B, L] with 1 = token]."""
        texts = [text] if isinstance(text, str) else list(text)
        clip = padded_tokens(self.clip_l, texts, CLIP_L_MAX_LENGTH)
        t5 = padded_tokens(self.t5xxl, texts, self.t5xxl_max_length)
        return [clip["input_ids"], t5["input_ids"], t5["attention_mask"]]

    def overlong(self, text: str) -> bool:
        """Whether T5, which carries the text in this family, does not see all of it."""
        return is_overlong(self.t5xxl, text, self.t5xxl_max_length)


def padded_tokens(tokenizer: Any, texts: list[str], length: int) -> Any:
    """Ids and mask [B, length] of some texts."""
    return tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")


def is_overlong(tokenizer: Any, text: str, length: int) -> bool:
    """Whether a text has more tokens than are read."""
    return len(tokenizer(text, verbose=False).input_ids) > length


class FluxTextEncodingStrategy(TextEncodingStrategy):
    """`apply_t5_attn_mask`: T5 does not attend to padding. The mask itself is always part of the result."""

    def __init__(self, apply_t5_attn_mask: bool = False) -> None:
        self.apply_t5_attn_mask = apply_t5_attn_mask

    def encode_tokens(
        self, tokenize_strategy: FluxTokenizeStrategy, models: list[nn.Module | None], tokens: list[Tensor]
    ) -> list[Tensor | None]:
        """[pooled [B, D], T5 states [B, L, D], text ids [B, L, 3] of zeros, T5 mask [B, L]]; None where a model is
        absent.

        `models` = [CLIP-L, T5]; `tokens` as `tokenize` gives them. ConfigError when an id has no embedding row.
        """
        clip_l, t5xxl = models[0], models[1] if len(models) > 1 else None
        clip_ids, t5_ids, t5_mask = tokens
        pooled, of_t5 = None, [None, None, None]
        if clip_l is not None and clip_ids is not None:
            check_ids(clip_ids, clip_l, tokenize_strategy.clip_l, "CLIP-L")
            pooled = pool_at_first_eos(clip_l, clip_ids, tokenize_strategy.clip_l.eos_token_id)
        if t5xxl is not None and t5_ids is not None:
            of_t5 = t5_outputs(t5xxl, tokenize_strategy.t5xxl, t5_ids, t5_mask, masked=self.apply_t5_attn_mask)
        return [pooled, *of_t5]


def t5_outputs(t5xxl: Any, tokenizer: Any, ids: Tensor, mask: Tensor, *, masked: bool) -> list[Tensor]:
    """[T5 states [B, L, D], text ids [B, L, 3] of zeros, mask [B, L]] of tokens [B, L]; `masked`: T5 does not attend to
    padding. ConfigError when an id has no embedding row."""
    check_ids(ids, t5xxl, tokenizer, "T5")
    device = _device(t5xxl)
    mask = to_device(mask, device)
    ids = to_device(ids, device)
    seen = text_encoder_utils.attended(t5xxl, ids, mask) if masked else None
    states = t5xxl(ids, attention_mask=seen).last_hidden_state
    return [states, torch.zeros(*ids.shape, 3, device=device), mask]


def pool_at_first_eos(clip_l: nn.Module, ids: Tensor, eos_id: int) -> Tensor:
    """The final-normed state at the first end token of each row, [B, D], without projection.

    A row without an end token (which tokenizers do not make) is pooled at its first place.
    """
    device = _device(clip_l)
    ids = to_device(ids, device)
    states = clip_l.text_model(input_ids=ids).last_hidden_state  # [B, L, D]
    return text_encoder_utils.pool_at_first_eos(states, ids, eos_id)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


class FluxLatentEncoder(LatentEncoder):
    """Latents of the FLUX.1 autoencoder, shifted and scaled, one posterior draw per image and size."""

    def encode(self, vae: nn.Module, images: Tensor, seeds: Sequence[int]) -> Tensor:
        return vae.encode(images, seeds)


class FluxLatentsCachingStrategy(FluxLatentEncoder, LatentsCachingStrategy):
    architecture = FAMILY.architecture


class FluxTextEncoderOutputsCachingStrategy(TextEncoderOutputsCachingStrategy):
    """Pooled CLIP state, T5 states, their ids and mask. A partial cache leaves the CLIP state to the CLIP-L that
    trains."""

    architecture = FAMILY.architecture

    def __init__(
        self,
        cache_to_disk: bool,
        batch_size: int | None,
        skip_disk_cache_validity_check: bool,
        is_partial: bool = False,
        is_weighted: bool = False,
        apply_t5_attn_mask: bool = False,
    ) -> None:
        super().__init__(cache_to_disk, batch_size, skip_disk_cache_validity_check, is_partial, is_weighted)
        self.apply_t5_attn_mask = apply_t5_attn_mask

    @property
    def flags(self) -> dict[str, bool]:
        return {"apply_t5_attn_mask": self.apply_t5_attn_mask}
