"""Pictures of Stable Diffusion or SDXL in batches: regions, sources and masks, two stages."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy
import torch
from torch import Tensor

from library.components.unet_models import DeepShrink
from library.core.errors import ConfigError
from library.core.options import Config
from library.device_utils import get_preferred_device
from library.generation import pipeline_class
from library.generation.adapters import LoadedAdapters
from library.generation.gen_img.guides import Guides, Steer, load_guides
from library.generation.gen_img.networks import layered_words_of, load_networks, words_of
from library.generation.gen_img.options import (
    GenerationControlOptions,
    GenerationModelOptions,
    GenerationNetworkOptions,
    GenerationPictureOptions,
    GenerationPromptOptions,
    GenerationSourceOptions,
)
from library.generation.gen_img.plan import ImageRequest, first_stage
from library.generation.prompt_encoder import PromptEncoder, stacked
from library.generation.prompt_weighting import sub_prompts
from library.generation.sampling_utils import images_of
from library.generation.unet_pipeline import UNetPipeline
from library.generation.unet_sampling import (
    OFFSETS,
    PYRAMID_DISCOUNTS,
    NoiseSettings,
    SamplingRun,
    blended,
    branches_of,
    guided_predictor,
)
from library.training.inference_samplers.discrete import STEPS_OFFSET, Predict
from library.training.keyword_args import parse_keyword_args

if TYPE_CHECKING:
    from PIL import Image

logger = logging.getLogger(__name__)

CHANNELS = 3


@dataclass(frozen=True)
class Made:
    """A finished picture. `stage`: 0 or 1 in highres fix, else None. It was number `place` of `together` pictures,
    which its last bits may depend on."""

    request: ImageRequest
    image: Image.Image
    stage: int | None = None
    place: int = 0
    together: int = 1


def _made(requests: Sequence[ImageRequest], images: Sequence[Image.Image], stage: int | None = None) -> list[Made]:
    """Of a batch."""
    numbered = enumerate(zip(requests, images))
    return [Made(request, image, stage, place, len(requests)) for place, (request, image) in numbered]


@dataclass
class PictureBatches:
    """A pipeline with what batches need. `sources` and `masks` are pictures in turn; `regions` [P, H, W] the areas of
    prompt parts."""

    config: Config
    pipeline: UNetPipeline
    prompts: PromptEncoder
    networks: LoadedAdapters
    device: torch.device
    sources: Sequence[Image.Image] = ()
    masks: Sequence[Image.Image] = ()
    regions: Tensor | None = None
    upscaler: Any = None
    guides: Guides = field(default_factory=Guides)

    @property
    def unet(self) -> Any:
        return self.pipeline.denoiser

    @property
    def vae(self) -> Any:
        return self.pipeline.vae

    @torch.no_grad()
    def generate(self, batch: Sequence[ImageRequest]) -> list[Made]:
        """The pictures of requests with an equal batch key. Prompts of different lengths run one after another."""
        made: list[Made] = []
        with self.networks.at(batch[0].multipliers):
            for (rows, parts), group in itertools.groupby(batch, self._shape_of_prompts):
                requests = list(group)
                stages = list(self._stages(requests, rows, parts))
                made += [one for per_request in zip(*stages) for one in per_request]
        return made

    def _shape_of_prompts(self, request: ImageRequest) -> tuple[int, int]:
        """(rows of tokens, parts between AND)."""
        parts = self._parts(request)
        return self.prompts.rows(*parts, request.negative_prompt), len(parts)

    def _parts(self, request: ImageRequest) -> list[str]:
        """The parts of a prompt, one per region; the last one stands for further networks."""
        if self.regions is None:
            return [request.prompt]
        found = sub_prompts(request.prompt)
        return found + found[-1:] * (len(self.networks.changing) - len(found))

    def _stages(self, requests: list[ImageRequest], rows: int, parts: int) -> Iterator[list[Made]]:
        """The pictures of one or, in highres fix, both stages."""
        options = self.config[GenerationSourceOptions]
        scale = options.highres_fix_scale
        if scale is None:
            images = self._decoded(self._latents(requests, rows, parts, self._source_latents(requests)))
            yield _made(requests, images)
            return
        small = [first_stage(request, scale, options.highres_fix_steps) for request in requests]
        latents = self._latents(small, rows, parts, self._source_latents(small))
        images = (
            self._decoded(latents) if options.highres_fix_save_1st or not options.highres_fix_latents_upscaling else []
        )
        if options.highres_fix_save_1st:
            yield _made(small, images, 0)
        source = self._enlarged(latents, images, requests[0])
        # another seed, as the noise of the first stage would shine through
        second = [dataclasses.replace(request, seed=request.seed + 1, gradual_latent=None) for request in requests]
        guides = Guides() if options.highres_fix_disable_control_net else self.guides
        images = self._decoded(self._latents(second, rows, parts, source, guides))
        yield _made(requests, images, 1)

    # -- latents -------------------------------------------------------------------------------------------------------

    def _latents(
        self, requests: Sequence[ImageRequest], rows: int, parts: int, source: Tensor | None,
        guides: Guides | None = None,
    ) -> Tensor:
        """Clean latents [B, 4, h, w]. `guides`: the nets that steer; those of the run when not given."""
        first = requests[0]
        picture, sources = self.config[GenerationPictureOptions], self.config[GenerationSourceOptions]
        size = self.pipeline.latent_spec.latent_shape((first.width, first.height))[-2:]
        run = SamplingRun(
            picture.sampler, first.steps, [request.seed for request in requests], self.pipeline.prediction_type,
            self.pipeline.zero_terminal_snr, size, noise_settings(picture),
            0 if sources.force_scheduler_zero_steps_offset else STEPS_OFFSET,
            source, self._mask(requests, size) if source is not None else None, first.strength, first.gradual_latent,
            sigma_table=picture.sigma_table, observe=self.pipeline.observe,
        )  # fmt: skip
        shrink = first.deep_shrink
        if shrink is not None:
            depths = [(shrink.depth_1, float("inf"), float(shrink.timesteps_1))]
            if shrink.depth_2 is not None:
                depths.append((shrink.depth_2, float(shrink.timesteps_1), float(shrink.timesteps_2)))
            self.unet.deep_shrink = DeepShrink(tuple(depths), shrink.ratio)
        guides = self.guides if guides is None else guides
        try:
            with guides.over(requests, run.timesteps(), self.pipeline.latent_spec.spatial_stride) as steer:
                return run.sample(self._predictor(requests, rows, parts, steer), self.device)
        finally:
            self.unet.deep_shrink = None

    def _predictor(self, requests: Sequence[ImageRequest], rows: int, parts: int, steer: Steer) -> Predict:
        if self.regions is None:
            return self._part_predictor(requests, [request.prompt for request in requests], rows, steer)
        texts = [self._parts(request) for request in requests]
        predictors = [
            self._region_predictor(requests, [text[place] for text in texts], rows, place, steer)
            for place in range(parts)
        ]
        return blended(predictors, regions_of(self.regions, parts))

    def _region_predictor(
        self, requests: Sequence[ImageRequest], prompts: list[str], rows: int, place: int, steer: Steer
    ) -> Predict:
        """The prediction of one part of the prompts, with the network of the same place alone."""
        with self.networks.only(place):
            predict = self._part_predictor(requests, prompts, rows, steer)

        def alone(latents: Tensor, timestep: Tensor) -> Tensor:
            with self.networks.only(place):
                return predict(latents, timestep)

        return alone

    def _part_predictor(
        self, requests: Sequence[ImageRequest], prompts: list[str], rows: int, steer: Steer
    ) -> Predict:
        first = requests[0]
        branches = branches_of(first.scale, first.negative_scale)
        texts = {
            "positive": prompts,
            "negative": [request.negative_prompt for request in requests],
            "empty": [""] * len(requests),
        }
        conditioning = stacked([self.prompts.encode(text, rows) for branch in branches for text in texts[branch]])
        sizes = [
            request.sizes if branch == "positive" else request.sizes_negative
            for branch in branches
            for request in requests
        ]
        predict = steer(self.pipeline.predictor(conditioning, sizes, (first.height, first.width)))
        return guided_predictor(predict, branches, first.scale, first.negative_scale)

    # -- pictures ------------------------------------------------------------------------------------------------------

    def _source_latents(self, requests: Sequence[ImageRequest]) -> Tensor | None:
        if not self.sources:
            return None
        size = (requests[0].width, requests[0].height)
        return self._encoded([self.sources[request.source] for request in requests], size)

    def _encoded(self, images: Sequence[Image.Image], size_wh: tuple[int, int]) -> Tensor:
        """Scaled latents [B, 4, h, w] of pictures resized to a size; one at a time, so that a picture does not depend
        on others."""
        from PIL import Image

        found = []
        for image in images:
            resized = image if image.size == size_wh else image.resize(size_wh, Image.Resampling.LANCZOS)
            pixels = torch.from_numpy(numpy.asarray(resized, dtype=numpy.float32).copy()) / 127.5 - 1  # [H, W, 3]
            found.append(self.vae.encode(pixels.permute(2, 0, 1)[None]).float())
        return torch.cat(found)

    def _mask(self, requests: Sequence[ImageRequest], size: tuple[int, int]) -> Tensor | None:
        """[B, 1, h, w]: 1 = made anew."""
        from PIL import Image

        if not self.masks:
            return None
        found = []
        for request in requests:
            mask = self.masks[request.source % len(self.masks)].resize((size[1], size[0]), Image.Resampling.BILINEAR)
            found.append(torch.from_numpy(numpy.asarray(mask, dtype=numpy.float32).copy()) / 255)
        return torch.stack(found)[:, None]

    def _decoded(self, latents: Tensor) -> list[Image.Image]:
        """PIL images. ConfigError when the autoencoder overflowed."""
        images = []
        for part in latents.split(self._decode_together(len(latents))):
            pixels = self.vae.decode(part).float()  # [b, 3, H, W]
            if not bool(torch.isfinite(pixels).all()):
                raise ConfigError(
                    "a picture has values that are not finite; the autoencoder or the model overflows: use "
                    "--no_half_vae, or --bf16"
                )
            images += images_of(pixels)
        return images

    def _decode_together(self, count: int) -> int:
        given = self.config[GenerationModelOptions].vae_batch_size
        if given is None:
            return 1
        together = given if given >= 1 else given * self.config[GenerationPromptOptions].batch_size
        return max(1, min(count, int(together)))

    def _enlarged(self, latents: Tensor, images: Sequence[Image.Image], request: ImageRequest) -> Tensor:
        """The first stage's latents at the size of the second: through an upscaler, as latents, or as pictures."""
        size_wh = (request.width, request.height)
        if self.upscaler is not None:
            result = self.upscaler.upscale(
                self.vae,
                list(images),
                latents,
                self.unet.dtype,
                *size_wh,
                len(latents),
                self._decode_together(len(latents)),
            )
            return result.to(self.device).float() if isinstance(result, Tensor) else self._encoded(result, size_wh)
        if self.config[GenerationSourceOptions].highres_fix_latents_upscaling:
            size = self.pipeline.latent_spec.latent_shape(size_wh)[-2:]
            return torch.nn.functional.interpolate(latents.float(), size=size, mode="bicubic", align_corners=False)
        return self._encoded(images, size_wh)


