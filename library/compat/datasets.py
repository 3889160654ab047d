"""Datasets as other code builds and reads them by hand: from subsets, as a group of batches, with caches of its own
strategies."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from library.config_util import Blueprint
from library.core.errors import ConfigError
from library.dataset import dataset as own
from library.dataset.architectures import ARCHITECTURES
from library.dataset.batch import Batch
from library.dataset.cache_checks import caching_problems
from library.dataset.custom import load_custom_dataset
from library.dataset.datasources import scan_datasets
from library.dataset.debug import debug_dataset as show_dataset
from library.dataset.fill_caches import fill_latent_cache, fill_text_cache
from library.dataset.items import DatasetParams, ImageItem, SubsetParams
from library.dataset.plan import BatchRequest, requests_of_epoch
from library.dataset.strategies import StrategySet
from library.strategy_base import (
    LatentsCachingStrategy,
    TextEncoderOutputsCachingStrategy,
    TextEncodingStrategy,
    TokenizeStrategy,
)

ARCHITECTURE = min(ARCHITECTURES.values(), key=lambda architecture: architecture.bucket_step)
"""A dataset by hand has no family: only the bucket step is read, the least that any asks for; caches are those of the
strategies."""


class DreamBoothSubset(SubsetParams):
    """A folder of images with caption files."""

    def __init__(
        self, image_dir: str, is_reg: bool = False, class_tokens: str | None = None,
        caption_extension: str = ".caption",
        cache_info: bool = False, alpha_mask: bool = False, num_repeats: int = 1, shuffle_caption: bool = False,
        caption_separator: str = ",", keep_tokens: int = 0, keep_tokens_separator: str = "",
        secondary_separator: str | None = None,
        enable_wildcard: bool = False, color_aug: bool = False, flip_aug: bool = False,
        face_crop_aug_range: tuple[float, float] | None = None, random_crop: bool = False,
        caption_dropout_rate: float = 0.0,
        caption_dropout_every_n_epochs: int = 0, caption_tag_dropout_rate: float = 0.0,
        caption_prefix: str | None = None,
        caption_suffix: str | None = None, token_warmup_min: int = 1, token_warmup_step: float = 0,
        custom_attributes: Mapping[str, Any] | None = None, validation_seed: int | None = None,
        validation_split: float | None = None,
        resize_interpolation: str | None = None,
    ) -> None:
        """`validation_seed` is that of the dataset."""
        super().__init__(**_fields(locals()))


class FineTuningSubset(SubsetParams):
    """The images of a metadata file."""

    def __init__(
        self, image_dir: str | None, metadata_file: str, alpha_mask: bool = False, num_repeats: int = 1,
        shuffle_caption: bool = False,
        caption_separator: str = ",", keep_tokens: int = 0, keep_tokens_separator: str = "",
        secondary_separator: str | None = None,
        enable_wildcard: bool = False, color_aug: bool = False, flip_aug: bool = False,
        face_crop_aug_range: tuple[float, float] | None = None, random_crop: bool = False,
        caption_dropout_rate: float = 0.0,
        caption_dropout_every_n_epochs: int = 0, caption_tag_dropout_rate: float = 0.0,
        caption_prefix: str | None = None,
        caption_suffix: str | None = None, token_warmup_min: int = 1, token_warmup_step: float = 0,
        custom_attributes: Mapping[str, Any] | None = None, validation_seed: int | None = None,
        validation_split: float | None = None,
        resize_interpolation: str | None = None,
    ) -> None:
        """`validation_seed` is that of the dataset."""
        super().__init__(**_fields(locals()))


class ControlNetSubset(SubsetParams):
    """A folder of images with caption files and a folder of their masks or control images."""

    def __init__(
        self, image_dir: str, conditioning_data_dir: str, caption_extension: str = ".caption", cache_info: bool = False,
        num_repeats: int = 1, shuffle_caption: bool = False, caption_separator: str = ",", keep_tokens: int = 0,
        keep_tokens_separator: str = "", secondary_separator: str | None = None, enable_wildcard: bool = False,
        color_aug: bool = False, flip_aug: bool = False, face_crop_aug_range: tuple[float, float] | None = None,
        random_crop: bool = False, caption_dropout_rate: float = 0.0, caption_dropout_every_n_epochs: int = 0,
        caption_tag_dropout_rate: float = 0.0, caption_prefix: str | None = None, caption_suffix: str | None = None,
        token_warmup_min: int = 1, token_warmup_step: float = 0, custom_attributes: Mapping[str, Any] | None = None,
        validation_seed: int | None = None, validation_split: float | None = None,
        resize_interpolation: str | None = None,
    ) -> None:
        """`validation_seed` is that of the dataset."""
        super().__init__(**_fields(locals()))


def _fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a subset that SubsetParams has."""
    found = {name: value for name, value in values.items() if name in SubsetParams.__dataclass_fields__}
    return {**found, "custom_attributes": found["custom_attributes"] or {}}


