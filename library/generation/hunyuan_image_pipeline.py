"""The models of HunyuanImage 2.1 put together for making pictures, and how the image script loads them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from library.checkpoints.loading import Transform
from library.checkpoints.weight_forms import FP8, FP8_SCALED
from library.dataset.collate import stack_padded
from library.dataset.strategies import StrategySet
from library.dataset.text_cache_io import TEXT_LAYOUTS
from library.device_utils import get_preferred_device
from library.generation.adapter_files import ListedAdapterOptions
from library.generation.adapters import load_with_adapters, merging
from library.generation.flow_pipeline import FlowPipeline
from library.generation.guidance import held_at_first, step_of
from library.generation.guidance_options import step_scales
from library.generation.hunyuan_image_options import HunyuanImageModelOptions, HunyuanImageRequest
from library.generation.pipeline import PictureMaker
from library.generation.sampling_utils import NUM_TRAIN_TIMESTEPS, Conditioning, on_device
from library.generation.speed import as_stored, type_to_load
from library.generation.speed_options import SpeedOptions
from library.hunyuan_image_train_utils import ProjectedGuidance, needed_text, predict_velocity
from library.hunyuan_image_utils import load_encoders, load_hunyuan_image, load_vae, save_hunyuan_image
from library.strategy_hunyuan_image import HunyuanImageTextEncodingStrategy, HunyuanImageTokenizeStrategy

if TYPE_CHECKING:
    from library.hunyuan_image_models import HYImageDiffusionTransformer
    from library.hunyuan_image_vae import HunyuanVAE2D


@dataclass
class HunyuanImagePipeline(FlowPipeline[HunyuanImageRequest]):
    """Euler steps along evenly spaced times that `flow_shift` moves towards noise. Guidance is projected after some
    steps; distilled models follow an embedded one instead, and mean-flow models are told where each step ends."""

    family = "hunyuan_image"
    request_class = HunyuanImageRequest

    @property
    def is_distilled(self) -> bool:
        return self.denoiser.params.guidance_embed

    def velocity(
        self,
        latents: Tensor,
        times: Tensor,
        conditioning: Conditioning,
        request: HunyuanImageRequest,
        next_times: Tensor | None = None,
    ) -> Tensor:
        """`next_times` [B]: where the step ends."""  # fmt: skip
        scale = request.cfg_scale if request.guidance_scale is None else request.guidance_scale
        return predict_velocity(self.denoiser, latents, times, conditioning, guidance=scale, timesteps_r=next_times)

    def shift(self, request: HunyuanImageRequest) -> float:
        return request.flow_shift

    def brought(self, conditioning: Conditioning) -> Conditioning:
        """As it is: what both texts do not need is left out before."""
        return conditioning

    def guided(
        self, request: HunyuanImageRequest, conditioning: Conditioning, negative: Conditioning | None
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """With guidance all prompts run as one batch, the negative one first."""
        sigmas, guidance = self.sigmas(request), self._guidance(request, conditioning)
        steps = len(sigmas) - 1
        if self.is_distilled or negative is None:
            scales: list[float | None] = [1.0] * steps
        elif request.cfg_schedule is None:
            scales = [None] * steps
        else:
            scales = step_scales(request.cfg_schedule, steps)
        neutral = self.further.get("neutral") if request.perp_neg is not None else None
        texts = [text for text in (negative, conditioning, neutral) if text is not None]
        given = {
            count: on_device(needed_text(joined(texts) if count > 1 else conditioning), self.denoiser.device)
            for count in {1 if request.at_scale(scale).cfg_scale == 1.0 else len(texts) for scale in scales}
        }
        ends = (sigmas[1:] * NUM_TRAIN_TIMESTEPS).tolist()

        def velocity(latents: Tensor, sigma: Tensor) -> Tensor:
            step = step_of(sigmas, sigma)
            own = request.at_scale(scales[step])
            rows = 1 if own.cfg_scale == 1.0 else len(texts)
            now, end = (
                torch.full((rows,), time, device=latents.device, dtype=torch.float32)
                for time in (float(sigma) * NUM_TRAIN_TIMESTEPS, ends[step])
            )
            predicted = self.velocity(torch.cat([latents] * rows), now, given[rows], request, end).float()
            if rows == 1:
                return predicted
            other, positive, *empty = predicted.chunk(rows)
            guidance.step = step
            return guidance(positive, other, self.combined(other, positive, own, *empty))

        return velocity

    def scheduled(
        self, request: HunyuanImageRequest, sigmas: Tensor, conditioning: Conditioning, negative: Conditioning | None
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """The schedule is in `guided`: projected guidance follows all guided steps, whatever their scales."""
        return held_at_first(self.guided(request, conditioning, negative), sigmas, request)

    @staticmethod
    def _guidance(request: HunyuanImageRequest, conditioning: Conditioning) -> ProjectedGuidance:
        has_text = bool(conditioning["ocr_mask"].any())
        start = request.apg_start_step_ocr if has_text else request.apg_start_step_general
        return ProjectedGuidance(request.cfg_scale, start, request.guidance_rescale, request.guidance_rescale_apg)


def joined(texts: Sequence[Conditioning]) -> Conditioning:
    """The conditioning of several prompts as one batch; what is shorter is padded, and masked there."""
    return {name: stack_padded([text[name][0] for text in texts]) for name in texts[0]}


def device_of(options: HunyuanImageModelOptions) -> torch.device:
    return get_preferred_device() if options.device is None else torch.device(options.device)


def load_decoder(options: HunyuanImageModelOptions) -> HunyuanVAE2D:
    """The autoencoder, which waits on the CPU and computes where latents are."""
    return load_vae(
        options.vae, getattr(torch, options.dtype_name), "cpu", chunk_size=options.vae_chunk_size,
        tiling=options.vae_tiling,
    )  # fmt: skip


def load_pipeline(
    options: HunyuanImageModelOptions, adapters: ListedAdapterOptions, *, needs_vae: bool,
    speed: SpeedOptions = SpeedOptions(),
) -> PictureMaker[HunyuanImageRequest]:
    """Load every part, and the adapters merged or hooked. CheckpointError when a file does not fit."""
    device, wide = device_of(options), getattr(torch, options.dtype_name)

    def load(transform: Transform | None) -> tuple[torch.nn.Module, list[torch.nn.Module]]:
        encoders = load_encoders(options.text_encoder, options.byt5, wide, "cpu")
        return load_denoiser(options, wide, device, transform, speed), encoders

    denoiser, encoders, loaded = load_with_adapters("hunyuan_image", adapters.adapters, load)
    tokenize = HunyuanImageTokenizeStrategy(
        options.tokenizer_cache_dir, options.text_encoder_tokenizer, options.text_encoder
    )
    strategies = StrategySet(tokenize, HunyuanImageTextEncodingStrategy(), text_layout=TEXT_LAYOUTS["hunyuan_image"])
    maker = PictureMaker(
        HunyuanImagePipeline(denoiser, load_decoder(options) if needs_vae else None), strategies, encoders, loaded,
        device, torch.device("cpu") if options.text_encoder_cpu else device, text_waits=True,
    )  # fmt: skip
    if options.fp8 and not options.fp8_scaled:
        maker.computing = functools.partial(torch.autocast, device.type, torch.bfloat16)  # 8 bits compute in it
    return maker


def load_denoiser(
    options: HunyuanImageModelOptions, wide: torch.dtype, device: torch.device, transform: Transform | None = None,
    speed: SpeedOptions = SpeedOptions(),
) -> HYImageDiffusionTransformer:
    """The denoiser in the type that the options ask for, on the device, or with block swap spread over device and main
    memory."""
    form = FP8_SCALED if options.fp8_scaled else FP8 if options.fp8 else None
    denoiser = load_hunyuan_image(
        options.dit, type_to_load(wide, speed), "cpu" if options.blocks_to_swap else device, form=form,
        by_rows=options.fp8_fast, transform=transform,
    )  # fmt: skip
    as_stored(denoiser, speed, wide)
    if options.blocks_to_swap:
        denoiser.enable_block_swap(options.blocks_to_swap, device)
        denoiser.move_to_device_except_swap_blocks(device)
    return denoiser


def save_merged(
    options: HunyuanImageModelOptions, adapters: ListedAdapterOptions, target: str,
    speed: SpeedOptions = SpeedOptions(),
) -> None:
    """Write the denoiser with the adapters in it, in the type that the options ask for."""
    wide = type_to_load(getattr(torch, options.dtype_name), speed)
    merge = merging("hunyuan_image", adapters.files)
    denoiser = load_hunyuan_image(options.dit, wide, "cpu", transform=merge)
    merge.finish()
    save_hunyuan_image(denoiser, target, wide)
