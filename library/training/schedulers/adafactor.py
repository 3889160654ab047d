"""The rates that Adafactor finds itself, for the log."""

from __future__ import annotations

import math
from typing import Any

import torch


def adafactor_rate(step: int, rms: float, group: dict[str, Any]) -> float:
    """Rate of update `step` (from 1) for a parameter of root mean square `rms`, with relative_step.

    max(eps2, rms) * min(1e-2, or 1e-6 * step with warmup_init, 1 / sqrt(step)); without scale_parameter the first
    factor is 1. Source: arXiv 1804.04235, section 8.
    """
    largest = 1e-6 * step if group["warmup_init"] else 1e-2
    scale = max(group["eps"][1], rms) if group["scale_parameter"] else 1.0
    return scale * min(largest, 1 / math.sqrt(step))


class AdafactorRates:
    """Looks like a scheduler; the optimizer does the scheduling. Before the first step `initial_rate` is shown."""

    def __init__(self, optimizer: torch.optim.Optimizer, initial_rate: float) -> None:
        self.optimizer = optimizer
        self.initial_rate = initial_rate

    def step(self) -> None:
        """Nothing: the rates follow from the optimizer's own count."""

    def get_last_lr(self) -> list[float]:
        """Rate of the first parameter of each group in the last update."""
        return [self._rate(group) for group in self.optimizer.param_groups]

    def _rate(self, group: dict[str, Any]) -> float:
        state = self.optimizer.state.get(group["params"][0])
        if not state or "step" not in state:
            return self.initial_rate
        return adafactor_rate(int(state["step"]), float(state["RMS"]), group)