class BaseDataset(own.Dataset):
    """A dataset whose batches have numbers; what trainers set on it, it keeps."""

    def __init__(
        self, kind: str, subsets: Sequence[SubsetParams], is_training: bool, prior_loss_weight: float, **params: Any
    ) -> None:
        settings = DatasetParams(kind=kind, subsets=tuple(subsets), label="datasets[0]", **params)
        seed = settings.validation_seed or 0
        scan = scan_datasets(Blueprint((settings,), False), seed=seed)
        items = (scan.train if is_training else scan.validation)[0]
        super().__init__(
            settings, items, index=0, architecture=ARCHITECTURE, seed=seed, is_training=is_training,
            prior_loss_weight=prior_loss_weight
        )

    @property
    def subsets(self) -> tuple[SubsetParams, ...]:
        return self.params.subsets

    @property
    def image_data(self) -> dict[str, ImageItem]:
        return {item.image_key: item for item in self.items}

    def __len__(self) -> int:
        return self.assignment.num_batches

    def make_buckets(self) -> None:
        """Buckets are made when the dataset is; this makes them anew from `items`."""
        self.assignment = self._assign()


class DreamBoothDataset(BaseDataset):
    """Folders of images with caption files, the training part of them or that of validation."""

    def __init__(
        self, subsets: Sequence[SubsetParams], is_training_dataset: bool, batch_size: int, resolution: tuple[int, int],
        network_multiplier: float, enable_bucket: bool, min_bucket_reso: int, max_bucket_reso: int,
        bucket_reso_steps: int,
        bucket_no_upscale: bool, prior_loss_weight: float, debug_dataset: bool = False, validation_split: float = 0.0,
        validation_seed: int | None = None, resize_interpolation: str | None = None,
        skip_image_resolution: tuple[int, int] | None = None,
    ) -> None:
        super().__init__(
            "DB", subsets, is_training_dataset, prior_loss_weight, batch_size=batch_size, resolution=tuple(resolution),
            network_multiplier=network_multiplier, enable_bucket=enable_bucket, min_bucket_reso=min_bucket_reso,
            max_bucket_reso=max_bucket_reso, bucket_reso_steps=bucket_reso_steps, bucket_no_upscale=bucket_no_upscale,
            validation_split=validation_split, validation_seed=validation_seed,
            resize_interpolation=resize_interpolation,
            skip_image_resolution=skip_image_resolution,
        )


class FineTuningDataset(BaseDataset):
    """The images of metadata files."""

    def __init__(
        self, subsets: Sequence[SubsetParams], batch_size: int, resolution: tuple[int, int], network_multiplier: float,
        enable_bucket: bool, min_bucket_reso: int, max_bucket_reso: int, bucket_reso_steps: int,
        bucket_no_upscale: bool,
        debug_dataset: bool = False, validation_seed: int | None = None, validation_split: float = 0.0,
        resize_interpolation: str | None = None, skip_image_resolution: tuple[int, int] | None = None,
    ) -> None:
        super().__init__(
            "FT", subsets, True, 1.0, batch_size=batch_size, resolution=tuple(resolution),
            network_multiplier=network_multiplier,
            enable_bucket=enable_bucket, min_bucket_reso=min_bucket_reso, max_bucket_reso=max_bucket_reso,
            bucket_reso_steps=bucket_reso_steps, bucket_no_upscale=bucket_no_upscale, validation_split=validation_split,
            validation_seed=validation_seed, resize_interpolation=resize_interpolation,
            skip_image_resolution=skip_image_resolution,
        )


