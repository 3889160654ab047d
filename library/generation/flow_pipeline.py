"""What flow models have in common in making pictures: noise of a seed, guidance, steps along a schedule of sigmas."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from library.device_utils import to_device
from library.generation.guidance import combine, scheduled
from library.generation.pipeline import PicturePipeline
from library.generation.requests import Request
from library.generation.sampling_utils import Conditioning, guided_velocity, on_device, start_noise, step_draws
from library.training.inference_samplers.common import noise_of
from library.training.inference_samplers.flow import flow_sampler, flow_schedule, observed
from library.training.inference_samplers.sigma_tables import table_sigmas

DEFAULT_SAMPLER = "euler"


@dataclass
class FlowPipeline(PicturePipeline[Request]):
    """A flow model, which predicts velocity (noise - data). A subclass gives one forward of it and, where they are not
    evenly spaced, the times of the steps."""

    split_uncond: bool = field(default=False, kw_only=True)
    """both prompts of guidance one after the other, not as one batch"""
    default_sampler: ClassVar[str] = DEFAULT_SAMPLER

    @abstractmethod
    def velocity(self, latents: Tensor, times: Tensor, conditioning: Conditioning, request: Request) -> Tensor:
        """Of latents [B, ...] at times [B] on the 0..1000 scale."""

    def sigmas(self, request: Request) -> Tensor:
        """[steps + 1] float32 from 1 to 0: those of the table that the request names, or else of `schedule`."""
        if request.sigma_table is None:
            return self.schedule(request)
        return table_sigmas(request.sigma_table, request.steps, self.shift(request))

    def schedule(self, request: Request) -> Tensor:
        """[steps + 1] float32 from 1 to 0."""
        return flow_schedule(request.steps, self.shift(request))

    def shift(self, request: Request) -> float:
        """How far the steps lie towards noise; 1 = evenly spaced."""
        return 1.0

    def latents(self, request: Request, conditioning: Conditioning, negative: Conditioning | None) -> Tensor:
        return self.latents_together([request], conditioning, negative)

    def latents_together(
        self, requests: Sequence[Request], conditioning: Conditioning, negative: Conditioning | None
    ) -> Tensor:
        request = requests[0]
        sigmas = self.sigmas(request)
        start = to_device(torch.cat([self.start(one, sigmas) for one in requests]), self.denoiser.device)
        generators = [step_draws(one.seed) for one in requests]
        sampler = flow_sampler(request.sampler or self.default_sampler)
        conditioning, negative = self.brought(conditioning), None if negative is None else self.brought(negative)
        velocity = self.scheduled(request, sigmas, conditioning, negative)
        if (observe := self.observe) is not None:
            velocity = observed(
                velocity, sigmas, lambda step, steps, clean: observe(step, steps, self.kept(clean, request))
            )
        return sampler(velocity, start, sigmas, noise_of(generators, start))  # sigmas are read as numbers, on the CPU

    def kept(self, latents: Tensor, request: Request) -> Tensor:
        """What the picture is decoded from, of all latents that the steps change."""
        return latents

    def brought(self, conditioning: Conditioning) -> Conditioning:
        """A text as the steps take it."""
        return on_device(conditioning, self.denoiser.device)

    def start(self, request: Request, sigmas: Tensor) -> Tensor:
        """Latents [1, C, ...] at the first of the `sigmas`, from which the steps go on."""
        return start_noise(request.seed, *self.latent_shape(request))

    def scheduled(
        self, request: Request, sigmas: Tensor, conditioning: Conditioning, negative: Conditioning | None
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """`guided` in the steps and by the scales of `cfg_schedule`, alone in the others; the first steps are held
        where that is asked for."""
        return scheduled(request, sigmas, lambda asked: self.guided(asked, conditioning, negative))

    def guided(
        self, request: Request, conditioning: Conditioning, negative: Conditioning | None
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """A function (latents [B, ...], sigma []) -> velocity, guided away from `negative` where `cfg_scale` is not
        1."""

        def predict(latents: Tensor, times: Tensor, given: Conditioning) -> Tensor:
            return self.velocity(latents, times, given, request)

        def made_one(*parts: Tensor) -> Tensor:
            return self.combined(parts[0], parts[1], request, *parts[2:])

        scale = request.cfg_scale
        negative = negative if scale != 1.0 else None
        return guided_velocity(
            predict, conditioning, negative, scale, made_one, neutral=self.neutral(request),
            apart=self.split_uncond or (negative is not None and negative.keys() != conditioning.keys()),
        )

    def neutral(self, request: Request) -> Conditioning | None:
        """The empty prompt, where a request's guidance counts from it."""
        found = self.further.get("neutral") if request.perp_neg is not None else None
        return None if found is None else self.brought(found)

    def combined(
        self, negative: Tensor, positive: Tensor, request: Request, neutral: Tensor | None = None
    ) -> Tensor:
        """The guided velocity [B, ...], from those of both prompts and of an empty one."""
        return combine(request, negative, positive, neutral)
