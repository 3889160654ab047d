"""The phases of a run that deal with data: images found, latents cached, captions encoded."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, TypeVar

import torch

from library.config_util import Blueprint, ScriptRules
from library.core.errors import CheckpointError, ConfigError
from library.core.options import Config
from library.dataset import CachingOptions, DatasetOptions
from library.dataset.architectures import DataArchitecture
from library.dataset.batch import PRESERVED
from library.dataset.bucket import BucketSelector
from library.dataset.build import build_dataset_groups
from library.dataset.cache_index import CacheIndex
from library.dataset.custom import load_custom_dataset
from library.dataset.datasources import ScanResult, load_datasets
from library.dataset.debug import debug_dataset
from library.dataset.fill_caches import fill_latent_cache, fill_text_cache, uncached
from library.dataset.strategies import StrategySet, Texts
from library.dataset.text_caching import warn_overlong_captions
from library.training.accelerator_setup import Runtime
from library.training.option_groups import LoopOptions
from library.training.packing_options import native_sizes, packing_of

if TYPE_CHECKING:
    from library.families.latents import SideLimit
    from library.training.hooks.base import Hook
    from library.training.protocols import BatchSource
    from library.training.trainables.base import Trainable
    from library.training.wiring.base import ModelFamily

Loaded = TypeVar("Loaded")
logger = logging.getLogger(__name__)

TOLD = {
    "vae": ("sample", "latents", "cache_latents"),
    "text_encoders": ("caption", "text encoder outputs", "cache_text_encoder_outputs"),
}
"""part -> of what a cache lacks what, and the tool that makes it"""
SHEETS = ("dataset.png", "dataset_validation.png")


@dataclass
class FoundData:
    """What the configuration names and the disk holds; nothing of it is decoded yet. None for --dataset_class."""

    blueprint: Blueprint | None
    scan: ScanResult | None


@dataclass
class DataGroups:
    """The images of a run, for training and, when some are held out, for validation."""

    train: BatchSource
    validation: BatchSource | None
    used_config_file: bool = False
    shadowed: frozenset[str] = frozenset()
    """see Blueprint"""
    index: CacheIndex = field(default_factory=CacheIndex, repr=False)
    """of cache files, for the phases that fill caches; released after them"""

    @property
    def groups(self) -> list[BatchSource]:
        return [group for group in (self.train, self.validation) if group is not None]

    def set_strategies(self, strategies: StrategySet) -> None:
        for group in self.groups:
            group.set_strategies(strategies)

    def show(self, seed: int, folder: str | None) -> None:
        """--debug_dataset: a line for every sample, and in `folder`, if there is one, sheets of the pictures."""
        for group, name in zip(self.groups, SHEETS):
            debug_dataset(group, seed=seed, sheet=os.path.join(folder, name) if folder else None)
        if not folder:
            logger.info("no picture is drawn without --output_dir, which is where the sheets of the samples go")


@dataclass
class TextPhase:
    """What remains of the text encoders after their phase: the modules that the step needs (None = released) and the
    conditioning of the sample prompts, text -> tensors [1, ...] by name."""

    text_encoders: list[torch.nn.Module | None] = field(default_factory=list)
    sample_conditioning: Texts = field(default_factory=dict)


def find_data(
    config: Config, architecture: DataArchitecture, script: str | ScriptRules = "train_network",
    limit: SideLimit | None = None,
) -> FoundData:
    """Read the dataset configuration and look at its files; every problem of both, and of the caches, in one
    ConfigError.

    `script`: the one that runs, or the rules of what is trained (Trainable.dataset_rules): they differ in the kinds of
    dataset that they take. `limit`: of pictures that keep their sizes.
    """
    data, caching = config[DatasetOptions], config[CachingOptions]
    if data.dataset_class is not None:
        if caching.caches_latents or caching.caches_text:
            raise ConfigError(
                "--dataset_class makes its own batches, which cannot be cached; leave the --cache_* options out"
            )
        return FoundData(None, None)
    return FoundData(
        *load_datasets(
            data, caching, explicit=config.explicit, architecture=architecture, script=script,
            seed=config[LoopOptions].seed, native=native_sizes(config, architecture, limit),
        )
    )


def side_limit_of(family: ModelFamily) -> SideLimit | None:
    """How large pictures may be; None too where that cannot be told, as the denoiser's file is not given or damaged,
    which is for other checks to tell."""
    try:
        return family.side_limit()
    except (CheckpointError, OSError):
        return None


def side_problems(found: FoundData, limit: SideLimit | None) -> list[str]:
    """A message for every bucket that is larger than the pictures that the model has positions for."""
    if found.scan is None or limit is None:
        return []
    problems = []
    for params, train, held_out in zip(found.blueprint.datasets, found.scan.train, found.scan.validation, strict=True):
        if params.native is not None:
            continue  # these sizes know the limit
        selector = BucketSelector.of(params)
        choices = [selector.select(item.image_size, item.frames) for item in (*train, *held_out)]
        counts = Counter(choice.bucket_reso for choice in choices if choice is not None)
        for size, count in sorted(counts.items()):
            what = f"{params.label}: the bucket of {count} {'image' if count == 1 else 'images'}"
            problem = limit.problem(*size, what, "a lower resolution or max_bucket_reso")
            problems += [problem] if problem else []
    return problems


def preserving_problems(found: FoundData, parts: Iterable[Trainable | Hook]) -> list[str]:
    """Why samples cannot keep what the untouched model predicts, where a subset asks for that."""
    datasets = found.blueprint.datasets if found.blueprint is not None else ()
    asked = any(subset.custom_attributes.get(PRESERVED) for params in datasets for subset in params.subsets)
    reasons = [part.without_untouched for part in parts if part.without_untouched] if asked else []
    return [f"{PRESERVED} in the dataset configuration {reason}" for reason in reasons]


def group_data(config: Config, found: FoundData, architecture: DataArchitecture, seed: int) -> DataGroups:
    """Items into buckets, and these into packs where the run packs."""
    data = config[DatasetOptions]
    if found.blueprint is None:
        group = load_custom_dataset(data.dataset_class, resolution=data.resolution, debug_dataset=data.debug_dataset)
        return DataGroups(group, None)
    train, validation = build_dataset_groups(
        found.blueprint, data, architecture=architecture, seed=seed, scan=found.scan
    )
    if packing := packing_of(config):
        train.set_packing(packing)
    blueprint = found.blueprint
    return DataGroups(train, validation, blueprint.used_config_file, blueprint.shadowed, found.scan.index)


class KeptModels(Generic[Loaded]):
    """Loads a part of the model when it is first asked for, and keeps it for whoever needs it after."""

    def __init__(self, load: Callable[[], Loaded]) -> None:
        self._load = load
        self.value: Loaded | None = None

    def __call__(self) -> Loaded:
        if self.value is None:
            self.value = self._load()
        return self.value


def lacking_problems(family: ModelFamily, data: DataGroups, strategies: StrategySet) -> list[str]:
    """A message for each part without files that would have to fill a cache."""
    parts = [part for part in TOLD if family.lacks(part)]
    found = uncached(data.groups, strategies, data.index) if parts else {}
    problems = []
    for part in parts:
        if part not in found:
            continue
        (item, reason), count = found[part][0], len(found[part])
        kind, what, tool = TOLD[part]
        have = f"{kind} has" if count == 1 else f"{kind}s have"
        path = item.latents_npz if part == "vae" else item.text_encoder_outputs_npz
        names = [f"--{name}" for name in family.part_files(part)]
        are, them = ("is", "it") if len(names) == 1 else ("are", "them")
        problems.append(
            f"{count} {have} no {what} in the cache (the first is {item.absolute_path}; cache file {path}: {reason}),"
            f" and {' and '.join(names)} {are} not given to make what is missing; give {them} here, or to"
            f" tools/{tool}.py --family {family.name} beforehand"
        )
    return problems


@torch.no_grad()
def cache_latents(
    config: Config, data: DataGroups, strategies: StrategySet, runtime: Runtime,
    load_vae: Callable[[], torch.nn.Module],
    load_parts: Callable[[], dict[str, torch.nn.Module]] = dict, num_threads: int | None = None,
) -> None:
    """Encode what the latent cache lacks with the VAE and the parts beside it; images that turn out to be unreadable
    leave the data with --skip_bad_images. `num_threads`: that read files."""
    if config[CachingOptions].caches_latents:
        skip = config[DatasetOptions].skip_bad_images
        fill_latent_cache(
            data.groups, strategies, load_vae, runtime, skip_bad_images=skip, index=data.index, load_parts=load_parts,
            num_threads=num_threads,
        )


def prepare_text(
    data: DataGroups,
    strategies: StrategySet,
    runtime: Runtime,
    *,
    load: Callable[[], list[torch.nn.Module | None]],
    encode_prompts: Callable[[list[torch.nn.Module | None]], Texts] | None,
    fill: Callable[..., object] = fill_text_cache,
) -> TextPhase:
    """Encode captions and sample prompts, then keep only the text encoders that the step needs.

    `encode_prompts` turns the encoders into the conditioning of the sample prompts; None: there are none. `fill` is
    called as `fill_text_cache`.
    """
    caches = strategies.text_encoder_outputs_caching is not None
    encoders, phase = KeptModels(load), TextPhase()
    with torch.no_grad(), runtime.autocast():
        if caches:
            fill(data.groups, strategies, encoders, runtime, index=data.index)
        data.index.release()
        if encode_prompts is not None:
            phase.sample_conditioning = encode_prompts(encoders())
    if not caches:
        if runtime.is_main_process:
            warn_overlong_captions([item for group in data.groups for item in group.items], strategies.tokenize)
        phase.text_encoders = encoders()
    elif live := strategies.text_encoder_outputs_caching.live:  # beside a cache only what makes these runs in the step
        needed = strategies.layout.encoders_for(live)
        phase.text_encoders = [encoder if number in needed else None for number, encoder in enumerate(encoders())]
    return phase
