"""Automagic: learning rates that follow from whether updates keep their direction.

Where the update of a weight has the sign of the one before, the rate rises by `lr_bump`; where the sign changes, it
falls by as much. Updates are those of Adafactor (arXiv 1804.04235): gradients divided by the root of a second moment,
which matrices keep as means of rows and columns, then clipped to a root mean square of `clip_threshold`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch

START = 1e-6
"""where rates start when --learning_rate is above `max_lr`, as the rates of other optimizers are"""
LEVELS = 255
PARTS = 2**24
MULTIPLIERS = (10368889, 6204021)
"""of the number of a weight and of the step, which spread these evenly over PARTS; rounding takes them for chances"""


class _SignOptimizer(torch.optim.Optimizer, ABC):
    """What both have in common; a subclass keeps the rates."""

    def __init__(
        self, params: Any, lr: float = START, min_lr: float = 1e-7, max_lr: float = 1e-3, lr_bump: float = 1e-6,
        beta2: float = 0.999, eps: float = 1e-30, clip_threshold: float = 1.0, weight_decay: float = 0.0,
    ) -> None:
        if not 0 < min_lr <= max_lr:
            raise ValueError(f"min_lr and max_lr are {min_lr} and {max_lr}; 0 < min_lr <= max_lr is needed")
        if not 0 <= beta2 < 1:
            raise ValueError(f"beta2 is {beta2}; a number of 0 or more and below 1 is needed")
        for name, value in (("lr_bump", lr_bump), ("eps", eps), ("weight_decay", weight_decay)):
            if not value >= 0:
                raise ValueError(f"{name} is {value}; 0 or more is needed")
        if not clip_threshold > 0:
            raise ValueError(f"clip_threshold is {clip_threshold}; a number above 0 is needed")
        names = ("lr", "min_lr", "max_lr", "lr_bump", "beta2", "eps", "clip_threshold", "weight_decay")
        values = (lr, min_lr, max_lr, lr_bump, beta2, eps, clip_threshold, weight_decay)
        super().__init__(params, dict(zip(names, values, strict=True)))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, group, self.state[p])
        return loss

    def _update(self, p: torch.Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        grad = p.grad.float()
        if not state:
            state["step"] = 0
            state["sign"] = torch.zeros_like(p, dtype=torch.int8)
        state["step"] += 1
        update = _divided(grad, group, state)
        sign = update.sign().to(torch.int8)
        kept = sign * state["sign"]  # 1 where the direction stays, -1 where it turns, 0 where there is none
        state["sign"] = sign
        start = group["lr"] if group["lr"] <= group["max_lr"] else START
        start = min(max(start, group["min_lr"]), group["max_lr"])
        rate = self._moved_rate(p, start, kept, group, state)
        if group["weight_decay"]:
            update = update + group["weight_decay"] * p
        p.sub_((rate * update).to(p.dtype))

    @abstractmethod
    def _moved_rate(
        self, p: torch.Tensor, start: float, kept: torch.Tensor, group: dict[str, Any], state: dict[str, Any]
    ) -> torch.Tensor:
        """The rate of this step, of the shape of `p` or of no axis, after `kept` has moved it; it is kept in
        `state`."""

    def group_rate(self, group: dict[str, Any]) -> float:
        """The mean rate of a group's first parameter that has one, for the log."""
        for p in group["params"]:
            if p in self.state and "step" in self.state[p]:
                return float(self._rate(self.state[p], group).mean())
        return float(group["lr"] if group["lr"] <= group["max_lr"] else START)

    @abstractmethod
    def _rate(self, state: dict[str, Any], group: dict[str, Any]) -> torch.Tensor:
        """The rate that is kept in `state`."""


class Automagic(_SignOptimizer):
    """A rate for each weight, kept in 8 bits as `codes * scale`. `scale` is a power of 2 for each tensor, so that
    nothing is lost while it stays; what falls between two codes is rounded up as often as its distance says, or a bump
    smaller than half a code would never count."""

    def _moved_rate(
        self, p: torch.Tensor, start: float, kept: torch.Tensor, group: dict[str, Any], state: dict[str, Any]
    ) -> torch.Tensor:
        rate = torch.full_like(p, start, dtype=torch.float32) if "codes" not in state else self._rate(state, group)
        rate = (rate + group["lr_bump"] * kept).clamp_(group["min_lr"], group["max_lr"])
        scale = torch.exp2(torch.ceil(torch.log2(rate.max() / LEVELS)))
        places = torch.arange(rate.numel(), device=rate.device).reshape(rate.shape)
        chance = (places * MULTIPLIERS[0] + state["step"] * MULTIPLIERS[1] % PARTS) % PARTS
        codes = torch.floor(rate / scale + chance / PARTS).clamp_(max=LEVELS)
        state["codes"], state["scale"] = codes.to(torch.uint8), scale
        return rate

    def _rate(self, state: dict[str, Any], group: dict[str, Any]) -> torch.Tensor:
        return (state["codes"].float() * state["scale"]).clamp_(group["min_lr"], group["max_lr"])


class AutomagicV2(_SignOptimizer):
    """One rate for each tensor: it rises by the mean of what its weights say."""

    def _moved_rate(
        self, p: torch.Tensor, start: float, kept: torch.Tensor, group: dict[str, Any], state: dict[str, Any]
    ) -> torch.Tensor:
        rate = state["rate"].float() if "rate" in state else torch.tensor(start, device=p.device)
        rate = (rate + group["lr_bump"] * kept.float().mean()).clamp_(group["min_lr"], group["max_lr"])
        state["rate"] = rate
        return rate

    def _rate(self, state: dict[str, Any], group: dict[str, Any]) -> torch.Tensor:
        return state["rate"].float()


def _divided(grad: torch.Tensor, group: dict[str, Any], state: dict[str, Any]) -> torch.Tensor:
    """The gradient divided by the root of its second moment, and clipped; the moment moves on in `state`."""
    beta2, square = group["beta2"], grad.square() + group["eps"]
    if grad.dim() < 2:
        update = grad * _mean_over_time(state, "square", square, beta2).rsqrt()
    else:
        rows = _mean_over_time(state, "rows", square.mean(-1), beta2)  # [..., r]
        columns = _mean_over_time(state, "columns", square.mean(-2), beta2)  # [..., c]
        shares = rows / rows.mean(-1, keepdim=True)
        update = grad * shares.rsqrt().unsqueeze(-1) * columns.rsqrt().unsqueeze(-2)
    size = update.square().mean().sqrt()
    return update / (size / group["clip_threshold"]).clamp_(min=1.0)


def _mean_over_time(state: dict[str, Any], name: str, value: torch.Tensor, beta2: float) -> torch.Tensor:
    before = state.get(name)
    before = torch.zeros_like(value) if before is None else before.float()
    state[name] = beta2 * before + (1 - beta2) * value
    return state[name]
