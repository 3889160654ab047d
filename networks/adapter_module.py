"""AdapterModule: the part that every kind of adapter shares, for one layer."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from library.errors import CheckpointError
from library.keyed_random import StepDraws


@dataclass
class StepState:
    """What all modules of a network share while training; set once per micro-batch."""

    draws: StepDraws | None = None


class AdapterModule(nn.Module):
    """Adds a low-rank change to one layer by replacing the layer's forward, never the layer.

    output = org_forward(x) + delta(x) * multiplier * scale, with scale = alpha / rank. `alpha` is a float32 buffer that is
    saved; the scale is always derived from it. Subclasses hold the trained tensors and say in `weight_keys` how a file
    calls them (the first one tells the kind).
    """

    weight_keys: ClassVar[tuple[str, ...]]
    optional_keys: ClassVar[tuple[str, ...]] = ()
    plus_names: ClassVar[tuple[str, ...]] = ()
    """parts of parameter names that LoRA+ trains at a higher rate"""

    def __init__(
        self,
        lora_name: str,
        org_module: nn.Module,
        multiplier: float = 1.0,
        lora_dim: int = 4,
        alpha: float | None = 1.0,
        dropout: float | None = None,
        rank_dropout: float | None = None,
        module_dropout: float | None = None,
    ) -> None:
        super().__init__()
        self.lora_name = lora_name
        self.lora_dim = lora_dim
        self.multiplier = multiplier
        self.dropout = dropout
        self.rank_dropout = rank_dropout
        self.module_dropout = module_dropout
        self.enabled = True
        self.rate: tuple[int, float] | None = None
        self.step_state = StepState()
        self._org_module = [org_module]  # in a list, so that the layer's weights are not counted among the adapter's
        self._backup: torch.Tensor | None = None
        self.register_buffer("alpha", torch.zeros((), dtype=torch.float32))
        self.set_alpha(alpha)

    @property
    def org_module(self) -> nn.Module:
        return self._org_module[0]

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return self._alpha / self.lora_dim

    def set_alpha(self, alpha: float | torch.Tensor | None) -> None:
        """0 and None stand for alpha = rank. The value is kept beside the buffer, so that no step reads the device."""
        value = float(alpha) if alpha is not None else 0.0
        self._alpha = value or float(self.lora_dim)
        self.alpha = torch.tensor(self._alpha, dtype=torch.float32, device=self.alpha.device)
        self._alpha = float(self.alpha) if not self.alpha.is_meta else self._alpha

    def _apply(self, fn: Any, recurse: bool = True) -> AdapterModule:
        super()._apply(fn, recurse)
        self.alpha = torch.tensor(self._alpha, dtype=torch.float32, device=self.alpha.device)  # a cast would round it
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *rest)
        if f"{prefix}alpha" in state_dict:
            self.set_alpha(state_dict[f"{prefix}alpha"])

    # -- forward ---------------------------------------------------------------------------------------------------

    def apply_to(self) -> None:
        """Put this adapter into the layer's forward."""
        self.org_forward = self.org_module.forward
        self.org_module.forward = self.forward

    def remove_from(self) -> None:
        """Give the layer its own forward back."""
        if self.is_applied:
            del self.org_module.forward
            del self.org_forward

    @property
    def is_applied(self) -> bool:
        return "org_forward" in self.__dict__

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The layer's output and the adapter's, summed in the wider dtype and rounded once to the layer's."""
        output = self.org_forward(x, *args, **kwargs)
        if not self.enabled or self.multiplier == 0:
            return output
        if self._is_dropped():
            # Gradients of zero instead of none: optimizers treat them differently, and ranks could not tell a dropped
            # module from one that has not run.
            return output + sum(parameter.flatten()[0] for parameter in self.parameters()).to(output) * 0
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.compute_dtype)
        change = self.delta_output(x)
        return torch.add(output, change.to(output.device), alpha=self.multiplier * self.scale).to(output.dtype)

    @property
    def compute_dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @abstractmethod
    def delta_output(self, x: torch.Tensor) -> torch.Tensor:
        """The adapter's output without multiplier and scale."""

    @abstractmethod
    def delta_weight(self) -> torch.Tensor:
        """The change of the layer's weight at multiplier 1, with the scale; float32, shape of the weight."""

    @abstractmethod
    def initialize(self, generator: torch.Generator | None = None) -> None:
        """Start values: the change is zero."""

    # -- dropout ---------------------------------------------------------------------------------------------------

    def _is_dropped(self) -> bool:
        """Module dropout: one decision per module and optimizer step, the same for all samples and ranks."""
        if not self.training or not self.module_dropout:
            return False
        draws = self.step_state.draws
        if draws is None:
            return float(torch.rand(())) < self.module_dropout
        return draws.batch_uniform("network module dropout", self.lora_name) < self.module_dropout

    def drop(self, hidden: torch.Tensor, probability: float, shape: tuple[int, ...], purpose: str) -> torch.Tensor:
        """Zero parts of `hidden` [B, ...] and scale up the rest. `shape` is that of one sample's mask, broadcast over the
        sample. Masks are keyed per sample, so that ranks, accumulation and recomputed activations see the same."""
        draws, rows = self.step_state.draws, hidden.shape[0]
        if draws is None:  # outside a training run: a module used by hand
            kept = torch.rand((rows, *shape)) >= probability
        else:
            samples = len(draws.positions)
            if samples == 0 or rows % samples:
                raise ValueError(f"{self.lora_name} sees {rows} rows for {samples} samples; the rows of a sample must be equally many")
            per_sample = rows // samples  # text encoders see several chunks per sample
            kept = torch.stack([
                torch.rand(shape, generator=draws.generator(purpose, row // per_sample, self.lora_name, row % per_sample))
                >= probability
                for row in range(rows)
            ])
        return hidden * (kept.to(hidden.device, hidden.dtype) / (1 - probability))

    # -- merging ---------------------------------------------------------------------------------------------------

    def get_weight(self, multiplier: float | None = None) -> torch.Tensor:
        """The change of the weight at this multiplier (default: the module's), float32."""
        return (self.multiplier if multiplier is None else multiplier) * self.delta_weight()

    @torch.no_grad()
    def merge_to(
        self,
        sd: Mapping[str, torch.Tensor] | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Add the change to the layer's weight: computed in float32 on `device`, rounded to `dtype` (default: the weight's).
        `sd` holds this module's tensors of a file, when they are not loaded yet."""
        if sd:
            self.load_file_tensors(sd)
        weight = self.org_module.weight
        device = weight.device if device is None else device
        merged = weight.detach().to(device, torch.float32) + self.get_weight().to(device)
        self.org_module.weight.data.copy_(merged.to(dtype or weight.dtype))

    @torch.no_grad()
    def backup_weight(self) -> None:
        if self._backup is None:
            self._backup = self.org_module.weight.detach().clone()

    @torch.no_grad()
    def restore_weight(self) -> None:
        if self._backup is not None:
            self.org_module.weight.data.copy_(self._backup)
            self.enabled = True

    def pre_calculation(self) -> None:
        """Merge into the (backed-up) weight and stop hooking, for quicker inference."""
        self.backup_weight()
        self.merge_to()
        self.enabled = False

    # -- files -----------------------------------------------------------------------------------------------------

    def file_tensors(self) -> dict[str, torch.Tensor]:
        """Parameter names of the file -> tensors."""
        return {name: tensor.detach() for name, tensor in self.state_dict().items()}

    def load_file_tensors(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Read the tensors of a file; CheckpointError when a name or shape does not fit. A file without alpha means
        alpha = rank. Shapes that differ only in 1x1 kernel axes fit."""
        own = self.state_dict()
        unknown = [name for name in tensors if name not in own]
        missing = [name for name in own if name not in tensors and name != "alpha"]
        if unknown or missing:
            raise CheckpointError(
                f"{self.lora_name}: the file has {', '.join(sorted(tensors)) or 'nothing'};"
                f" this network needs {', '.join(sorted(own))}"
            )
        fitted: dict[str, torch.Tensor] = {}
        for name, tensor in tensors.items():
            wanted = own[name].shape
            if [n for n in tensor.shape if n != 1] != [n for n in wanted if n != 1]:
                raise CheckpointError(f"{self.lora_name}.{name} has shape {list(tensor.shape)}; this network needs {list(wanted)}")
            fitted[name] = tensor.reshape(wanted)
        fitted.setdefault("alpha", torch.tensor(float(self.lora_dim)))
        self.load_state_dict(fitted)

    # -- norms -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def weight_norm(self) -> torch.Tensor:
        """Frobenius norm of the change at multiplier 1; a 0-d tensor on the device."""
        return self.delta_weight().norm()

    @abstractmethod
    def scale_weight(self, ratio: torch.Tensor) -> None:
        """Multiply the change by `ratio`, in place."""
