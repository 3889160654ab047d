"""The models of SDXL put together for making pictures: the forward, which files fit, and how the image scripts load
them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from library.components.tokenizers import load_clip_tokenizer
from library.components.unet_utils import UNetInfo
from library.dataset.strategies import StrategySet
from library.dataset.text_cache_io import TEXT_LAYOUTS
from library.device_utils import get_preferred_device, to_device
from library.families.sdxl import FAMILY
from library.generation.adapters import load_with_adapters
from library.generation.pipeline import PictureMaker
from library.generation.prompt_encoder import PromptEncoder, tokenizer_problems
from library.generation.sampling_utils import Conditioning
from library.generation.sdxl_options import SdxlModelOptions, SdxlRequest
from library.generation.unet_pipeline import ControlledPredict, UNetPipeline
from library.sdxl_train_utils import predict_noise
from library.sdxl_utils import (
    embedding_widths,
    inspect_sdxl_unet,
    inspect_vae_sdxl,
    load_text_encoders_sdxl,
    load_unet_sdxl,
    load_vae_sdxl,
    text_encoder_sizes,
    text_width_problem,
)
from library.strategy_sdxl import SECOND_PAD, SdxlTextEncodingStrategy, SdxlTokenizeStrategy

if TYPE_CHECKING:
    from library.checkpoints.embeddings import Widths
    from library.checkpoints.loading import Transform
    from library.generation.gen_img.options import GenerationModelOptions

logger = logging.getLogger(__name__)


@dataclass
class SdxlPipeline(UNetPipeline[SdxlRequest]):
    """SDXL; its samples are pictures that nothing was cropped from."""

    request_class = SdxlRequest
    family = "sdxl"
    inspect_vae = staticmethod(inspect_vae_sdxl)
    load_denoiser = staticmethod(load_unet_sdxl)
    load_vae = staticmethod(load_vae_sdxl)

    def predictor(
        self, conditioning: Conditioning, sizes: Sequence[Sequence[int]], target_hw: tuple[int, int]
    ) -> ControlledPredict:
        numbers = ([size[:2] for size in sizes], [size[2:] for size in sizes], [target_hw] * len(sizes))
        original, crop, target = (to_device(torch.tensor(rows), self.denoiser.device) for rows in numbers)  # [R, 2]
        return lambda latents, timestep, control=None: predict_noise(
            self.denoiser, latents, timestep.expand(len(latents)), conditioning, (original, crop, target),
            control=control,
        ).float()

    @staticmethod
    def inspect(options: GenerationModelOptions) -> tuple[UNetInfo, list[str]]:
        """What the header of the checkpoint tells, and what the options have against it. CheckpointError for another
        model."""
        return inspect_sdxl_unet(options.ckpt), []

    @staticmethod
    def text_problems(options: GenerationModelOptions) -> list[str]:
        """Text encoders against the U-Net, and the tokenizer against them."""
        sizes = text_encoder_sizes(options.ckpt)
        width = text_width_problem(options.ckpt, sizes, inspect_sdxl_unet(options.ckpt).params)

        def load() -> Any:
            return load_clip_tokenizer(options.clip_tokenizer, options.tokenizer_cache_dir, option="--clip_tokenizer")

        found = tokenizer_problems(load, min(values["vocab"] for values in sizes))
        return [*found, width] if width else found

    @staticmethod
    def embedding_widths(options: GenerationModelOptions) -> Widths:
        return embedding_widths(options.ckpt)

    @staticmethod
    def load_prompt_encoder(options: GenerationModelOptions, dtype: torch.dtype, device: torch.device) -> PromptEncoder:
        """Both text encoders and their tokenizers, which differ in their padding."""
        where = (options.clip_tokenizer, options.tokenizer_cache_dir)
        first = load_clip_tokenizer(*where, option="--clip_tokenizer")
        second = load_clip_tokenizer(*where, pad_token=SECOND_PAD, option="--clip_tokenizer")
        encoders = load_text_encoders_sdxl(options.ckpt, dtype, device)
        return PromptEncoder(
            lambda length: SdxlTokenizeStrategy(length, tokenizers=(first, second)), SdxlTextEncodingStrategy(),
            TEXT_LAYOUTS["sdxl"], encoders, [first, second], FAMILY.embedding_keys
        )


def load_pipeline(options: SdxlModelOptions) -> PictureMaker[SdxlRequest]:
    """Load every part, and the adapters merged or hooked. CheckpointError when a file does not fit."""
    device, dtype = get_preferred_device(), getattr(torch, options.dtype_name)
    if device.type == "cpu" and dtype == torch.float16:
        logger.warning("float16 is slow on a CPU; --dtype float32 is quicker there")
    info = inspect_sdxl_unet(options.ckpt_path)

    def load(transform: Transform | None) -> tuple[torch.nn.Module, list[torch.nn.Module]]:
        unet = load_unet_sdxl(options.ckpt_path, dtype, device, transform=transform)
        return unet, load_text_encoders_sdxl(options.ckpt_path, dtype, device, transform=transform)

    unet, encoders, adapters = load_with_adapters("sdxl", options.adapters, load)
    vae = load_vae_sdxl(
        options.vae or options.ckpt_path, torch.float32, device
    )  # its values are beyond the range of float16
    given = (options.clip_tokenizer, options.tokenizer_cache_dir)
    tokenizers = (load_clip_tokenizer(*given), load_clip_tokenizer(*given, pad_token=SECOND_PAD))
    is_v = options.v_parameterization or info.prediction_type == "v"
    pipeline = SdxlPipeline(
        unet, vae, "v" if is_v else "epsilon", options.zero_terminal_snr or bool(info.zero_terminal_snr)
    )
    strategies = StrategySet(
        SdxlTokenizeStrategy(tokenizers=tokenizers), SdxlTextEncodingStrategy(), text_layout=TEXT_LAYOUTS["sdxl"]
    )
    return PictureMaker(pipeline, strategies, encoders, adapters, device, device)
