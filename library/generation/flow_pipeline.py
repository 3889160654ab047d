"""What flow models have in common in making pictures: noise of a seed, guidance, steps along a schedule of sigmas."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from library.generation.pipeline import PicturePipeline
from library.generation.requests import Request, SampledRequest
from library.generation.sampling_utils import Conditioning, guided_velocity, start_noise
from library.training.inference_samplers.common import noise_of
from library.training.inference_samplers.flow import flow_sampler, flow_schedule

DEFAULT_SAMPLER = "euler"


@dataclass
class FlowPipeline(PicturePipeline[Request]):
    """A flow model, which predicts velocity (noise - data). A subclass gives one forward of it and, where they are not
    evenly spaced, the times of the steps."""

    @abstractmethod
    def velocity(self, latents: Tensor, times: Tensor, conditioning: Conditioning, request: Request) -> Tensor:
        """Of latents [B, ...] at times [B] on the 0..1000 scale."""

    def sigmas(self, request: Request) -> Tensor:
        """[steps + 1] float32 from 1 to 0."""
        return flow_schedule(request.steps)

    def latents(self, request: Request, conditioning: Conditioning, negative: Conditioning | None) -> Tensor:
        start = start_noise(request.seed, *self.latent_shape(request)).to(self.denoiser.device)
        generator = torch.Generator("cpu").manual_seed(
            request.seed + 1
        )  # samplers with noise of their own draw from here
        sampler = flow_sampler(request.sampler if isinstance(request, SampledRequest) else DEFAULT_SAMPLER)
        guided = self.guided(request, conditioning, negative)
        return sampler(guided, start, self.sigmas(request).to(start.device), noise_of([generator], start))

    def guided(
        self, request: Request, conditioning: Conditioning, negative: Conditioning | None
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """A function (latents [1, ...], sigma []) -> velocity, guided away from `negative` where `cfg_scale` is not
        1."""

        def predict(latents: Tensor, times: Tensor, given: Conditioning) -> Tensor:
            return self.velocity(latents, times, given, request)

        return guided_velocity(predict, conditioning, negative if request.cfg_scale != 1.0 else None, request.cfg_scale)
