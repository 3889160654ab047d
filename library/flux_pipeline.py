"""The models of FLUX.1 put together for making pictures: text encoders, denoiser, autoencoder, adapters."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from library.device_utils import clean_memory_on_device, get_preferred_device
from library.errors import ConfigError
from library.flux_inference import InferenceModelOptions, PictureRequest, parse_lora_argument
from library.flux_train_utils import SampleSettings, Sampler, decode_to_image, generate_latents
from library.flux_utils import load_ae, load_clip_l, load_flow_model, load_t5xxl
from library.strategy_flux import FluxTextEncodingStrategy, FluxTokenizeStrategy

if TYPE_CHECKING:
    from PIL import Image

    from library.flux_models import AutoEncoder, Flux

logger = logging.getLogger(__name__)

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
    offload: bool = False
    networks: list[Any] = field(default_factory=list)
    multipliers: tuple[float, ...] = ()

    @property
    def is_schnell(self) -> bool:
        return not self.denoiser.params.guidance_embed

    @torch.no_grad()
    def generate(self, request: PictureRequest) -> Image.Image:
        """One picture; `request` is complete (steps, seed and sizes are set)."""
        self._set_multipliers(request.multipliers)
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
        with self._autocast():
            latents = generate_latents(
                self.denoiser, settings, conditioning, negative, sampler=self.sampler, device=self.device
            )
        self._put_away(self.denoiser)
        return decode_to_image(self.vae, latents)

    def _conditioning(self, text: str) -> list[Any]:
        for encoder in self.text_encoders:
            self._bring(encoder)
        outputs = self.encode.encode_tokens(self.tokenize, self.text_encoders, self.tokenize.tokenize(text))
        for encoder in self.text_encoders:
            self._put_away(encoder)
        return outputs

    def _autocast(self) -> Any:
        """Weights of 8 bits compute in bfloat16."""
        if any(parameter.dtype == torch.float8_e4m3fn for parameter in self.denoiser.parameters()):
            return torch.autocast(self.device.type, torch.bfloat16)
        return nullcontext()

    def _set_multipliers(self, multipliers: tuple[float, ...] | None) -> None:
        if multipliers is not None and not self.networks:
            logger.warning("--m has no effect: there are no adapters, or they are merged into the weights")
            return
        wanted = self.multipliers if multipliers is None else multipliers
        if len(wanted) > len(self.networks):
            raise ConfigError(f"--m gives {len(wanted)} multipliers for {len(self.networks)} adapters")
        for network, multiplier in zip(self.networks, (*wanted, *self.multipliers[len(wanted) :])):
            network.set_multiplier(multiplier)

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
    encoders = [
        load_clip_l(options.clip_l, _dtype(options, "clip_l_dtype"), place),
        load_t5xxl(options.t5xxl, _dtype(options, "t5xxl_dtype"), place),
    ]
    denoiser = load_flow_model(options.ckpt_path, _dtype(options, "flux_dtype"), place)
    vae = load_ae(options.ae, _dtype(options, "ae_dtype"), place)
    default_length = TOKEN_LENGTH_DEV if denoiser.params.guidance_embed else TOKEN_LENGTH_SCHNELL
    tokenize = FluxTokenizeStrategy(
        options.t5xxl_max_token_length or default_length, options.tokenizer_cache_dir,
        clip_l_tokenizer=options.clip_l_tokenizer, t5xxl_tokenizer=options.t5xxl_tokenizer, t5xxl_path=options.t5xxl,
    )
    pipeline = FluxPipeline(
        denoiser, vae, encoders, tokenize, FluxTextEncodingStrategy(options.apply_t5_attn_mask),
        INFERENCE_SAMPLERS.resolve(SAMPLER), device, options.offload,
    )
    for text in options.lora_weights or []:
        add_adapter(pipeline, *parse_lora_argument(text), merge=options.merge_lora_weights)
    return pipeline


def add_adapter(pipeline: FluxPipeline, path: str, multiplier: float, *, merge: bool) -> None:
    """Merge an adapter file into the weights, or hook it; hooked ones follow --m."""
    from networks import lora_flux

    network, tensors = lora_flux.create_network_from_weights(
        multiplier, path, None, pipeline.text_encoders, pipeline.denoiser, for_inference=True
    )
    if merge:
        network.merge_to(pipeline.text_encoders, pipeline.denoiser, tensors)
        return
    network.apply_to(pipeline.text_encoders, pipeline.denoiser)
    result = network.load_weights(path)
    logger.info("hooked %s with multiplier %s; layers of no model: %d", path, multiplier, len(result["unexpected"]))
    network.to(pipeline.denoiser.device).eval()
    pipeline.networks.append(network)
    pipeline.multipliers = (*pipeline.multipliers, multiplier)


def _dtype(options: InferenceModelOptions, name: str) -> torch.dtype:
    return getattr(torch, options.dtype_of(name))
