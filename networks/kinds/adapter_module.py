"""AdapterModule: the part that every kind of adapter shares, for one layer."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from library.checkpoints.number_formats import IN_MEMORY, narrowed
from library.core.errors import CheckpointError
from library.core.forward_values import ForwardValue
from library.core.keyed_random import StepDraws, drawing
from library.fp8_optimization_utils import set_weight, stored_of, weight_of, weight_shape
from networks.kinds.weight_decomposition import decomposed_output, dora_change, lengths_of, shrink


@dataclass
class StepState:
    """What all modules of a network share while training. `draws` are set once per micro-batch; `times` [B], how noisy
    each sample is (0 = data, 1 = noise), before every forward that has others."""

    draws: StepDraws | None = None
    _times: ForwardValue[torch.Tensor] = field(default_factory=ForwardValue)

    @property
    def times(self) -> torch.Tensor | None:
        return self._times.value

    @times.setter
    def times(self, times: torch.Tensor | None) -> None:
        self._times.value = times


def change_of(
    module_class: type[AdapterModule], tensors: Mapping[str, torch.Tensor], weight: torch.Tensor, multiplier: float
) -> torch.Tensor:
    """Change of `weight` by the tensors of one layer of a file, at this multiplier; float32, shape of the weight.

    The one formula for forward, merging, saving, streaming and the tools. Gradients flow into the tensors.
    """
    with torch.autocast(
        weight.device.type, enabled=False
    ):  # a change that is rounded on the way is no longer the file's
        if "dora_scale" not in tensors:
            return module_class.weight_change(tensors, weight, multiplier)
        plain = module_class.weight_change(without_lengths(tensors), weight, 1.0)
        return dora_change(plain, weight, tensors["dora_scale"], multiplier)


def without_lengths(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A layer's tensors without those of DoRA."""
    return {name: tensor for name, tensor in tensors.items() if name != "dora_scale"}


