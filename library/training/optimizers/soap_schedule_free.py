"""SOAP without a schedule: the steps of SOAP (arXiv 2409.11321) on the fast weights of schedule-free training
(arXiv 2405.15682)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from pytorch_optimizer import SOAP


class SOAPScheduleFree(SOAP):
    """Gradients are taken at y, between the fast weights z and their mean x: y = (1 - beta1) z + beta1 x. z takes the
    steps of SOAP with beta1 = 0, and x the mean of all z with the weights k^r * (largest rate so far)^weight_lr_power.

    The parameters hold y while training and x after `eval()`. The first step of SOAP only fills its preconditioners.
    """

    def __init__(
        self, params: Any, lr: float = 3e-3, betas: tuple[float, float] = (0.95, 0.95),
        shampoo_beta: float | None = None, weight_decay: float = 0.01, precondition_frequency: int = 10,
        max_precondition_dim: int = 10000, merge_dims: bool = False, precondition_1d: bool = False, eps: float = 1e-8,
        weight_lr_power: float = 2.0, r: float = 0.0, warmup_steps: int = 0,
    ) -> None:
        if not 0 < betas[0] < 1:
            raise ValueError(f"betas is {betas}; the first must be between 0 and 1, as it mixes mean and fast weights")
        if warmup_steps < 0:
            raise ValueError(f"warmup_steps is {warmup_steps}; 0 or more is needed")
        super().__init__(
            params, lr=lr, betas=betas, shampoo_beta=shampoo_beta, weight_decay=weight_decay,
            precondition_frequency=precondition_frequency, max_precondition_dim=max_precondition_dim,
            merge_dims=merge_dims, precondition_1d=precondition_1d, eps=eps,
        )
        own = {
            "weight_lr_power": weight_lr_power, "r": r, "warmup_steps": warmup_steps, "weight_sum": 0.0, "lr_max": 0.0,
            "train_mode": True,
        }
        self.defaults.update(own)
        for group in self.param_groups:
            for name, value in own.items():
                group.setdefault(name, value)

    def train(self) -> None:
        """Parameters become y."""
        for group in self.param_groups:
            if not group["train_mode"]:
                self._mix(group, 1 - group["betas"][0])
                group["train_mode"] = True

    def eval(self) -> None:
        """Parameters become x."""
        for group in self.param_groups:
            if group["train_mode"]:
                self._mix(group, 1 - 1 / group["betas"][0])
                group["train_mode"] = False

    @torch.no_grad()
    def _mix(self, group: dict[str, Any], share: float) -> None:
        for p in group["params"]:
            if "z" in self.state[p]:
                p.lerp_(self.state[p]["z"].to(p), share)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not all(group["train_mode"] for group in self.param_groups):
            raise RuntimeError("SOAPScheduleFree: train() must be called before step()")
        moving = [(group, p) for group in self.param_groups for p in group["params"] if p.grad is not None]
        means = [p.clone() for _, p in moving]  # y
        for _, p in moving:
            if "z" in self.state[p]:
                p.copy_(self.state[p]["z"])
        fast = [p.clone() for _, p in moving]  # z
        rates = {id(group): _rate(group) for group in self.param_groups}
        with _plain_steps(self.param_groups, rates):
            super().step()
        shares = {id(group): _share(group, rates[id(group)]) for group in self.param_groups}
        for (group, p), y, z in zip(moving, means, fast, strict=True):
            if group["step"] > 1:
                decay = rates[id(group)] * group["weight_decay"]
                update, share = z - p + decay * y, shares[id(group)]
                p.copy_(y.lerp(z, share).add_(update, alpha=group["betas"][0] * (1 - share) - 1))
                self.state[p]["z"] = z - update
            else:
                self.state[p]["z"] = z
        return loss


def _rate(group: dict[str, Any]) -> float:
    """The rate of the coming step, whose number without the first, which moves nothing, is group["step"]."""
    done = group.get("step", 0)
    return group["lr"] * min(1.0, done / group["warmup_steps"]) if group["warmup_steps"] else group["lr"]


def _share(group: dict[str, Any], rate: float) -> float:
    """The share of the newest fast weights in their mean."""
    count = group["step"] - 1
    if count < 1:
        return 0.0
    group["lr_max"] = max(group["lr_max"], rate)
    weight = count ** group["r"] * group["lr_max"] ** group["weight_lr_power"]
    group["weight_sum"] += weight
    return weight / group["weight_sum"] if group["weight_sum"] else 0.0


@contextmanager
def _plain_steps(groups: list[dict[str, Any]], rates: dict[int, float]) -> Iterator[None]:
    """Inside, the groups say to SOAP: no mean of gradients, no decay, these rates."""
    kept = [(group, group["lr"], group["betas"], group["weight_decay"]) for group in groups]
    try:
        for group, _, betas, _ in kept:
            group.update(lr=rates[id(group)], betas=(0.0, betas[1]), weight_decay=0.0)
        yield
    finally:
        for group, rate, betas, decay in kept:
            group.update(lr=rate, betas=betas, weight_decay=decay)
