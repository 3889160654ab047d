"""Keeps the norms of an adapter's weight changes below a limit, and tells the log about them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING

from library.training.hooks.base import Hook

if TYPE_CHECKING:
    import torch

    from library.training.protocols import Logs
    from library.training.run import Run
    from library.training.trainables.network import NetworkTrainable


class WeightNormHook(Hook):
    """`--scale_weight_norms`: after each optimizer step every pair of adapter weights is scaled so that the norm of its
    product is at most `max_norm`. Without a limit, networks that follow their own norms (GGPO) have them logged.

    `trainable`: whose `network` it is, once there is one."""

    def __init__(self, trainable: NetworkTrainable, max_norm: float | None) -> None:
        self.trainable = trainable
        self.max_norm = max_norm
        self._logs: Logs = {}

    @cached_property
    def _is_idle(self) -> bool:
        network = self.trainable.network
        return not self.max_norm and not getattr(network, "follows_norms", hasattr(network, "update_norms"))

    def on_gradients_ready(self, run: Run) -> None:
        if self._is_idle:
            return
        for name in ("update_grad_norms", "update_norms"):
            update = getattr(self.trainable.network, name, None)
            if update is not None:
                update()

    def on_post_optimizer_step(self, run: Run) -> None:
        if self._is_idle:
            return
        if self.max_norm:
            network = self.trainable.network
            if hasattr(network, "limit_norms"):
                scaled, mean_norm, max_norm = network.limit_norms(self.max_norm)
            else:  # of another package, which gives numbers
                scaled, mean_norm, max_norm = network.apply_max_norm_regularization(self.max_norm, run.runtime.device)
            self._logs = {
                "max_norm/keys_scaled": scaled,
                "norm/avg_key_norm": mean_norm,
                "max_norm/max_key_norm": max_norm,
            }
            return
        names = {
            "norm/avg_key_norm": "weight_norms",
            "norm/avg_grad_norm": "grad_norms",
            "norm/avg_combined_norm": "combined_weight_norms",
        }
        values = {key: _called(getattr(self.trainable.network, attribute, None)) for key, attribute in names.items()}
        self._logs = {key: value.mean() for key, value in values.items() if value is not None}

    def extra_step_logs(self, run: Run) -> Logs:
        return self._logs


def _called(norms: torch.Tensor | Callable[[], torch.Tensor | None] | None) -> torch.Tensor | None:
    """Networks offer their norms as a tensor or as a method that returns one (None when there is nothing yet)."""
    return norms() if callable(norms) else norms
