"""Filling the caches of a run: what trainers and the tools call between reading the data set and loading the
denoiser."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Protocol

from library.dataset.cache_index import CacheIndex
from library.dataset.caching import check_jobs, encode_latents, plan_latents, uncached_latents, unusable_items
from library.dataset.dataset import DatasetGroup
from library.dataset.items import ImageItem
from library.dataset.strategies import StrategySet
from library.dataset.text_caching import empty_caption_item, encode_text, finish_text, plan_text, uncached_captions

if TYPE_CHECKING:
    from torch.nn import Module


class Processes(Protocol):
    """What is needed of a Runtime: which process this is, and waiting for the others."""

    rank: int
    num_processes: int

    def barrier(self) -> None: ...


def fill_latent_cache(
    groups: list[DatasetGroup],
    strategies: StrategySet,
    load_vae: Callable[[], Module],
    processes: Processes,
    *,
    num_threads: int | None = None,
    skip_bad_images: bool = False,
    index: CacheIndex | None = None,
    load_parts: Callable[[], Mapping[str, Module]] = dict,
) -> int:
    """Give every image of the groups (training and validation) its latents, in memory or on disk.

    The VAE, and what `load_parts` gives beside it, are loaded only when this process has something to encode, and
    released. Images that cannot be decoded are an error naming all of them, or leave their groups with
    `skip_bad_images`. `index` may be that of the other caches of the run, so that it is read once. Returns the number
    of images encoded here.
    """
    strategy = strategies.latents_caching
    items = [item for group in groups for item in group.items]
    index = index or CacheIndex()
    jobs = plan_latents(
        items, strategy, process_index=processes.rank, num_processes=processes.num_processes, index=index
    )
    bad: list[ImageItem] = []
    if jobs:
        vae, parts = load_vae(), load_parts()
        bad = encode_latents(
            jobs, strategy, vae, num_threads=num_threads, skip_bad_images=skip_bad_images,
            show_progress=processes.rank == 0, parts=parts
        )
        del vae, parts
    processes.barrier()
    if skip_bad_images and processes.num_processes > 1:  # other processes may have found bad images among theirs
        bad = unusable_items(items, strategy, index)
    if strategy.cache_to_disk:
        check_jobs(jobs, strategy, index)  # what was just written is noted as it lies on the disk
        _save_in_turn(index, processes)
    for group in groups:
        group.drop(bad)
        group.share_memory()
    return len(jobs)


def _save_in_turn(index: CacheIndex, processes: Processes) -> None:
    """One process after the other, so that none overwrites what another has noted."""
    for rank in range(processes.num_processes):
        if rank == processes.rank:
            index.save()
        processes.barrier()


def uncached(
    groups: list[DatasetGroup], strategies: StrategySet, index: CacheIndex | None = None
) -> dict[str, list[tuple[ImageItem, str]]]:
    """What the caches on the disk lack for the groups, without loading or writing anything: "vae" or "text_encoders", the
    part that would have to make it -> items, with the reason why their files cannot be used."""
    index = index or CacheIndex()
    latents, text = strategies.latents_caching, strategies.text_encoder_outputs_caching
    found = {}
    if latents is not None and latents.cache_to_disk:
        found["vae"] = uncached_latents([item for group in groups for item in group.items], latents, index)
    if text is not None and text.cache_to_disk:
        found["text_encoders"] = uncached_captions(_captions_of(groups)[0], text, index)
    return {part: items for part, items in found.items() if items}


def _captions_of(groups: list[DatasetGroup]) -> tuple[list[ImageItem], ImageItem | None]:
    """(all items of the groups with, where captions may be dropped, a stand-in for the empty one; that stand-in)."""
    items = [item for group in groups for item in group.items]
    empty = empty_caption_item([item for group in groups if group.is_training for item in group.items])
    return items if empty is None else [*items, empty], empty


def fill_text_cache(
    groups: list[DatasetGroup],
    strategies: StrategySet,
    load_text_encoders: Callable[[], list[Module | None]],
    processes: Processes,
    *,
    index: CacheIndex | None = None,
) -> int:
    """Give every caption of the groups its text encoder outputs, and the empty caption where captions may be dropped.

    `load_text_encoders` is called only when this process has something to encode; whoever wants to keep the encoders
    keeps them. `index`: see fill_latent_cache. Returns the number of captions encoded here.
    """
    strategy = strategies.text_encoder_outputs_caching
    everything, empty = _captions_of(groups)
    index = index or CacheIndex()
    plan = plan_text(
        everything, strategy, process_index=processes.rank, num_processes=processes.num_processes, index=index
    )
    if plan.needs_model:
        batch_size = max((group.batch_size for group in groups), default=1)
        encode_text(plan, strategies, load_text_encoders(), batch_size=batch_size, show_progress=processes.rank == 0)
    processes.barrier()
    if strategy.cache_to_disk:
        finish_text(everything if processes.num_processes > 1 else plan.items, strategy, index)
        _save_in_turn(index, processes)
    if empty is not None:
        empty.text_encoder_outputs = strategy.outputs_of(empty)
    for group in groups:
        group.set_strategies(strategies)
        group.set_empty_caption(empty)
        group.share_memory()
    return len(plan.jobs)
