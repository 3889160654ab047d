"""The models of FLUX.1 put together for making pictures: text encoders, denoiser, autoencoder, adapters."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from library.dataset.strategies import Conditioning
from library.dataset.text_cache_io import TEXT_LAYOUTS
from library.device_utils import clean_memory_on_device, get_preferred_device
from library.flux_train_utils import Sampler, SampleSettings, decode_to_image, generate_latents
from library.flux_utils import load_ae, load_clip_l, load_flux, load_t5xxl
from library.generation.adapters import LoadedAdapters, merging, parse_adapter_argument
from library.generation.flux_inference import FluxRequest, InferenceModelOptions
from library.strategy_flux import FluxTextEncodingStrategy, FluxTokenizeStrategy

if TYPE_CHECKING:
    from PIL import Image

    from library.flux_models import AutoEncoder, Flux

SAMPLER = "euler"
TOKEN_LENGTH_DEV, TOKEN_LENGTH_SCHNELL = 512, 256


@dataclass
class FluxPipeline:
    """Loaded parts. With `offload` each one is on the device only while it computes."""

    denoiser: Flux
    vae: AutoEncoder
    text_encoders: list[torch.nn.Module]
    tokenize: FluxTokenizeStrategy
    encode: FluxTextEncodingStrategy
    sampler: Sampler
    device: torch.device
    adapters: LoadedAdapters
    offload: bool = False

    @property
    def is_schnell(self) -> bool:
        return not self.denoiser.params.guidance_embed

    @torch.no_grad()
    def generate(self, request: FluxRequest) -> Image.Image:
        """One picture; `request` is complete (steps, seed and sizes are set)."""
        self.adapters.set_multipliers(request.multipliers)
        conditioning = self._conditioning(request.prompt)
        negative = None
        if request.negative_prompt is not None and request.cfg_scale != 1.0:
            negative = self._conditioning(request.negative_prompt)
        settings = SampleSettings(
            height=request.height, width=request.width, num_steps=request.steps, seed=request.seed,
            guidance=request.guidance, cfg_scale=request.cfg_scale, shift=not self.is_schnell,
            use_t5_mask=self.encode.apply_t5_attn_mask,
        )
        self._bring(self.denoiser)
        self.adapters.follow_models()
        with self._autocast():
            latents = generate_latents(
                self.denoiser, settings, conditioning, negative, sampler=self.sampler, device=self.device
            )
        self._put_away(self.denoiser)
        return decode_to_image(self.vae, latents)

    def _conditioning(self, text: str) -> Conditioning:
        for encoder in self.text_encoders:
            self._bring(encoder)
        self.adapters.follow_models()
        found = self.encode.encode_tokens(self.tokenize, self.text_encoders, self.tokenize.tokenize(text))
        for encoder in self.text_encoders:
            self._put_away(encoder)
        return TEXT_LAYOUTS["flux"].named(found)

    def _autocast(self) -> Any:
        """Weights of 8 bits compute in bfloat16."""
        if any(parameter.dtype == torch.float8_e4m3fn for parameter in self.denoiser.parameters()):
            return torch.autocast(self.device.type, torch.bfloat16)
        return nullcontext()

    def _bring(self, module: torch.nn.Module) -> None:
        if self.offload:
            module.to(self.device)

    def _put_away(self, module: torch.nn.Module) -> None:
        if self.offload and self.device.type != "cpu":
            module.to("cpu")
            clean_memory_on_device(self.device)


def load_pipeline(options: InferenceModelOptions) -> FluxPipeline:
    """Load every part, and the adapters merged or hooked. CheckpointError when a file does not fit."""
    from library.training.inference_samplers import INFERENCE_SAMPLERS

    device = get_preferred_device()
    place = torch.device("cpu") if options.offload else device
    files = [parse_adapter_argument(text) for text in options.lora_weights or ()]
    merge = merging("flux", files) if files and options.merge_lora_weights else None
    encoders = [
        load_clip_l(options.clip_l, _dtype(options, "clip_l_dtype"), place, transform=merge),
        load_t5xxl(options.t5xxl, _dtype(options, "t5xxl_dtype"), place, transform=merge),
    ]
    denoiser = load_flux(options.ckpt_path, _dtype(options, "flux_dtype"), place, transform=merge)
    if merge:
        merge.finish()
    vae = load_ae(options.ae, _dtype(options, "ae_dtype"), place)
    default_length = TOKEN_LENGTH_DEV if denoiser.params.guidance_embed else TOKEN_LENGTH_SCHNELL
    tokenize = FluxTokenizeStrategy(
        options.t5xxl_max_token_length or default_length, options.tokenizer_cache_dir,
        clip_l_tokenizer=options.clip_l_tokenizer, t5xxl_tokenizer=options.t5xxl_tokenizer, t5xxl_path=options.t5xxl,
    )
    pipeline = FluxPipeline(
        denoiser, vae, encoders, tokenize, FluxTextEncodingStrategy(options.apply_t5_attn_mask),
        INFERENCE_SAMPLERS.resolve(SAMPLER), device, LoadedAdapters(denoiser, encoders), options.offload,
    )
    for adapter in [] if merge else files:
        pipeline.adapters.add(adapter)
    return pipeline


def _dtype(options: InferenceModelOptions, name: str) -> torch.dtype:
    return getattr(torch, options.dtype_of(name))
