"""The models of SDXL put together for making pictures: text encoders, U-Net, autoencoder, adapters."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from library.components.ldm_coding import SampleSettings, generate_unet_latents
from library.components.tokenizers import load_clip_tokenizer
from library.dataset.strategies import Conditioning
from library.dataset.text_cache_io import TEXT_LAYOUTS
from library.device_utils import get_preferred_device
from library.generation.adapters import LoadedAdapters, merging, parse_adapter_argument
from library.generation.sampling_utils import decode_to_image
from library.generation.sdxl_inference import SdxlModelOptions, SdxlRequest
from library.sdxl_train_utils import guided_predictor
from library.sdxl_utils import inspect_sdxl_unet, load_text_encoders_sdxl, load_unet_sdxl, load_vae_sdxl
from library.strategy_sdxl import SECOND_PAD, SdxlTextEncodingStrategy, SdxlTokenizeStrategy

if TYPE_CHECKING:
    from PIL import Image

    from library.components.ldm_models import AutoEncoder
    from library.sdxl_models import SdxlUNet2DConditionModel

logger = logging.getLogger(__name__)


@dataclass
class SdxlPipeline:
    """Loaded parts."""

    unet: SdxlUNet2DConditionModel
    vae: AutoEncoder
    text_encoders: list[torch.nn.Module]
    tokenize: SdxlTokenizeStrategy
    encode: SdxlTextEncodingStrategy
    adapters: LoadedAdapters
    prediction_type: str
    zero_terminal_snr: bool

    @torch.no_grad()
    def generate(self, request: SdxlRequest) -> Tensor:
        """Scaled latents [1, 4, h, w] of one picture; `request` is complete (steps, seed and sizes are set)."""
        self.adapters.set_multipliers(request.multipliers)
        self.adapters.follow_models()
        conditioning = self.conditioning(request.prompt, request.prompt2)
        negative = self.conditioning(request.negative_prompt or "", None) if request.cfg_scale != 1.0 else None
        settings = SampleSettings(
            height=request.height, width=request.width, num_steps=request.steps, seed=request.seed, cfg_scale=request.cfg_scale,
            sampler=request.sampler,
        )  # fmt: skip
        predict = guided_predictor(self.unet, conditioning, negative, request.cfg_scale, request.height, request.width)
        return generate_unet_latents(
            predict, settings, prediction_type=self.prediction_type, zero_terminal_snr=self.zero_terminal_snr, device=self.unet.device
        )

    def conditioning(self, prompt: str, prompt2: str | None) -> Conditioning:
        """The first encoder reads `prompt`, the second `prompt2`; None = `prompt`."""
        first = self.tokenize.tokenize(prompt)[0]
        second = self.tokenize.tokenize(prompt if prompt2 is None else prompt2)[1]
        return TEXT_LAYOUTS["sdxl"].named(self.encode.encode_tokens(self.tokenize, self.text_encoders, [first, second]))

    def decode(self, latents: Tensor) -> Image.Image:
        return decode_to_image(self.vae, latents)


def load_pipeline(options: SdxlModelOptions) -> SdxlPipeline:
    """Load every part, and the adapters merged or hooked. CheckpointError when a file does not fit."""
    device, dtype = get_preferred_device(), getattr(torch, options.dtype_name)
    if device.type == "cpu" and dtype == torch.float16:
        logger.warning("float16 is slow on a CPU; --dtype float32 is quicker there")
    info = inspect_sdxl_unet(options.ckpt_path)
    files = [parse_adapter_argument(text) for text in options.lora_weights or ()]
    merge = merging("sdxl", files) if files and options.merge_lora_weights else None
    unet = load_unet_sdxl(options.ckpt_path, dtype, device, transform=merge)
    encoders = load_text_encoders_sdxl(options.ckpt_path, dtype, device, transform=merge)
    if merge:
        merge.finish()
    vae = load_vae_sdxl(options.vae or options.ckpt_path, torch.float32, device)  # its values are beyond the range of float16
    given = (options.clip_tokenizer, options.tokenizer_cache_dir)
    tokenizers = (load_clip_tokenizer(*given), load_clip_tokenizer(*given, pad_token=SECOND_PAD))
    is_v = options.v_parameterization or info.prediction_type == "v"
    pipeline = SdxlPipeline(
        unet, vae, encoders, SdxlTokenizeStrategy(tokenizers=tokenizers), SdxlTextEncodingStrategy(),
        LoadedAdapters(unet, encoders), "v" if is_v else "epsilon", options.zero_terminal_snr or bool(info.zero_terminal_snr),
    )  # fmt: skip
    for adapter in [] if merge else files:
        pipeline.adapters.add(adapter)
    return pipeline
