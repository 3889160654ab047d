"""Small image files and items for tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from library.dataset.architectures import ARCHITECTURES
from library.dataset.dataset import Dataset, DatasetGroup
from library.dataset.items import DatasetParams, ImageItem, SubsetParams
from library.dataset.plan import BatchRequest, requests_of_epoch

FLUX = ARCHITECTURES["flux"]


def make_image(path: Path, size: tuple[int, int] = (64, 64), seed: int = 0, alpha: int | None = None) -> Path:
    """A picture of smooth random colours, so that mirrored and cropped ones differ."""
    rng = np.random.default_rng(seed)
    mode = "RGB" if alpha is None else "RGBA"
    pixels = rng.integers(0, 255, (8, 8, len(mode)), dtype=np.uint8)
    image = Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR)
    if alpha is not None:
        image.putalpha(alpha)
    image.save(path)
    return path


def make_item(
    path: Path, size: tuple[int, int] = (64, 64), caption: str = "a cat", subset: SubsetParams | None = None, **fields
) -> ImageItem:
    subset = subset or SubsetParams(image_dir=str(path.parent), label="datasets[0].subsets[0]")
    return ImageItem(
        image_key=str(path),
        absolute_path=str(path),
        caption=caption,
        subset=subset,
        image_size=size,
        num_repeats=subset.num_repeats,
        **fields,
    )


def make_folder(
    folder: Path, count: int, subset: SubsetParams | None = None, sizes=((64, 64), (96, 64))
) -> list[ImageItem]:
    folder.mkdir(parents=True, exist_ok=True)
    items = []
    for i in range(count):
        size = sizes[i % len(sizes)]
        path = make_image(folder / f"{i:02d}.png", size, seed=i)
        items.append(make_item(path, size, caption=f"picture number {i}, red, round, shiny", subset=subset))
    return items


def make_group(items: list[ImageItem], *, seed: int = 7, is_training: bool = True, **params) -> DatasetGroup:
    settings = dict(
        resolution=(64, 64),
        batch_size=2,
        enable_bucket=True,
        min_bucket_reso=32,
        max_bucket_reso=128,
        bucket_reso_steps=16,
    )
    settings |= params
    subsets = tuple({id(item.subset): item.subset for item in items}.values())
    dataset = Dataset(
        DatasetParams(**settings, subsets=subsets), items, index=0, architecture=FLUX, seed=seed,
        is_training=is_training, prior_loss_weight=0.5
    )
    return DatasetGroup([dataset], is_training=is_training)


def epoch_requests(
    group: DatasetGroup, epoch: int = 1, *, rank: int = 0, num_processes: int = 1, accumulation: int = 1
) -> list[BatchRequest]:
    plan = group.plan(epoch, 7, num_processes, accumulation)
    return list(
        requests_of_epoch(
            plan, epoch=epoch, first_step=(epoch - 1) * len(plan), rank=rank, num_processes=num_processes,
            is_training=group.is_training
        )
    )