def linear_output(layer: nn.Module, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """What a layer with this geometry and this weight gives, without bias."""
    if type(layer).__name__ == "Linear":
        return F.linear(x, weight)
    if layer.padding_mode != "zeros":
        x = F.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
        return F.conv2d(x, weight, None, layer.stride, 0, layer.dilation, layer.groups)
    return F.conv2d(x, weight, None, layer.stride, layer.padding, layer.dilation, layer.groups)


class AdapterModule(nn.Module):
    """Changes one layer by replacing the layer's forward, never the layer.

    output = org_forward(x) + output_change(x). A kind of adapter is a subclass that holds the trained tensors under the
    names of a file and gives `weight_change`, the formula from those tensors to the change of the layer's weight. That
    is enough: forward, merging and the tools use it. A kind with a cheaper way than building the whole change overrides
    `output_change`.

    `alpha` is a float32 buffer that is saved; the scale alpha / rank is always derived from it.
    """

    weight_keys: ClassVar[tuple[str, ...]]
    """tensors that a file must have"""
    optional_keys: ClassVar[tuple[str, ...]] = ()
    layer_classes: ClassVar[tuple[str, ...]] = ("Linear", "Conv2d")
    """class names of the layers that it can change"""
    has_alpha: ClassVar[bool] = True
    """whether files of this kind hold an alpha"""
    default_alpha: ClassVar[float | None] = None
    """the alpha when none is given; None = the neutral one"""
    plus_names: ClassVar[tuple[str, ...]] = ()
    """parts of parameter names that LoRA+ trains at a higher rate; none = LoRA+ is refused"""
    decomposable: ClassVar[bool] = True
    """whether lengths (DoRA, `dora_scale`) may stand beside its tensors"""
    is_norm: ClassVar[bool] = False
    """whether it changes a norm layer: those stand beside the layers of any other kind"""
    drops: ClassVar[tuple[str, ...]] = ("rank_dropout", "module_dropout")
    """the dropouts that do something: `dropout` of inner values, `rank_dropout`, `module_dropout`"""
    recomputes: ClassVar[bool] = False
    """whether the backward pass builds the change of the weight again instead of keeping it and what it is made of"""

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
        **shape: Any,
    ) -> None:
        """`shape`: what `build` of the kind takes."""
        super().__init__()
        self.lora_name = lora_name
        self.lora_dim = lora_dim
        self.multiplier = multiplier
        self.dropout = dropout
        self.rank_dropout = rank_dropout
        self.module_dropout = module_dropout
        self.enabled = True
        self.rate: tuple[int, float] | None = None
        self.block: int | None = None
        """number of the U-Net block that the layer stands in"""
        self.weight_name = "weight"
        """name of the layer's parameter that is changed"""
        self.step_state = StepState()
        self._org_module = [org_module]  # in a list, so that the layer's weights are not counted among the adapter's
        self._backup: dict[str, torch.Tensor] | None = None
        self.dora_scale: nn.Parameter | None = None
        self.diff_b: nn.Parameter | None = None
        self.register_buffer("alpha", torch.zeros((), dtype=torch.float32), persistent=self.has_alpha)
        self.set_alpha(self.default_alpha if alpha is None else alpha)
        self.build(**shape)
        self.initialize()

    @abstractmethod
    def build(self, **shape: Any) -> None:
        """Make the trained tensors for `org_module` and `lora_dim`; `initialize` gives them values."""

    @property
    def org_module(self) -> nn.Module:
        return self._org_module[0]

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return self._alpha / self.lora_dim

    @property
    def neutral_alpha(self) -> float:
        """The alpha that changes nothing, which a file without one has: the rank."""
        return float(self.lora_dim)

    def set_alpha(self, alpha: float | torch.Tensor | None) -> None:
        """0 and None stand for `neutral_alpha`. The value is kept beside the buffer, so that no step reads the
        device."""
        value = float(alpha) if alpha is not None else 0.0
        self._alpha = value or self.neutral_alpha
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
            trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
            return output + sum(parameter.flatten()[0] for parameter in trained).to(output) * 0 if trained else output
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.compute_dtype)
        return self.changed_output(x, output).to(output.dtype)

    def changed_output(self, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """The layer's `output` for `x` and what the adapter adds to it, in the wider of their dtypes."""
        change = (
            self.output_change(x) if self.dora_scale is None else self.multiplier * decomposed_output(self, x, output)
        )
        change = change.to(output.device)
        if self.diff_b is not None:
            bias = self.multiplier * self.diff_b  # [out]
            change = change + bias.to(change.device, change.dtype).view(-1, *[1] * (len(self.weight_shape) - 2))
        return output + change

    @property
    def compute_dtype(self) -> torch.dtype:
        for parameter in self._parameters.values():  # a walk through all modules in every call costs as much as a layer
            if parameter is not None:
                return parameter.dtype
        return next(self.parameters()).dtype

    def output_change(self, x: torch.Tensor, multiplier: float | None = None) -> torch.Tensor:
        """What is added to the layer's output, at this multiplier (default: the module's) and with the scale; without
        the lengths of DoRA."""
        multiplier = self.multiplier if multiplier is None else multiplier
        if self.recomputes and self.training and torch.is_grad_enabled():
            is_keyed = self.step_state.draws is not None  # then dropout draws the same again
            return checkpoint(self._built_change, x, multiplier, use_reentrant=False, preserve_rng_state=not is_keyed)
        return self._built_change(x, multiplier)

    def _built_change(self, x: torch.Tensor, multiplier: float) -> torch.Tensor:
        return linear_output(self.org_module, x, self.step_weight(multiplier).to(x.device, x.dtype))

    def step_weight(self, multiplier: float | None = None) -> torch.Tensor:
        """The change of the weight for one step, without the lengths of DoRA: with rank dropout in training."""
        return self._dropped_rows(self.plain_change(self.multiplier if multiplier is None else multiplier))

    def plain_change(self, multiplier: float) -> torch.Tensor:
        """The change of the weight without the lengths of DoRA, float32."""
        return change_of(type(self), without_lengths(self.tensors()), self.original_weight(), multiplier)

    def original_weight(self) -> torch.Tensor:
        """The weight of the layer, widened to float32 where it is stored in fewer bits."""
        return weight_of(self.org_module, self.weight_name)

    @property
    def weight_shape(self) -> torch.Size:
        """[out, in, ...] of the layer's weight, however it is stored."""
        return weight_shape(self.org_module)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """What the layer's weight makes of an input, without bias and adapter; in the type of autocast, else of `x`."""
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        return linear_output(self.org_module, x, self.original_weight().to(dtype))  # no copy where it is stored so

    @staticmethod
    @abstractmethod
    def weight_change(tensors: Mapping[str, torch.Tensor], weight: torch.Tensor, multiplier: float) -> torch.Tensor:
        """Change of `weight` by one layer's tensors under the names of a file, scale included; float32, shape of
        `weight`. `weight` is only read where the change depends on it. Gradients flow into the tensors."""

    @staticmethod
    def bias_change(tensors: Mapping[str, torch.Tensor], multiplier: float) -> torch.Tensor | None:
        """Change of the layer's bias [out], float32; None when it is left alone. `diff_b` may stand beside any kind."""
        return multiplier * tensors["diff_b"].float() if "diff_b" in tensors else None

    @staticmethod
    def change_shape(tensors: Mapping[str, torch.Tensor]) -> tuple[int, ...] | None:
        """Shape of the change as the tensors alone tell it (kernel axes may be folded into the inputs); None for kinds
        whose change depends on the layer's weight."""
        return None

    @classmethod
    def rows_of(cls, tensors: Mapping[str, torch.Tensor], rows: slice, total: int) -> Mapping[str, torch.Tensor] | None:
        """The tensors whose change is these rows of the change of a layer with `total` rows, so that large layers can
        be merged a few rows at a time; None where rows cannot be had alone."""
        return None

    @classmethod
    def missing_keys(cls, names: Iterable[str]) -> list[str]:
        """Tensors that a layer's file lacks for this kind."""
        return [key for key in cls.weight_keys if key not in names]

    @classmethod
    def unknown_keys(cls, names: Iterable[str]) -> list[str]:
        """Tensors of a layer's file that this kind has no use for."""
        beside = ("alpha", "diff_b", *(("dora_scale",) if cls.decomposable else ()))
        return sorted(set(names) - {*cls.weight_keys, *cls.optional_keys, *beside})

    @abstractmethod
    def initialize(self, generator: torch.Generator | None = None) -> None:
        """Start values: the change is zero."""

    def on_step_draws(self) -> None:
        """The draws of a micro-batch are set: kinds that train a drawn part of their parameters choose it here."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """The live tensors (parameters and buffers), as `weight_change` takes them."""
        alpha = (
            {"alpha": torch.tensor(self._alpha)} if self.has_alpha else {}
        )  # on the CPU: reading it waits for no device
        return {**dict(self.named_parameters()), **dict(self.named_buffers()), **alpha}

    def bias_tensors(self) -> dict[str, torch.Tensor]:
        """The live change of the bias, where there is one, as `bias_change` takes it."""
        return {} if self.diff_b is None else {"diff_b": self.diff_b}

    @torch.no_grad()
    def decompose_weight(self, on_output: bool = True) -> None:
        """Switch DoRA on: a trained `dora_scale`, at first the lengths of the layer's rows (of its columns with
        on_output False), so that the change stays zero. Call it while the change is zero."""
        weight = self.original_weight().float()
        shape = [size if axis == (0 if on_output else 1) else 1 for axis, size in enumerate(weight.shape)]
        self.dora_scale = nn.Parameter(lengths_of(weight, torch.empty(shape, device="meta")))

    # -- dropout ---------------------------------------------------------------------------------------------------

    def _is_dropped(self) -> bool:
        """Module dropout: one decision per module and optimizer step, the same for all samples and ranks."""
        if not self.training or not self.module_dropout:
            return False
        draws = self.step_state.draws
        if draws is None:
            return float(torch.rand(())) < self.module_dropout
        return draws.batch_uniform("network module dropout", self.lora_name) < self.module_dropout

    def rows_of_samples(self, rows: int, samples: int) -> int:
        """How many rows of a layer's input belong to each sample: text encoders see several chunks per sample."""
        if samples == 0 or rows % samples:
            raise ValueError(
                f"{self.lora_name} sees {rows} rows for {samples} samples; the rows of a sample must be equally many"
            )
        return rows // samples

    @drawing
    def drop(self, hidden: torch.Tensor, probability: float, shape: tuple[int, ...], purpose: str) -> torch.Tensor:
        """Zero parts of `hidden` [B, ...] and scale up the rest. `shape` is that of one sample's mask, broadcast over
        the sample. Masks are keyed per sample, so that ranks, accumulation and recomputed activations see the same."""
        draws, rows = self.step_state.draws, hidden.shape[0]
        if draws is None:  # outside a training run: a module used by hand
            kept = torch.rand((rows, *shape)) >= probability
        else:
            per_sample = self.rows_of_samples(rows, len(draws.positions))
            kept = torch.stack(
                [
                    torch.rand(
                        shape,
                        generator=draws.generator(
                            purpose, row // per_sample, self.lora_name, row % per_sample, device=hidden.device
                        ),
                        device=hidden.device,
                    )
                    >= probability
                    for row in range(rows)
                ]
            )
        return hidden * (kept.to(hidden.device, hidden.dtype) / (1 - probability))

    def _dropped_rows(self, change: torch.Tensor) -> torch.Tensor:
        """Rank dropout of kinds that build the whole change: output rows of it are zeroed, the others scaled up. One
        mask for all samples of the optimizer step, because the samples share the weight."""
        if not self.training or not self.rank_dropout:
            return change
        draws, rows = self.step_state.draws, change.shape[0]
        uniform = (
            torch.rand(rows) if draws is None
            else draws.batch_uniforms("network row dropout", rows, self.lora_name, device=change.device)
        )
        kept = (uniform >= self.rank_dropout).to(change.device, change.dtype) / (1 - self.rank_dropout)
        return change * kept.view(-1, *[1] * (change.ndim - 1))

    # -- merging ---------------------------------------------------------------------------------------------------

    def get_weight(self, multiplier: float | None = None) -> torch.Tensor:
        """The change of the weight at this multiplier (default: the module's), float32."""
        multiplier = self.multiplier if multiplier is None else multiplier
        return change_of(type(self), self.tensors(), self.original_weight(), multiplier)

    def delta_weight(self) -> torch.Tensor:
        """The change of the weight at multiplier 1, with the scale; float32, shape of the weight."""
        return self.get_weight(1.0)

    @torch.no_grad()
    def merge_to(
        self,
        sd: Mapping[str, torch.Tensor] | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Add the change to the layer's weight: computed in float32 on `device`, rounded to `dtype` (default: the
        weight's; a weight in fewer bits keeps its form). `sd` holds this module's tensors of a file, when they are not
        loaded yet."""
        if sd:
            self.load_file_tensors(sd)
        tensors = {name: tensor.to(device) if device is not None else tensor for name, tensor in self.tensors().items()}
        for name, change_of_part in ((self.weight_name, self._merged_weight), ("bias", self._merged_bias)):
            parameter = getattr(self.org_module, name, None)
            if parameter is None:
                continue
            original = weight_of(self.org_module, name).detach().to(
                next(iter(tensors.values())).device if device is None else device, torch.float32
            )
            merged = change_of_part(tensors, original)
            if merged is not None and name == "weight" and stored_of(self.org_module) is not None:
                set_weight(self.org_module, merged.to(parameter.device))
            elif merged is not None:
                parameter.data.copy_(narrowed(f"{self.lora_name}.{name}", merged, dtype or parameter.dtype, IN_MEMORY))

    def _merged_weight(self, tensors: Mapping[str, torch.Tensor], weight: torch.Tensor) -> torch.Tensor | None:
        return weight + change_of(type(self), tensors, weight, self.multiplier)

    def _merged_bias(self, tensors: Mapping[str, torch.Tensor], bias: torch.Tensor) -> torch.Tensor | None:
        change = self.bias_change(tensors, self.multiplier)
        return None if change is None else bias + change

    @torch.no_grad()
    def backup_weight(self) -> None:
        if self._backup is None:
            layer = self.org_module
            own = (*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False))
            self._backup = {name: tensor.detach().clone() for name, tensor in own}

    @torch.no_grad()
    def restore_weight(self) -> None:
        if self._backup is not None:
            for name, tensor in self._backup.items():
                getattr(self.org_module, name).data.copy_(tensor)
            self.enabled = True

    def pre_calculation(self) -> None:
        """Merge into the (backed-up) weight and stop hooking, for quicker inference."""
        self.backup_weight()
        self.merge_to()
        self.enabled = False

    # -- files -----------------------------------------------------------------------------------------------------

    def add_optional(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Make room for what may stand beside the tensors of any kind: a magnitude (DoRA) and a change of the bias.
        CheckpointError for a change of a bias that the layer does not have."""
        if "diff_b" in tensors and getattr(self.org_module, "bias", None) is None:
            raise CheckpointError(
                f"{self.lora_name} has diff_b, a change of the bias; this model's layer has no bias, so that the file "
                "is another model's"
            )
        for name in ("dora_scale", "diff_b"):
            if name in tensors and getattr(self, name) is None:
                setattr(self, name, nn.Parameter(torch.empty_like(tensors[name], dtype=torch.float32)))

    def file_tensors(self) -> dict[str, torch.Tensor]:
        """Parameter names of the file -> tensors."""
        return {name: tensor.detach() for name, tensor in self.state_dict().items()}

    def load_file_tensors(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Read the tensors of a file; CheckpointError when a name or shape does not fit. A file without alpha has
        the neutral one. Shapes that differ only in 1x1 kernel axes fit."""
        self.add_optional(tensors)
        if not self.has_alpha:
            tensors = {name: tensor for name, tensor in tensors.items() if name != "alpha"}
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
                raise CheckpointError(
                    f"{self.lora_name}.{name} has shape {list(tensor.shape)}; this network needs {list(wanted)}"
                )
            fitted[name] = tensor.reshape(wanted)
        if self.has_alpha:
            fitted.setdefault("alpha", torch.tensor(self.neutral_alpha))
        self.load_state_dict(fitted)

    # -- norms -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def weight_norm(self) -> torch.Tensor:
        """Frobenius norm of the change at multiplier 1; a 0-d tensor on the device."""
        return self.delta_weight().norm()

    def scale_change(self, ratio: torch.Tensor) -> None:
        """Multiply the norm of the change of the weight by `ratio` (0-d, at most 1), in place."""
        if self.dora_scale is None:
            self.scale_weight(ratio)
        else:
            shrink(self, ratio)

    @abstractmethod
    def scale_weight(self, ratio: torch.Tensor) -> None:
        """Multiply the change by `ratio`, in place; without the lengths of DoRA."""
