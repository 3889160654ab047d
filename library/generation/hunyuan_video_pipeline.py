"""The models of HunyuanVideo put together for making clips."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from library.components.hunyuan_vae_models import scaled_latents
from library.core.errors import ConfigError
from library.generation.sampling_utils import Conditioning, computing_on
from library.generation.video_pipeline import VideoPipeline, picture_pixels
from library.generation.video_requests import VideoRequest
from library.hunyuan_video_train_utils import predict_velocity

FLOW_SHIFT, FLOW_SHIFT_OF_FEW, FEW_STEPS = 7.0, 17.0, 20
"""shift of the times towards noise; with fewer steps it is larger"""
EMBEDDED_GUIDANCE = 6.0
PICTURE_NEEDED = (
    "the denoiser is a model from image to video, and there is no picture for the first frame (--i in a prompt line,"
    " --image_path); give one, or take a model from text to video"
)


@dataclass
class HunyuanVideoPipeline(VideoPipeline):
    """Euler steps along evenly spaced times that `flow_shift` moves towards noise. Models that are distilled follow an
    embedded guidance; a negative prompt may lead them away too. Models from image to video are shown the picture of
    `image_path` as the first frame.
    """

    family = "hunyuan_video"
    _first_frame: tuple[tuple[object, ...], Tensor] | None = field(default=None, init=False, repr=False)

    def velocity(
        self, latents: Tensor, times: Tensor, conditioning: Conditioning, request: VideoRequest, **how: object
    ) -> Tensor:
        clips = latents if latents.ndim == 5 else latents[:, :, None]  # a picture is a clip of one frame
        scale = request.embedded_guidance_scale
        self.denoiser.told_guidance = request.told_guidance
        shown = self.first_frame(request)
        velocity = predict_velocity(
            self.denoiser, clips, times, conditioning, guidance=EMBEDDED_GUIDANCE if scale is None else scale,
            first_frame=None if shown is None else shown.expand(len(clips), -1, -1, -1, -1), **how,
        )  # fmt: skip
        return velocity.view_as(latents)

    def shift(self, request: VideoRequest) -> float:
        usual = FLOW_SHIFT_OF_FEW if request.steps < FEW_STEPS else FLOW_SHIFT
        return usual if request.flow_shift is None else request.flow_shift

    def noise(self, request: VideoRequest) -> Tensor:
        """Drawn frame by frame: the first frames of a seed do not hang on how many there are."""
        channels, *size = self.latent_shape(request)
        generator = torch.Generator("cpu").manual_seed(request.seed)
        if len(size) == 2:
            return torch.randn((1, channels, *size), generator=generator)
        frames = [torch.randn((1, channels, 1, *size[1:]), generator=generator) for _ in range(size[0])]
        return torch.cat(frames, dim=2)

    def encode(self, pixels: Tensor, seed: int) -> Tensor:
        return scaled_latents(self.vae.encode_raw(pixels, [seed]), self.vae.params.scaling_factor)

    def first_frame(self, request: VideoRequest) -> Tensor | None:
        """Latents [1, C, 1, h, w] of the picture that the clip begins with, encoded once for all steps; None where the
        model is shown none. ConfigError when the request has no picture."""
        if not self.denoiser.params.shown_channels:
            return None
        if request.image_path is None:
            raise ConfigError(PICTURE_NEEDED)
        wanted = (request.image_path, request.width, request.height, request.seed, request.i2_extra_noise)
        if self._first_frame is None or self._first_frame[0] != wanted:
            pixels = picture_pixels(request.image_path, request.width, request.height).to(self.denoiser.device)
            with torch.no_grad(), computing_on(self.vae, pixels.device):
                latents = self.encode(pixels, request.seed).float()
            self._first_frame = (wanted, self.with_extra_noise(latents, request))
        return self._first_frame[1]
