"""Numerics that only SD3 has: the forward that training and sampling share, its schedule, what training varies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from library.components.block_calls import DenoiserCall
from library.core.courses import course
from library.core.keyed_random import StepDraws
from library.core.lazy_names import homes, lazy_names
from library.device_utils import to_device, to_like
from library.generation.sampling_utils import NUM_TRAIN_TIMESTEPS
from library.training.timesteps import shift_sigmas

if TYPE_CHECKING:
    from library.sd3_models import MMDiT

__getattr__, __dir__ = lazy_names(__name__, {
    **homes(
        "library.compat.sd3_names", "add_sd3_training_arguments", "do_sample", "get_all_sigmas",
        "get_noisy_model_input_and_timesteps", "max_denoise", "sample_images", "save_models",
    ),
    **homes("library.flux_train_utils", "compute_density_for_timestep_sampling", "compute_loss_weighting_for_sd3"),
    **homes("library.compat.flows", "get_sigmas"),
})

SAMPLE_SHIFT = 3.0
"""shift of the schedule that pictures are made along"""


@course
def predict_velocity(
    denoiser: MMDiT, noisy_latents: Tensor, timesteps: Tensor, conditioning: Mapping[str, Tensor], **inputs: object
) -> Tensor | tuple[Tensor, Tensor]:
    """Velocity (noise - data) [B, C, H, W] of noisy latents [B, C, H, W].

    `timesteps` [B], or one per patch [B, h * w], are on the 0..1000 scale, float32. `conditioning` has the keys of the
    family; the masks have done their work in the text encoders. With `feature_layer` among `inputs` the result is
    (velocity, tokens [B, h * w, hidden] after that block).
    """
    device = noisy_latents.device
    context = to_device(joined_context(conditioning["lg_out"], conditioning["t5_out"]), device)
    pooled = to_device(conditioning["lg_pooled"], device)
    given = {"y": pooled, "context": context, **inputs}
    return (yield DenoiserCall(denoiser, (noisy_latents, timesteps.float()), given))


def joined_context(lg_out: Tensor, t5_out: Tensor) -> Tensor:
    """[B, 77 + L, D]: the CLIP states [B, 77, D_l + D_g], filled up with zeros to the width of T5, and then its
    states."""
    filled = F.pad(lg_out, (0, t5_out.shape[-1] - lg_out.shape[-1]))
    return torch.cat((filled, t5_out.to(filled)), dim=1)


def sample_schedule(steps: int, shift: float = SAMPLE_SHIFT) -> Tensor:
    """[steps + 1] float32: even times from 1 to the smallest of the trained ones, shifted, and then 0."""
    smallest = shift_sigmas(torch.tensor(1 / NUM_TRAIN_TIMESTEPS, dtype=torch.float64), shift)
    times = torch.linspace(1.0, float(smallest), steps, dtype=torch.float64)
    return torch.cat((shift_sigmas(times, shift), torch.zeros(1, dtype=torch.float64))).float()


# -- what training varies ----------------------------------------------------------------------------------------------


def without_dropped_parts(
    conditioning: Mapping[str, Tensor], rates: Mapping[str, float], clip_l_width: int, draws: StepDraws
) -> dict[str, Tensor]:
    """The conditioning with the parts of some encoders set to zero, each encoder of each sample by itself.

    `rates`: clip_l, clip_g and t5 -> probability; CLIP-L has the first `clip_l_width` channels of what both CLIPs make.
    """
    kept = dict(conditioning)
    widths = {"clip_l": slice(None, clip_l_width), "clip_g": slice(clip_l_width, None)}
    for name, rate in rates.items():
        if not rate:
            continue
        drops = draws.uniform(f"{name} dropout") < rate  # [B]
        keys = {"t5_out": slice(None)} if name == "t5" else dict.fromkeys(("lg_out", "lg_pooled"), widths[name])
        for key, channels in keys.items():
            tensor = kept[key]
            keep = to_like(~drops, tensor).view(-1, *[1] * (tensor.ndim - 1))
            mask = torch.ones_like(tensor)
            mask[..., channels] = keep
            kept[key] = tensor * mask
    return kept


def random_corners(denoiser: MMDiT, latent_hw: tuple[int, int], rate: float, draws: StepDraws) -> Tensor | None:
    """Where in the position table the patches of each sample begin [B, 2], on the CPU: with the probability `rate`
    anywhere that they fit, else in the middle. None when no sample is moved."""
    moves = draws.uniform("position crop") < rate  # [B]
    if not moves.any():
        return None
    side = denoiser.params.patch_size
    grid = (-(-latent_hw[0] // side), -(-latent_hw[1] // side))
    middle = torch.tensor(denoiser.middle_corner(grid))
    places = torch.tensor(denoiser.crop_range(grid)) + 1
    drawn = (draws.uniform("position crop corner", (2,)) * places).long()
    return torch.where(moves[:, None], torch.minimum(drawn, places - 1), middle)
