"""What flow models have in common in making pictures: noise of a seed, guidance, steps along a schedule of sigmas."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from library.generation.pipeline import PicturePipeline
from library.generation.requests import Request, SampledRequest
from library.generation.sampling_utils import Conditioning, guided, guided_velocity, start_noise
from library.training.inference_samplers.common import noise_of
from library.training.inference_samplers.flow import flow_sampler, flow_schedule

DEFAULT_SAMPLER = "euler"


@dataclass
class FlowPipeline(PicturePipeline[Request]):
    """A flow model, which predicts velocity (noise - data). A subclass gives one forward of it and, where they are not
    evenly spaced, the times of the steps."""

    split_uncond: bool = field(default=False, kw_only=True)
    """both prompts of guidance one after the other, not as one batch"""

    @abstractmethod
    def velocity(self, latents: Tensor, times: Tensor, conditioning: Conditioning, request: Request) -> Tensor:
        """Of latents [B, ...] at times [B] on the 0..1000 scale."""

    def sigmas(self, request: Request) -> Tensor:
        """[steps + 1] float32 from 1 to 0."""
        return flow_schedule(request.steps)

    def latents(self, request: Request, conditioning: Conditioning, negative: Conditioning | None) -> Tensor:
        return self.latents_together([request], conditioning, negative)

    def latents_together(
        self, requests: Sequence[Request], conditioning: Conditioning, negative: Conditioning | None
    ) -> Tensor:
        start = torch.cat([start_noise(one.seed, *self.latent_shape(one)) for one in requests]).to(self.denoiser.device)
        # samplers with noise of their own draw from here
        generators = [torch.Generator("cpu").manual_seed(one.seed + 1) for one in requests]
        request = requests[0]
        sampler = flow_sampler(request.sampler if isinstance(request, SampledRequest) else DEFAULT_SAMPLER)
        velocity = self.guided(request, conditioning, negative)
        return sampler(velocity, start, self.sigmas(request).to(start.device), noise_of(generators, start))

    def guided(
        self, request: Request, conditioning: Conditioning, negative: Conditioning | None
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """A function (latents [B, ...], sigma []) -> velocity, guided away from `negative` where `cfg_scale` is not
        1."""

        def predict(latents: Tensor, times: Tensor, given: Conditioning) -> Tensor:
            return self.velocity(latents, times, given, request)

        def combine(negative_part: Tensor, positive_part: Tensor) -> Tensor:
            return self.combined(negative_part, positive_part, request)

        scale = request.cfg_scale
        negative = negative if scale != 1.0 else None
        return guided_velocity(predict, conditioning, negative, scale, combine, apart=self.split_uncond)

    def combined(self, negative: Tensor, positive: Tensor, request: Request) -> Tensor:
        """The guided velocity [B, ...], from those of both prompts."""
        return guided(negative, positive, request.cfg_scale)
