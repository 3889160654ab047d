"""AdditionalNetwork: all adapters of a model as one nn.Module, with the methods that trainers and tools call."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from library.core.errors import CheckpointError, ConfigError
from library.core.keyed_random import StepDraws, keyed_generator
from library.core.learning_rates import Member, optimizer_groups
from networks.files.network_files import (
    by_module,
    check_finite,
    match_names,
    read_adapter_file,
    to_kohya_names,
    write_adapter_file,
)
from networks.kinds.adapter_module import AdapterModule, StepState
from networks.kinds.block_rates import block_factors
from networks.kinds.network_args import NetworkSettings
from networks.kinds.targets import NetworkTargets

logger = logging.getLogger(__name__)

LISTED_PROBLEMS = 5


class AdditionalNetwork(nn.Module):
    """The adapters of one denoiser and its text encoders. Modules become children, named by their lora name, when they
    are applied, so that state_dict() has the names of the file."""

    def __init__(
        self, targets: NetworkTargets, settings: NetworkSettings, modules: Iterable[AdapterModule], multiplier: float
    ) -> None:
        super().__init__()
        self.targets = targets
        self.settings = settings
        self.multiplier = multiplier
        self.step_state = StepState()
        self.unet_loras: list[AdapterModule] = []
        self.text_encoder_loras: list[AdapterModule] = []
        for module in modules:
            module.step_state = self.step_state
            is_denoiser = targets.encoder_of(module.lora_name) is None
            (self.unet_loras if is_denoiser else self.text_encoder_loras).append(module)
        self._choosing = [m for m in self.loras if type(m).on_step_draws is not AdapterModule.on_step_draws]
        self.train_t5xxl = bool(settings.get("train_t5xxl", False))
        self.block_lr_weight = block_factors(targets, settings)
        self.undecayed = settings.get("excludes_weight_decay") or []
        self.set_loraplus_lr_ratio(
            settings.get("loraplus_lr_ratio"),
            settings.get("loraplus_unet_lr_ratio"),
            settings.get("loraplus_text_encoder_lr_ratio"),
        )

    @property
    def loras(self) -> list[AdapterModule]:
        return [*self.text_encoder_loras, *self.unet_loras]

    @torch.no_grad()
    def initialize(self, seed: int) -> None:
        """Start values as a function of (seed, layer name) alone. Norms of DoRA are those of the layer and stay."""
        for module in self.loras:
            norms = None if module.dora_scale is None else module.dora_scale.clone()
            module.initialize(keyed_generator(seed, "network init", module.lora_name))
            if norms is not None:
                module.dora_scale.copy_(norms)

    # -- the life of a training run --------------------------------------------------------------------------------

    def apply_to(self, text_encoder: Any, unet: Any, apply_text_encoder: bool = True, apply_unet: bool = True) -> None:
        """Hook the layers. A side that is not applied loses its modules."""
        if not apply_text_encoder:
            self.text_encoder_loras = []
        if not apply_unet:
            self.unet_loras = []
        applied = set(self.loras)
        self._choosing = [module for module in self._choosing if module in applied]
        for module in self.loras:
            module.apply_to()
            self.add_module(module.lora_name, module)

    def remove_from(self) -> None:
        """Give every layer its own forward back."""
        for module in self.loras:
            module.remove_from()

    def enable_gradient_checkpointing(self) -> None:
        """Nothing to do: adapters run inside the checkpointed blocks."""

    def prepare_grad_etc(self, text_encoder: Any = None, unet: Any = None) -> None:
        self.requires_grad_(True)

    def on_epoch_start(self, text_encoder: Any = None, unet: Any = None) -> None:
        if not all(module.training for module in self.loras):  # a walk through thousands of modules otherwise
            self.train()

    def on_step_start(self, text_encoder: Any = None, unet: Any = None) -> None:
        """Start of a micro-step; the draws come by set_step_draws."""

    def set_step_draws(self, draws: StepDraws | None) -> None:
        """Key the dropouts of the coming micro-batch; row i of a layer's input belongs to sample i."""
        self.step_state.draws = draws
        self.step_state.times = None
        for module in self._choosing:
            module.on_step_draws()

    def set_step_times(self, times: torch.Tensor | None) -> None:
        """How noisy each sample of the micro-batch is [B], 0 = data, 1 = noise: for kinds whose rank depends on it."""
        self.step_state.times = times

    def get_trainable_params(self) -> Iterator[nn.Parameter]:
        return (parameter for parameter in self.parameters() if parameter.requires_grad)

    def set_multiplier(self, multiplier: float) -> None:
        self.multiplier = multiplier
        for module in self.loras:
            module.multiplier = multiplier

    def set_enabled(self, is_enabled: bool) -> None:
        for module in self.loras:
            module.enabled = is_enabled

    # -- learning rates --------------------------------------------------------------------------------------------

    def set_loraplus_lr_ratio(
        self, loraplus_lr_ratio: float | None, unet: float | None = None, text_encoder: float | None = None
    ) -> None:
        """LoRA+ (arXiv 2402.12354): the up matrices learn `ratio` times as fast; a specific ratio wins over the
        general."""
        self.loraplus_unet_lr_ratio = unet if unet is not None else loraplus_lr_ratio
        self.loraplus_text_encoder_lr_ratio = text_encoder if text_encoder is not None else loraplus_lr_ratio

    def set_block_lr_weight(self, block_lr_weight: Sequence[float] | None) -> None:
        """One factor of the learning rate for every block of the U-Net; None = 1 for all."""
        count = self.targets.blocks.count if self.targets.blocks else 0
        if block_lr_weight is not None and len(block_lr_weight) != count:
            raise ConfigError(
                f"{len(block_lr_weight)} learning rate factors are given; the denoiser of {self.targets.family} has "
                f"{count} numbered blocks, needed: one for each"
            )
        self.block_lr_weight = None if block_lr_weight is None else [float(factor) for factor in block_lr_weight]

    def get_lr_weight(self, block_idx: int | None) -> float:
        """The factor of a block's learning rate; 1 for layers outside the blocks and without factors."""
        return 1.0 if self.block_lr_weight is None or block_idx is None else self.block_lr_weight[block_idx]

    def prepare_optimizer_params(
        self, text_encoder_lr: float | None, unet_lr: float | None, default_lr: float | None = None
    ) -> tuple[list[dict[str, Any]], list[str]]:
        """(optimizer groups, their names) with one rate for all text encoders."""
        return self.prepare_optimizer_params_with_multiple_te_lrs(text_encoder_lr, unet_lr, default_lr)

    def prepare_optimizer_params_with_multiple_te_lrs(
        self,
        text_encoder_lr: float | Sequence[float] | None,
        unet_lr: float | None,
        default_lr: float | None = None,
    ) -> tuple[list[dict[str, Any]], list[str]]:
        """(optimizer groups, their names). `text_encoder_lr` is one rate, or one per text encoder in the family's
        order.

        Rates that are None become `default_lr`; groups with rate 0 or None are left out.
        """
        groups: list[dict[str, Any]] = []
        rates = self._text_encoder_rates(text_encoder_lr, default_lr)
        for position, rate in enumerate(rates):
            modules = [m for m in self.text_encoder_loras if self.targets.encoder_of(m.lora_name) == position]
            label = f"textencoder {position + 1}" if len(rates) > 1 else "textencoder"
            groups += self._groups(modules, rate, self.loraplus_text_encoder_lr_ratio, label)
        rate = unet_lr if unet_lr is not None else default_lr
        groups += self._groups(self.unet_loras, rate, self.loraplus_unet_lr_ratio, "unet")
        names = [f"{module.lora_name}.{name}" for module in self.loras for name, _ in module.named_parameters()]
        for pattern in self.undecayed:
            if names and not any(map(pattern.search, names)):
                text = "--network_args excludes_weight_decay: no weight of the network has '%s' in its name (the first: %s)"
                logger.warning(text, pattern.pattern, names[0])
        return groups, [group.pop("name") for group in groups]

    def _text_encoder_rates(self, rates: float | Sequence[float] | None, default: float | None) -> list[float | None]:
        count = len(self.targets.text_encoders)
        values: list[float | None] = [rates] if isinstance(rates, (int, float)) else list(rates or [])
        if not values:
            return [default] * count
        if len(values) > count:
            raise ConfigError(
                f"--text_encoder_lr has {len(values)} values; {self.targets.family} has {count} text encoders"
            )
        if len(values) == 1:
            return values * count
        return values + [values[-1]] * (count - len(values))

    def _groups(
        self, modules: list[AdapterModule], rate: float | None, ratio: float | None, label: str
    ) -> list[dict[str, Any]]:
        """The groups of one part: by rate pattern, by block, ordinary and LoRA+ parameters."""
        members = [
            Member(
                p, module.rate, module.block, ratio is not None and any(part in n for part in module.plus_names),
                any(pattern.search(f"{module.lora_name}.{n}") for pattern in self.undecayed),
            )
            for module in modules
            for n, p in module.named_parameters()
        ]
        return optimizer_groups(members, rate, name=label, factors=self.block_lr_weight, ratio=ratio)

    # -- norms -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def apply_max_norm_regularization(self, max_norm_value: float, device: Any = None) -> tuple[int, float, float]:
        """Scale down every change whose norm is above the limit. Returns (how many, mean norm, largest norm),
        afterwards.

        Per module n' = max(n, limit / 2) and ratio = min(n', limit) / n'; the change is multiplied by the ratio.
        """
        scaled, mean, largest = self.limit_norms(max_norm_value).tolist()
        return int(scaled), mean, largest

    def limit_norms(self, max_norm_value: float) -> torch.Tensor:
        """The same; what it gives is a tensor [3] on the device, so that nothing is waited for."""
        if not self.loras:
            return torch.zeros(3)
        norms = torch.stack([module.weight_norm() for module in self.loras])
        floored = norms.clamp(min=max_norm_value / 2)
        ratios = floored.clamp(max=max_norm_value) / floored
        for module, ratio in zip(self.loras, ratios, strict=True):
            module.scale_change(ratio)
        scaled = norms * ratios
        return torch.stack([(ratios != 1).sum().to(scaled.dtype), scaled.mean(), scaled.max()])

    @property
    def follows_norms(self) -> bool:
        """Whether there are norms to update and to log."""
        return self.settings.get("ggpo_sigma") is not None

    def _ggpo(self) -> list[tuple[AdapterModule, Any]]:
        if not self.follows_norms:  # asked several times in every step
            return []
        return [(module, module.ggpo) for module in self.loras if getattr(module, "ggpo", None) is not None]

    def update_grad_norms(self) -> None:
        """After the backward pass; nothing without GGPO."""
        for module, ggpo in self._ggpo():
            ggpo.update_grad_norms(module)

    def update_norms(self) -> None:
        for module, ggpo in self._ggpo():
            ggpo.update_norms(module)

    def grad_norms(self) -> torch.Tensor | None:
        return _stacked_means(ggpo.grad_norms for _, ggpo in self._ggpo())

    def weight_norms(self) -> torch.Tensor | None:
        return torch.stack([module.weight_norm() for module, _ in self._ggpo()]) if self._ggpo() else None

    def combined_weight_norms(self) -> torch.Tensor | None:
        return _stacked_means(ggpo.combined_norms for _, ggpo in self._ggpo())

    # -- files -----------------------------------------------------------------------------------------------------

    def file_state_dict(self) -> dict[str, torch.Tensor]:
        """Tensors under the names of the file."""
        return {f"{m.lora_name}.{name}": tensor for m in self.loras for name, tensor in m.file_tensors().items()}

    def save_weights(self, file: str, dtype: torch.dtype | None, metadata: Mapping[str, str] | None) -> None:
        """Write the adapter file; alpha stays float32 whatever `dtype` is."""
        write_adapter_file(file, self.file_state_dict(), dtype, metadata or None)

    def load_weights(self, file: str) -> dict[str, list[str]]:
        """Read a file into this network; returns the layers missing in the file and those that are in no model.

        Raises CheckpointError when a tensor does not fit. The alphas of the file replace the network's.
        """
        return self.load_tensors(read_adapter_file(file, self.targets), str(file))

    def load_tensors(self, tensors: Mapping[str, torch.Tensor], label: str = "the file") -> dict[str, list[str]]:
        """As load_weights, from tensors under the names of a file; CheckpointError for values that are not finite,
        too."""
        check_finite(tensors, label)
        modules = {module.lora_name: module for module in self.loras}
        parts = by_module(tensors)
        found, unknown = match_names(parts, modules, self.targets)
        problems: list[str] = []
        for name, own in found.items():
            try:
                modules[own].load_file_tensors(parts[name])
            except CheckpointError as error:
                problems.append(str(error))
        if problems:
            more = f" and {len(problems) - LISTED_PROBLEMS} more" if len(problems) > LISTED_PROBLEMS else ""
            raise CheckpointError(f"{label} does not fit this network: {'; '.join(problems[:LISTED_PROBLEMS])}{more}")
        return {"missing": sorted(set(modules) - set(found.values())), "unexpected": unknown}

    # -- merging ---------------------------------------------------------------------------------------------------

    def is_mergeable(self) -> bool:
        return True

    def merge_to(
        self, text_encoder: Any, unet: Any, weights_sd: Mapping[str, torch.Tensor] | None = None,
        dtype: torch.dtype | None = None, device: Any = None,
    ) -> None:
        """Add the changes of `weights_sd` (default: of the tensors held) to the weights of the models."""
        modules = {module.lora_name: module for module in self.loras}
        if weights_sd is None:
            for module in modules.values():
                module.merge_to(None, dtype, device)
            return
        parts = by_module(to_kohya_names(weights_sd, self.targets, "the file"))
        found, _ = match_names(parts, modules, self.targets)
        for name, own in found.items():
            modules[own].merge_to(parts[name], dtype, device)
        logger.info("merged %d adapters into the model's weights", len(found))

    def backup_weights(self) -> None:
        for module in self.loras:
            module.backup_weight()

    def restore_weights(self) -> None:
        for module in self.loras:
            module.restore_weight()

    def pre_calculation(self) -> None:
        for module in self.loras:
            module.pre_calculation()


def _stacked_means(tensors: Iterable[torch.Tensor | None]) -> torch.Tensor | None:
    present = [tensor.mean() for tensor in tensors if tensor is not None]
    return torch.stack(present) if present else None
