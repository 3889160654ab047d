"""What a training step receives where samples of several sizes go through the denoiser together."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch

from library.dataset.batch import Batch
from library.dataset.plan import BatchRequest


@dataclass
class PackedBatch:
    """The samples of one micro-batch of one rank, as batches of one size each. It has no parts where the rank only
    joins the gradient reduction (see BatchRequest).

    The request of each part names the items and positions of its samples, and is else that of the whole: a sample is
    what it would be in an ordinary batch at its position.
    """

    request: BatchRequest
    parts: list[Batch]

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    @property
    def image_keys(self) -> list[str]:
        """Files, for messages; of all parts, as the fields below."""
        return self._listed("image_keys")

    @property
    def captions(self) -> list[str]:
        return self._listed("captions")

    @property
    def are_reg(self) -> list[bool]:
        return [value for part in self.parts for value in part.are_reg or [False] * len(part)]

    @property
    def custom_attributes(self) -> list[dict[str, object]]:
        return self._listed("custom_attributes")

    @property
    def loss_weights(self) -> torch.Tensor:  # [B] float32
        return self._joined("loss_weights")

    @property
    def network_multipliers(self) -> torch.Tensor:  # [B] float32
        return self._joined("network_multipliers")

    def _listed(self, name: str) -> list:
        return [value for part in self.parts for value in getattr(part, name)]

    def _joined(self, name: str) -> torch.Tensor:
        return torch.cat([getattr(part, name) for part in self.parts]) if self.parts else torch.zeros(0)

    def with_parts(self, change: Callable[[Batch], Batch]) -> PackedBatch:
        """A pack with its parts changed."""
        return dataclasses.replace(self, parts=[change(part) for part in self.parts])

    def to(self, device: torch.device | str) -> PackedBatch:
        """See `Batch.to`."""
        return self.with_parts(lambda part: part.to(device))

    def pin_memory(self) -> PackedBatch:
        return self.with_parts(Batch.pin_memory)
