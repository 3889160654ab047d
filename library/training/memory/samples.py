"""The batch or pack that a plan is made for: the largest of the data, without a file of it being read."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from library.dataset.batch import CONDITIONING_ALPHA, CONDITIONING_IMAGES, Batch
from library.dataset.collate import Sample, collate
from library.dataset.packed_batch import PackedBatch
from library.dataset.plan import BatchRequest
from library.families.latents import Bucket

if TYPE_CHECKING:
    from library.dataset.dataset import Dataset
    from library.dataset.items import ImageItem
    from library.dataset.packing import Packing
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

    @property
    def told_as(self) -> str:
        return f"batch of {len(self.items)} at {self.size}"

    @property
    def parts(self) -> Sequence[Demand]:
        """What is of one size, the largest first."""
        return (self,)

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


@dataclass(frozen=True)
class PackDemand(Demand):
    """Samples of several sizes that a step trains together; `bucket` is that of the largest."""

    of_sizes: Sequence[Demand] = ()

    @property
    def size(self) -> str:
        return f"{len(self.of_sizes)} sizes up to {super().size}" if len(self.of_sizes) > 1 else super().size

    @property
    def told_as(self) -> str:
        return f"pack of {len(self.items)} at {self.size}"

    @property
    def parts(self) -> Sequence[Demand]:
        return self.of_sizes


def joined(batches: Sequence[Batch]) -> PackedBatch:
    """Batches of one step as a pack."""
    places = tuple(range(sum(map(len, batches))))
    return PackedBatch(dataclasses.replace(batches[0].request, items=places, positions=places), list(batches))


def demands(data: DataGroups, spec: LatentSpec) -> list[Demand]:
    """One for each size and number of samples of the training data, the largest first; with packs, one for each
    dataset, of its fullest pack."""
    packing = getattr(data.train, "packing", None)
    if packing is not None:
        packs = [_fullest(dataset, packing, spec) for dataset in data.train.datasets]
        return sorted(packs, key=lambda one: -_elements(one, spec))
    found = {}
    for demand in _demands(data):
        found.setdefault((demand.bucket, len(demand.items)), demand)
    return sorted(found.values(), key=lambda one: (-_elements(one, spec), one.size))


def _elements(demand: Demand, spec: LatentSpec) -> int:
    return sum(len(part.items) * math.prod(spec.latent_shape(part.bucket)) for part in demand.parts)


def _fullest(dataset: Dataset, packing: Packing, spec: LatentSpec) -> PackDemand:
    """The pack of the first epoch with the most tokens, and of those the one with the most samples."""
    tokens = dataset.tokens
    pack = max(dataset.packs(packing, 1, dataset.seed), key=lambda pack: (sum(tokens[i] for i in pack), len(pack)))
    by_size: dict[Bucket, list[ImageItem]] = {}
    for item in (dataset.items[number] for number in pack):
        by_size.setdefault(item.bucket, []).append(item)
    order = sorted(by_size, key=lambda bucket: -math.prod(spec.latent_shape(bucket)))
    multiplier = dataset.params.network_multiplier
    parts = [Demand(bucket, by_size[bucket], multiplier) for bucket in order]
    return PackDemand(order[0], [item for part in parts for item in part.items], multiplier, of_sizes=parts)


def _demands(data: DataGroups) -> Iterator[Demand]:
    for dataset in data.train.datasets:
        for bucket in getattr(dataset, "buckets", ()):
            items = {number: dataset.items[number] for number in bucket.samples}
            longest = sorted(items.values(), key=lambda item: len(item.caption), reverse=True)
            count = min(bucket.batch_size, len(bucket.samples))
            chosen = (longest * -(-count // len(longest)))[:count]
            yield Demand(Bucket(*bucket.bucket), chosen, dataset.params.network_multiplier)
