"""DoRA (arXiv 2402.09353): the lengths of a weight's rows or columns are trained apart from their directions.

With a change D of the weight W, V = W + D and the trained lengths g: W' = c V, c = g / (norm(V) + eps), by row or by
column. The shape of the lengths decides: [out, 1, ..] are those of the rows (of the outputs), [1, in, ..] those of the
columns (of the inputs). At another multiplier than 1 the change is multiplier * (W' - W).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from networks.kinds.adapter_module import AdapterModule

POINTS, ROUNDS = 64, 5
"""the root of `shrinking_factor` is found to POINTS ** -ROUNDS"""


def lengths_of(weight: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """norm + eps of the rows or columns of `weight` [out, in, ..] that `like` has a length for, float32, shape of
    `like`."""
    axes = tuple(axis for axis, size in enumerate(like.shape) if size == 1)
    if not axes:  # lengths without axes of their own
        axes = tuple(range(1, weight.ndim))
    return torch.linalg.vector_norm(weight, dim=axes, keepdim=True) + torch.finfo(torch.float32).eps


def magnitude_factors(change: torch.Tensor, weight: torch.Tensor, dora_scale: torch.Tensor) -> torch.Tensor:
    """c = g / (norm(W + D) + eps), float32, shape of `dora_scale`."""
    return dora_scale.float() / lengths_of(weight.float() + change, dora_scale)


def dora_change(
    change: torch.Tensor, weight: torch.Tensor, dora_scale: torch.Tensor, multiplier: float
) -> torch.Tensor:
    """Change of the weight: multiplier * (c (W + D) - W), float32."""
    original = weight.float()
    changed = original + change
    return multiplier * (changed * (dora_scale.float() / lengths_of(changed, dora_scale)) - original)


def on_outputs(dora_scale: torch.Tensor) -> bool:
    """Whether the lengths are those of rows; a single length may stand for either."""
    return dora_scale.ndim == 0 or dora_scale.numel() == dora_scale.shape[0]


class ScaledSum(torch.autograd.Function):
    """(c - 1) * base + c * change, which DoRA adds to a layer's output `base`: for backward one tensor of the output's
    size is kept, in the type of `change`, instead of two or of anything of the weight's size."""

    @staticmethod
    def forward(ctx: Any, base: torch.Tensor, change: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
        kept = (base + change).to(change.dtype) if ctx.needs_input_grad[2] else None
        ctx.save_for_backward(kept, factors)
        ctx.types = base.dtype, change.dtype
        return (factors - 1) * base + factors * change

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        kept, factors = ctx.saved_tensors
        of_factors = None if kept is None else (gradient * kept).sum_to_size(factors.shape).to(factors.dtype)
        return ((factors - 1) * gradient).to(ctx.types[0]), (factors * gradient).to(ctx.types[1]), of_factors


def shrinking_factor(
    change: torch.Tensor, weight: torch.Tensor, factors: torch.Tensor, ratio: torch.Tensor
) -> torch.Tensor:
    """rho in 0..1 so that D' = rho D and c' = 1 + rho (c - 1) change the weight `ratio` times as much as D and c do.

    c' (W + D') - W = rho ((c - 1) W + D + rho (c - 1) D), so that the square of its norm is rho^2 times a polynomial of
    rho. All stays on the device.
    """
    of_both = (factors - 1) * change
    first = (factors - 1) * weight + change
    constant, linear, square = first.square().sum(), (first * of_both).sum(), of_both.square().sum()
    wanted = ratio.square() * (constant + 2 * linear + square)
    low, width = torch.zeros_like(wanted), 1.0
    places = torch.linspace(0, 1, POINTS + 1, device=wanted.device)
    for _ in range(ROUNDS):
        rho = (low + width * places).clamp(max=1)
        fits = rho.square() * (constant + 2 * linear * rho + square * rho.square()) <= wanted
        low, width = torch.where(fits, rho, 0).max(), width / POINTS
    return torch.where(ratio < 1, low, 1.0)


def decomposed_output(module: AdapterModule, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """What DoRA adds at multiplier 1 to `output`, the layer's own output for `x`. Lengths of rows scale the layer's
    output and that of the change, lengths of columns the input of both, so that dropouts of the change keep their
    meaning. The lengths of the changed weight are built again in the backward pass: nothing of the weight's size is
    kept."""
    if module.training and torch.is_grad_enabled():
        factors = checkpoint(_factors_of, module, use_reentrant=False, preserve_rng_state=False).to(x.device)
    else:
        factors = _factors_of(module).to(x.device)
    layer = module.org_module
    axes = [1] * (len(module.weight_shape) - 2)  # of the kernel
    if on_outputs(factors):
        bias = getattr(layer, "bias", None)
        base = output if bias is None else output.float() - bias.float().view(-1, *axes)
        return ScaledSum.apply(base, module.output_change(x, 1.0), factors.view(-1, *axes))
    factors = factors.flatten().repeat(getattr(layer, "groups", 1)).view(-1, *axes)  # of the inputs of every group
    return module.product(((factors - 1) * x).to(x.dtype)) + module.output_change((factors * x).to(x.dtype), 1.0)


def _factors_of(module: AdapterModule) -> torch.Tensor:
    with torch.autocast(module.dora_scale.device.type, enabled=False):
        return magnitude_factors(module.plain_change(1.0), module.original_weight(), module.dora_scale)


@torch.no_grad()
def shrink(module: AdapterModule, ratio: torch.Tensor) -> None:
    """Multiply the norm of the change of the weight by `ratio` (0-d, at most 1), in place: the change and what its
    factors differ from 1 by are shrunk alike."""
    weight, change = module.original_weight().float(), module.plain_change(1.0)
    factors = magnitude_factors(change, weight, module.dora_scale)
    rho = shrinking_factor(change, weight, factors, ratio)
    module.scale_weight(rho)
    lengths = (1 + rho * (factors - 1)) * lengths_of(weight + rho * change, module.dora_scale)
    module.dora_scale.copy_(torch.where(ratio < 1, lengths, module.dora_scale.float()))
