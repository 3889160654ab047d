"""The model call, which training and pictures share, and how a picture is made."""

from __future__ import annotations

from dataclasses import dataclass

from library.generation.pipeline import PicturePipeline
from library.generation.requests import PictureRequest
from library.generation.sampling_utils import guided_velocity, start_noise
from library.training.inference_samplers.flow import euler, flow_schedule


def predict_velocity(denoiser, latents, times, conditioning, **inputs):
    """Velocity [B, C, h, w]; times [B] are on the 0..1000 scale."""
    given = {name: tensor.to(latents.device) for name, tensor in conditioning.items()}
    return denoiser(
        latents.to(denoiser.dtype),
        times.float() / 1000,
        given["words"].to(denoiser.dtype),
        given["words_mask"],
        **inputs,
    )


@dataclass
class PastelPipeline(PicturePipeline[PictureRequest]):
    family = "pastel"
    request_class = PictureRequest

    def latents(self, request, conditioning, negative):
        noise = start_noise(request.seed, *self.latent_shape(request))

        def predict(latents, times, given):
            return predict_velocity(self.denoiser, latents, times, given)

        velocity = guided_velocity(predict, conditioning, negative, request.cfg_scale)
        return euler(velocity, noise.to(self.denoiser.device), flow_schedule(request.steps))