def noise_settings(options: GenerationPictureOptions) -> NoiseSettings:
    return NoiseSettings(
        options.pyramid_noise_prob, options.pyramid_noise_discount_range or PYRAMID_DISCOUNTS,
        options.noise_offset_prob, options.noise_offset_range or OFFSETS,
    )  # fmt: skip


def regions_of(regions: Tensor, parts: int) -> Tensor:
    """[parts, H, W]; parts beyond the regions of the mask have the whole picture."""
    if parts <= len(regions):
        return regions[:parts]
    return torch.cat((regions, torch.ones(parts - len(regions), *regions.shape[1:])))


def read_regions(image: Image.Image, max_codes: int | None) -> Tensor:
    """Regions [P, H, W] of a mask in RGB: its channels, or the colours whose bits (red 1, green 2, blue 4) are the
    codes from 1."""
    values = torch.from_numpy(numpy.asarray(image).copy())  # [H, W, 3]
    if max_codes is None:
        return values.permute(2, 0, 1).float() / 255
    colours = torch.tensor([[(code >> bit & 1) * 255 for bit in range(CHANNELS)] for code in range(1, max_codes + 1)])
    return torch.stack([(values == colour).all(dim=2).float() for colour in colours])


def load_upscaler(options: GenerationSourceOptions, device: torch.device, dtype: torch.dtype) -> Any:
    """The object of --highres_fix_upscaler, or None. ConfigError when the module does not give one."""
    name = options.highres_fix_upscaler
    if not name:
        return None
    arguments = parse_keyword_args(
        [part for part in (options.highres_fix_upscaler_args or "").split(";") if part.strip()],
        "highres_fix_upscaler_args",
    )
    try:
        create: Callable[..., Any] = importlib.import_module(name).create_upscaler
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"--highres_fix_upscaler is {name}; a module with create_upscaler(**arguments) is needed: {error}"
        ) from error
    upscaler = create(**arguments)
    if hasattr(upscaler, "to"):
        upscaler.to(device, dtype=dtype)
    return upscaler