class ControlNetDataset(BaseDataset):
    """Images with a mask or control image each, the training part of them."""

    def __init__(
        self, subsets: Sequence[SubsetParams], batch_size: int, resolution: tuple[int, int], network_multiplier: float,
        enable_bucket: bool, min_bucket_reso: int, max_bucket_reso: int, bucket_reso_steps: int,
        bucket_no_upscale: bool, debug_dataset: bool = False, validation_split: float = 0.0,
        validation_seed: int | None = None, resize_interpolation: str | None = None,
        skip_image_resolution: tuple[int, int] | None = None,
    ) -> None:
        super().__init__(
            "CN", subsets, True, 1.0, batch_size=batch_size, resolution=tuple(resolution),
            network_multiplier=network_multiplier, enable_bucket=enable_bucket, min_bucket_reso=min_bucket_reso,
            max_bucket_reso=max_bucket_reso, bucket_reso_steps=bucket_reso_steps, bucket_no_upscale=bucket_no_upscale,
            validation_split=validation_split, validation_seed=validation_seed,
            resize_interpolation=resize_interpolation, skip_image_resolution=skip_image_resolution,
        )


@dataclass(frozen=True)
class _Processes:
    """What filling caches asks of a Runtime, of an Accelerator (None: one process)."""

    accelerator: Any

    @property
    def rank(self) -> int:
        return 0 if self.accelerator is None else self.accelerator.process_index

    @property
    def num_processes(self) -> int:
        return 1 if self.accelerator is None else self.accelerator.num_processes

    def barrier(self) -> None:
        if self.accelerator is not None:
            self.accelerator.wait_for_everyone()


class DatasetGroup(own.DatasetGroup):
    """Datasets as one list of batches: `group[i]` is batch i of the present epoch, for a DataLoader with batch_size 1
    and `collator_class`. The order within an epoch is a function of its number and the seed."""

    def __init__(self, datasets: Sequence[own.Dataset]) -> None:
        super().__init__(datasets, is_training=all(dataset.is_training for dataset in datasets))
        for number, dataset in enumerate(self.datasets):
            if dataset.index != number:
                dataset.index = number
                dataset.assignment = dataset._assign()
        self.epoch, self.step = 1, 0
        self._requests: tuple[tuple[int, int], list[BatchRequest]] | None = None

    def __getitem__(self, index: int | BatchRequest) -> Batch:
        if isinstance(index, BatchRequest):
            return self.load(index)
        return self.load(self._requests_of_epoch()[index])

    def _requests_of_epoch(self) -> list[BatchRequest]:
        key = (self.epoch, self.step)
        if self._requests is None or self._requests[0] != key:
            plan = self.plan(self.epoch, self.datasets[0].seed, 1)
            requests = requests_of_epoch(
                plan, epoch=self.epoch, first_step=self.step, rank=0, num_processes=1, is_training=self.is_training
            )
            self._requests = key, list(requests)
        return self._requests[1]

    @property
    def image_data(self) -> dict[str, ImageItem]:
        return {item.image_key: item for dataset in self.datasets for item in dataset.items}

    def get_resolutions(self) -> list[tuple[int, int]]:
        return [dataset.params.resolution for dataset in self.datasets]

    def set_current_epoch(self, epoch: int) -> None:
        """Counted from 1."""
        self.epoch = max(1, epoch)

    def set_current_step(self, step: int) -> None:
        """Optimizer steps that were done before the epoch."""
        self.step = step

    def set_current_strategies(self) -> None:
        """Those of the four `set_strategy` calls."""
        self.set_strategies(current_strategies())

    def add_replacement(self, str_from: str, str_to: str) -> None:
        for dataset in self.datasets:
            dataset.replacements = {**(dataset.replacements or {}), str_from: str_to}

    def verify_bucket_reso_steps(self, min_steps: int) -> None:
        """ConfigError when bucket sides could be no multiples of `min_steps`."""
        wrong = [
            dataset.params
            for dataset in self.datasets
            if dataset.params.enable_bucket and dataset.params.bucket_reso_steps % min_steps
        ]
        if wrong:
            raise ConfigError(
                [
                    f"{p.label}: bucket_reso_steps is {p.bucket_reso_steps}; needed: a multiple of {min_steps}"
                    for p in wrong
                ]
            )

    def is_latent_cacheable(self) -> bool:
        return not caching_problems(self.subsets, latents=True, text=False)

    def is_text_encoder_output_cacheable(self, cache_supports_dropout: bool = False) -> bool:
        return not caching_problems(self.subsets, latents=False, text=True)

    def new_cache_latents(self, model: Any, accelerator: Any) -> None:
        """Fill the latent cache of LatentsCachingStrategy.set_strategy with this VAE."""
        fill_latent_cache([self], current_strategies(), lambda: model, _Processes(accelerator))
        self.set_current_strategies()

    def new_cache_text_encoder_outputs(self, models: list[Any], accelerator: Any) -> None:
        """Fill the cache of TextEncoderOutputsCachingStrategy.set_strategy with these text encoders."""
        fill_text_cache([self], current_strategies(), lambda: models, _Processes(accelerator))


