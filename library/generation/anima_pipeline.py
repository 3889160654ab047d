"""The models of Anima put together for making pictures, and how the image script loads them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from library.anima_train_utils import predict_velocity
from library.anima_utils import load_anima
from library.checkpoints.loading import Transform
from library.checkpoints.weight_forms import FP8, FP8_SCALED
from library.components.llm_encoder_utils import load_qwen3
from library.components.wan_vae_utils import load_wan_vae
from library.dataset.strategies import StrategySet
from library.dataset.text_cache_io import TEXT_LAYOUTS
from library.device_utils import get_preferred_device
from library.generation.adapter_files import ListedAdapterOptions
from library.generation.adapters import load_with_adapters
from library.generation.anima_options import AnimaModelOptions, AnimaRequest
from library.generation.flow_pipeline import FlowPipeline
from library.generation.pipeline import PictureMaker
from library.generation.sampling_utils import Conditioning
from library.generation.speed import as_stored, type_to_load
from library.generation.speed_options import SpeedOptions
from library.strategy_anima import AnimaTextEncodingStrategy, AnimaTokenizeStrategy

if TYPE_CHECKING:
    from library.anima_models import Anima
    from library.components.wan_vae_models import WanVAE


@dataclass
class AnimaPipeline(FlowPipeline[AnimaRequest]):
    """Steps along evenly spaced times that `flow_shift` moves towards noise."""

    family = "anima"
    request_class = AnimaRequest

    def velocity(self, latents: Tensor, times: Tensor, conditioning: Conditioning, request: AnimaRequest) -> Tensor:
        return predict_velocity(self.denoiser, latents, times, conditioning)

    def shift(self, request: AnimaRequest) -> float:
        return request.flow_shift


def device_of(options: AnimaModelOptions) -> torch.device:
    return get_preferred_device() if options.device is None else torch.device(options.device)


def load_decoder(options: AnimaModelOptions) -> WanVAE:
    """The autoencoder, which waits on the CPU and computes where latents are."""
    wide = getattr(torch, options.dtype_name)
    # values inside this autoencoder are beyond the range of float16
    vae = load_wan_vae(options.vae, torch.float32 if wide == torch.float16 else wide, "cpu")
    vae.set_chunk_rows(options.vae_chunk_size)
    return vae


def load_pipeline(
    options: AnimaModelOptions, adapters: ListedAdapterOptions, *, needs_vae: bool,
    speed: SpeedOptions = SpeedOptions(),
) -> PictureMaker[AnimaRequest]:
    """Load every part, and the adapters merged or hooked. CheckpointError when a file does not fit."""
    device, wide = device_of(options), getattr(torch, options.dtype_name)

    def load(transform: Transform | None) -> tuple[torch.nn.Module, list[torch.nn.Module]]:
        encoder = load_qwen3(options.text_encoder, wide, "cpu", transform=transform)
        return load_denoiser(options, wide, device, transform, speed), [encoder]

    denoiser, encoders, loaded = load_with_adapters("anima", adapters.adapters, load)
    tokenize = AnimaTokenizeStrategy(
        options.qwen3_max_token_length, options.t5_max_token_length, options.tokenizer_cache_dir,
        options.qwen3_tokenizer, options.t5_tokenizer_path, options.text_encoder,
    )  # fmt: skip
    strategies = StrategySet(tokenize, AnimaTextEncodingStrategy(), text_layout=TEXT_LAYOUTS["anima"])
    return PictureMaker(
        AnimaPipeline(denoiser, load_decoder(options) if needs_vae else None), strategies, encoders, loaded,
        device, torch.device("cpu") if options.text_encoder_cpu else device, text_waits=True,
    )  # fmt: skip


def load_denoiser(
    options: AnimaModelOptions, wide: torch.dtype, device: torch.device, transform: Transform | None = None,
    speed: SpeedOptions = SpeedOptions(),
) -> Anima:
    """The denoiser in the type that the options ask for. What is stored in 8 bits is never cast afterwards."""
    form = FP8_SCALED if options.fp8_scaled else FP8 if options.fp8 else None
    denoiser = load_anima(
        options.dit, type_to_load(wide, speed), device, llm_adapter_path=options.llm_adapter_path,
        transform=transform, form=form,
    )  # fmt: skip
    return as_stored(denoiser, speed, wide)
