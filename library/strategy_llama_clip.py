"""Captions of clips: read by LLaMA inside of a template that asks for a description, and as a whole by CLIP-L. What the
families with these two text encoders share.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from library.components.llm_encoder_utils import states_of
from library.components.text_encoder_utils import attended, pool_at_first_eos
from library.components.tokenizers import check_ids, load_clip_tokenizer, load_llama_tokenizer
from library.device_utils import to_device
from library.strategy_base import TokenizeStrategy

VIDEO_HEAD = (
    "<|start_header_id|>system<|end_header_id|>\n\nDescribe the video by detailing the following aspects: "
    "1. The main content and theme of the video."
    "2. The color, shape, size, texture, quantity, text, and spatial relationships of the objects."
    "3. Actions, events, behaviors temporal relationships, physical movement changes of the objects."
    "4. background environment, light, style and atmosphere."
    "5. camera angles, movements, and transitions used in the video:<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\n"
)
"""95 tokens with the one that begins a text, which the released tokenizer adds; of pictures too"""
TAIL = "<|eot_id|>"
TEXT_LENGTH = 256
"""tokens of a caption, the end of the template among them"""
HIDDEN_LAYER = -3
"""of the states of the language model, counted from the last, which follows its last norm"""
CLIP_LENGTH = 77


def system_head(text: str) -> str:
    """What stands before the caption where the system is told `text`."""
    return f"<|start_header_id|>system<|end_header_id|>\n\n{text}<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"


class LlamaClipTokenizeStrategy(TokenizeStrategy):
    """LLaMA with its template, and CLIP-L. `head`: the template before the caption.

    The tokenizers come ready, or from the folders `llama_tokenizer` and `clip_l_tokenizer`, `tokenizer_cache_dir`, the
    folder of the language model `llama_path`, an installed package, or the hub. ConfigError when one cannot be found.
    """

    def __init__(
        self,
        tokenizer_cache_dir: str | None = None,
        llama_tokenizer: Any | None = None,
        clip_l_tokenizer: Any | None = None,
        llama_path: str | None = None,
        head: str = VIDEO_HEAD,
    ) -> None:
        self.llama = (
            llama_tokenizer
            if callable(llama_tokenizer)
            else load_llama_tokenizer(llama_tokenizer, tokenizer_cache_dir, llama_path)
        )
        self.clip_l = (
            clip_l_tokenizer
            if callable(clip_l_tokenizer)
            else load_clip_tokenizer(clip_l_tokenizer, tokenizer_cache_dir, option="--text_encoder2_tokenizer")
        )
        self.head = head
        self.num_head = len(self.llama_ids(head))
        """tokens of the template before the caption, whose states are left out"""

    @property
    def tokenizers(self) -> list[Any]:
        return [self.llama, self.clip_l]

    def llama_ids(self, text: str) -> list[int]:
        """A text's tokens behind the one that begins every text."""
        ids = list(self.llama(text, verbose=False).input_ids)
        begin = self.llama.bos_token_id
        return ids if begin is None or ids[:1] == [begin] else [begin, *ids]

    def tokenize(self, text: str | list[str]) -> list[Tensor]:
        """[ids [B, L] of captions in their template, mask [B, L], CLIP ids [B, 77], mask [B, 77]]; masks have 1 for
        tokens, L is that of the longest."""
        texts = [text] if isinstance(text, str) else list(text)
        longest = self.num_head + TEXT_LENGTH
        rows = [self.llama_ids(self.head + caption + TAIL)[:longest] for caption in texts]
        width = max(map(len, rows))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        mask = (torch.arange(width) < torch.tensor([len(row) for row in rows])[:, None]).long()
        clip = self.clip_l(
            texts, padding="max_length", truncation=True, max_length=CLIP_LENGTH, return_tensors="pt"
        )
        return [ids, mask, clip["input_ids"], clip["attention_mask"]]

    def overlong(self, text: str) -> bool:
        """Whether the language model, which carries the text, does not see all of it."""
        return len(self.llama_ids(self.head + text + TAIL)) > self.num_head + TEXT_LENGTH


def llama_states(
    tokenize: LlamaClipTokenizeStrategy, llama: Any, ids: Tensor, mask: Tensor, length: int,
    hidden_layer: int = HIDDEN_LAYER, final_norm: bool = False,
) -> Tensor:
    """States [B, length, D] of captions without those of the template's head, 0 where there is no token. `hidden_layer`:
    which of the model's states, counted from the last, which is -1; `final_norm`: with the last norm, which that one has
    in any case.

    Texts of one length run together and never see padding: a caption's states do not depend on its batch. ConfigError
    when an id has no embedding row.
    """
    check_ids(ids, llama, tokenize.llama, "LLaMA")

    def read(rows: Tensor) -> Tensor:
        states = llama(rows, attended(llama, rows, causal=True), output_hidden_states=True).hidden_states[hidden_layer]
        return llama.norm(states) if final_norm and hidden_layer != -1 else states

    states = states_of(ids, mask, llama, read)[:, tokenize.num_head :]
    return padded(states, length)


def padded(tensor: Tensor, length: int) -> Tensor:
    """[B, L, ...] as [B, length, ...], with zeros behind it."""
    more = tensor.new_zeros(tensor.shape[0], length - tensor.shape[1], *tensor.shape[2:])
    return torch.cat((tensor, more), dim=1)


def pooled_clip(tokenize: LlamaClipTokenizeStrategy, clip_l: Any, ids: Tensor) -> Tensor:
    """The final-normed state [B, D] at the first end token, without projection. ConfigError when an id has no embedding
    row."""
    check_ids(ids, clip_l, tokenize.clip_l, "CLIP-L")
    ids = to_device(ids, next(clip_l.parameters()).device)
    states = clip_l.text_model(input_ids=ids).last_hidden_state  # [B, 77, D]
    return pool_at_first_eos(states, ids, tokenize.clip_l.eos_token_id)
