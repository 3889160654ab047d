"""Numerics that only Wan has: the forward that training and sampling share, with two experts too."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from library.components.block_calls import DenoiserCall
from library.core.courses import course
from library.core.keyed_random import StepDraws, key_seed
from library.dataset.collate import stack_padded
from library.device_utils import to_device
from library.families.wan_tasks import is_high_noise
from library.generation.sampling_utils import NUM_TRAIN_TIMESTEPS

if TYPE_CHECKING:
    from library.training.timestep_samplers import TimestepSampler
    from library.wan_models import AttentionGuidance, WanModel

SIDE = -1
"""the place in the batch, of no sample, whose noise level decides the side of a step"""
MOST_DRAWS = 10_000


class OneSide:
    """Noise levels [B] of which all of an optimizer step lie on one side of `boundary`, so that one of two experts
    learns in it; over all steps they follow `law`.

    The side of a step, the same for all samples and processes, is that of one noise level of the law; the levels of
    samples are those of the law on this side. `redraw`: the law of the draws that replace one on the other side.
    """

    def __init__(self, law: TimestepSampler, boundary: float, redraw: TimestepSampler | None = None) -> None:
        self.law, self.boundary, self.redraw = law, boundary, redraw or law

    def know_epochs(self, *facts: int) -> None:
        """For laws that fill an epoch evenly."""
        getattr(self.law, "know_epochs", lambda *_: None)(*facts)

    def sample(self, latent_shape: Sequence[int], draws: StepDraws) -> Tensor:
        """Sigmas [B] float32; see `TimestepSampler`."""
        first = self.redraw.sample(latent_shape, StepDraws(draws.step_seed, draws.step, (SIDE,)))  # [1]
        side = is_high_noise(float(first), self.boundary)
        times = self.law.sample(latent_shape, draws)
        for number in range(MOST_DRAWS):
            wrong = (times >= self.boundary) != side
            if not wrong.any():
                return times
            again = StepDraws(key_seed(draws.seed, "side of the boundary", number), draws.step, draws.positions)
            times = torch.where(wrong, self.redraw.sample(latent_shape, again), times)
        return torch.where((times >= self.boundary) != side, first, times)  # a side that the law hardly ever takes


@course
def predict_velocity(
    denoiser: WanModel,
    noisy_latents: Tensor,
    timesteps: Tensor,
    text: Tensor | Sequence[Tensor],
    *,
    y: Tensor | None = None,
    vision: Tensor | None = None,
    f_indices: Tensor | None = None,
    boundary: float | None = None,
    known_times: Tensor | None = None,
    skip_layers: Collection[int] = (),
    feature_layer: int | None = None,
    attention_guidance: AttentionGuidance | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Velocity (noise - data) [B, C, F, h, w] of noisy latents.

    `timesteps` [B], [B, F] or one per token, on the 0..1000 scale, float32; text: states [B, T, D] with 0 behind each
    text, or one [T, D] for each; y [B, n, F, h, w], vision [B, N, V], f_indices [B, F]: see WanModel. `boundary`: the
    noise level from which the second expert predicts; samples on both sides of it are computed apart. Tokens of frames
    with times of their own go with the noisiest of their sample. `known_times`: the timesteps on the CPU, where
    they are there, so that the device is not waited for.
    """
    device = noisy_latents.device
    states = to_device(text if isinstance(text, Tensor) else stack_padded(list(text)), device)
    more = {"skip_block_indices": skip_layers, "feature_layer": feature_layer}
    if attention_guidance is not None:
        more["attention_guidance"] = attention_guidance

    def forward(rows: slice | Tensor) -> DenoiserCall:
        def of_rows(tensor: Tensor) -> Tensor:
            return tensor[rows if isinstance(rows, slice) else to_device(rows, tensor.device)]

        given = {"y": y, "clip_fea": vision}
        beside = {name: None if t is None else to_device(of_rows(t), device) for name, t in given.items()}
        places = None if f_indices is None else of_rows(f_indices)  # read as numbers, so they stay where they are
        times = of_rows(timesteps).float()
        inputs = {"f_indices": places, **beside, **more}
        return DenoiserCall(denoiser, (of_rows(noisy_latents), times, of_rows(states)), inputs)

    if denoiser.experts is None or boundary is None:
        return (yield forward(slice(None)))
    readable = timesteps if known_times is None else known_times
    noisiest = readable if readable.ndim == 1 else readable.flatten(1).amax(dim=1)
    high = torch.tensor([is_high_noise(time / NUM_TRAIN_TIMESTEPS, boundary) for time in noisiest.tolist()])
    sides = sorted(set(high.tolist()))
    made = []
    for side in sides:
        denoiser.experts.use(high_noise=side)
        made.append((yield forward(slice(None) if len(sides) == 1 else torch.nonzero(high == side)[:, 0])))
    if len(sides) == 1:
        return made[0]
    back = torch.argsort(torch.cat([torch.nonzero(high == side)[:, 0] for side in sides]))
    back = to_device(back, device)
    if feature_layer is None:
        return torch.cat(made)[back]
    return torch.cat([velocity for velocity, _ in made])[back], torch.cat([tokens for _, tokens in made])[back]
