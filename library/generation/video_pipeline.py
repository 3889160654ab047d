"""What flow models of clips have in common beside those of pictures: a clip to start from, guidance in some of the
steps, blocks that are left out."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from PIL import Image
from torch import Tensor

from library.core.errors import ConfigError
from library.core.keyed_random import key_seed
from library.dataset.bucket import centre_offset, cover_size
from library.dataset.media_utils import image_extensions, resize_and_crop
from library.families.registry import record_of
from library.generation.control_pictures import open_picture
from library.generation.flow_pipeline import FlowPipeline
from library.generation.guidance import step_of
from library.generation.picture_files import FRAMES_PER_SECOND, read_frames
from library.generation.sampling_utils import (
    NUM_TRAIN_TIMESTEPS,
    Conditioning,
    computing_on,
    start_noise,
)
from library.generation.video_files import read_video
from library.generation.video_requests import VideoRequest, guided_steps

logger = logging.getLogger(__name__)


@dataclass
class VideoPipeline(FlowPipeline[VideoRequest]):
    """A flow model of clips. A subclass gives `velocity`, `sigmas` and, where clips may start from others, `encode`.

    `velocity` of a model whose blocks can be left out takes `skip_layers`, the numbers of those.
    """

    request_class = VideoRequest

    @property
    def fps(self) -> float:
        """Frames per second of what the family was trained on, which are those of its clips."""
        return frame_rate(self.family)

    def encode(self, pixels: Tensor, seed: int) -> Tensor:
        """Latents [1, C, F, h, w], as the denoiser has them, of a clip [1, 3, F, H, W] in -1..1; the VAE is on the
        pixels' device. `seed`: of a posterior that is drawn."""
        raise ConfigError(f"{record_of(self.family).title} makes no clip from another one (video_path)")

    def sigmas(self, request: VideoRequest) -> Tensor:
        """Those of a clip that starts from another one are the last ones, as `noise_mode` says."""
        return kept_sigmas(super().sigmas(request), request)

    def start(self, request: VideoRequest, sigmas: Tensor) -> Tensor:
        noise = self.noise(request)
        if request.video_path is None:
            return noise
        return noised_clip(self.starting_clip(request), noise, sigmas, request)

    def latents_together(
        self, requests: Sequence[VideoRequest], conditioning: Conditioning, negative: Conditioning | None
    ) -> Tensor:
        self.denoiser.riflex_index = requests[0].riflex_index
        return super().latents_together(requests, conditioning, negative)

    def with_extra_noise(self, latents: Tensor, request: VideoRequest) -> Tensor:
        """Latents of a first frame, or of what stands beside a clip, with `i2_extra_noise`."""
        if not request.i2_extra_noise:
            return latents
        noise = start_noise(key_seed(request.seed, "noise on the first frame"), *latents.shape[1:])
        return latents + request.i2_extra_noise * noise.to(latents)

    def noise(self, request: VideoRequest) -> Tensor:
        return start_noise(request.seed, *self.latent_shape(request))

    @torch.no_grad()
    def starting_clip(self, request: VideoRequest) -> Tensor:
        """Latents [1, C, F, h, w] of the first frames of `video_path`; one that is too short is filled up with its
        first or last latent frame, as `pad_mode` says."""
        frames = read_clip_frames(request.video_path, request.frames)
        frames = frames[: self.latent_spec.usable_frames(len(frames))]
        pixels = clip_pixels(frames, request.width, request.height).to(self.denoiser.device)
        with computing_on(self.vae, pixels.device):
            latents = self.encode(pixels, request.seed).float()
        return fitted(latents, self.latent_shape(request), request.pad_mode)

    def guided(
        self, request: VideoRequest, conditioning: Conditioning, negative: Conditioning | None
    ) -> Callable[[Tensor, Tensor], Tensor]:
        if negative is None or request.cfg_scale == 1.0:
            return super().guided(request, conditioning, None)
        sigmas, skip = self.sigmas(request), request.skip_layers
        steps = len(sigmas) - 1
        wanted = guided_steps(request.cfg_skip_mode, request.cfg_apply_ratio, steps)
        alone = super().guided(request, conditioning, None)
        asked = dataclasses.replace(request, told_guidance=not request.disable_embedded_for_cfg)
        both = super().guided(asked, conditioning, negative)
        skipping = skip and self._skipping(request, conditioning, negative)

        def velocity(latents: Tensor, sigma: Tensor) -> Tensor:
            step = step_of(sigmas, sigma)
            if not wanted[step]:
                return alone(latents, sigma)
            return (skipping if skip and skip.works_at(step, steps) else both)(latents, sigma)

        return velocity

    def _skipping(
        self, request: VideoRequest, conditioning: Conditioning, negative: Conditioning
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """The velocity of a step in which a forward for the negative text leaves blocks out."""
        skip, neutral = request.skip_layers, self.neutral(request)

        def velocity(latents: Tensor, sigma: Tensor) -> Tensor:
            times = torch.full((len(latents),), float(sigma) * NUM_TRAIN_TIMESTEPS, device=latents.device)

            def predict(texts: Conditioning, **how: Any) -> Tensor:
                return self.velocity(latents, times, texts, request, **how).float()

            positive, skipped = predict(conditioning), predict(negative, skip_layers=skip.layers)
            empty = None if neutral is None else predict(neutral)
            if skip.mode == "uncond":
                return self.combined(skipped, positive, request, empty)
            return self.combined(predict(negative), positive, request, empty) + skip.scale * (positive - skipped)

        return velocity


def kept_steps(request: VideoRequest) -> int:
    """How many of the steps change the clip that is started from."""
    return int(request.steps * request.strength)


def kept_sigmas(sigmas: Tensor, request: VideoRequest) -> Tensor:
    """Of all sigmas [n + 1] those of the steps that are made: of a clip that starts from another one the last ones, as
    `noise_mode` says."""
    if request.video_path is None:
        return sigmas
    if request.noise_mode == "direct":
        return sigmas[int((sigmas - request.strength).abs().argmin()) :]
    return sigmas[max(len(sigmas) - 1 - kept_steps(request), 0) :]  # some tables have fewer steps than were asked for


def noised_clip(clip: Tensor, noise: Tensor, sigmas: Tensor, request: VideoRequest) -> Tensor:
    """Latents of a clip at the first of the `sigmas`, with noise of their shape. It is told where no step follows."""
    if len(sigmas) == 1 and request.strength:
        logger.warning("--strength %g of %d steps is none; the clip stays as it is", request.strength, request.steps)
    more = request.v2_extra_noise if len(sigmas) > 1 else 0.0  # no step would take it away again
    return (sigmas[0] + more) * noise.to(clip) + (1 - sigmas[0]) * clip


def fitted(latents: Tensor, shape: Sequence[int], pad_mode: str) -> Tensor:
    """Latents [1, C, F, h, w] of a clip with the frames of `shape` ([C, F, h, w], or of a picture [C, h, w]): cut at
    the end, or filled up by repeating the first ("front") or the last ("end") frame."""
    frames = shape[1] if len(shape) == 4 else 1
    missing = frames - latents.shape[2]
    if missing > 0:
        edge = latents[:, :, :1] if pad_mode == "front" else latents[:, :, -1:]
        more = edge.expand(-1, -1, missing, -1, -1)
        latents = torch.cat([more, latents] if pad_mode == "front" else [latents, more], dim=2)
    return latents[:, :, :frames].reshape(1, *shape)


def frame_rate(family: str) -> float:
    """Frames per second of the clips of a family."""
    clips = record_of(family).clips
    return clips.fps if clips is not None and clips.fps else FRAMES_PER_SECOND


# -- what clips are made of --------------------------------------------------------------------------------------------


def read_clip_frames(path: str | os.PathLike[str], most: int | None = None) -> list[Image.Image]:
    """The first `most` frames of a video file, of an animated picture or of a folder of pictures. ConfigError when
    there are none."""
    path = Path(path)
    if path.suffix.lower() in image_extensions() and not path.is_dir():
        return read_frames(path)[:most]
    return read_video(path, most)


def clip_pixels(frames: Sequence[Image.Image], width: int, height: int) -> Tensor:
    """[1, 3, F, H, W] float32 in -1..1: each frame scaled to cover the size, and its middle cut out, as the frames of a
    dataset are."""
    made = []
    for frame in frames:
        image = numpy.asarray(frame.convert("RGB"))
        resized = cover_size(frame.size, (width, height))
        made.append(resize_and_crop(image, resized, (width, height), centre_offset(resized, (width, height))))
    values = torch.from_numpy(numpy.stack(made).astype(numpy.float32))  # [F, H, W, 3]
    return (values / 127.5 - 1).permute(3, 0, 1, 2)[None].contiguous()


def picture_pixels(path: str | os.PathLike[str], width: int, height: int) -> Tensor:
    """[1, 3, 1, H, W] float32 in -1..1 of one picture file, as `clip_pixels` reads it. ConfigError."""
    return clip_pixels([open_picture(path)], width, height)
