"""The models of FLUX.1 put together for making pictures, and how the image script loads them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from library.checkpoints.loading import Transform
from library.dataset.strategies import StrategySet
from library.dataset.text_cache_io import TEXT_LAYOUTS
from library.device_utils import get_preferred_device
from library.flux_train_utils import BASE_SHIFT, MAX_SHIFT, get_lin_function, get_schedule, predict_velocity
from library.flux_utils import load_ae, load_clip_l, load_flux, load_t5xxl
from library.generation.adapters import load_with_adapters
from library.generation.flow_pipeline import FlowPipeline
from library.generation.flux_options import FluxRequest, InferenceModelOptions
from library.generation.pipeline import PictureMaker
from library.generation.requests import PictureRequest
from library.generation.sampling_utils import Conditioning
from library.generation.speed import as_stored, type_to_load
from library.generation.speed_options import SpeedOptions
from library.strategy_flux import FluxTextEncodingStrategy, FluxTokenizeStrategy

TOKEN_LENGTH_DEV, TOKEN_LENGTH_SCHNELL = 512, 256


@dataclass
class FluxPipeline(FlowPipeline[FluxRequest]):
    """Steps along the schedule of the number of tokens; schnell's are evenly spaced."""

    family = "flux"
    request_class = FluxRequest
    use_t5_mask: bool = False

    @property
    def is_schnell(self) -> bool:
        return not self.denoiser.params.guidance_embed

    def velocity(self, latents: Tensor, times: Tensor, conditioning: Conditioning, request: FluxRequest) -> Tensor:
        return predict_velocity(
            self.denoiser, latents, times, conditioning, guidance=request.guidance, use_t5_mask=self.use_t5_mask,
            control=self.control,
        )

    def schedule(self, request: FluxRequest) -> Tensor:
        return sigmas_of_tokens(self, request, shift=not self.is_schnell)

    def shift(self, request: FluxRequest) -> float:
        return 1.0 if self.is_schnell else shift_of_tokens(self, request)


def tokens_of(pipeline: FlowPipeline[Any], request: PictureRequest) -> int:
    height, width = (side // pipeline.latent_spec.patch for side in pipeline.latent_shape(request)[-2:])
    return height * width


def sigmas_of_tokens(pipeline: FlowPipeline[Any], request: PictureRequest, shift: bool = True) -> Tensor:
    """[steps + 1] from 1 to 0, moved towards noise by the number of tokens of the picture."""
    return torch.tensor(get_schedule(request.steps, tokens_of(pipeline, request), shift=shift))


def shift_of_tokens(pipeline: FlowPipeline[Any], request: PictureRequest) -> float:
    """How far `sigmas_of_tokens` moves evenly spaced times."""
    return math.exp(get_lin_function(y1=BASE_SHIFT, y2=MAX_SHIFT)(tokens_of(pipeline, request)))


def load_pipeline(
    options: InferenceModelOptions, speed: SpeedOptions = SpeedOptions()
) -> PictureMaker[FluxRequest]:
    """Load every part, and the adapters merged or hooked. CheckpointError when a file does not fit."""
    device = get_preferred_device()
    place = torch.device("cpu") if options.offload else device

    def load(transform: Transform | None) -> tuple[torch.nn.Module, list[torch.nn.Module]]:
        encoders = [
            load_clip_l(options.clip_l, dtype_of(options, "clip_l_dtype"), place, transform=transform),
            load_t5xxl(options.t5xxl, dtype_of(options, "t5xxl_dtype"), place, transform=transform),
        ]
        wide = dtype_of(options, "flux_dtype")
        kind = type_to_load(wide, speed)
        denoiser = load_flux(options.ckpt_path, kind, place, transform=transform, form=options.form)
        return as_stored(denoiser, speed, wide), encoders

    denoiser, encoders, adapters = load_with_adapters("flux", options.adapters, load)
    vae = load_ae(options.ae, dtype_of(options, "ae_dtype"), place)
    pipeline = FluxPipeline(denoiser, vae, options.apply_t5_attn_mask)
    tokenize = FluxTokenizeStrategy(
        options.t5xxl_max_token_length or (TOKEN_LENGTH_SCHNELL if pipeline.is_schnell else TOKEN_LENGTH_DEV),
        options.tokenizer_cache_dir,
        clip_l_tokenizer=options.clip_l_tokenizer, t5xxl_tokenizer=options.t5xxl_tokenizer, t5xxl_path=options.t5xxl,
    )  # fmt: skip
    strategies = StrategySet(
        tokenize, FluxTextEncodingStrategy(options.apply_t5_attn_mask), text_layout=TEXT_LAYOUTS["flux"]
    )
    return PictureMaker(
        pipeline, strategies, encoders, adapters, device, device,
        text_waits=options.offload, denoiser_waits=options.offload,
        computing=computing_of(denoiser, device, options.form, speed),
    )  # fmt: skip


def computing_of(
    denoiser: torch.nn.Module, device: torch.device, form: str | None, speed: SpeedOptions
) -> Callable[[], AbstractContextManager[Any]]:
    """What forwards run inside: weights of 8 bits without scales compute in bfloat16."""
    if form is not None or speed.mixed_precision_transformer:
        return nullcontext
    if any(parameter.dtype == torch.float8_e4m3fn for parameter in denoiser.parameters()):
        return functools.partial(torch.autocast, device.type, torch.bfloat16)
    return nullcontext


def dtype_of(options: InferenceModelOptions, name: str) -> torch.dtype:
    return getattr(torch, options.dtype_of(name))
