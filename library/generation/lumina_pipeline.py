"""The models of Lumina-Image 2.0 put together for making pictures, and how the image script loads them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from library.checkpoints.loading import Transform
from library.components.gemma_encoder_utils import load_gemma2
from library.dataset.strategies import StrategySet
from library.dataset.text_cache_io import TEXT_LAYOUTS
from library.device_utils import get_preferred_device
from library.generation.adapters import load_with_adapters
from library.generation.flow_pipeline import FlowPipeline
from library.generation.lumina_options import LuminaModelOptions, LuminaPromptOptions, LuminaRequest
from library.generation.pipeline import PictureMaker
from library.generation.sampling_utils import Conditioning
from library.generation.speed import as_stored, type_to_load
from library.generation.speed_options import SpeedOptions
from library.lumina_train_utils import predict_velocity
from library.lumina_utils import load_ae, load_lumina
from library.strategy_lumina import LuminaTextEncodingStrategy, LuminaTokenizeStrategy


@dataclass
class LuminaPipeline(FlowPipeline[LuminaRequest]):
    """Steps along evenly spaced times that `flow_shift` moves towards noise; guidance lasts for the noisier of them
    alone."""

    family = "lumina"
    request_class = LuminaRequest

    def velocity(self, latents: Tensor, times: Tensor, conditioning: Conditioning, request: LuminaRequest) -> Tensor:
        """Of the sign that other models have: noise - data."""
        return -predict_velocity(self.denoiser, latents, times, conditioning)

    def shift(self, request: LuminaRequest) -> float:
        return request.flow_shift

    def guided(
        self, request: LuminaRequest, conditioning: Conditioning, negative: Conditioning | None
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """With guidance while 1 - sigma is below `cfg_trunc_ratio`, one forward per step after that."""
        plain = super().guided(request, conditioning, None)
        both = super().guided(request, conditioning, negative)

        def velocity(latents: Tensor, sigma: Tensor) -> Tensor:
            return (both if 1 - float(sigma) < request.cfg_trunc_ratio else plain)(latents, sigma)

        return velocity

    def combined(
        self, negative: Tensor, positive: Tensor, request: LuminaRequest, neutral: Tensor | None = None
    ) -> Tensor:
        """No longer than `renorm_cfg` times the velocity without guidance; 0 = of any length."""
        velocity = super().combined(negative, positive, request, neutral)
        if request.renorm_cfg <= 0:
            return velocity
        axes = tuple(range(1, velocity.ndim))
        bound = torch.linalg.vector_norm(positive, dim=axes, keepdim=True) * request.renorm_cfg
        length = torch.linalg.vector_norm(velocity, dim=axes, keepdim=True)
        return velocity * (bound / length.clamp_min(torch.finfo(length.dtype).tiny)).clamp(max=1.0)


def load_pipeline(
    options: LuminaModelOptions, pictures: LuminaPromptOptions, speed: SpeedOptions = SpeedOptions()
) -> PictureMaker[LuminaRequest]:
    """Load every part, and the adapters merged or hooked. CheckpointError when a file does not fit."""
    device = get_preferred_device() if options.device is None else torch.device(options.device)
    place = torch.device("cpu") if options.offload else device
    model = options.pretrained_model_name_or_path
    gemma2, ae = options.gemma2_path or model, options.ae_path or model

    def load(transform: Transform | None) -> tuple[torch.nn.Module, list[torch.nn.Module]]:
        encoder = load_gemma2(gemma2, _dtype(options, "gemma2_dtype"), place, transform=transform)
        wide = _dtype(options, "dtype")
        kind = type_to_load(wide, speed)
        denoiser = load_lumina(model, kind, place, transform=transform, form=options.form)
        return as_stored(denoiser, speed, wide), [encoder]

    denoiser, encoders, adapters = load_with_adapters("lumina", options.adapters, load)
    tokenize = LuminaTokenizeStrategy(
        pictures.system_prompt, options.gemma2_max_token_length, options.tokenizer_cache_dir, options.gemma2_tokenizer,
        gemma2, pictures.add_system_prompt_to_negative_prompt,
    )  # fmt: skip
    strategies = StrategySet(tokenize, LuminaTextEncodingStrategy(), text_layout=TEXT_LAYOUTS["lumina"])
    pipeline = LuminaPipeline(denoiser, load_ae(ae, _dtype(options, "ae_dtype"), place))
    maker = PictureMaker(
        pipeline, strategies, encoders, adapters, device, device, text_waits=options.offload,
        denoiser_waits=options.offload,
    )  # fmt: skip
    is_plain = options.form is None and not speed.mixed_precision_transformer
    if is_plain and any(parameter.dtype == torch.float8_e4m3fn for parameter in denoiser.parameters()):
        # weights of 8 bits compute in it
        maker.computing = functools.partial(torch.autocast, device.type, torch.bfloat16)
    return maker


def _dtype(options: LuminaModelOptions, name: str) -> torch.dtype:
    return getattr(torch, options.dtype_of(name))
