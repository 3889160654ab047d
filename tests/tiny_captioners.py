"""Tiny random captioning models with their tokenizer, in folders as transformers has them, for tests."""

from __future__ import annotations

from pathlib import Path

import torch

WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] [DEC] a picture of cat dog red blue green on the with sky wall small large two".split()
TEXT = {
    "vocab_size": len(WORDS), "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 96, "bos_token_id": WORDS.index("[DEC]"), "eos_token_id": WORDS.index("[SEP]"),
    "pad_token_id": 0,
}  # fmt: skip
VISION = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 32,
    "patch_size": 16,
}


def save_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordPiece({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    ends = [("[CLS]", WORDS.index("[CLS]")), ("[SEP]", WORDS.index("[SEP]"))]
    tokenizer.post_processor = processors.BertProcessing(ends[1], ends[0])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]",
        bos_token="[DEC]", eos_token="[SEP]",
    )  # fmt: skip
    fast.save_pretrained(folder)


def build_tiny_blip(folder: Path) -> Path:
    from transformers import BlipConfig, BlipForConditionalGeneration

    torch.manual_seed(3)
    text = {**TEXT, "encoder_hidden_size": 16, "sep_token_id": WORDS.index("[SEP]"), "projection_dim": 8}
    config = BlipConfig(
        text_config=text, vision_config={**VISION, "projection_dim": 8}, projection_dim=8, image_text_hidden_size=8
    )
    model = BlipForConditionalGeneration(config)
    livelier(model)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def build_tiny_git(folder: Path) -> Path:
    from transformers import GitConfig, GitForCausalLM

    torch.manual_seed(5)
    model = GitForCausalLM(
        GitConfig(vision_config={**VISION, "projection_dim": 8}, **{**TEXT, "bos_token_id": WORDS.index("[CLS]")})
    )
    livelier(model)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@torch.no_grad()
def livelier(model: torch.nn.Module) -> None:
    """Weights large enough for pictures to make a difference."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=0.5)
