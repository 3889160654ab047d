"""Dataset and DatasetGroup: from items to batches. A batch is a pure function of its request and the seed.

Every random decision (mirroring, colours, crop, caption) has a generator keyed by the seed, the purpose, the optimizer
step and the sample's place in the global batch, so that workers, ranks, prefetching and resuming change nothing.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import os
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from library.core.errors import ConfigError, listed
from library.core.keyed_random import LateRandom
from library.dataset.architectures import DataArchitecture
from library.dataset.batch import CONDITIONING_IMAGES, Batch, numbered
from library.dataset.bucket import BucketAssignment, assign_buckets, effective_limits
from library.dataset.cache_io import file_content_id
from library.dataset.captions import (
    Replacements,
    deterministic_caption,
    is_dropped,
    process_caption,
    tags_of_folders,
)
from library.dataset.collate import Sample, collate
from library.dataset.draws import sample_color, sample_flip, sample_geometry
from library.dataset.items import DatasetParams, ImageItem, SubsetParams
from library.dataset.latent_cache import float32_if_floats, seed_of
from library.dataset.media_utils import ImageFileError
from library.dataset.packed_batch import PackedBatch
from library.dataset.packing import Pack, Packing, most_samples, packs_of_epoch
from library.dataset.plan import BatchRequest, BucketList, StepPlan, plan_epoch, plan_packs
from library.dataset.samples import Geometry, image_tensor, mask_tensor, picture_tensors, read_pictures, read_pixels
from library.dataset.shared_tensors import SharedTensors
from library.dataset.strategies import Conditioning, StrategySet
from library.dataset.text_caching import cached_caption
from library.dataset.text_padding import PaddedText, without_padding
from library.families.latents import PLAIN, Bucket

logger = logging.getLogger(__name__)

SUBSET_RECORD = (
    "num_repeats", "color_aug", "flip_aug", "random_crop", "shuffle_caption", "keep_tokens", "keep_tokens_separator",
    "secondary_separator", "enable_wildcard", "caption_prefix", "caption_suffix", "resize_interpolation",
)


class Dataset:
    """One resolution, one batch size, one set of buckets."""

    def __init__(
        self,
        params: DatasetParams,
        items: Sequence[ImageItem],
        *,
        index: int,
        architecture: DataArchitecture,
        seed: int,
        is_training: bool = True,
        prior_loss_weight: float = 1.0,
    ) -> None:
        self.params = params
        self.items = list(items)
        self.index = index
        self.architecture = architecture
        self.seed = seed
        self.is_training = is_training
        self.prior_loss_weight = prior_loss_weight
        self.strategies: StrategySet | None = None
        self.max_train_steps = 0
        self.replacements: Replacements | None = None
        """of textual inversion, applied to every caption that is tokenized"""
        self.empty_caption: ImageItem | None = None
        """carries the cached outputs of "", for captions that are dropped"""
        self.cut_texts: Sequence[PaddedText] = ()
        """of packs"""
        self.assignment = self._assign()
        self._warned_masks: set[str] = set()

    def _assign(self) -> BucketAssignment:
        self._tag_frequency: dict[str, dict[str, int]] | None = None  # counted once, when the record of the run is made
        if not self.is_training:
            for item in self.items:
                item.num_repeats = 1
        return assign_buckets(
            self.items, self.params, dataset=self.index, seed=self.seed, finest_step=self.architecture.bucket_step
        )

    # ---- counts and records ------------------------------------------------------------------------------------------

    @property
    def buckets(self) -> tuple[BucketList, ...]:
        return self.assignment.buckets

    @property
    def used_items(self) -> list[ImageItem]:
        """Items that appear in an epoch: big enough for a bucket, and for regularisation images, needed."""
        return [item for item, repeats in zip(self.items, self.assignment.repeats) if repeats]

    @property
    def num_train_images(self) -> int:
        """Training samples of an epoch, repeats included."""
        return sum(n for item, n in zip(self.items, self.assignment.repeats) if not item.is_reg)

    @property
    def num_reg_images(self) -> int:
        """Regularisation images with their own repeats, as they were offered (what known trainers record)."""
        return sum(item.num_repeats for item in self.items if item.is_reg)

    @property
    def batch_size(self) -> int:
        return self.params.batch_size

    @property
    def bucket_info(self) -> dict[str, Any] | None:
        return self.assignment.bucket_info

    @property
    def tag_frequency(self) -> dict[str, dict[str, int]]:
        """Folder or metadata file -> tag -> number of images that have it."""
        if self._tag_frequency is None:
            self._tag_frequency = tags_of_folders(self.items)
        return self._tag_frequency

    @property
    def subset_items(self) -> list[tuple[SubsetParams, list[ImageItem]]]:
        """Each subset with its images."""
        groups: dict[int, tuple[SubsetParams, list[ImageItem]]] = {id(s): (s, []) for s in self.params.subsets}
        for item in self.items:
            groups.setdefault(id(item.subset), (item.subset, []))[1].append(item)
        return [group for group in groups.values() if group[1]]

    def metadata(self) -> dict[str, Any]:
        """The record of `ss_datasets`; the bucket limits are those in force, on the grid, where there are any."""
        params = self.params
        limits = effective_limits(params.min_bucket_reso, params.max_bucket_reso, params.bucket_reso_steps)
        lowest, highest = limits if params.enable_bucket and params.bucket_rule == "steps" else (None, None)
        return {
            "is_dreambooth": params.kind != "FT",
            "batch_size_per_device": params.batch_size,
            "num_train_images": self.num_train_images,
            "num_reg_images": self.num_reg_images,
            "resolution": list(params.resolution),
            "enable_bucket": params.enable_bucket,
            "min_bucket_reso": lowest,
            "max_bucket_reso": highest,
            "tag_frequency": self.tag_frequency,
            "bucket_info": self.bucket_info,
            "resize_interpolation": params.resize_interpolation,
            "subsets": [subset_record(subset, len(items)) for subset, items in self.subset_items],
        }

    # ---- loading -----------------------------------------------------------------------------------------------------

    def load(self, request: BatchRequest) -> Batch:
        """The batch of a request. Raises ImageFileError or CheckpointError naming the file that cannot be read."""
        try:
            samples = [
                self._sample(self.items[i], request, position) for i, position in zip(request.items, request.positions)
            ]
        except ImageFileError as error:  # damage inside a file, which its header does not show
            raise ImageFileError(
                f"{error}; repair or remove it. --check_images names all such images before training, "
                "--skip_bad_images leaves them out"
            ) from error
        tokenize = self.strategies.tokenize if self.strategies is not None and self._needs_tokens(samples) else None
        caching = self.strategies.text_encoder_outputs_caching if self.strategies is not None else None
        if caching is None:
            return collate(request, samples, tokenize, self.params.network_multiplier)
        return collate(
            request, samples, tokenize, self.params.network_multiplier, caching.layout.names, caching.layout.lists
        )

    def load_pack(self, request: BatchRequest) -> PackedBatch:
        """The samples of a request, each size as a batch of its own."""
        places: dict[Bucket, list[int]] = {}
        for place, item in enumerate(request.items):
            places.setdefault(self.items[item].bucket, []).append(place)
        parts = [
            dataclasses.replace(
                request,
                items=tuple(request.items[place] for place in places[bucket]),
                positions=tuple(request.positions[place] for place in places[bucket]),
            )
            for bucket in sorted(places)
        ]
        return PackedBatch(request, [self._cut(self.load(part)) for part in parts])

    def _cut(self, part: Batch) -> Batch:
        """A part of a pack with cached texts as long as the longest of them."""
        if part.conditioning is None or not self.cut_texts:
            return part
        return dataclasses.replace(part, conditioning=without_padding(part.conditioning, self.cut_texts))

    def packs(self, packing: Packing, epoch: int, seed: int) -> list[Pack]:
        """The packs of an epoch."""
        return packs_of_epoch(self._samples, self.tokens, packing, seed=seed, epoch=epoch, dataset=self.index)

    def most_samples(self, packing: Packing) -> int:
        """Of a pack of any epoch."""
        return most_samples(self._samples, self.tokens, packing)

    @property
    def _samples(self) -> list[int]:
        """Items with repeats."""
        return [item for bucket in self.buckets for item in bucket.samples]

    @property
    def tokens(self) -> dict[int, int]:
        """How many the denoiser makes of each item that appears in an epoch."""
        latents = self.architecture.latents
        used = {item for bucket in self.buckets for item in bucket.samples}
        return {item: latents.tokens(self.items[item].bucket) for item in used}

    def _needs_tokens(self, samples: Sequence[Sample]) -> bool:
        """Tokens are made where an encoder runs in the step: nothing is cached, or an encoder trains beside the
        cache."""
        caching = self.strategies.text_encoder_outputs_caching if self.strategies is not None else None
        return caching is None or bool(caching.live) or any(sample.text_outputs is None for sample in samples)

    def _sample(self, item: ImageItem, request: BatchRequest, position: int) -> Sample:
        flipped = sample_flip(self.seed, item, request, position)
        geometry = sample_geometry(self.seed, item, request, position, self.params.enable_bucket)
        caption, outputs = self._text(item, request, position)
        sample = Sample(
            image_key=item.absolute_path,
            caption=caption,
            text_outputs=outputs,
            loss_weight=self.prior_loss_weight if item.is_reg else 1.0,
            original_size_hw=(item.image_size[1], item.image_size[0]),
            crop_top_left=geometry.top_left(flipped),
            target_size_hw=(geometry.bucket[1], geometry.bucket[0]),
            flipped=flipped,
            is_reg=item.is_reg,
            custom_attributes=dict(item.subset.custom_attributes),
            facts=item.facts,
        )
        if item.latents is not None or item.latents_npz is not None:
            self._add_latents(sample, item)
        else:
            self._add_pixels(sample, item, geometry, request, position)
        sample.conditions |= picture_tensors(read_pictures(item, geometry, self._pictures_of(item, sample)), flipped)
        self._warn_empty_mask(sample)
        return sample

    def _pictures_of(self, item: ImageItem, sample: Sample) -> tuple[str, ...]:
        """The masks and control pictures that the step gets: those that the family encodes, where no cache holds what
        is made of them, and the one of a dataset of kind CN for others. Without a family, to be looked at, all."""
        if item.cond_path is None and not item.control_paths:
            return ()
        own = (CONDITIONING_IMAGES,) if item.cond_path is not None else ()
        caching = self.strategies.latents_caching if self.strategies is not None else None
        if caching is None:
            return own or tuple(numbered(CONDITIONING_IMAGES, number) for number in range(len(item.control_paths)))
        encoded = caching.encoder.pictures_for(item.bucket)
        if sample.latents is not None:
            return tuple(name for name in own if name not in encoded)
        return tuple(dict.fromkeys((*own, *encoded)))

    def _add_latents(self, sample: Sample, item: ImageItem) -> None:
        if item.latents is not None:
            latents, mirrored, mask = item.latents, item.latents_flipped, item.alpha_mask
            conditions = item.conditions_flipped if sample.flipped else item.conditions
        else:
            # plug-ins know pictures by (width, height)
            caching, bucket = self.strategies.latents_caching, item.bucket
            size = bucket.key if bucket.kind == PLAIN else bucket
            latents, _, _, mirrored, mask = caching.load_latents_from_disk(item.latents_npz, size)
            conditions = caching.load_conditions_from_disk(item.latents_npz, bucket, sample.flipped)
        sample.latents = torch.as_tensor(mirrored if sample.flipped else latents).float()  # [C, h, w] or [C, F, h, w]
        found = {name: float32_if_floats(torch.as_tensor(value)) for name, value in (conditions or {}).items()}
        sample.conditions |= found
        if item.subset.alpha_mask:
            sample.alpha_mask = mask_tensor(mask, sample.flipped)

    def _add_pixels(
        self, sample: Sample, item: ImageItem, geometry: Geometry, request: BatchRequest, position: int
    ) -> None:
        color = sample_color(self.seed, item, request, position)
        pixels = read_pixels(item, geometry, with_alpha=item.subset.alpha_mask, color=color)
        sample.image = image_tensor(pixels.image, sample.flipped)  # [3, H, W] or [3, F, H, W]
        sample.latent_seed = seed_of(item, file_content_id(item.absolute_path), sample.flipped)
        if pixels.alpha_mask is not None:
            caching = self.strategies.latents_caching if self.strategies is not None else None
            mask = pixels.alpha_mask if caching is None else caching.learned_mask(item, pixels.alpha_mask)
            sample.alpha_mask = mask_tensor(mask, sample.flipped)

    def _text(self, item: ImageItem, request: BatchRequest, position: int) -> tuple[str, Conditioning | None]:
        """The caption that is used, and its cached outputs when there are some."""
        rng = LateRandom(self.seed, "caption", request.step, position)
        caching = self.strategies.text_encoder_outputs_caching if self.strategies is not None else None
        if item.text_encoder_outputs is not None or item.text_encoder_outputs_npz is not None:
            if request.is_training and is_dropped(item.subset, rng, request.epoch):
                return "", caching.outputs_of(self.empty_caption)
            return cached_caption(item), caching.outputs_of(item)
        if not request.is_training:
            return deterministic_caption(item.caption, item.subset, self.replacements), None
        caption = process_caption(
            item.caption, item.subset, rng=rng, epoch=request.epoch, step=request.step,
            max_train_steps=self.max_train_steps,
            replacements=self.replacements,
        )
        return caption, None

    def _warn_empty_mask(self, sample: Sample) -> None:
        is_mask = sample.conditioning is not None and self.params.kind == "CN" and not self.params.holds_control
        mask = sample.conditioning[0] / 2 + 0.5 if is_mask else sample.alpha_mask
        if mask is not None and sample.image_key not in self._warned_masks and not (mask > 0).any():
            self._warned_masks.add(sample.image_key)
            logger.warning("the mask of %s is zero everywhere: nothing is learned from this image", sample.image_key)


def subset_record(subset: SubsetParams, num_images: int) -> dict[str, Any]:
    record: dict[str, Any] = {"img_count": num_images}
    record |= {name: getattr(subset, name) for name in SUBSET_RECORD}
    source, path = subset.source or ("", "")
    names = {"image_dir": subset.image_dir, source: path, "control_directory": subset.control_directory}
    record |= {name: os.path.basename(os.path.normpath(path)) for name, path in names.items() if path}
    record |= {} if subset.clips is None else dataclasses.asdict(subset.clips)
    if subset.metadata_file:
        return record
    return record | {"class_tokens": subset.class_tokens, "is_reg": subset.is_reg}


class DatasetGroup(torch.utils.data.Dataset):
    """All datasets of a run, for training or for validation. `group[request]` is `group.load(request)`, so that it
    serves as the dataset of `DataLoader(group, sampler=requests, batch_size=None)`; it pickles for spawned workers."""

    def __init__(self, datasets: Sequence[Dataset], *, is_training: bool = True) -> None:
        self.datasets = list(datasets)
        self.is_training = is_training
        self.shared = SharedTensors()
        self.packing: Packing | None = None
        """of samples of several sizes; None: batches of one size"""

    def __len__(self) -> int:
        """Batches of an epoch with one process."""
        if self.packing is not None:
            return sum(len(dataset.packs(self.packing, 1, dataset.seed)) for dataset in self.datasets)
        return sum(dataset.assignment.num_batches for dataset in self.datasets)

    def __getitem__(self, request: BatchRequest) -> Batch | PackedBatch:
        return self.load(request)

    def plan(self, epoch: int, seed: int, num_processes: int, accumulation: int = 1) -> list[StepPlan]:
        """The optimizer steps of an epoch as global micro-batches; always in the same order for validation."""
        if self.packing is not None:
            packs = [(dataset.index, dataset.packs(self.packing, epoch, seed)) for dataset in self.datasets]
            return plan_packs(packs, seed=seed, epoch=epoch, num_processes=num_processes, accumulation=accumulation)
        buckets = [bucket for dataset in self.datasets for bucket in dataset.buckets]
        return plan_epoch(
            buckets, seed=seed, epoch=epoch, num_processes=num_processes, accumulation=accumulation,
            shuffle=self.is_training
        )

    def load(self, request: BatchRequest) -> Batch | PackedBatch:
        dataset = self.datasets[request.dataset]
        return dataset.load(request) if self.packing is None else dataset.load_pack(request)

    @property
    def items(self) -> list[ImageItem]:
        """All items that appear in an epoch."""
        return [item for dataset in self.datasets for item in dataset.used_items]

    @property
    def subsets(self) -> list[SubsetParams]:
        return [subset for dataset in self.datasets for subset, _ in dataset.subset_items]

    @property
    def num_train_images(self) -> int:
        return sum(dataset.num_train_images for dataset in self.datasets)

    @property
    def num_reg_images(self) -> int:
        return sum(dataset.num_reg_images for dataset in self.datasets)

    @property
    def batch_size(self) -> int:
        """The largest of the datasets."""
        return max((dataset.batch_size for dataset in self.datasets), default=1)

    @property
    def bucket_info(self) -> list[dict[str, Any] | None]:
        return [dataset.bucket_info for dataset in self.datasets]

    @property
    def tag_frequency(self) -> dict[str, dict[str, int]]:
        """Of all datasets; where two have a folder of one name, the first counts."""
        merged: dict[str, dict[str, int]] = {}
        for dataset in self.datasets:
            for name, tags in dataset.tag_frequency.items():
                merged.setdefault(name, tags)
        return merged

    def metadata(self) -> list[dict[str, Any]]:
        return [dataset.metadata() for dataset in self.datasets]

    # ---- settings that are known later -------------------------------------------------------------------------------

    def set_strategies(self, strategies: StrategySet) -> None:
        for dataset in self.datasets:
            dataset.strategies = strategies

    @property
    def most_samples(self) -> int | None:
        """Of a pack of any epoch; None without packing, as batches of an epoch are as large as those of the first."""
        if self.packing is None:
            return None
        return max(dataset.most_samples(self.packing) for dataset in self.datasets)

    def set_packing(self, packing: Packing | None) -> None:
        """Let samples of several sizes be trained together."""
        self.packing = packing
        for dataset in self.datasets if packing is not None else ():
            alone = [dataset.items[item] for item, count in dataset.tokens.items() if count > packing.token_budget]
            if alone:
                logger.warning(
                    "%s: %s more tokens than --navit_token_budget %d, each a pack of its own: %s", dataset.params.label,
                    "1 sample has" if len(alone) == 1 else f"{len(alone)} samples have", packing.token_budget,
                    listed([item.absolute_path for item in alone]),
                )

    def cut_texts_of_packs(self, texts: Sequence[PaddedText]) -> None:
        """Leave out what no caption of a size fills; before loader workers start."""
        for dataset in self.datasets:
            dataset.cut_texts = texts

    def set_max_train_steps(self, max_train_steps: int) -> None:
        """For settings that are a part of all steps; before loader workers start."""
        for dataset in self.datasets:
            dataset.max_train_steps = max_train_steps

    def set_replacements(self, replacements: Replacements) -> None:
        for dataset in self.datasets:
            dataset.replacements = replacements

    def set_empty_caption(self, item: ImageItem | None) -> None:
        for dataset in self.datasets:
            dataset.empty_caption = item

    def drop(self, items: Iterable[ImageItem]) -> None:
        """Leave out images that turned out to be unusable, and make the buckets anew. ConfigError when nothing is
        left."""
        unwanted = {id(item) for item in items}
        if not unwanted:
            return
        for dataset in self.datasets:
            dataset.items = [item for item in dataset.items if id(item) not in unwanted]
            dataset.assignment = dataset._assign()
        if self.num_train_images == 0:
            raise ConfigError("no image is left: all of them are unreadable or left out")

    def share_memory(self) -> None:
        """Pack the caches that are in memory, so that loader workers share them."""
        self.shared.absorb([*self.items, *self._empty_captions()])

    def _empty_captions(self) -> list[ImageItem]:
        return [d.empty_caption for d in self.datasets if d.empty_caption is not None]

    def __getstate__(self) -> dict[str, Any]:
        self.share_memory()
        datasets = []
        for dataset in self.datasets:
            frozen = copy.copy(dataset)
            frozen.items = [self.shared.frozen(item) for item in dataset.items]
            frozen.empty_caption = None if dataset.empty_caption is None else self.shared.frozen(dataset.empty_caption)
            datasets.append(frozen)
        return {**self.__dict__, "datasets": datasets}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.shared.thaw([*(item for d in self.datasets for item in d.items), *self._empty_captions()])
