"""The models of HunyuanImage 2.1 put together for making pictures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from library.dataset.collate import stack_padded
from library.generation.flow_pipeline import FlowPipeline
from library.generation.hunyuan_image_options import HunyuanImageRequest
from library.generation.sampling_utils import NUM_TRAIN_TIMESTEPS, Conditioning
from library.hunyuan_image_train_utils import ProjectedGuidance, predict_velocity
from library.training.inference_samplers.flow import flow_schedule


@dataclass
class HunyuanImagePipeline(FlowPipeline[HunyuanImageRequest]):
    """Euler steps along evenly spaced times that `flow_shift` moves towards noise. Guidance is projected after some
    steps; distilled models follow an embedded one instead, and mean-flow models are told where each step ends."""

    family = "hunyuan_image"
    request_class = HunyuanImageRequest

    @property
    def is_distilled(self) -> bool:
        return self.denoiser.params.guidance_embed

    def velocity(
        self,
        latents: Tensor,
        times: Tensor,
        conditioning: Conditioning,
        request: HunyuanImageRequest,
        next_times: Tensor | None = None,
    ) -> Tensor:
        """`next_times` [B]: where the step ends."""  # fmt: skip
        scale = request.cfg_scale if request.guidance_scale is None else request.guidance_scale
        return predict_velocity(self.denoiser, latents, times, conditioning, guidance=scale, timesteps_r=next_times)

    def sigmas(self, request: HunyuanImageRequest) -> Tensor:
        return flow_schedule(request.steps, request.flow_shift)

    def guided(
        self, request: HunyuanImageRequest, conditioning: Conditioning, negative: Conditioning | None
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """One call for each step, in their order. With guidance both prompts run as one batch, the negative first."""
        if self.is_distilled or request.cfg_scale == 1.0:
            negative = None
        guidance = self._guidance(request, conditioning)
        given = conditioning if negative is None else joined(negative, conditioning)
        rows = 1 if negative is None else 2
        ends = iter((self.sigmas(request)[1:] * NUM_TRAIN_TIMESTEPS).tolist())

        def velocity(latents: Tensor, sigma: Tensor) -> Tensor:
            now, end = (
                torch.full((rows,), time, device=latents.device, dtype=torch.float32)
                for time in (float(sigma) * NUM_TRAIN_TIMESTEPS, next(ends))
            )
            predicted = self.velocity(torch.cat([latents] * rows), now, given, request, end).float()
            if negative is None:
                return predicted
            negative_part, positive_part = predicted.chunk(2)
            return guidance(positive_part, negative_part)

        return velocity

    @staticmethod
    def _guidance(request: HunyuanImageRequest, conditioning: Conditioning) -> ProjectedGuidance:
        has_text = bool(conditioning["ocr_mask"].any())
        start = request.apg_start_step_ocr if has_text else request.apg_start_step_general
        return ProjectedGuidance(request.cfg_scale, start, request.guidance_rescale, request.guidance_rescale_apg)


def joined(negative: Conditioning, positive: Conditioning) -> Conditioning:
    """The conditioning of two prompts as one batch; what is shorter is padded, and masked there."""
    return {name: stack_padded([negative[name][0], positive[name][0]]) for name in positive}