def current_strategies() -> StrategySet:
    slots = (TokenizeStrategy, TextEncodingStrategy, LatentsCachingStrategy, TextEncoderOutputsCachingStrategy)
    return StrategySet(*(slot.get_strategy() for slot in slots))


class MinimalDataset(torch.utils.data.Dataset):
    """The base of an own dataset for --dataset_class; see library/dataset/custom.py for what a subclass sets and
    gives."""

    def __init__(
        self, resolution: tuple[int, int] | None, network_multiplier: float, debug_dataset: bool = False
    ) -> None:
        self.resolution, self.network_multiplier, self.debug_dataset = resolution, network_multiplier, debug_dataset
        self.num_train_images = self.num_reg_images = 0
        self.batch_size = 1
        self.datasets = [self]
        self.subsets: list[Any] = []
        self.tag_frequency: dict[str, Any] = {}
        self.bucket_info: Any = None
        self.current_epoch = self.current_step = 0

    def __len__(self) -> int:
        raise NotImplementedError(f"{type(self).__name__} has no __len__, the number of batches of an epoch")

    def __getitem__(self, index: int) -> dict[str, Any]:
        raise NotImplementedError(f"{type(self).__name__} has no __getitem__, batch `index` as a dict")

    def is_latent_cacheable(self) -> bool:
        return False

    def verify_bucket_reso_steps(self, min_steps: int) -> None: ...

    def get_resolutions(self) -> list[Any]:
        return []

    def set_current_epoch(self, epoch: int) -> None:
        self.current_epoch = epoch

    def set_current_step(self, step: int) -> None:
        self.current_step = step

    def set_max_train_steps(self, max_train_steps: int) -> None:
        self.max_train_steps = max_train_steps


def load_arbitrary_dataset(args: Any, tokenizer: Any = None) -> Any:
    """The dataset of --dataset_class. ConfigError naming what it lacks."""
    group = load_custom_dataset(
        args.dataset_class, max_token_length=getattr(args, "max_token_length", None),
        resolution=getattr(args, "resolution", None),
        debug_dataset=bool(getattr(args, "debug_dataset", False)), tokenizer=tokenizer,
    )
    return group.dataset


class collator_class:
    """`collate_fn` of a DataLoader over batches: tells the dataset, in whichever process it is, the epoch and step, and
    takes the one batch. `epoch` and `step` have a `value`."""

    def __init__(self, epoch: Any, step: Any, dataset: Any) -> None:
        self.current_epoch, self.current_step, self.dataset = epoch, step, dataset

    def __call__(self, examples: list[Any]) -> Any:
        worker = torch.utils.data.get_worker_info()
        dataset = self.dataset if worker is None else worker.dataset
        dataset.set_current_epoch(self.current_epoch.value)
        dataset.set_current_step(self.current_step.value)
        return examples[0]


def debug_dataset(
    train_dataset: own.DatasetGroup, show_input_ids: bool = False, show: Callable[[str], None] = print
) -> int:
    """Describe every sample of an epoch, tokens by their shapes; returns how many."""
    return show_dataset(train_dataset, seed=train_dataset.datasets[0].seed, show=show)
