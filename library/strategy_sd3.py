"""SD3: captions to tokens, tokens to conditioning [CLIP states, T5 states, pooled states, masks], and the caches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from library.components.text_encoder_utils import CLIP_G, attended, pool_at_first_eos
from library.components.tokenizers import check_ids, load_clip_tokenizer, load_t5_tokenizer
from library.dataset.latent_cache import LatentEncoder
from library.device_utils import to_device
from library.families.sd3 import FAMILY
from library.strategy_base import (
    LatentsCachingStrategy,
    TextEncoderOutputsCachingStrategy,
    TextEncodingStrategy,
    TokenizeStrategy,
)

CLIP_MAX_LENGTH = 77
CLIP_G_PAD = CLIP_G.pad
"""id 0 of the common vocabulary, with which CLIP-G was trained"""
LENGTH_WITHOUT_T5 = 77
"""tokens of zeros that stand for T5 where there is none"""


class Sd3TokenizeStrategy(TokenizeStrategy):
    """CLIP-L and CLIP-G (77 tokens each) and T5 (`t5xxl_max_length`).

    Tokenizers come from a folder (`clip_l_tokenizer`, `clip_g_tokenizer`, `t5xxl_tokenizer`; ready tokenizer objects
    are taken as they are), `tokenizer_cache_dir`, the T5 file `t5xxl_path`, an installed package, or the hub, in this
    order. `has_t5`: without it the ids of T5 are padding alone. ConfigError when a tokenizer cannot be found.
    """

    def __init__(
        self,
        t5xxl_max_length: int = 256,
        tokenizer_cache_dir: str | None = None,
        *,
        clip_l_tokenizer: Any | None = None,
        clip_g_tokenizer: Any | None = None,
        t5xxl_tokenizer: Any | None = None,
        t5xxl_path: str | None = None,
        has_t5: bool = True,
    ) -> None:
        self.t5xxl_max_length = t5xxl_max_length if has_t5 else LENGTH_WITHOUT_T5

        def clip(given: Any | None, pad: str | None = None) -> Any:
            return given if callable(given) else load_clip_tokenizer(given, tokenizer_cache_dir, pad_token=pad)

        self.clip_l, self.clip_g = clip(clip_l_tokenizer), clip(clip_g_tokenizer, CLIP_G_PAD)
        self.t5xxl = None
        if has_t5:
            self.t5xxl = (
                t5xxl_tokenizer
                if callable(t5xxl_tokenizer)
                else load_t5_tokenizer(t5xxl_tokenizer, tokenizer_cache_dir, t5xxl_path)
            )
            self.t5xxl.model_max_length = t5xxl_max_length

    @property
    def tokenizers(self) -> list[Any]:
        return [self.clip_l, self.clip_g, self.t5xxl]

    def tokenize(self, text: str | list[str]) -> list[Tensor]:
        """[ids of CLIP-L [B, 77], of CLIP-G [B, 77], of T5 [B, L], their masks with 1 = token]."""
        texts = [text] if isinstance(text, str) else list(text)
        made = [self._encode(self.clip_l, texts, CLIP_MAX_LENGTH), self._encode(self.clip_g, texts, CLIP_MAX_LENGTH)]
        if self.t5xxl is None:
            empty = torch.zeros(len(texts), self.t5xxl_max_length, dtype=torch.int64)
            made.append({"input_ids": empty, "attention_mask": empty})
        else:
            made.append(self._encode(self.t5xxl, texts, self.t5xxl_max_length))
        return [*(tokens["input_ids"] for tokens in made), *(tokens["attention_mask"] for tokens in made)]

    def overlong(self, text: str) -> bool:
        """Whether T5, or without it CLIP, does not see all of a text."""
        if self.t5xxl is None:
            return len(self.clip_l(text, verbose=False).input_ids) > CLIP_MAX_LENGTH
        return len(self.t5xxl(text, verbose=False).input_ids) > self.t5xxl_max_length

    @staticmethod
    def _encode(tokenizer: Any, texts: list[str], length: int) -> Any:
        return tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")


class Sd3TextEncodingStrategy(TextEncodingStrategy):
    """`apply_lg_attn_mask`, `apply_t5_attn_mask`: CLIP and T5 do not attend to padding. `t5_width`: width of the zeros
    that stand for T5 in a run without it; None where T5 is merely not in memory."""

    def __init__(
        self, apply_lg_attn_mask: bool = False, apply_t5_attn_mask: bool = False, t5_width: int | None = None
    ) -> None:
        self.apply_lg_attn_mask = bool(apply_lg_attn_mask)
        self.apply_t5_attn_mask = bool(apply_t5_attn_mask)
        self.t5_width = t5_width

    def encode_tokens(
        self, tokenize_strategy: Sd3TokenizeStrategy, models: list[Any], tokens: list[Tensor]
    ) -> list[Tensor | None]:
        """[CLIP states side by side [B, 77, D_l + D_g], T5 states [B, L, D], pooled CLIP states [B, D_l + D_g], masks
        of the three]; None where a model is absent.

        `models` = [CLIP-L, CLIP-G, T5]; `tokens` as `tokenize` gives them. ConfigError when an id has no embedding row.
        """
        clip_l, clip_g, t5xxl = (*models, None, None, None)[:3]
        l_ids, g_ids, t5_ids, *masks = tokens
        states = pooled = t5_states = None
        if clip_l is not None and clip_g is not None:
            first = self._clip(clip_l, l_ids, masks[0], tokenize_strategy.clip_l, "CLIP-L")
            second = self._clip(clip_g, g_ids, masks[1], tokenize_strategy.clip_g, "CLIP-G")
            states, pooled = (torch.cat(pair, dim=-1) for pair in zip(first, second))
        if t5xxl is not None:
            check_ids(t5_ids, t5xxl, tokenize_strategy.t5xxl, "T5")
            device = _device(t5xxl)
            ids = to_device(t5_ids, device)
            seen = attended(t5xxl, ids, to_device(masks[2], device)) if self.apply_t5_attn_mask else None
            t5_states = t5xxl(ids, attention_mask=seen).last_hidden_state
        elif self.t5_width is not None:
            t5_states = torch.zeros(*t5_ids.shape, self.t5_width, device=None if states is None else states.device)
        return [states, t5_states, pooled, *masks]

    def _clip(self, encoder: Any, ids: Tensor, mask: Tensor, tokenizer: Any, name: str) -> tuple[Tensor, Tensor]:
        """The last but one layer without the final norm [B, 77, D], and the projected state of the first end token."""
        check_ids(ids, encoder, tokenizer, name)
        device = _device(encoder)
        ids = to_device(ids, device)
        seen = attended(encoder, ids, to_device(mask, device), causal=True) if self.apply_lg_attn_mask else None
        result = encoder.text_model(input_ids=ids, attention_mask=seen, output_hidden_states=True)
        pooled = pool_at_first_eos(result.last_hidden_state, ids, tokenizer.eos_token_id)
        # row by row: a matrix of one row takes another kernel, and a caption's result must not depend on those with it
        return result.hidden_states[-2], torch.cat([encoder.text_projection(row) for row in pooled.split(1)])


def _device(model: Any) -> torch.device:
    return next(model.parameters()).device


class Sd3LatentEncoder(LatentEncoder):
    """Latents of the SD3 autoencoder as it gives them, one posterior draw per image and size; the step shifts and
    scales."""

    def encode(self, vae: Any, images: Tensor, seeds: Sequence[int]) -> Tensor:
        return vae.encode_raw(images, seeds)


class Sd3LatentsCachingStrategy(Sd3LatentEncoder, LatentsCachingStrategy):
    architecture = FAMILY.architecture


class Sd3TextEncoderOutputsCachingStrategy(TextEncoderOutputsCachingStrategy):
    """CLIP states and pooled states, T5 states and the masks. A partial cache leaves what CLIP makes to the CLIPs that
    train."""

    architecture = FAMILY.architecture

    def __init__(
        self,
        cache_to_disk: bool,
        batch_size: int | None,
        skip_disk_cache_validity_check: bool,
        is_partial: bool = False,
        apply_lg_attn_mask: bool = False,
        apply_t5_attn_mask: bool = False,
    ) -> None:
        super().__init__(cache_to_disk, batch_size, skip_disk_cache_validity_check, is_partial)
        self.apply_lg_attn_mask = bool(apply_lg_attn_mask)
        self.apply_t5_attn_mask = bool(apply_t5_attn_mask)

    @property
    def flags(self) -> dict[str, bool]:
        return {"apply_lg_attn_mask": self.apply_lg_attn_mask, "apply_t5_attn_mask": self.apply_t5_attn_mask}
