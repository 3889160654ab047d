"""Caching of text encoder outputs: which captions lack them, and encoding those in batches.

What is cached is the caption without its random parts (captions.deterministic_caption). Whole-caption dropout works
with a cache too: the outputs of the empty caption are encoded once and take the place of a dropped caption's when a
batch is made.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from library.core.errors import TrainingError, counted
from library.core.garbage import records_stay
from library.dataset import text_cache_io
from library.dataset.background import BackgroundWriter, map_in_threads
from library.dataset.cache_checks import cache_paths, check_cache_folders, check_caching
from library.dataset.cache_index import CacheIndex
from library.dataset.cache_io import source_of
from library.dataset.cache_pruning import listed_in
from library.dataset.cache_stores import text_store
from library.dataset.captions import deterministic_caption
from library.dataset.items import ImageItem
from library.dataset.strategies import Conditioning, StrategySet
from library.dataset.text_cache import TextCache, row_as_stored

if TYPE_CHECKING:
    from library.strategy_base import TokenizeStrategy

logger = logging.getLogger(__name__)

CHECK_THREADS = 8
EMPTY_CAPTION_FILE = "_empty_caption"  # stem of the file that holds the outputs of ""


@dataclass
class TextJob:
    """One caption and the items that have it; in disk mode `items` are those whose files lack it."""

    caption: str
    items: list[ImageItem] = field(default_factory=list)


@dataclass
class TextPlan:
    """What this process has to encode. `in_use`: file that is written -> hashes of all captions that the run keeps in
    it."""

    jobs: list[TextJob]
    in_use: dict[str, frozenset[str]]

    @property
    def items(self) -> list[ImageItem]:
        return [item for job in self.jobs for item in job.items]

    @property
    def needs_model(self) -> bool:
        return bool(self.jobs)


def cached_caption(item: ImageItem) -> str:
    """The text whose outputs stand for the item in a cache."""
    return deterministic_caption(item.caption, item.subset)


def may_drop_captions(item: ImageItem) -> bool:
    return item.subset.caption_dropout_rate > 0 or item.subset.caption_dropout_every_n_epochs > 0


def empty_caption_item(items: Sequence[ImageItem]) -> ImageItem | None:
    """A stand-in for the empty caption, with its file beside the first image that needs it; None when none does.

    `items` are those of training: validation drops nothing.
    """
    first = next((item for item in items if may_drop_captions(item)), None)
    if first is None:
        return None
    path = os.path.join(os.path.dirname(first.absolute_path), EMPTY_CAPTION_FILE + ".png")
    subset = type(first.subset)(cache_directory=first.subset.cache_directory)
    return ImageItem(
        image_key=EMPTY_CAPTION_FILE, absolute_path=path, caption="", subset=subset,
        image_size=first.image_size
    )


@records_stay()
def plan_text(
    items: Sequence[ImageItem], strategy: TextCache, *, process_index: int = 0, num_processes: int = 1,
    index: CacheIndex | None = None,
) -> TextPlan:
    """Find what is cached already and what this process has to encode; sets paths and suffixes of the items.

    On disk the files are divided among the processes; in memory every process encodes everything. Raises ConfigError
    when a folder cannot be written.
    """
    check_caching({id(item.subset): item.subset for item in items}.values(), latents=False, text=True)
    if not strategy.cache_to_disk:
        return TextPlan(_jobs_of(item for item in items if item.text_encoder_outputs is None), {})
    by_file = _name_files(items, strategy)
    mine = sorted(by_file)[process_index::num_processes]
    found = _find_all([by_file[path] for path in mine], strategy, index)
    missing, lacking = [item for item, _ in found], _one_each(found)
    wanted = sum(len({cached_caption(item) for item in by_file[path]}) for path in mine)
    reasons = Counter(reason for _, reason in lacking)
    logger.info(
        "text encoder outputs: %d captions cached, %d to encode%s", wanted - len(lacking), len(lacking), counted(reasons)
    )
    check_cache_folders((item.text_encoder_outputs_npz for item in missing), [item.subset for item in missing])
    written = {item.text_encoder_outputs_npz for item in missing}
    in_use = {path: frozenset(text_cache_io.caption_hash(cached_caption(i)) for i in by_file[path]) for path in written}
    return TextPlan(_jobs_of(missing), in_use)


def uncached_captions(
    items: Sequence[ImageItem], strategy: TextCache, index: CacheIndex | None = None
) -> list[tuple[ImageItem, str]]:
    """An item of each caption that no file on the disk has outputs of, with the reason: what `plan_text` would have
    encoded."""
    return _one_each(_find_all(list(_name_files(items, strategy).values()), strategy, index))


def _one_each(found: Sequence[tuple[ImageItem, str]]) -> list[tuple[ImageItem, str]]:
    """The first item of each caption of a file: clips of one video have one caption and one file."""
    first: dict[tuple[str, str], tuple[ImageItem, str]] = {}
    for item, reason in found:
        first.setdefault((item.text_encoder_outputs_npz, cached_caption(item)), (item, reason))
    return list(first.values())


def _name_files(items: Sequence[ImageItem], strategy: TextCache) -> dict[str, list[ImageItem]]:
    """Set `text_encoder_outputs_npz` of the items; the items of each file."""
    by_file: dict[str, list[ImageItem]] = {}
    for item, path in zip(items, cache_paths(items, strategy.path_of)):
        item.text_encoder_outputs_npz = path
        by_file.setdefault(path, []).append(item)
    return by_file


def _find_all(
    files: Sequence[Sequence[ImageItem]], strategy: TextCache, index: CacheIndex | None
) -> list[tuple[ImageItem, str]]:
    """`_find` for the items of many files."""
    find = strategy.find_with(index or CacheIndex())
    found = map_in_threads(lambda items: _find(items, find), files, num_threads=CHECK_THREADS)
    return [entry for entries in found for entry in entries]


def _find(
    items: Sequence[ImageItem], find: Callable[[str, str, bool], tuple[str | None, str]]
) -> list[tuple[ImageItem, str]]:
    """Set the suffix of those items of one file whose caption is there; return the others with the reason."""
    captions = [cached_caption(item) for item in items]
    different = dict.fromkeys(captions)
    path = items[0].text_encoder_outputs_npz
    found = {caption: find(path, caption, len(different) == 1) for caption in different}
    missing = []
    for item, caption in zip(items, captions):
        suffix, reason = found[caption]
        if suffix is None:
            missing.append((item, reason))
        else:
            item.text_encoder_outputs_suffix = suffix
    return missing


def _jobs_of(items) -> list[TextJob]:
    jobs: dict[str, TextJob] = {}
    for item in items:
        caption = cached_caption(item)
        jobs.setdefault(caption, TextJob(caption)).items.append(item)
    return list(jobs.values())


def encode_text(
    plan: TextPlan, strategies: StrategySet, text_encoders: list[torch.nn.Module | None], *, batch_size: int = 1,
    show_progress: bool = True
) -> None:
    """Encode the captions of a plan in batches and store them: files in the background, memory on the items.

    Raises TrainingError for outputs that are not finite, naming an image of the caption; nothing of that batch is
    written.
    """
    strategy = strategies.text_encoder_outputs_caching
    warn_overlong([job.caption for job in plan.jobs], strategies.tokenize)
    size = strategy.batch_size or batch_size
    bar = tqdm(total=len(plan.jobs), desc="caching text encoder outputs", unit="caption", disable=not show_progress)
    with bar, BackgroundWriter() as writer:
        for start in range(0, len(plan.jobs), size):
            jobs = plan.jobs[start : start + size]
            if strategy.stores_batches:
                _store_by_plugin(jobs, strategies, text_encoders)
                bar.update(len(jobs))
                continue
            outputs = strategy.encode(strategies, text_encoders, [job.caption for job in jobs])  # name -> [B, ...]
            writer.submit(_store_batch, strategy, jobs, outputs, plan.in_use)
            bar.update(len(jobs))


def _store_by_plugin(
    jobs: Sequence[TextJob], strategies: StrategySet, text_encoders: list[torch.nn.Module | None]
) -> None:
    """A batch goes to the `cache_batch_outputs` of a user's class, with every item of its captions. In memory it leaves
    lists."""
    strategy, items = strategies.text_encoder_outputs_caching, [item for job in jobs for item in job.items]
    strategy.cache_batch_outputs(strategies.tokenize, text_encoders, strategies.text_encoding, items)
    for item in items:
        if isinstance(item.text_encoder_outputs, (list, tuple)):
            outputs = [None if output is None else torch.as_tensor(output) for output in item.text_encoder_outputs]
            item.text_encoder_outputs = strategy.layout.named(outputs, type(strategy).__name__, has_batch=False)


def _store_batch(
    strategy: TextCache, jobs: Sequence[TextJob], batch: Conditioning, in_use: dict[str, frozenset[str]]
) -> None:
    """Fetch what was encoded ([B, ...] by name) from its device, in the dtypes of the cache, check all of it, and put
    it into files or on the items."""
    with torch.no_grad():
        store, results = text_store(strategy.architecture), []
        for index, job in enumerate(jobs):
            outputs = row_as_stored(batch, index, strategy.layout, keeps_bfloat16=store.keeps_bfloat16)
            _check_finite(outputs, job)
            results.append({name: output.clone() for name, output in outputs.items()})
    for job, outputs in zip(jobs, results):
        if strategy.cache_to_disk:
            _store_on_disk(strategy, job, outputs, in_use)
        else:
            for item in job.items:
                item.text_encoder_outputs = outputs


def _check_finite(outputs: Conditioning, job: TextJob) -> None:
    for name, output in outputs.items():
        if output.is_floating_point() and not torch.isfinite(output).all():
            raise TrainingError(
                f"{name} of the caption of {job.items[0].absolute_path} is not finite; run the text encoders in "
                "bfloat16"
                " or float32 (--mixed_precision)"
            )


def _store_on_disk(
    strategy: TextCache, job: TextJob, outputs: Conditioning, in_use: dict[str, frozenset[str]]
) -> None:
    store, record = text_store(strategy.architecture), strategy.record_of(job.caption)
    written: dict[str, str] = {}
    for item in job.items:
        path = item.text_encoder_outputs_npz
        if path not in written:
            source = {"source": source_of(path, item.absolute_path), "listed_in": listed_in(path, item.subset)}
            made_of = replace(record, **source) if store.keeps_source else record
            written[path] = store.save(
                path, strategy.architecture, strategy.layout, outputs, made_of, caption=job.caption,
                in_use=in_use.get(path, frozenset()),
            )
        item.text_encoder_outputs_suffix = written[path]


def finish_text(
    items: Sequence[ImageItem], strategy: TextCache, index: CacheIndex | None = None
) -> None:
    """After every process has encoded its part: look up what was written, by this process and by others."""
    if not strategy.cache_to_disk:
        return
    by_file: dict[str, list[ImageItem]] = {}
    for item in items:
        by_file.setdefault(item.text_encoder_outputs_npz, []).append(item)
    missing = _find_all(list(by_file.values()), strategy, index)
    if missing:
        item, reason = missing[0]
        raise TrainingError(
            f"{len(missing)} captions have no cached text encoder outputs, the first of {item.absolute_path} ({reason})"
        )


def warn_overlong(captions: Sequence[str], tokenize: TokenizeStrategy) -> int:
    """Count the captions that the tokenizers cut off; one warning for all. Returns the count."""
    overlong = getattr(tokenize, "overlong", None)
    cut = [caption for caption in dict.fromkeys(captions) if overlong is not None and overlong(caption)]
    if cut:
        logger.warning(
            "%d of %d captions are longer than the text encoders read and are cut off; the first begins: %.60s",
            len(cut), len(captions), cut[0],
        )
    return len(cut)


def warn_overlong_captions(items: Sequence[ImageItem], tokenize: TokenizeStrategy) -> int:
    """The same for the captions of items that are tokenized during training, without their random parts."""
    return warn_overlong([cached_caption(item) for item in items], tokenize)


def cache_one_batch(
    strategy: TextCache, strategies: StrategySet, models: list[torch.nn.Module | None], items: Sequence[ImageItem]
) -> None:
    """Encode and store exactly these items in one batch; their paths are set when they are not."""
    for item in items:
        if strategy.cache_to_disk and item.text_encoder_outputs_npz is None:
            item.text_encoder_outputs_npz = strategy.path_of(item)
    jobs = [TextJob(cached_caption(item), [item]) for item in items]
    _store_batch(strategy, jobs, strategy.encode(strategies, models, [job.caption for job in jobs]), {})
