"""Numerics that only FLUX.1 has: schedules, and the forward that training and sampling share.

Times are float32 up to the model's embedding. Loss weights and samplers that other families share are in
`library/training/timesteps.py` and `library/training/inference_samplers/`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from library.components.block_calls import DenoiserCall
from library.components.control_models import Control, GuidedBy
from library.core.courses import course
from library.core.lazy_names import homes, lazy_names
from library.device_utils import to_device
from library.flux_utils import pack_latents, prepare_img_ids, unpack_latents
from library.generation.sampling_utils import NUM_TRAIN_TIMESTEPS

__all__ = [
    "compute_density_for_timestep_sampling", "compute_loss_weighting_for_sd3", "denoise", "get_lin_function",
    "get_schedule",
    "predict_velocity", "time_shift",
]  # fmt: skip

if TYPE_CHECKING:
    from library.flux_models import Flux, StreamTransformer

__getattr__, __dir__ = lazy_names(__name__, {
    **homes("library.compat.flux_names", "add_flux_train_arguments"),
    **homes("library.compat.flows", "apply_model_prediction_type", "get_noisy_model_input_and_timesteps", "get_sigmas"),
    "sample_images": "library.compat.samples:sample_images_flux",
})

BASE_TOKENS, BASE_SHIFT = 256, 0.5
MAX_TOKENS, MAX_SHIFT = 4096, 1.15


def time_shift(mu: float, sigma: float, t: Tensor) -> Tensor:
    """e^mu / (e^mu + (1/t - 1)^sigma): moves times in 0..1 towards noise for mu > 0. t = 0 stays 0."""
    return math.exp(mu) / (math.exp(mu) + (1 / t - 1) ** sigma)


def get_lin_function(
    x1: float = BASE_TOKENS, y1: float = BASE_SHIFT, x2: float = MAX_TOKENS, y2: float = MAX_SHIFT
) -> Callable[[float], float]:
    """The line through (x1, y1) and (x2, y2); the defaults give mu for a number of image tokens."""
    slope = (y2 - y1) / (x2 - x1)
    return lambda x: slope * x + (y1 - slope * x1)


def get_schedule(
    num_steps: int, image_seq_len: int, base_shift: float = BASE_SHIFT, max_shift: float = MAX_SHIFT, shift: bool = True
) -> list[float]:
    """Sigmas from 1 to 0, `num_steps` + 1 of them, moved by mu of the number of tokens unless `shift` is off
    (schnell)."""
    sigmas = torch.linspace(1, 0, num_steps + 1)
    if shift:
        sigmas = time_shift(get_lin_function(y1=base_shift, y2=max_shift)(image_seq_len), 1.0, sigmas)
    return sigmas.tolist()


@course
def predict_velocity(
    denoiser: Flux,
    noisy_latents: Tensor,
    timesteps: Tensor,
    conditioning: Mapping[str, Tensor],
    *,
    guidance: float,
    use_t5_mask: bool = False,
    **inputs: object,
) -> Tensor | tuple[Tensor, Tensor]:
    """Velocity (noise - data) [B, C, H, W] of noisy latents [B, C, H, W]; H and W must be even.

    `timesteps` [B], or [B, (H/2)(W/2)] for a time per token, are on the 0..1000 scale, float32; the model gets them
    divided by 1000. `conditioning` has the keys of the family; the T5 mask reaches the model only with `use_t5_mask`.
    `guidance` is the embedded scale, one float32 number per sample; a model without that embedding (schnell) ignores
    it. With `feature_layer` among `inputs` the result is (velocity, tokens [B, L, hidden] after that block).
    """
    device = noisy_latents.device
    return (yield from on_packed_latents.course(
        denoiser, noisy_latents, timesteps, conditioning["t5_out"],
        y=to_device(conditioning["l_pooled"], device),
        guidance=torch.full((len(noisy_latents),), float(guidance), device=device, dtype=torch.float32),
        txt_attention_mask=to_device(conditioning["t5_attn_mask"], device) if use_t5_mask else None,
        **inputs,
    ))  # fmt: skip


@course
def on_packed_latents(
    denoiser: StreamTransformer, noisy_latents: Tensor, timesteps: Tensor, text: Tensor, **inputs: object
) -> Tensor | tuple[Tensor, Tensor]:
    """Call a denoiser of these blocks on latents [B, C, H, W] and text [B, T, context]; its velocity unpacked again."""
    height, width = (side // 2 for side in noisy_latents.shape[-2:])
    velocity = yield DenoiserCall(denoiser, inputs=dict(
        img=pack_latents(noisy_latents),  # [B, (H/2)(W/2), 4C]
        img_ids=prepare_img_ids(1, height, width),
        txt=to_device(text, noisy_latents.device),
        txt_ids=torch.zeros(1, text.shape[1], 3),  # as those of every text, on the CPU, where positions are read
        timesteps=timesteps.float() / NUM_TRAIN_TIMESTEPS,
        **inputs,
    ))  # fmt: skip
    if isinstance(velocity, tuple):
        return unpack_latents(velocity[0], height, width), velocity[1]
    return unpack_latents(velocity, height, width)  # [B, C, H, W]


def denoise(
    model: Flux, img: Tensor, img_ids: Tensor, txt: Tensor, txt_ids: Tensor, vec: Tensor,
    timesteps: Sequence[float], guidance: float = 4.0, t5_attn_mask: Tensor | None = None, controlnet: Any = None,
    controlnet_img: Tensor | None = None, neg_txt: Tensor | None = None, neg_vec: Tensor | None = None,
    neg_t5_attn_mask: Tensor | None = None, cfg_scale: float | None = None,
) -> Tensor:
    """Euler steps on packed latents [B, L, 4C] along `timesteps` (1 = noise, 0 = data), for callers that pack
    themselves. With `neg_txt` and a `cfg_scale` other than 1 the velocity is neg + cfg_scale * (pos - neg), `neg_vec`
    None standing for `vec`. `controlnet_img` [B or 1, 3, H, W] in -1..1 guides through `controlnet`.
    """
    control = None if controlnet is None else Control((GuidedBy(controlnet, controlnet_img),))
    guidance_vec = torch.full((img.shape[0],), float(guidance), device=img.device, dtype=torch.float32)

    def velocity_of(img: Tensor, time: float, txt: Tensor, vec: Tensor, mask: Tensor | None) -> Tensor:
        times = torch.full((img.shape[0],), time, device=img.device, dtype=torch.float32)
        ids = txt_ids if txt_ids.shape[1] == txt.shape[1] else torch.zeros(1, txt.shape[1], 3)
        return model(
            img=img, img_ids=img_ids, txt=txt, txt_ids=ids, timesteps=times, y=vec, guidance=guidance_vec,
            txt_attention_mask=mask, control=control,
        )

    is_guided = neg_txt is not None and cfg_scale not in (None, 1.0)
    for now, after in zip(timesteps[:-1], timesteps[1:]):
        velocity = velocity_of(img, now, txt, vec, t5_attn_mask)
        if is_guided:
            negative = velocity_of(img, now, neg_txt, vec if neg_vec is None else neg_vec, neg_t5_attn_mask)
            velocity = negative + cfg_scale * (velocity - negative)
        img = img + (after - now) * velocity
    return img


def compute_density_for_timestep_sampling(
    weighting_scheme: str, batch_size: int, logit_mean: float = 0.0, logit_std: float = 1.0, mode_scale: float = 1.29
) -> Tensor:
    """Numbers [B] in 0..1 that follow `--weighting_scheme`, drawn from torch's global generator (for foreign
    callers)."""
    from library.training.timesteps import density

    return density(
        weighting_scheme, torch.rand(batch_size), logit_mean=logit_mean, logit_std=logit_std, mode_scale=mode_scale
    )


def compute_loss_weighting_for_sd3(weighting_scheme: str, sigmas: Tensor) -> Tensor:
    """Loss weight of `--weighting_scheme` per sigma."""
    from library.training.timesteps import flow_weights

    return flow_weights(weighting_scheme, sigmas)
