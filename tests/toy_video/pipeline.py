"""Making its clips, without a first frame."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from library.generation.flow_pipeline import FlowPipeline
from library.generation.requests import PictureRequest


@dataclass
class ToyVideoPipeline(FlowPipeline[PictureRequest]):
    family = "toy_video"
    request_class = PictureRequest

    def velocity(self, latents, times, conditioning, request):
        clips = latents if latents.ndim == 5 else latents[:, :, None]  # a picture is a clip of one frame
        return self.denoiser(clips, torch.zeros_like(clips[:, :, 0]), times / 1000, conditioning["states"]).view_as(
            latents
        )
