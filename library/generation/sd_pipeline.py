"""The models of Stable Diffusion 1 and 2 put together for making pictures: the forward, which files fit, loading."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from library.components.text_encoder_utils import inspect_clip
from library.components.tokenizers import load_clip_tokenizer
from library.components.unet_models import text_layers
from library.components.unet_utils import UNetInfo
from library.dataset.text_cache_io import TEXT_LAYOUTS
from library.families.sd import FAMILY
from library.generation.prompt_encoder import PromptEncoder, tokenizer_problems
from library.generation.requests import SampledRequest
from library.generation.sampling_utils import Conditioning
from library.generation.unet_pipeline import ControlledPredict, UNetPipeline
from library.sd_train_utils import predict_noise
from library.sd_utils import (
    clip_skip_problem,
    inspect_sd_unet,
    inspect_vae_sd,
    load_text_encoder_sd,
    load_unet_sd,
    load_vae_sd,
    text_slot,
)
from library.strategy_sd import V2_PAD, SdTextEncodingStrategy, SdTokenizeStrategy

if TYPE_CHECKING:
    from library.checkpoints.embeddings import Widths
    from library.generation.gen_img.options import GenerationModelOptions


@dataclass
class SdPipeline(UNetPipeline[SampledRequest]):
    """Stable Diffusion 1 or 2."""

    family = "sd"
    inspect_vae = staticmethod(inspect_vae_sd)
    load_denoiser = staticmethod(load_unet_sd)
    load_vae = staticmethod(load_vae_sd)

    def predictor(
        self, conditioning: Conditioning, sizes: Sequence[Sequence[int]], target_hw: tuple[int, int]
    ) -> ControlledPredict:
        """Sizes mean nothing to these models."""
        return lambda latents, timestep, control=None: predict_noise(
            self.denoiser, latents, timestep.expand(len(latents)), conditioning, control=control
        ).float()

    @staticmethod
    def inspect(options: GenerationModelOptions) -> tuple[UNetInfo, list[str]]:
        """What the header of the checkpoint tells, and what the options have against it. CheckpointError for another
        model."""
        info, problems = inspect_sd_unet(options.ckpt), []
        if info.is_v2 and not options.v2:
            problems.append(f"--ckpt is {options.ckpt}, which is Stable Diffusion 2; add --v2")
        if options.v2 and not info.is_v2:
            problems.append(f"--v2 is set and --ckpt is {options.ckpt}, which is Stable Diffusion 1; leave --v2 out")
        return info, problems

    @staticmethod
    def text_problems(options: GenerationModelOptions) -> list[str]:
        """The tokenizer and --clip_skip against the text encoder."""
        if inspect_sd_unet(options.ckpt).is_v2 != options.v2:
            return []  # told already; the text encoder of the other version would only be missed
        rows = inspect_clip(options.ckpt, text_slot(options.v2)).values["vocab"]
        skip = clip_skip_problem(options.ckpt, options.v2, options.clip_skip)
        return [*tokenizer_problems(lambda: _tokenizer(options), rows), *([skip] if skip else [])]

    @staticmethod
    def embedding_widths(options: GenerationModelOptions) -> Widths:
        width = inspect_clip(options.ckpt, text_slot(options.v2)).values["width"]
        return dict.fromkeys(FAMILY.embedding_keys, width)

    @staticmethod
    def text_layers(options: GenerationModelOptions) -> list[str]:
        return text_layers(inspect_sd_unet(options.ckpt).params)

    @staticmethod
    def load_prompt_encoder(options: GenerationModelOptions, dtype: torch.dtype, device: torch.device) -> PromptEncoder:
        """The text encoder and its tokenizer."""
        tokenizer = _tokenizer(options)
        encoder = load_text_encoder_sd(options.ckpt, options.v2, dtype, device)
        return PromptEncoder(
            lambda length: SdTokenizeStrategy(options.v2, length, tokenizer=tokenizer),
            SdTextEncodingStrategy(options.clip_skip),
            TEXT_LAYOUTS["sd"], [encoder], [tokenizer], FAMILY.embedding_keys
        )


def _tokenizer(options: GenerationModelOptions) -> Any:
    pad = V2_PAD if options.v2 else None
    return load_clip_tokenizer(
        options.clip_tokenizer, options.tokenizer_cache_dir, pad_token=pad, option="--clip_tokenizer"
    )
