"""The models of Anima put together for making pictures, how the image script loads them, and files of latents."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from library.anima_train_utils import predict_velocity
from library.anima_utils import load_anima
from library.checkpoints.loading import Transform
from library.components.llm_encoder_utils import load_qwen3
from library.components.wan_vae_utils import load_wan_vae
from library.core.errors import CheckpointError
from library.dataset.strategies import StrategySet
from library.dataset.text_cache_io import TEXT_LAYOUTS
from library.device_utils import get_preferred_device
from library.fp8_optimization_utils import FP8_STORAGE, shrink_linears_to_scaled_fp8
from library.generation.adapters import load_with_adapters
from library.generation.anima_options import AnimaAdapterOptions, AnimaModelOptions, AnimaRequest
from library.generation.flow_pipeline import FlowPipeline
from library.generation.pipeline import PictureMaker
from library.generation.sampling_utils import Conditioning
from library.safetensors_utils import MemoryEfficientSafeOpen, save_file_atomic
from library.strategy_anima import AnimaTextEncodingStrategy, AnimaTokenizeStrategy
from library.training.inference_samplers.flow import flow_schedule

if TYPE_CHECKING:
    from library.anima_models import Anima
    from library.components.wan_vae_models import WanVAE

LATENT_KEY = "latent"
KEPT_WIDE = ("_embedder", "norm", "adaln", "final_layer", ".embed.")
"""parts of layer names that scaled 8-bit storage leaves alone"""


@dataclass
class AnimaPipeline(FlowPipeline[AnimaRequest]):
    """Steps along evenly spaced times that `flow_shift` moves towards noise."""

    family = "anima"
    request_class = AnimaRequest

    def velocity(self, latents: Tensor, times: Tensor, conditioning: Conditioning, request: AnimaRequest) -> Tensor:
        return predict_velocity(self.denoiser, latents, times, conditioning)

    def sigmas(self, request: AnimaRequest) -> Tensor:
        return flow_schedule(request.steps, request.flow_shift)


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
    options: AnimaModelOptions, adapters: AnimaAdapterOptions, *, needs_vae: bool
) -> PictureMaker[AnimaRequest]:
    """Load every part, and the adapters merged or hooked. CheckpointError when a file does not fit."""
    device, wide = device_of(options), getattr(torch, options.dtype_name)

    def load(transform: Transform | None) -> tuple[torch.nn.Module, list[torch.nn.Module]]:
        encoder = load_qwen3(options.text_encoder, wide, "cpu", transform=transform)
        return load_denoiser(options, wide, device, transform), [encoder]

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
    options: AnimaModelOptions, wide: torch.dtype, device: torch.device, transform: Transform | None = None
) -> Anima:
    """The denoiser in the type that the options ask for. What is stored in 8 bits is never cast afterwards."""
    plain_fp8 = options.fp8 and not options.fp8_scaled
    place = "cpu" if options.fp8_scaled else device
    denoiser = load_anima(
        options.dit, FP8_STORAGE if plain_fp8 else wide, place, llm_adapter_path=options.llm_adapter_path,
        transform=transform
    )
    if options.fp8_scaled:
        shrink_linears_to_scaled_fp8(denoiser, takes_scale)
        denoiser.to(device)
    return denoiser


def takes_scale(path: str) -> bool:
    """Whether the layer of this path is stored in scaled 8 bits: the matrices of the blocks."""
    return path.startswith("blocks.") and not any(part in path for part in KEPT_WIDE)


def save_latents(latents: Tensor, path: Path, texts: Mapping[str, str]) -> Path:
    """Write latents [1, C, h, w], as the denoiser has them, as `latent` [C, 1, h, w] float32."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file_atomic({LATENT_KEY: latents[0][:, None].float().cpu().contiguous()}, path, dict(texts) or None)
    return path


def read_latents(path: str | os.PathLike[str], channels: int) -> tuple[Tensor, dict[str, str]]:
    """(latents [1, C, h, w], texts) of a file of `save_latents`. CheckpointError when it holds none of this shape."""
    with MemoryEfficientSafeOpen(path) as file:
        if LATENT_KEY not in file.keys():
            raise CheckpointError(
                f"{path} holds no latents ('{LATENT_KEY}' is not there); needed: a file of --output_type latent"
            )
        latents, texts = file.get_tensor(LATENT_KEY), file.metadata()
    shape = list(latents.shape)
    if latents.ndim == 5 and shape[0] == 1:
        latents = latents[0]
    if latents.ndim == 4:  # one frame, or one picture
        latents = latents[:, 0] if latents.shape[1] == 1 else latents[0] if latents.shape[0] == 1 else latents
    if latents.ndim != 3 or latents.shape[0] != channels:
        raise CheckpointError(
            f"{path} has latents {shape}; needed: [{channels}, 1, height / 8, width / 8] of one picture"
        )
    return latents[None].float(), texts
