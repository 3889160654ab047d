"""Layers of --network_weights that belong to parts of the model that are not trained. They act while the others learn,
as they will when the file is used, and are written again beside what was learned."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from library.checkpoints.identity import model_identity
from library.core.errors import AtelierError
from library.lora_utils import Adapter
from library.training.adapters import NetworkOptions
from networks.files.network_files import by_module, check_finite, read_adapter_file
from networks.kinds.registry import kind_of
from networks.kinds.targets import NetworkTargets

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class KeptLayers:
    """`layers` of `path` by name, with their tensors; `drops`: they are left out, as --drop_untrained asks; `merges`:
    they can be added to the weights while the model is read."""

    path: str = ""
    targets: NetworkTargets | None = None
    layers: Mapping[str, Mapping[str, torch.Tensor]] = field(default_factory=dict)
    drops: bool = False
    merges: bool = True

    @property
    def are_written(self) -> bool:
        return bool(self.layers) and not self.drops

    def adapter(self) -> Adapter | None:
        """What is merged into the untrained parts."""
        return Adapter(self.path, self.layers, lambda name: 1.0) if self.are_written and self.merges else None

    def identity(self) -> str:
        """Stands for those that change text encoders, "" without any; see Trainable.transform_identity."""
        changes_text = any(encoder_of(name, self.targets) is not None for name in self.layers)
        return f"untrained layers of {model_identity(self.path)}" if self.adapter() is not None and changes_text else ""

    def tensors(self) -> dict[str, torch.Tensor]:
        """For the file that is written."""
        if not self.are_written:
            return {}
        return {f"{name}.{key}": tensor for name, parts in self.layers.items() for key, tensor in parts.items()}

    def rest(self) -> dict[str, torch.Tensor]:
        """The tensors of the layers that are trained."""
        parts = by_module(read_adapter_file(self.path, self.targets))
        return {
            f"{name}.{key}": tensor
            for name, own in parts.items()
            if name not in self.layers
            for key, tensor in own.items()
        }

    def message(self) -> str | None:
        """What becomes of them, for log and start page."""
        if not self.layers:
            return None
        what = f"{len(self.layers)} layers of --network_weights {self.path} are in parts that are not trained"
        if self.drops:
            return f"{what} (first: {next(iter(self.layers))}) and left out of the training and of the output (--drop_untrained)"
        acting = (
            "they act as they are"
            if self.merges
            else "they do not act while training, being of a kind that only its module knows"
        )
        return f"{what} (first: {next(iter(self.layers))}): {acting} and are written to the output again; --drop_untrained leaves them out"


def encoder_of(name: str, targets: NetworkTargets) -> int | None:
    """Position of the text encoder of a layer, under any spelling of its name; None for the denoiser."""
    return next(
        (place for spelled in targets.canonical_names(name) if (place := targets.encoder_of(spelled)) is not None), None
    )


def kept_layers(options: NetworkOptions, targets: NetworkTargets, trained_encoders: Sequence[bool]) -> KeptLayers:
    """Of the file to start from; none when it cannot be read, which is told where it is loaded."""
    path = options.network_weights
    if not path or not os.path.isfile(path):
        return KeptLayers()

    def is_trained(name: str) -> bool:
        encoder = encoder_of(name, targets)
        return not options.network_train_text_encoder_only if encoder is None else trained_encoders[encoder]

    try:
        parts = by_module(read_adapter_file(path, targets))
    except AtelierError:
        return KeptLayers()
    layers = {name: own for name, own in parts.items() if not is_trained(name)}
    check_finite({f"{name}.{key}": tensor for name, own in layers.items() for key, tensor in own.items()}, path)
    return KeptLayers(
        path, targets, layers, options.drop_untrained, all(kind_of(own) is not None for own in layers.values())
    )
