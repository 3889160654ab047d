"""Making its clips: Euler steps from noise, without a first frame."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from library.generation.pipeline import PicturePipeline
from library.generation.requests import PictureRequest
from library.generation.sampling_utils import guided_velocity, start_noise
from tests.toy_video.record import FAMILY


@dataclass(frozen=True, kw_only=True)
class ToyVideoRequest(PictureRequest):
    frame_count: int


@dataclass
class ToyVideoPipeline(PicturePipeline[ToyVideoRequest]):
    request_class = ToyVideoRequest
    latent_spec = FAMILY.latents

    def latents(self, request, conditioning, negative):
        shape = self.latent_spec.latent_shape((request.width, request.height, request.frame_count))
        latents = start_noise(request.seed, *(shape if len(shape) == 4 else (shape[0], 1, *shape[1:]))).to(self.denoiser.device)

        def predict(noisy, times, given):
            return self.denoiser(noisy, torch.zeros_like(noisy[:, :, 0]), times / 1000, given["states"])

        velocity = guided_velocity(predict, conditioning, negative, request.cfg_scale)
        sigmas = torch.linspace(1, 0, request.steps + 1)
        for now, after in zip(sigmas[:-1], sigmas[1:]):
            latents = latents + (after - now) * velocity(latents, now)
        return latents
