"""HunyuanImage 2.1: captions to tokens, tokens to conditioning [text states, their mask, glyph states, their mask,
whether there are glyphs], and the caches.

What the caption puts in quotation marks is read a second time, byte by byte, by an encoder that knows how letters look.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from library.components.llm_encoder_utils import states_of
from library.components.text_encoder_utils import attended
from library.components.tokenizers import byt5_ids, check_ids, load_qwen25_vl_tokenizer
from library.dataset.latent_cache import LatentEncoder
from library.families.hunyuan_image import FAMILY
from library.hunyuan_image_vae import SAMPLE_SIZE
from library.strategy_base import (
    LatentsCachingStrategy,
    TextEncoderOutputsCachingStrategy,
    TextEncodingStrategy,
    TokenizeStrategy,
)

TEMPLATE_HEAD = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial"
    " relationships of the objects and background:<|im_end|>\n<|im_start|>user\n"
)
TEMPLATE_TAIL = "<|im_end|>"
MAX_LENGTH = 1024
"""tokens of a caption, the end of the template among them"""
GLYPH_LENGTH = 128
"""bytes of the glyph text, its end token among them"""
HIDDEN_LAYER = -3
"""of the states of the language model, counted from the last"""
QUOTES = (re.compile(r'"(.*?)"'), re.compile(r"‘(.*?)’"), re.compile(r"“(.*?)”"))


def glyph_text(caption: str) -> str:
    """What the glyph encoder reads: all texts in quotation marks, those in straight ones first; "" when there is
    none."""
    return "".join(f'Text "{text}". ' for quotes in QUOTES for text in quotes.findall(caption))


class HunyuanImageTokenizeStrategy(TokenizeStrategy):
    """Qwen2.5-VL with its template, and the bytes of what is quoted. Both are padded to the longest of the batch.

    The tokenizer comes ready, or from the folder `tokenizer`, `tokenizer_cache_dir`, the folder of the text encoder
    `text_encoder_path`, or the hub. ConfigError when it cannot be found.
    """

    def __init__(
        self, tokenizer_cache_dir: str | None = None, tokenizer: Any | None = None, text_encoder_path: str | None = None
    ) -> None:
        self.vlm = (
            tokenizer
            if callable(tokenizer)
            else load_qwen25_vl_tokenizer(tokenizer, tokenizer_cache_dir, text_encoder_path)
        )
        self.num_head = len(self.vlm(TEMPLATE_HEAD).input_ids)
        """tokens of the template before the caption; 34 with the released tokenizer"""

    def tokenize(self, text: str | list[str]) -> list[Tensor]:
        """[ids [B, L] of captions in their template, mask [B, L], glyph ids [B, G], mask [B, G]]; masks have 1 for
        tokens. G is 1, and the mask 0, where no caption quotes anything."""
        texts = [text] if isinstance(text, str) else list(text)
        vlm = self.vlm(
            [TEMPLATE_HEAD + caption + TEMPLATE_TAIL for caption in texts],
            padding=True, truncation=True, max_length=self.num_head + MAX_LENGTH, return_tensors="pt",
        )  # fmt: skip
        rows = [byt5_ids(glyphs, GLYPH_LENGTH) if (glyphs := glyph_text(caption)) else [] for caption in texts]
        longest = max(1, *map(len, rows))
        glyph_ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        lengths = torch.tensor([len(row) for row in rows])
        glyph_mask = (torch.arange(longest) < lengths[:, None]).long()
        return [vlm["input_ids"].long(), vlm["attention_mask"].long(), glyph_ids, glyph_mask]

    def overlong(self, text: str) -> bool:
        """Whether one of the two encoders does not see all of it."""
        tokens = len(self.vlm(text + TEMPLATE_TAIL, verbose=False).input_ids)
        return tokens > MAX_LENGTH or len(glyph_text(text).encode()) >= GLYPH_LENGTH


class HunyuanImageTextEncodingStrategy(TextEncodingStrategy):
    """Texts of one length run together and never see padding: a caption's states do not depend on its batch."""

    def encode_tokens(
        self, tokenize_strategy: HunyuanImageTokenizeStrategy, models: list[Any], tokens: list[Tensor]
    ) -> list[Tensor | None]:
        """[text states [B, L, D] without those of the template's head, their mask [B, L], glyph states [B, G, E], their
        mask [B, G], whether there are glyphs [B]]; states are 0 where there is no token, and None where a model is
        absent.

        `models` = [Qwen2.5-VL, ByT5]. ConfigError when an id has no embedding row.
        """
        ids, mask, glyph_ids, glyph_mask = tokens
        vlm, byt5 = models[0] if models else None, models[1] if len(models) > 1 else None
        head = tokenize_strategy.num_head
        text_mask = mask[:, head:]
        text_states = glyph_states = None
        if vlm is not None:
            check_ids(ids, vlm, tokenize_strategy.vlm, "Qwen2.5-VL", "the text encoder")
            text_states = states_of(
                ids, mask, vlm,
                lambda rows: vlm(
                    rows, attended(vlm, rows, causal=True), output_hidden_states=True
                ).hidden_states[HIDDEN_LAYER],
            )[:, head:]
        if byt5 is not None:
            glyph_states = states_of(glyph_ids, glyph_mask, byt5, lambda rows: byt5(rows).last_hidden_state)
        return [text_states, text_mask, glyph_states, glyph_mask, glyph_mask.any(dim=1)]


class HunyuanImageLatentEncoder(LatentEncoder):
    """Latents of the 32x autoencoder, one posterior draw per image and size, stored without the scale."""

    tiling = False
    """whether the autoencoder was loaded to compute larger pictures in tiles"""

    def manner(self, bucket: Sequence[int]) -> str:
        return "in tiles" if self.tiling and max(bucket[:2]) > SAMPLE_SIZE else ""

    def encode(self, vae: Any, images: Tensor, seeds: Sequence[int]) -> Tensor:
        return vae.encode_raw(images, seeds)


class HunyuanImageLatentsCachingStrategy(HunyuanImageLatentEncoder, LatentsCachingStrategy):
    architecture = FAMILY.architecture


class HunyuanImageTextEncoderOutputsCachingStrategy(TextEncoderOutputsCachingStrategy):
    """Text states and glyph states with their masks, each as long as its caption, and whether there are glyphs."""

    architecture = FAMILY.architecture
