"""Stable Diffusion 1 and 2 for the image scripts: which files fit, loading, the forward."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from library.components.text_encoder_utils import inspect_clip
from library.components.tokenizers import load_clip_tokenizer
from library.components.unet_utils import UNetInfo
from library.dataset.text_cache_io import TEXT_LAYOUTS
from library.generation.conditioning import PromptEncoder, WordTokenizer, tokenizer_problems
from library.generation.options import GenerationModelOptions
from library.sd_train_utils import predict_noise
from library.sd_utils import clip_skip_problem, inspect_sd_unet, inspect_vae_sd, load_text_encoder_sd, load_unet_sd, load_vae_sd, text_slot
from library.strategy_sd import V2_PAD, SdTextEncodingStrategy, SdTokenizeStrategy

NAME, KINDS = "sd", frozenset({"sd1", "sd2"})
inspect_vae = inspect_vae_sd
load_unet = load_unet_sd
load_vae = load_vae_sd


def inspect(options: GenerationModelOptions) -> tuple[UNetInfo, list[str]]:
    """What the header of the checkpoint tells, and what the options have against it. CheckpointError for another model."""
    info, problems = inspect_sd_unet(options.ckpt), []
    if info.is_v2 and not options.v2:
        problems.append(f"--ckpt is {options.ckpt}, which is Stable Diffusion 2; add --v2")
    if options.v2 and not info.is_v2:
        problems.append(f"--v2 is set and --ckpt is {options.ckpt}, which is Stable Diffusion 1; leave --v2 out")
    return info, problems


def text_problems(options: GenerationModelOptions) -> list[str]:
    """The tokenizer and --clip_skip against the text encoder."""
    if inspect_sd_unet(options.ckpt).is_v2 != options.v2:
        return []  # told already; the text encoder of the other version would only be missed
    rows = inspect_clip(options.ckpt, text_slot(options.v2)).values["vocab"]
    skip = clip_skip_problem(options.ckpt, options.v2, options.clip_skip)
    return [*tokenizer_problems(lambda: _tokenizer(options), rows), *([skip] if skip else [])]


def _tokenizer(options: GenerationModelOptions) -> Any:
    pad = V2_PAD if options.v2 else None
    return load_clip_tokenizer(options.clip_tokenizer, options.tokenizer_cache_dir, pad_token=pad, option="--clip_tokenizer")


def load_prompt_encoder(options: GenerationModelOptions, dtype: torch.dtype, device: torch.device) -> PromptEncoder:
    """The text encoder and its tokenizer."""
    tokenizer = WordTokenizer(_tokenizer(options))
    encoder = load_text_encoder_sd(options.ckpt, options.v2, dtype, device)
    return PromptEncoder(
        lambda length: SdTokenizeStrategy(options.v2, length, tokenizer=tokenizer), SdTextEncodingStrategy(options.clip_skip), TEXT_LAYOUTS["sd"], [encoder], [tokenizer]
    )


def predictor(
    unet: Any, conditioning: Mapping[str, Tensor], sizes: Sequence[Sequence[int]], target_hw: tuple[int, int]
) -> Callable[[Tensor, Tensor], Tensor]:
    """(latents [R, 4, h, w], timestep []) -> prediction, for conditioning of R rows. Sizes mean nothing to these models."""
    return lambda latents, timestep: predict_noise(unet, latents, timestep.expand(len(latents)), conditioning).float()
