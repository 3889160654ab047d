"""From a Blueprint to the dataset groups of a run."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from library.config_util import Blueprint
from library.dataset import DatasetOptions
from library.dataset.architectures import DataArchitecture
from library.dataset.background import map_in_threads
from library.dataset.cache_index import CacheIndex
from library.dataset.dataset import Dataset, DatasetGroup
from library.dataset.datasources import ScanResult, reads_all_images, scan_datasets
from library.dataset.items import DatasetParams, ImageItem
from library.dataset.media_utils import count_frames
from library.families.latents import LatentSpec

logger = logging.getLogger(__name__)

HEADER_THREADS = 8


def build_dataset_groups(
    blueprint: Blueprint,
    options: DatasetOptions,
    *,
    architecture: DataArchitecture,
    seed: int,
    scan: ScanResult | None = None,
) -> tuple[DatasetGroup, DatasetGroup | None]:
    """(training group, validation group or None) of a Blueprint.

    `scan`: what scan_datasets or load_datasets found, when that ran already. `seed` is the run's seed: it decides
    augmentation and the choice of regularisation images, and the validation split where no seed of its own is set.
    Raises ConfigError with all problems of the files.
    """
    if scan is None:
        scan = scan_datasets(
            blueprint, seed=seed, skip_bad_images=options.skip_bad_images,
            fail_on_missing_captions=options.fail_on_missing_captions, check_images=reads_all_images(options, None),
            architecture=architecture,
        )
    how = {"architecture": architecture, "seed": seed, "prior_loss_weight": options.prior_loss_weight}
    train = _group(blueprint.datasets, scan.train, scan.index, is_training=True, **how)
    validation = _group(blueprint.datasets, scan.validation, scan.index, is_training=False, **how)
    for warning in scan.warnings:
        logger.warning("%s", warning)
    for dataset in (*train.datasets, *validation.datasets):
        for warning in dataset.assignment.warnings:
            logger.warning("%s: %s", dataset.params.label, warning)
    logger.info("%s", scan.summary)
    if not train.num_reg_images:
        logger.info("no regularisation images")
    return train, validation if len(validation) else None


def _group(
    datasets: Sequence[DatasetParams], items: Sequence[list[ImageItem]], index: CacheIndex, *, is_training: bool,
    **how: Any,
) -> DatasetGroup:
    """Datasets without images (all of them held out, or none) are not part of the group."""
    filled = [(params, images) for params, images in zip(datasets, items) if images]
    if how["architecture"].latents.clips:
        pictures = [item for _, images in filled for item in images if item.clip is None]
        set_frames(pictures, how["architecture"].latents, index)
    return DatasetGroup(
        [Dataset(params, images, index=i, is_training=is_training, **how) for i, (params, images) in enumerate(filled)],
        is_training=is_training,
    )


def set_frames(items: Sequence[ImageItem], latents: LatentSpec, index: CacheIndex) -> None:
    """Look at the files for how many frames they have, which the index notes, and give every item as many as the
    family's VAE takes."""

    def counted(path: str) -> int:
        return int(index.find(path, "number of frames", lambda: (str(count_frames(path)), ""))[0])

    paths = list(dict.fromkeys(item.absolute_path for item in items))
    counts = dict(zip(paths, map_in_threads(counted, paths, num_threads=HEADER_THREADS)))
    for item in items:
        item.frames = latents.usable_frames(counts[item.absolute_path])
