"""`--dataset_class package.module.Class`: batches from a user's own class.

The class is called as `Class(tokenizer, max_token_length, resolution, debug_dataset)`; `tokenizer` is None, since
captions are tokenized by the family. It needs

    __len__()           number of batches of an epoch
    __getitem__(i)      batch i as a dict: `images` float32 [B, 3, H, W] in -1..1 (or `latents` [B, C, h, w]; clips have an axis of
                        frames before the height) and `captions`, a list of B texts; any other key of
                        library.dataset.batch.Batch may be there too
    num_train_images    samples of an epoch
    batch_size          samples of every batch but the last, which may be shorter

and may have num_reg_images, subsets, bucket_info, tag_frequency for the records. Batch i must be the same whenever it
is asked for. Its order within the epoch is shuffled by us; its latents and captions are not cached.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol, runtime_checkable

import torch

from library.core.errors import ConfigError
from library.core.keyed_random import key_seed, keyed_random
from library.core.registry import import_target
from library.dataset.batch import CONDITIONING_IMAGES, Batch, rows_of
from library.dataset.captions import Replacements, replaced
from library.dataset.collate import Sample, collate
from library.dataset.plan import BatchRequest, GlobalBatch, StepPlan
from library.dataset.strategies import StrategySet


@runtime_checkable
class CustomDataset(Protocol):
    """What a class given as --dataset_class must have; see the module's text."""

    num_train_images: int
    batch_size: int

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