def load_batches(config: Config) -> PictureBatches:
    """Load every part, the embeddings and the networks. CheckpointError when a file does not fit."""
    options, networks = config[GenerationModelOptions], config[GenerationNetworkOptions]
    family = pipeline_class(options.family)
    device, dtype = get_preferred_device(), getattr(torch, options.dtype)
    info, _ = family.inspect(options)
    prompts = family.load_prompt_encoder(options, dtype, device)
    given = config[GenerationPromptOptions]
    prompts.max_rows, prompts.normalize_mode = given.max_embeddings_multiples or 1, given.emb_normalize_mode
    for word in words_of(options, networks):
        prompts.words.add(word)
    layered = layered_words_of(options, networks)
    if layered:
        prompts.add_layered(layered)
    unet = family.load_denoiser(options.ckpt, dtype, device).eval()
    if options.opt_channels_last:
        unet.to(memory_format=torch.channels_last)
    vae = family.load_vae(options.vae or options.ckpt, torch.float32 if options.no_half_vae else dtype, device).eval()
    held = load_networks(networks, unet, prompts.encoders)
    guides = load_guides(config[GenerationControlOptions], options.family, unet, dtype, device)
    upscaler = load_upscaler(config[GenerationSourceOptions], device, dtype)
    is_v = options.v_parameterization or info.prediction_type == "v"
    pipeline = family(unet, vae, "v" if is_v else "epsilon", options.zero_terminal_snr or bool(info.zero_terminal_snr))
    return PictureBatches(config, pipeline, prompts, held, device, upscaler=upscaler, guides=guides)
