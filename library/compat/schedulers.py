"""Noise schedulers as other trainers know them: a view of our Objective, and an Objective of a foreign table."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from library.core.errors import ConfigError
from library.training.objective import DdpmObjective, Objective, expand_like, flow_noisy_latents
from library.training.timesteps import NUM_TIMESTEPS


class NoiseScheduler:
    """What methods of a NetworkTrainer get as `noise_scheduler`. `objective` is ours; `alphas_cumprod` [1000] is there
    where it has a table of noise levels, not for a flow."""

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        kind = objective.prediction_type
        kind = {"v": "v_prediction", "velocity": "flow_prediction"}.get(kind, kind)
        self.config = SimpleNamespace(num_train_timesteps=NUM_TIMESTEPS, prediction_type=kind)
        if not objective.is_flow:
            self.alphas_cumprod = objective.alphas_cumprod.float()

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Samples [B, ...] at timesteps [B] on the 0..1000 scale."""
        if self.objective.is_flow:
            return flow_noisy_latents(original_samples, noise, timesteps.float() / NUM_TIMESTEPS)
        signal, scale = self._roots(original_samples, timesteps)
        return signal * original_samples + scale * noise

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What a model with v-prediction learns, or one of a flow."""
        if self.objective.is_flow:
            return noise - sample
        signal, scale = self._roots(sample, timesteps)
        return signal * noise - scale * sample

    def _roots(self, sample: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        share = self.alphas_cumprod.to(sample.device)[timesteps.long()]
        return expand_like(share.sqrt(), sample), expand_like((1 - share).sqrt(), sample)


class TableObjective(DdpmObjective):
    """The objective of a family with the noise levels of another scheduler."""

    def __init__(self, own: DdpmObjective, alphas_cumprod: Tensor, prediction_type: str) -> None:
        super().__init__(
            own.timestep_options, own.noise_options, prediction_type=prediction_type,
            zero_terminal_snr=float(alphas_cumprod[-1]) == 0,
        )
        self.alphas_cumprod = alphas_cumprod.detach().cpu().double()
        self._tables = self.tables_of(self.alphas_cumprod)


def objective_of(scheduler: Any, own: Objective) -> Objective:
    """What `get_noise_scheduler` gave, as an Objective; `own`: that of the family."""
    if isinstance(scheduler, Objective):
        return scheduler
    table = getattr(scheduler, "alphas_cumprod", None)
    if isinstance(scheduler, NoiseScheduler):
        objective = scheduler.objective
        if objective.is_flow or torch.equal(table, objective.alphas_cumprod.float()):
            return objective
    if own.is_flow and table is None:
        return own  # a flow has no table
    if own.is_flow or not isinstance(table, torch.Tensor) or table.shape != (NUM_TIMESTEPS,):
        needed = f"one with alphas_cumprod [{NUM_TIMESTEPS}]"
        needed = "a scheduler of a flow, which has no alphas_cumprod" if own.is_flow else needed
        raise ConfigError(f"get_noise_scheduler gave a {type(scheduler).__name__}; needed: {needed}")
    kind = getattr(getattr(scheduler, "config", None), "prediction_type", None)
    return TableObjective(own, table, {"v_prediction": "v", "epsilon": "epsilon"}.get(kind, own.prediction_type))
