"""GGPO: LoRA trained under noise on the weights, as strong as the weights and their gradients are large.

State per module: `grad_norms` and `combined_norms` [out, 1], taken after each backward pass. In training the layer's
output gets x @ noise^T with noise = randn(out, in) * (sigma * combined_norms + beta * grad_norms^2) / sqrt(out); no
gradient flows through the noise, and the network's multiplier does not touch it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from library.core.keyed_random import drawing, keyed_generator

if TYPE_CHECKING:
    from networks.lora import LoRAModule

SAMPLED_ROWS = 1000


def row_norms_squared(up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """Squared norm of every row of up @ down [out], through the rank x rank Gram matrix: the product is never
    formed."""
    up, down = up.detach().flatten(1).float(), down.detach().flatten(1).float()
    return ((up @ (down @ down.T)) * up).sum(1).clamp_min(0)


class Ggpo:
    """The noise of one module."""

    def __init__(self, sigma: float, beta: float) -> None:
        self.sigma, self.beta = sigma, beta
        self.weight_norm_estimate: torch.Tensor | None = None
        self.grad_norms: torch.Tensor | None = None  # [out, 1]
        self.combined_norms: torch.Tensor | None = None  # [out, 1]

    @torch.no_grad()
    def update_grad_norms(self, module: LoRAModule) -> None:
        """Row norms of the gradient of the change, scale * (up @ grad_down + grad_up @ down).

        A gradient that overflowed belongs to a step that fp16 skips: the last norms stay, 0 when there are none.
        """
        rows = []
        for down, up in module.pairs():
            if down.weight.grad is None or up.weight.grad is None:
                return  # the module was left out of this step; the last norms stay
            wide_up = torch.cat([up.weight, up.weight.grad], dim=1)  # [out, 2 rank]
            wide_down = torch.cat([down.weight.grad, down.weight])  # [2 rank, in]
            rows.append(row_norms_squared(wide_up, wide_down))
        norms = abs(module.scale) * torch.cat(rows).sqrt().unsqueeze(1)  # [out, 1]
        last = torch.zeros_like(norms) if self.grad_norms is None else self.grad_norms
        self.grad_norms = torch.where(torch.isfinite(norms).all(), norms, last)

    @torch.no_grad()
    def update_norms(self, module: LoRAModule) -> None:
        """sqrt(estimate^2 + |row of scale * up @ down|^2), the size of the changed weight's rows."""
        if self.weight_norm_estimate is None:
            weight = module.original_weight()
            step = max(
                1, weight.shape[0] // SAMPLED_ROWS
            )  # evenly spaced rows instead of random ones: the same in every run
            self.weight_norm_estimate = weight[::step].float().norm(dim=1).mean()
        change = torch.cat([row_norms_squared(up.weight, down.weight) for down, up in module.pairs()])
        self.combined_norms = (self.weight_norm_estimate**2 + module.scale**2 * change).sqrt().unsqueeze(1)

    @drawing
    def perturbation(self, x: torch.Tensor, module: LoRAModule) -> torch.Tensor | float:
        """What the noise adds to the layer's output; 0 before the first update."""
        draws = module.step_state.draws
        if self.grad_norms is None or self.combined_norms is None or draws is None:
            return 0.0
        out_features, in_features = module.org_module.out_features, module.org_module.in_features
        with torch.no_grad():
            # Drawn on the device: a full weight's worth of numbers per layer and step would take minutes on the CPU.
            generator = keyed_generator(draws.seed, "network ggpo", draws.step, module.lora_name, device=x.device)
            noise = torch.randn(out_features, in_features, generator=generator, device=x.device)
            noise *= (self.sigma * self.combined_norms + self.beta * self.grad_norms**2) / out_features**0.5
        return torch.nn.functional.linear(x, noise.to(x.dtype))

    def state(self) -> dict[str, torch.Tensor]:
        """What an exact resume needs."""
        pairs = {"grad_norms": self.grad_norms, "combined_norms": self.combined_norms}
        return {name: tensor.cpu() for name, tensor in pairs.items() if tensor is not None}

    def load_state(self, state: dict[str, torch.Tensor], device: torch.device) -> None:
        for name, tensor in state.items():
            setattr(self, name, tensor.to(device))
