"""The exponential moving average of saved adapters of one run, made afterwards from its files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from library.core.errors import CheckpointError, ConfigError

SMALLEST_SHARE = 1 / math.sqrt(12)
"""widths (sigma_rel) of power functions lie below that of a uniform average"""


@dataclass(frozen=True)
class Averaging:
    """How much of the average a next file leaves: `beta`, from file to file in equal steps to `beta2`; or the power
    function of relative width `sigma_rel` (arXiv 2312.02696, section 3.1), which takes the place of both."""

    beta: float = 0.95
    beta2: float | None = None
    sigma_rel: float | None = None

    def __post_init__(self) -> None:
        for name in ("beta", "beta2"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise ConfigError(f"--{name} is {value:g}; needed: a number from 0, below 1")
        if self.sigma_rel is not None and not 0 < self.sigma_rel < SMALLEST_SHARE:
            raise ConfigError(
                f"--sigma_rel is {self.sigma_rel:g}; needed: a number above 0, below {SMALLEST_SHARE:.4f}"
            )
        if self.sigma_rel is not None and self.beta2 is not None:
            raise ConfigError("--sigma_rel and --beta2 are both given; each says how the average fades, leave one out")

    def shares(self, steps: int) -> list[float]:
        """What is kept of the average at each of these steps."""
        if self.sigma_rel is not None:
            gamma = gamma_of(self.sigma_rel)
            return [(1 - 1 / t) ** (gamma + 1) for t in range(1, steps + 1)]
        last = self.beta if self.beta2 is None else self.beta2
        return [self.beta + (last - self.beta) * (i / (steps - 1) if steps > 1 else 0.0) for i in range(steps)]


def gamma_of(sigma_rel: float) -> float:
    """Exponent of the power function with this relative width: the largest real root, 0 or more, of
    g^3 + 7 g^2 + (16 - 1/s^2) g + (12 - 1/s^2)."""
    inverse = sigma_rel**-2
    roots = np.roots([1, 7, 16 - inverse, 12 - inverse])
    return float(max(root.real for root in roots if abs(root.imag) < 1e-9 and root.real >= 0))


@torch.no_grad()
def averaged(files: Sequence[tuple[str, Mapping[str, torch.Tensor]]], how: Averaging) -> dict[str, torch.Tensor]:
    """average = average * b + next * (1 - b) over (label, tensors) of files, the first one first; in float32, each
    tensor in the type of the last file. CheckpointError when files do not have the same layers, ranks and alphas."""
    first_label, first = files[0]
    for label, tensors in files[1:]:
        _compare(first_label, first, label, tensors)
    state = {key: tensor.to(torch.float32, copy=True) for key, tensor in first.items() if _is_averaged(key, tensor)}
    for (_, tensors), share in zip(files[1:], how.shares(len(files) - 1), strict=True):
        for key, own in state.items():
            own.mul_(share).add_(tensors[key].float(), alpha=1 - share)
    last = files[-1][1]
    return {key: state[key].to(tensor.dtype) if key in state else tensor for key, tensor in last.items()}


def _is_averaged(key: str, tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() and not key.endswith(".alpha")


def _compare(
    first_label: str, first: Mapping[str, torch.Tensor], label: str, tensors: Mapping[str, torch.Tensor]
) -> None:
    other = next(iter(first.keys() ^ tensors.keys()), None)
    if other is not None:
        has, lacks = (first_label, label) if other in first else (label, first_label)
        raise CheckpointError(f"{has} has {other} and {lacks} has not; only files of one run can be averaged")
    for key, tensor in first.items():
        if tensor.shape != tensors[key].shape:
            raise CheckpointError(
                f"{key} is {list(tensor.shape)} in {first_label} and {list(tensors[key].shape)} in {label}; only files "
                "of one run, with"
                " the same ranks, can be averaged"
            )
        if not _is_averaged(key, tensor) and not torch.equal(tensor.float(), tensors[key].float()):
            raise CheckpointError(
                f"{key} is {tensor.tolist()} in {first_label} and {tensors[key].tolist()} in {label}; the matrices of "
                "files with other alphas"
                " cannot be averaged"
            )
