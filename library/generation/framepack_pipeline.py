"""The models of FramePack put together for making clips: section by section, each in view of those that are there."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from library.components import framepack_sections as sections
from library.components.framepack_sections import Places, Step
from library.core.errors import ConfigError
from library.device_utils import to_device
from library.framepack_train_utils import predict_velocity
from library.generation.framepack_requests import FramePackRequest
from library.generation.framepack_sampling import MagCache, decode_by_sections, section_sigmas, unipc_clean
from library.generation.sampling_utils import (
    NUM_TRAIN_TIMESTEPS,
    Conditioning,
    computing_on,
    images_of,
    on_device,
    start_noise,
    step_draws,
    with_spread,
)
from library.generation.video_pipeline import (
    VideoPipeline,
    clip_pixels,
    kept_sigmas,
    noised_clip,
    picture_pixels,
    read_clip_frames,
)
from library.strategy_framepack import indices_of, masked, picture_states
from library.training.inference_samplers.common import noise_of
from library.training.inference_samplers.flow import flow_sampler

logger = logging.getLogger(__name__)

GUIDANCE = 10.0
"""the embedded scale where a request says nothing"""
OWN_SAMPLER = "unipc"
"""the name of `unipc_clean`, which has one order more than the UniPC of other families"""


@dataclass(frozen=True)
class _Start:
    """A first frame: latents [1, C, 1, h, w] and the condition that its states are."""

    latents: Tensor
    states: dict[str, Tensor]


@dataclass
class FramePackPipeline(VideoPipeline):
    """`image_encoder`: reads the first picture; None where clips are made without one. `window`: latent frames of a
    section; `is_f1`: sections are made from the first to the last, with models that learned so. `bulk_decode`: all
    latents at once. From `rope_threshold` on (0..1000, None = never) distances between rows and between columns are
    `rope_scale` times as long."""

    image_encoder: Any = None
    window: int = sections.WINDOW
    is_f1: bool = False
    bulk_decode: bool = False
    rope_scale: float = 0.5
    rope_threshold: float | None = None

    family = "framepack"
    request_class = FramePackRequest

    # -- one forward ---------------------------------------------------------------------------------------------------

    def velocity(
        self, latents: Tensor, times: Tensor, conditioning: Conditioning, request: FramePackRequest,
        rope_scale: float = 1.0,
    ) -> Tensor:
        """`conditioning` has the conditions of the section beside those of the text."""
        guidance = GUIDANCE if request.embedded_guidance_scale is None else request.embedded_guidance_scale
        return predict_velocity(
            self.denoiser, latents, times, conditioning, conditioning, guidance=guidance,
            rope_scale=rope_scale, block_cache=conditioning.get("block_cache"),
        )  # fmt: skip

    def encode(self, pixels: Tensor, seed: int) -> Tensor:
        return self.vae.encode_raw(pixels, [seed]) * self.vae.params.scaling_factor

    # -- clips ---------------------------------------------------------------------------------------------------------

    def latents(self, request: FramePackRequest, conditioning: Conditioning, negative: Conditioning | None) -> Tensor:
        """Of a clip of S sections [1, C, 1 + S * w, h, w], the first frame among them; of one frame [1, C, 1, h, w],
        which a request of one without sections asks for, too. `conditioning` has a row for each text of the prompt's
        sections. ConfigError when the frames hold no section."""
        if request.one_frame is not None or (request.frames == 1 and not request.sections):
            return self._single_frame(request, conditioning, negative)
        count = self.section_count(request)
        texts, starts = sections.section_texts(request.prompt), self._starts(request)
        rows = {index: row for row, index in enumerate(texts)}
        draws, drawn = torch.Generator("cpu").manual_seed(request.seed), step_draws(request.seed)
        history, clip = self._history(request, starts), None
        if request.video_path is not None:
            clip = self.starting_clip(dataclasses.replace(request, frames=sections.frames_needed(self.window, count)))
        made: list[Tensor] = []
        for step in sections.steps_of(count, self.window, is_f1=self.is_f1, given=request.latent_paddings):
            row = rows[sections.index_for(step.number, count, texts)]
            start = starts[sections.index_for(step.number, count, starts)]
            text = {name: tensor[row : row + 1] for name, tensor in conditioning.items()}
            noise = torch.randn(1, *self._section_shape(request, self.window), generator=draws)
            seen = {**start.states, **self._seen(step, start, history)}
            given = None if clip is None else clip[:, :, 1 + step.number * self.window :][:, :, : self.window]
            latents = self._made(request, noise, text, negative, seen, drawn, given)
            logger.info("section %d of %d is made (number %d)", len(made) + 1, count, step.number)
            made = [*made, latents] if self.is_f1 else [latents, *made]
            if self.observe is not None:
                self.observe(len(made), count, torch.cat((starts[0].latents, *made), dim=2))
            history = torch.cat((history, latents) if self.is_f1 else (latents, history), dim=2)
        return torch.cat((starts[0].latents, *made), dim=2)

    def latents_together(
        self, requests: Sequence[FramePackRequest], conditioning: Conditioning, negative: Conditioning | None
    ) -> Tensor:
        """One by one: each may have texts for its sections."""
        if len(requests) > 1:
            raise ConfigError("clips of sections are made one by one")
        return self.latents(requests[0], conditioning, negative)

    def section_count(self, request: FramePackRequest) -> int:
        """ConfigError, naming the frames needed, when they hold none."""
        if request.sections:
            return request.sections
        used = sections.usable_frames(request.frames, self.window)
        return sections.sections_in(used, self.window)

    def _section_shape(self, request: FramePackRequest, frames: int) -> tuple[int, int, int, int]:
        channels, height, width = self.latent_spec.latent_shape((request.width, request.height))
        return channels, frames, height, width

    def _starts(self, request: FramePackRequest) -> dict[int, _Start]:
        """First frames by the index of their section; of a clip that starts from another one its own."""
        if not request.image_path:
            size = (request.width, request.height)
            first = request.video_path and clip_pixels(read_clip_frames(request.video_path, 1), *size)
            return {0: self._start(request, first)}
        paths = sections.section_texts(request.image_path)
        known: dict[str, _Start] = {}
        for path in paths.values():
            known.setdefault(path, self._start(request, picture_pixels(path, request.width, request.height)))
        return {index: known[path] for index, path in paths.items()}

    def _start(self, request: FramePackRequest, pixels: Tensor | None) -> _Start:
        """Latents and states of a picture [1, 3, 1, H, W]; zeros of none."""
        if pixels is None:
            zeros = torch.zeros(1, *self._section_shape(request, 1), device=self.denoiser.device)
            return _Start(zeros, self._states(None))
        return _Start(self._encoded(pixels, request.seed), self._states(pixels[:, :, 0]))

    def _encoded(self, pixels: Tensor, seed: int) -> Tensor:
        device = self.denoiser.device
        with torch.no_grad(), computing_on(self.vae, device):
            return self.encode(pixels.to(device, self.vae.dtype), seed).float()

    def _states(self, picture: Tensor | None) -> dict[str, Tensor]:
        """Of a picture [1, 3, H, W]."""
        encoder, device = self.image_encoder, self.denoiser.device
        if encoder is None:
            width = self.denoiser.params.image_proj_dim
            if picture is not None:
                raise ConfigError("a clip begins with a picture, and --image_encoder, which reads it, is not given")
            return {"image_embeddings": torch.zeros(1, 1, width, device=device)}
        with computing_on(encoder, device):
            return {"image_embeddings": picture_states(encoder, picture, 1)}

    def _history(self, request: FramePackRequest, starts: Mapping[int, _Start]) -> Tensor:
        """What stands beside the first section that is made [1, C, F, h, w], in the order of time."""
        zeros = torch.zeros(1, *self._section_shape(request, sections.HISTORY), device=self.denoiser.device)
        if self.is_f1:
            return torch.cat((zeros, starts[0].latents), dim=2)
        if not request.end_image_path:
            return zeros
        pixels = picture_pixels(request.end_image_path, request.width, request.height)
        return torch.cat((self._encoded(pixels, request.seed), zeros), dim=2)

    def _seen(self, step: Step, start: _Start, history: Tensor) -> dict[str, Tensor]:
        near, middle, far = (history[:, :, part] for part in sections.cut_history(self.is_f1))
        return {
            "latents_clean": torch.cat((start.latents, near), dim=2), "latents_clean_2x": middle,
            "latents_clean_4x": far, **_rows(step.places),
        }

    def _made(
        self, request: FramePackRequest, noise: Tensor, text: Conditioning, negative: Conditioning | None,
        seen: Mapping[str, Tensor], drawn: torch.Generator, clip: Tensor | None = None,
    ) -> Tensor:
        """Latents [1, C, F, h, w] of a section, or of one frame, from noise of that shape. `drawn`: where samplers that
        add noise take it from. `clip`: the same part of one that is started from."""  # fmt: skip
        device = self.denoiser.device
        noise = to_device(noise, device)
        patch = self.denoiser.params.patch
        tokens = noise[0, 0].numel() / (patch[1] * patch[2])
        sigmas = section_sigmas(request.steps, tokens, request.flow_shift, request.sigma_table)  # read as numbers
        if clip is not None:
            sigmas = kept_sigmas(sigmas, request)
            noise = noised_clip(clip, noise, sigmas, request)
            if len(sigmas) == 1:
                return noise
        request = dataclasses.replace(request, steps=len(sigmas) - 1)  # some tables have fewer
        conditioning = {**on_device(text, device), **seen}
        negative = None if negative is None else {**on_device(negative, device), **seen}
        velocity = self.scheduled(request, sigmas, conditioning, negative)
        if request.sampler in (None, OWN_SAMPLER):
            return unipc_clean(lambda latents, sigma: latents - sigma * velocity(latents, sigma), noise, sigmas)
        return flow_sampler(request.sampler)(velocity, noise, sigmas, noise_of([drawn], noise))

    def guided(
        self, request: FramePackRequest, conditioning: Conditioning, negative: Conditioning | None
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """Both texts one after the other, whose guided velocity may have the spread of the positive one."""
        texts, neutral = [conditioning], self.neutral(request)
        if negative is not None and request.cfg_scale != 1.0:
            texts = [negative, conditioning, *([] if neutral is None else [{**conditioning, **neutral}])]
        caches = [MagCache(request.magcache, request.steps) for _ in texts] if request.magcache else [None] * len(texts)
        given = [{**text, "block_cache": cache} for text, cache in zip(texts, caches)]

        def velocity(latents: Tensor, sigma: Tensor) -> Tensor:
            time = torch.tensor(float(sigma) * NUM_TRAIN_TIMESTEPS)  # float32
            is_scaled = self.rope_threshold is not None and float(time) >= self.rope_threshold
            times = torch.full((len(latents),), float(time), device=latents.device)
            scale = self.rope_scale if is_scaled else 1.0
            made = [self.velocity(latents, times, text, request, scale).float() for text in given]
            own = caches[0 if len(texts) == 1 else 1]  # that of the prompt
            if request.magcache and request.magcache.calibrate and own.step == request.steps:
                logger.info("--magcache_mag_ratios %s", ",".join(map(str, own.measured)))
            if len(made) == 1:
                return made[0]
            return with_spread(self.combined(made[0], made[1], request, *made[2:]), made[1], request.guidance_rescale)

        return velocity

    # -- one frame -----------------------------------------------------------------------------------------------------

    def _single_frame(
        self, request: FramePackRequest, conditioning: Conditioning, negative: Conditioning | None
    ) -> Tensor:
        """Latents [1, C, 1, h, w] of a frame in view of control pictures."""
        settings = request.one_frame or ""
        places = sections.parse_one_frame(settings, len(request.control_image_paths), self.window)
        paths, masks = request.control_image_paths, request.control_mask_paths
        zero = torch.zeros(1, *self._section_shape(request, 1), device=self.denoiser.device)
        seen = [
            self._control(request, path, masks[number] if number < len(masks) else None)
            for number, path in enumerate(paths)
        ] or [zero]
        seen += [zero] * places.has_zero
        first = request.image_path or (paths[0] if paths else None)
        states = self._states(None if first is None else picture_pixels(first, request.width, request.height)[:, :, 0])
        rows = _rows(Places(latent=(places.target,), near=places.near, middle=places.middle, far=places.far))
        text = {name: tensor[:1] for name, tensor in conditioning.items()}
        noise = start_noise(request.seed, *self._section_shape(request, 1))
        beside = {**states, "latents_clean": torch.cat(seen, dim=2), **rows}
        made = self._made(request, noise, text, negative, beside, step_draws(request.seed))
        if self.observe is not None:
            self.observe(1, 1, made)
        return made

    def _control(self, request: FramePackRequest, path: str, mask_path: str | None) -> Tensor:
        """Latents of a control picture [1, C, 1, h, w]; what a mask (grey, white = seen) or its own alpha hides is
        0."""
        size = (request.width, request.height)
        latents = self._encoded(picture_pixels(path, *size), request.seed)
        alpha = control_alpha(path, mask_path, *size)
        return latents if alpha is None else masked(latents[:, :, 0], alpha.to(latents.device))[:, :, None]

    # -- decoding ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def frames(self, latents: Tensor) -> list[Any]:
        """Two sections at a time, faded into each other, unless all latents are decoded at once."""
        if self.bulk_decode or latents.ndim == 4 or latents.shape[2] < 1 + 2 * self.window or (
            (latents.shape[2] - 1) % self.window
        ):
            return super().frames(latents)
        stride = self.latent_spec.temporal_stride
        with computing_on(self.vae, latents.device):
            pixels = decode_by_sections(
                lambda part: self.vae.decode(part).float(), latents, self.window, stride, is_f1=self.is_f1
            )
        return images_of(pixels[0].movedim(1, 0))


def _rows(places: Places) -> dict[str, Tensor]:
    """Places in time as conditions of one sample [1, F]."""
    made = indices_of(places.latent, places.near, places.middle, places.far)
    return {name: row[None] for name, row in made.items()}


def control_alpha(path: str, mask_path: str | None, width: int, height: int) -> Tensor | None:
    """What is to be seen of a control picture [1, 1, H, W] in 0..1, by a grey picture or its own alpha; None = all."""
    if mask_path:
        return (picture_pixels(mask_path, width, height)[:, :1, 0] + 1) / 2
    with Image.open(path) as picture:
        if "A" not in picture.getbands():
            return None
        alpha = picture.getchannel("A").convert("RGB")
    return (clip_pixels([alpha], width, height)[:, :1, 0] + 1) / 2
