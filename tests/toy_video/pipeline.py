"""Making its clips, without a first frame."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from library.generation.video_pipeline import VideoPipeline


@dataclass
class ToyVideoPipeline(VideoPipeline):
    family = "toy_video"

    def velocity(self, latents, times, conditioning, request, *, skip_layers=()):
        clips = latents if latents.ndim == 5 else latents[:, :, None]  # a picture is a clip of one frame
        first = torch.zeros_like(clips[:, :, 0])
        made = self.denoiser(clips, first, times / 1000, conditioning["states"], skip_layers=skip_layers)
        return made.view_as(latents)

    def encode(self, pixels, seed):
        return self.vae.encode(pixels, [seed])