def load_custom_dataset(
    path: str, *, max_token_length: int | None = None, resolution: tuple[int, int] | None = None,
    debug_dataset: bool = False,
    tokenizer: Any = None,
) -> CustomDatasetGroup:
    """Import and build the class. Raises ConfigError naming what it lacks."""
    try:
        dataset_class = import_target(path)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"--dataset_class is {path}, which cannot be imported ({error}); use package.module.Class"
        ) from error
    try:
        dataset = dataset_class(tokenizer, max_token_length, resolution, debug_dataset)
    except TypeError as error:
        raise ConfigError(
            f"--dataset_class {path} cannot be called with (None, max_token_length, resolution, debug_dataset): "
            f"{error};"
            " see library/dataset/custom.py for what is needed"
        ) from error
    missing = [
        name for name in ("__len__", "__getitem__", "num_train_images", "batch_size") if not hasattr(dataset, name)
    ]
    if missing:
        raise ConfigError(
            f"--dataset_class {path} has no {', '.join(missing)}; see library/dataset/custom.py for what is needed"
        )
    batches = -(-dataset.num_train_images // dataset.batch_size)
    if len(dataset) != batches or not batches:
        raise ConfigError(
            f"--dataset_class {path} has {len(dataset)} batches of {dataset.batch_size} samples but num_train_images is"
            f" {dataset.num_train_images}, which makes {batches}; all batches but the last must be full, and one at "
            "least is needed"
        )
    return CustomDatasetGroup(dataset)


class CustomDatasetGroup(torch.utils.data.Dataset):
    """A user's dataset behind the interface of DatasetGroup. Sample s is row s % batch_size of batch s //
    batch_size."""

    is_training = True

    def __init__(self, dataset: CustomDataset, seed: int = 0) -> None:
        self.dataset = dataset
        self.datasets = [dataset]
        self.seed = seed
        self.strategies: StrategySet | None = None
        self.num_train_images = dataset.num_train_images
        self.num_reg_images = getattr(dataset, "num_reg_images", 0)
        self.batch_size = dataset.batch_size
        self.bucket_info = [getattr(dataset, "bucket_info", None)]
        self.tag_frequency = getattr(dataset, "tag_frequency", {})
        self.subsets: list[Any] = []
        self.items: list[Any] = []
        self.replacements: Replacements | None = None

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, request: BatchRequest) -> Batch:
        return self.load(request)

    def set_strategies(self, strategies: StrategySet) -> None:
        self.strategies = strategies

    def set_replacements(self, replacements: Replacements) -> None:
        self.replacements = replacements

    def set_max_train_steps(self, max_train_steps: int) -> None:
        return None

    def metadata(self) -> list[dict[str, Any]]:
        return [
            {
                "is_dreambooth": False, "batch_size_per_device": self.batch_size,
                "num_train_images": self.num_train_images,
                "num_reg_images": self.num_reg_images, "tag_frequency": self.tag_frequency,
                "bucket_info": self.bucket_info[0], "subsets": [],
            }
        ]

    def plan(self, epoch: int, seed: int, num_processes: int, accumulation: int = 1) -> list[StepPlan]:
        """Every rank loads whole batches of the user: full ones are grouped by the number of processes; those that are
        left over, and the short last one, are cut among the ranks."""
        size = self.batch_size
        samples = [tuple(range(i * size, min((i + 1) * size, self.num_train_images))) for i in range(len(self))]
        rng = keyed_random(seed, "order of batches", epoch)
        full, short = (
            [batch for batch in samples if len(batch) == size],
            [batch for batch in samples if len(batch) < size],
        )
        rng.shuffle(full)
        whole = len(full) - len(full) % num_processes
        groups = [sum(full[i : i + num_processes], ()) for i in range(0, whole, num_processes)] + full[whole:] + short
        rng.shuffle(groups)
        return [
            tuple(GlobalBatch(0, group) for group in groups[i : i + accumulation])
            for i in range(0, len(groups), accumulation)
        ]

    def load(self, request: BatchRequest) -> Batch:
        """The rows of one user batch. ConfigError when the user's batch is not what the protocol says."""
        rows = [item % self.batch_size for item in request.items]
        index = request.items[0] // self.batch_size if request.items else None
        content = self.dataset[index] if index is not None else {}
        samples = [self._sample(content, row, request.items[i]) for i, row in enumerate(rows)]
        for position, sample in zip(request.positions, samples, strict=True):
            rng = keyed_random(self.seed, "caption", request.step, position)
            sample.caption = replaced(sample.caption, self.replacements, rng)
        ready = {
            name: rows_of(content[name], rows)
            for name in ("input_ids_list", "conditioning")
            if content.get(name) is not None
        }
        if content.get("text_encoder_outputs_list") is not None and self.strategies is not None:
            layout, outputs = self.strategies.layout, rows_of(content["text_encoder_outputs_list"], rows)
            ready |= {"conditioning": layout.named(outputs, "--dataset_class"), "conditioning_keys": layout.names}
        tokenize = self.strategies.tokenize if self.strategies is not None and not ready else None
        return dataclasses.replace(collate(request, samples, tokenize), **ready)

    def _sample(self, content: dict[str, Any], row: int, sample_id: int) -> Sample:
        images, latents = content.get("images"), content.get("latents")
        tensor = images if images is not None else latents
        if tensor is None or len(tensor) <= row or len(content.get("captions", ())) <= row:
            raise ConfigError(
                f"--dataset_class: a batch needs images or latents and captions with {row + 1} rows or more"
            )
        height, width = tensor.shape[-2:]

        def value(name: str, default: Any) -> Any:
            entry = content.get(name)
            return default if entry is None else entry[row]

        size = tuple(int(v) for v in value("target_sizes_hw", (height, width)))
        return Sample(
            image_key=str(value("image_keys", f"sample {sample_id}")),
            caption=content["captions"][row],
            text_outputs=None,
            loss_weight=float(value("loss_weights", 1.0)),
            original_size_hw=tuple(int(v) for v in value("original_sizes_hw", size)),
            crop_top_left=tuple(int(v) for v in value("crop_top_lefts", (0, 0))),
            target_size_hw=size,
            flipped=bool(value("flippeds", False)),
            custom_attributes=dict(value("custom_attributes", {})),
            image=None if images is None else images[row],
            latents=None if images is not None else latents[row],
            latent_seed=None if images is None else key_seed(self.seed, "posterior of a custom dataset", sample_id),
            alpha_mask=value("alpha_masks", None),
            conditions={name: tensor[row] for name, tensor in conditions_of(content).items()},
        )


def conditions_of(content: dict[str, Any]) -> dict[str, torch.Tensor]:
    """What a user's batch has beside images and captions: `conditions` by name, conditioning images under their own
    name too."""
    images = content.get(CONDITIONING_IMAGES)
    return {**(content.get("conditions") or {}), **({} if images is None else {CONDITIONING_IMAGES: images})}
