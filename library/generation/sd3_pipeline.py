"""The models of SD3 put together for making pictures, and how the image script loads them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from library.checkpoints.loading import Transform
from library.dataset.strategies import StrategySet
from library.dataset.text_cache_io import TEXT_LAYOUTS
from library.device_utils import get_preferred_device
from library.generation.adapters import load_with_adapters
from library.generation.flow_pipeline import FlowPipeline
from library.generation.pipeline import PictureMaker
from library.generation.sampling_utils import Conditioning
from library.generation.sd3_options import Sd3ModelOptions, Sd3Request
from library.generation.speed import as_stored, type_to_load
from library.generation.speed_options import SpeedOptions
from library.sd3_train_utils import SAMPLE_SHIFT, predict_velocity, sample_schedule
from library.sd3_utils import ENCODER_LOADERS, ENCODER_SLOTS, load_sd3, load_vae_sd3, part_paths
from library.strategy_sd3 import Sd3TextEncodingStrategy, Sd3TokenizeStrategy


@dataclass
class Sd3Pipeline(FlowPipeline[Sd3Request]):
    """Steps along the known schedule, which is shifted towards noise."""

    family = "sd3"
    request_class = Sd3Request

    def velocity(self, latents: Tensor, times: Tensor, conditioning: Conditioning, request: Sd3Request) -> Tensor:
        return predict_velocity(self.denoiser, latents, times, conditioning)

    def schedule(self, request: Sd3Request) -> Tensor:
        return sample_schedule(request.steps)

    def shift(self, request: Sd3Request) -> float:
        return SAMPLE_SHIFT


def load_pipeline(options: Sd3ModelOptions, speed: SpeedOptions = SpeedOptions()) -> PictureMaker[Sd3Request]:
    """Load every part, and the adapters merged or hooked. CheckpointError when a file does not fit."""
    device, dtype = get_preferred_device(), getattr(torch, options.dtype_name)
    place = torch.device("cpu") if options.offload else device
    paths = part_paths(options.ckpt_path, {slot: getattr(options, slot) for slot in ENCODER_SLOTS})

    def load(transform: Transform | None) -> tuple[torch.nn.Module, list[torch.nn.Module]]:
        encoders = [
            ENCODER_LOADERS[slot](path, _text_dtype(slot, dtype), place, transform=transform)
            for slot, path in paths.items()
        ]
        kind = type_to_load(dtype, speed)
        denoiser = load_sd3(options.ckpt_path, kind, place, transform=transform, form=options.form)
        return as_stored(denoiser, speed, dtype), encoders

    denoiser, encoders, adapters = load_with_adapters("sd3", options.adapters, load)
    if options.enable_scaled_pos_embed:
        denoiser.enable_scaled_pos_embed()
    vae = load_vae_sd3(options.vae or options.ckpt_path, dtype, place)
    has_t5 = "t5xxl" in paths
    tokenize = Sd3TokenizeStrategy(
        options.t5xxl_token_length, options.tokenizer_cache_dir, clip_l_tokenizer=options.clip_l_tokenizer,
        clip_g_tokenizer=options.clip_g_tokenizer or options.clip_l_tokenizer, t5xxl_tokenizer=options.t5xxl_tokenizer,
        t5xxl_path=paths.get("t5xxl"), has_t5=has_t5,
    )  # fmt: skip
    encode = Sd3TextEncodingStrategy(
        options.apply_lg_attn_mask, options.apply_t5_attn_mask, None if has_t5 else denoiser.params.context_in
    )
    strategies = StrategySet(tokenize, encode, text_layout=TEXT_LAYOUTS["sd3"])
    return PictureMaker(
        Sd3Pipeline(denoiser, vae, split_uncond=options.split_uncond), strategies, encoders, adapters, device, device,
        text_waits=options.offload, denoiser_waits=options.offload,
    )  # fmt: skip


def _text_dtype(slot: str, dtype: torch.dtype) -> torch.dtype:
    """T5 overflows in float16."""
    return torch.bfloat16 if slot == "t5xxl" and dtype == torch.float16 else dtype
