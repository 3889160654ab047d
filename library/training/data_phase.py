"""The phases of a run that deal with data: images found, latents cached, captions encoded."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from library.dataset import CachingOptions, DatasetOptions
from library.dataset.caching import encode_latents, plan_latents, unusable_items
from library.dataset.dataset import DatasetGroup
from library.dataset.items import ImageItem
from library.dataset.text_caching import empty_caption_item, encode_text, finish_text, plan_text
from library.options import Config
from library.strategy_base import StrategySet
from library.training.accelerator_setup import Runtime
from library.training.hooks.losses import gather_objects

logger = logging.getLogger(__name__)


@dataclass
class DataGroups:
    """The images of a run."""

    train: DatasetGroup
    validation: DatasetGroup | None
    blueprint: Any

    @property
    def groups(self) -> list[DatasetGroup]:
        return [group for group in (self.train, self.validation) if group is not None]

    @property
    def items(self) -> list[ImageItem]:
        return [item for group in self.groups for item in group.items]

    def set_strategies(self, strategies: StrategySet) -> None:
        for group in self.groups:
            group.set_strategies(strategies)


@dataclass
class TextPhase:
    """What remains of the text encoders after their phase: the modules that the step needs (None = released) and the
    conditioning of the sample prompts, text -> list of tensors [1, ...]."""

    text_encoders: list[torch.nn.Module | None] = field(default_factory=list)
    sample_conditioning: dict[str, list[Any]] = field(default_factory=dict)


def cache_latents(
    config: Config, data: DataGroups, strategies: StrategySet, runtime: Runtime, load_vae: Callable[[], torch.nn.Module]
) -> torch.nn.Module | None:
    """Encode what the latent cache lacks. Returns the VAE when it had to be loaded; images that turned out to be unreadable
    leave the data with --skip_bad_images."""
    if not config[CachingOptions].caches_latents:
        return None
    strategy, skip = strategies.latents_caching, config[DatasetOptions].skip_bad_images
    jobs = plan_latents(data.items, strategy, process_index=runtime.rank, num_processes=runtime.num_processes)
    vae = None
    if jobs:
        vae = load_vae()
        with torch.no_grad():
            bad = encode_latents(jobs, strategy, vae, skip_bad_images=skip, show_progress=runtime.is_main_process)
        vae.to("cpu")
    else:
        bad = []
    runtime.barrier()
    if skip and any(gather_objects(bool(bad))):
        if runtime.num_processes > 1:  # other processes found bad images as well
            bad = unusable_items(data.items, strategy)
        for group in data.groups:
            group.drop(bad)
    return vae


def prepare_text(
    config: Config,
    data: DataGroups,
    strategies: StrategySet,
    runtime: Runtime,
    *,
    load: Callable[[], list[torch.nn.Module | None]],
    encode_prompts: Callable[[list[torch.nn.Module | None]], dict[str, list[Any]]] | None,
    trained: list[bool],
) -> TextPhase:
    """Encode captions and sample prompts, then keep only the text encoders that the step needs.

    `encode_prompts` turns the encoders into the conditioning of the sample prompts; None: there are none.
    """
    caches = strategies.text_encoder_outputs_caching is not None
    plan, items = None, []
    if caches:
        empty = empty_caption_item(data.train.items)
        for group in data.groups:
            group.set_empty_caption(empty)
        items = [*data.items, *([empty] if empty is not None else [])]
        plan = plan_text(
            items, strategies.text_encoder_outputs_caching, process_index=runtime.rank, num_processes=runtime.num_processes
        )
    in_step = any(trained) or not caches
    phase = TextPhase()
    encoders: list[torch.nn.Module | None] = []
    if in_step or encode_prompts is not None or plan.needs_model:
        encoders = load()
        with torch.no_grad(), runtime.autocast():
            if plan is not None and plan.needs_model:
                encode_text(
                    plan, strategies, encoders, batch_size=data.train.batch_size, show_progress=runtime.is_main_process
                )
            if encode_prompts is not None:
                phase.sample_conditioning = encode_prompts(encoders)
    runtime.barrier()
    if caches:
        finish_text(items, strategies.text_encoder_outputs_caching)
        # beside a cache only the encoders that learn run in the step
        phase.text_encoders = [e if i < len(trained) and trained[i] else None for i, e in enumerate(encoders)]
    else:
        phase.text_encoders = encoders
    return phase
