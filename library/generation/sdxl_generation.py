"""SDXL for the image scripts: which files fit, loading, the forward."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from library.components.tokenizers import load_clip_tokenizer
from library.components.unet_utils import UNetInfo
from library.dataset.text_cache_io import TEXT_LAYOUTS
from library.generation.conditioning import PromptEncoder, WordTokenizer, tokenizer_problems
from library.generation.options import GenerationModelOptions
from library.sdxl_train_utils import predict_noise
from library.sdxl_utils import (
    inspect_sdxl_unet,
    inspect_vae_sdxl,
    load_text_encoders_sdxl,
    load_unet_sdxl,
    load_vae_sdxl,
    text_encoder_sizes,
    text_width_problem,
)
from library.strategy_sdxl import SECOND_PAD, SdxlTextEncodingStrategy, SdxlTokenizeStrategy

NAME, KINDS = "sdxl", frozenset({"sdxl"})
inspect_vae = inspect_vae_sdxl
load_unet = load_unet_sdxl
load_vae = load_vae_sdxl


def inspect(options: GenerationModelOptions) -> tuple[UNetInfo, list[str]]:
    """What the header of the checkpoint tells, and what the options have against it. CheckpointError for another model."""
    return inspect_sdxl_unet(options.ckpt), []


def text_problems(options: GenerationModelOptions) -> list[str]:
    """Text encoders against the U-Net, and the tokenizer against them."""
    sizes = text_encoder_sizes(options.ckpt)
    width = text_width_problem(options.ckpt, sizes, inspect_sdxl_unet(options.ckpt).params)

    def load() -> Any:
        return load_clip_tokenizer(options.clip_tokenizer, options.tokenizer_cache_dir, option="--clip_tokenizer")

    found = tokenizer_problems(load, min(values["vocab"] for values in sizes))
    return [*found, width] if width else found


def load_prompt_encoder(options: GenerationModelOptions, dtype: torch.dtype, device: torch.device) -> PromptEncoder:
    """Both text encoders and their tokenizers, which differ in their padding."""
    where = (options.clip_tokenizer, options.tokenizer_cache_dir)
    first = WordTokenizer(load_clip_tokenizer(*where, option="--clip_tokenizer"))
    second = WordTokenizer(load_clip_tokenizer(*where, pad_token=SECOND_PAD, option="--clip_tokenizer"))
    encoders = load_text_encoders_sdxl(options.ckpt, dtype, device)
    return PromptEncoder(
        lambda length: SdxlTokenizeStrategy(length, tokenizers=(first, second)), SdxlTextEncodingStrategy(), TEXT_LAYOUTS["sdxl"], encoders, [first, second]
    )


def predictor(
    unet: Any, conditioning: Mapping[str, Tensor], sizes: Sequence[Sequence[int]], target_hw: tuple[int, int]
) -> Callable[[Tensor, Tensor], Tensor]:
    """(latents [R, 4, h, w], timestep []) -> prediction, for conditioning of R rows. `sizes`: original height and width, crop
    top and left of each row."""
    original = torch.tensor([size[:2] for size in sizes])  # [R, 2]
    crop = torch.tensor([size[2:] for size in sizes])
    target = torch.tensor([target_hw] * len(sizes))
    return lambda latents, timestep: predict_noise(
        unet, latents, timestep.expand(len(latents)), conditioning, (original, crop, target)
    ).float()
