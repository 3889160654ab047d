"""The models of Chroma put together for making pictures, and how the image script loads them."""

from __future__ import annotations

import torch
from torch import Tensor

from library.checkpoints.loading import Transform
from library.chroma_train_utils import predict_velocity
from library.chroma_utils import load_chroma
from library.dataset.strategies import StrategySet
from library.dataset.text_cache_io import TEXT_LAYOUTS
from library.device_utils import get_preferred_device
from library.flux_utils import load_ae, load_t5xxl
from library.generation.adapters import load_with_adapters
from library.generation.chroma_options import ChromaModelOptions, ChromaRequest
from library.generation.flow_pipeline import FlowPipeline
from library.generation.flux_pipeline import computing_of, dtype_of, shift_of_tokens, sigmas_of_tokens
from library.generation.pipeline import PictureMaker
from library.generation.sampling_utils import Conditioning
from library.generation.speed import as_stored, type_to_load
from library.generation.speed_options import SpeedOptions
from library.strategy_chroma import ChromaTextEncodingStrategy, ChromaTokenizeStrategy

TOKEN_LENGTH = 512


class ChromaPipeline(FlowPipeline[ChromaRequest]):
    """Steps along the schedule of the number of tokens, as those of FLUX.1 dev."""

    family = "chroma"
    request_class = ChromaRequest

    def velocity(self, latents: Tensor, times: Tensor, conditioning: Conditioning, request: ChromaRequest) -> Tensor:
        return predict_velocity(self.denoiser, latents, times, conditioning)

    def schedule(self, request: ChromaRequest) -> Tensor:
        return sigmas_of_tokens(self, request)

    def shift(self, request: ChromaRequest) -> float:
        return shift_of_tokens(self, request)


def load_pipeline(
    options: ChromaModelOptions, speed: SpeedOptions = SpeedOptions()
) -> PictureMaker[ChromaRequest]:
    """Load every part, and the adapters merged or hooked. CheckpointError when a file does not fit."""
    device = get_preferred_device()
    place = torch.device("cpu") if options.offload else device

    def load(transform: Transform | None) -> tuple[torch.nn.Module, list[torch.nn.Module]]:
        encoder = load_t5xxl(options.t5xxl, dtype_of(options, "t5xxl_dtype"), place, transform=transform)
        wide = dtype_of(options, "flux_dtype")
        kind = type_to_load(wide, speed)
        denoiser = load_chroma(options.ckpt_path, kind, place, transform=transform, form=options.form)
        return as_stored(denoiser, speed, wide), [encoder]

    denoiser, encoders, adapters = load_with_adapters("chroma", options.adapters, load)
    vae = load_ae(options.ae, dtype_of(options, "ae_dtype"), place)
    tokenize = ChromaTokenizeStrategy(
        options.t5xxl_max_token_length or TOKEN_LENGTH, options.tokenizer_cache_dir,
        t5xxl_tokenizer=options.t5xxl_tokenizer, t5xxl_path=options.t5xxl,
    )  # fmt: skip
    strategies = StrategySet(tokenize, ChromaTextEncodingStrategy(), text_layout=TEXT_LAYOUTS["chroma"])
    return PictureMaker(
        ChromaPipeline(denoiser, vae), strategies, encoders, adapters, device, device,
        text_waits=options.offload, denoiser_waits=options.offload,
        computing=computing_of(denoiser, device, options.form, speed),
    )  # fmt: skip
