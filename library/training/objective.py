"""How latents are corrupted and what the denoiser has to predict: DDPM noise schedules and flow matching."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from library.keyed_random import StepDraws


@dataclass
class NoisyLatents:
    """A noised micro-batch. `timesteps` are on the 0..1000 scale and `sigmas` (flow: 0 = data, 1 = noise) stay float32."""

    latents: torch.Tensor  # [B, C, ...]
    noisy_latents: torch.Tensor  # [B, C, ...]
    noise: torch.Tensor  # [B, C, ...]
    timesteps: torch.Tensor  # [B] float32, 0..1000
    sigmas: torch.Tensor  # [B] float32
    target: torch.Tensor  # [B, C, ...]


class Objective(ABC):
    """Schedule and prediction type. `times` are in the objective's own unit: sigmas for flow matching, integer
    timesteps for DDPM."""

    is_flow: bool

    @abstractmethod
    def corrupt(self, latents: torch.Tensor, noise: torch.Tensor, times: torch.Tensor, draws: StepDraws) -> NoisyLatents:
        """Noise the latents [B, C, ...] to `times` [B]; `draws` feeds options that need more random numbers."""

    @abstractmethod
    def snr(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Signal-to-noise ratio [B] at timesteps [B] on the 0..1000 scale."""

    @abstractmethod
    def validation_times(self) -> list[float]:
        """The four fixed noise levels of a validation pass, in the unit of `times`."""
