"""The batch that a plan is made for: the largest of the data, without a file of it being read."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from library.dataset.batch import CONDITIONING_ALPHA, CONDITIONING_IMAGES, Batch
from library.dataset.collate import Sample, collate
from library.dataset.plan import BatchRequest
from library.families.latents import Bucket

if TYPE_CHECKING:
    from library.dataset.items import ImageItem
    from library.families.latents import LatentSpec
    from library.training.data_phase import DataGroups


@dataclass(frozen=True)
class Demand:
    """Samples of one bucket that a step trains together: `items` with the longest captions of it."""

    bucket: Bucket
    items: Sequence[ImageItem]
    multiplier: float

    @property
    def size(self) -> str:
        """1024x1024, or with the number of frames 832x480x81."""
        return "x".join(map(str, self.bucket.key))

    def images(self, count: int, device: torch.device) -> torch.Tensor:
        """Pictures [count, 3, H, W], or clips [count, 3, F, H, W], without values."""
        frames = (self.bucket.frames,) if self.items[0].clip is not None or self.bucket.frames > 1 else ()
        return torch.empty(count, 3, *frames, self.bucket.height, self.bucket.width, device=device)

    def pictures(self, names: Sequence[str], count: int, device: torch.device) -> dict[str, torch.Tensor]:
        """Control pictures or masks of these names, as large as the images."""
        images = self.images(count, device)
        return {
            name: images[:, :1] if name.startswith(CONDITIONING_ALPHA) else images
            for name in names
        }

    def batch(self) -> Batch:
        """On the CPU and without images, latents and captions."""
        places = tuple(range(len(self.items)))
        request = BatchRequest(0, places, places, 1, 0, 0, len(places), True, False)
        side = (self.bucket.height, self.bucket.width)
        samples = [
            Sample(
                item.absolute_path, item.caption, None, 1.0, side, (0, 0), side, False,
                custom_attributes=dict(item.subset.custom_attributes), latent_seed=0, facts=item.facts,
            )
            for item in self.items
        ]
        return collate(request, samples, None, self.multiplier)

    @property
    def own_picture(self) -> tuple[str, ...]:
        """The mask or control picture that a trainable reads."""
        return (CONDITIONING_IMAGES,) if self.items[0].cond_path is not None else ()


def demands(data: DataGroups, spec: LatentSpec) -> list[Demand]:
    """One for each size and number of samples of the training data, the largest first."""
    found = {}
    for demand in _demands(data):
        found.setdefault((demand.bucket, len(demand.items)), demand)
    return sorted(found.values(), key=lambda one: (-_elements(one, spec), one.size))


def _elements(demand: Demand, spec: LatentSpec) -> int:
    return len(demand.items) * math.prod(spec.latent_shape(demand.bucket))


def _demands(data: DataGroups) -> Iterator[Demand]:
    for dataset in data.train.datasets:
        for bucket in getattr(dataset, "buckets", ()):
            items = {number: dataset.items[number] for number in bucket.samples}
            longest = sorted(items.values(), key=lambda item: len(item.caption), reverse=True)
            count = min(bucket.batch_size, len(bucket.samples))
            chosen = (longest * -(-count // len(longest)))[:count]
            yield Demand(Bucket(*bucket.bucket), chosen, dataset.params.network_multiplier)
