"""What a training step receives: the tensors of one micro-batch and the keys of its random draws."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from library.dataset.plan import BatchRequest


@dataclass
class Batch:
    """One micro-batch of one rank, B samples of one bucket. B may be 0 (see BatchRequest).

    Field names are the batch keys that plug-ins know; `batch["latents"]` reads a field too.
    """

    request: BatchRequest
    image_keys: list[str]
    """files, for messages"""
    captions: list[str]
    loss_weights: torch.Tensor  # [B] float32
    original_sizes_hw: torch.Tensor  # [B, 2] int64
    crop_top_lefts: torch.Tensor  # [B, 2] int64
    target_sizes_hw: torch.Tensor  # [B, 2] int64
    flippeds: list[bool]
    network_multipliers: torch.Tensor  # [B] float32
    custom_attributes: list[dict[str, Any]]
    images: torch.Tensor | None = None  # [B, 3, H, W] in -1..1
    latents: torch.Tensor | None = None  # [B, C, h, w]
    latent_seeds: list[int] = field(default_factory=list)
    """for live encoding: the seed of each sample's posterior draw, the same that its cache would have used"""
    alpha_masks: torch.Tensor | None = None  # [B, H, W] weights 0..1, in pixels
    conditioning_images: torch.Tensor | None = None  # [B, 3, H, W] in -1..1
    conditioning: dict[str, torch.Tensor] | None = None
    """cached outputs of text encoders, [B, ...] by name; keys that come from an encoder in the step are not there"""
    conditioning_keys: tuple[str, ...] = ()
    """all keys of the family, in the order of the list that plug-ins know"""
    input_ids_list: list[torch.Tensor] | None = None
    token_weights_list: list[torch.Tensor] | None = None  # weights of the ids, where captions carry some

    @property
    def text_encoder_outputs_list(self) -> list[torch.Tensor | None] | None:
        """The conditioning as plug-ins know it: a list in the order of the family, None where an output is not cached."""
        if self.conditioning is None:
            return None
        return [self.conditioning.get(name) for name in self.conditioning_keys or self.conditioning]

    def __len__(self) -> int:
        return len(self.image_keys)

    def __getitem__(self, key: str) -> Any:
        return getattr(self, key)

    def keys(self) -> Iterator[str]:
        yield from (f.name for f in dataclasses.fields(self))
        yield "text_encoder_outputs_list"

    def get(self, key: str, default: Any = None) -> Any:
        return getattr(self, key, default)

    def rows(self, rows: Sequence[int]) -> Batch:
        """A batch of the samples of these numbers; `request` stays that of the whole."""

        def listed(values: list[Any]) -> list[Any]:
            return [values[i] for i in rows] if len(values) == len(self) else values

        names = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "request"}
        of_samples = ("image_keys", "captions", "flippeds", "custom_attributes", "latent_seeds")
        return dataclasses.replace(self, **{
            name: listed(value) if name in of_samples else rows_of(value, rows) for name, value in names.items()
        })

    def to(self, device: torch.device | str) -> Batch:
        """A copy with all tensors on `device`, but for the network multipliers, which are read as numbers."""
        waits = torch.device(device).type != "cuda"  # elsewhere a copy that is not waited for may be read before it is there
        names = [f.name for f in dataclasses.fields(self) if f.name != "network_multipliers"]
        return self._mapped(names, lambda tensor: tensor.to(device, non_blocking=not waits))

    def pin_memory(self) -> Batch:
        return self._mapped([f.name for f in dataclasses.fields(self)], lambda tensor: tensor.pin_memory())

    def _mapped(self, names: Sequence[str], change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        return dataclasses.replace(self, **{name: map_tensors(getattr(self, name), change) for name in names})


def map_tensors(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """`change` of a tensor, or of every tensor of a list or dict; anything else as it is."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, dict):
        return {name: map_tensors(entry, change) for name, entry in value.items()}
    if isinstance(value, list) and any(isinstance(entry, torch.Tensor) for entry in value):
        return [map_tensors(entry, change) for entry in value]
    return value


def rows_of(value: Any, rows: Sequence[int]) -> Any:
    """Some rows of a tensor, or of every tensor of a list or dict."""
    return map_tensors(value, lambda tensor: tensor[torch.tensor(rows, dtype=torch.int64, device=tensor.device)])
