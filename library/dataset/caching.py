"""Caching of latents: which images lack them, and a pipeline that decodes, encodes and writes at the same time.

Decoding runs in threads with a bounded backlog, and one more thread makes tensors of the batches of one bucket; the
caller's thread does nothing but encode, and what comes out is fetched from the device, checked and written by one
background thread. A file appears complete or not at all, so an interrupted run leaves what it finished and the next one
goes on from there.
"""

from __future__ import annotations

import functools
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch
from tqdm import tqdm

from library.core.errors import ConfigError, TrainingError, counted
from library.core.garbage import records_stay
from library.dataset.background import BackgroundWriter, map_ahead, map_in_threads
from library.dataset.cache_checks import cache_paths, check_cache_folders, check_caching
from library.dataset.cache_index import CacheIndex
from library.dataset.cache_io import ImageIdentity, LatentArrays
from library.dataset.items import ImageItem
from library.dataset.latent_cache import LatentCache, LatentEncoder, condition_paths, float32_if_floats, seed_of
from library.dataset.media_utils import ImageFileError
from library.dataset.samples import Geometry, Pixels, image_tensor, picture_tensors, read_pictures, read_pixels

logger = logging.getLogger(__name__)

CHECK_THREADS = 8
MOST_BYTES_AHEAD = 1 << 30
"""of pixels that wait to be encoded"""


@dataclass
class LatentsJob:
    """One image at one size. Several items share it when datasets use the same image at the same size."""

    items: list[ImageItem] = field(default_factory=list)
    flip_aug: bool = False
    alpha_mask: bool = False

    @property
    def item(self) -> ImageItem:
        return self.items[0]

    def add(self, item: ImageItem) -> None:
        self.items.append(item)
        self.flip_aug |= item.subset.flip_aug
        self.alpha_mask |= item.subset.alpha_mask

    @property
    def batch_key(self) -> tuple:
        return (*self.item.bucket, self.flip_aug, self.alpha_mask)


@dataclass
class Decoded:
    """A job with its pixels and the identity of the file they came from."""

    job: LatentsJob
    pixels: Pixels
    identity: ImageIdentity
    pictures: dict[str, np.ndarray] = field(default_factory=dict)
    """of conditions that the family encodes, as `samples.read_pictures` gives them"""

    @property
    def batch_key(self) -> tuple:
        return self.job.batch_key


@dataclass
class Inputs:
    """What an encoder takes of a batch."""

    images: torch.Tensor  # [B, 3, H, W] or [B, 3, F, H, W]
    pictures: dict[str, torch.Tensor]  # [B, 3 or 1, ..., h, w]
    seeds: list[int]

    def pinned(self) -> Inputs:
        """In memory that a GPU fetches while the encoder runs."""
        pictures = {name: tensor.pin_memory() for name, tensor in self.pictures.items()}
        return Inputs(self.images.pin_memory(), pictures, self.seeds)


@dataclass
class Outputs:
    """What an encoder gave of a batch: on the CPU, once `arrived`."""

    latents: torch.Tensor  # [B, C, h, w] or [B, C, F, h, w]
    conditions: dict[str, torch.Tensor]
    arrived: Callable[[], None]


T = TypeVar("T", LatentsJob, Decoded)


@dataclass
class Encoded:
    """Results of one job, on the CPU, in the number formats that the encoder gives."""

    latents: torch.Tensor  # [C, h, w] or [C, F, h, w]
    conditions: dict[str, torch.Tensor]
    flipped: torch.Tensor | None
    conditions_flipped: dict[str, torch.Tensor]


# ---- what is missing -------------------------------------------------------------------------------------------------

@records_stay()
def plan_latents(
    items: Iterable[ImageItem], strategy: LatentCache, *, process_index: int = 0, num_processes: int = 1,
    index: CacheIndex | None = None,
) -> list[LatentsJob]:
    """The jobs that this process has to encode, sorted by bucket size; sets `latents_npz` of the items. `index` knows
    files that were found right before.

    On disk the files are divided among the processes; in memory every process encodes everything. Raises ConfigError
    when one image would be needed in two ways under one key, or a folder cannot be written.
    """
    items = list(items)
    strategy.check_pictures(items)
    check_caching({id(item.subset): item.subset for item in items}.values(), latents=True, text=False)
    if not strategy.cache_to_disk:
        return _sorted(_jobs_of((item for item in items if item.latents is None), strategy))
    _name_files(items, strategy)
    if problems := _conflicts(items, strategy):
        raise ConfigError(problems)
    files = sorted({item.latents_npz for item in items})
    mine = set(files[process_index::num_processes])
    jobs = [job for job in _jobs_of(items, strategy) if job.item.latents_npz in mine]
    reasons = check_jobs(jobs, strategy, index)
    missing = [job for job, reason in zip(jobs, reasons) if reason is not None]
    counts = Counter(reason for reason in reasons if reason is not None)
    logger.info(
        "latents: %d %ss cached, %d to encode%s", len(jobs) - len(missing), _word(jobs), len(missing), counted(counts)
    )
    subsets = [item.subset for job in missing for item in job.items]
    check_cache_folders((job.item.latents_npz for job in missing), subsets)
    return _sorted(missing)


def uncached_latents(
    items: Iterable[ImageItem], strategy: LatentCache, index: CacheIndex | None = None
) -> list[tuple[ImageItem, str]]:
    """Items whose latents no file on the disk holds, with the reason: what `plan_latents` would have encoded."""
    items = list(items)
    _name_files(items, strategy)
    jobs = _jobs_of(items, strategy)
    return [(job.item, reason) for job, reason in zip(jobs, check_jobs(jobs, strategy, index)) if reason is not None]


def _name_files(items: Sequence[ImageItem], strategy: LatentCache) -> None:
    """Set `latents_npz` of the items."""
    for item, path in zip(items, cache_paths(items, strategy.path_of)):
        known = strategy.known_path_of(item)
        item.latents_npz = known if known and os.path.exists(known) and not os.path.exists(path) else path


def check_jobs(jobs: Sequence[LatentsJob], strategy: LatentCache, index: CacheIndex | None) -> list[str | None]:
    """Why the cache file of each job cannot be used, None where it can."""
    problem_of = strategy.problem_with(index or CacheIndex())
    return map_in_threads(
        lambda job: problem_of(job.items[0], job.flip_aug, job.alpha_mask), jobs, num_threads=CHECK_THREADS
    )


def _jobs_of(items: Iterable[ImageItem], strategy: LatentCache) -> list[LatentsJob]:
    jobs: dict[tuple, LatentsJob] = {}
    for item in items:
        bucket = item.bucket
        beside = tuple(condition_paths(item, strategy.encoder.pictures_for(bucket)).values())
        key = (
            item.absolute_path, item.clip, bucket, item.resized_size, item.subset.resize_interpolation,
            item.subset.cache_directory, beside,
        )  # fmt: skip
        jobs.setdefault(key, LatentsJob()).add(item)
    return list(jobs.values())


def _word(jobs: Iterable[LatentsJob]) -> str:
    """What the jobs encode: images, clips, or samples of both kinds."""
    has_clips = {job.item.clip is not None for job in jobs}
    return "sample" if len(has_clips) > 1 else "clip" if True in has_clips else "image"


def _sorted(jobs: Iterable[LatentsJob]) -> list[LatentsJob]:
    return sorted(jobs, key=lambda job: (job.batch_key, job.item.absolute_path))


def _conflicts(items: Iterable[ImageItem], strategy: LatentCache) -> list[str]:
    """Images that two subsets want at one size with different resampling, or with different pictures that the family
    caches with them, or at two sizes or rates where a file has one: a file has room for one."""
    wanted: dict[tuple, ImageItem] = {}
    problems, has_one_size = [], strategy.store.has_one_size
    for item in items:
        place = (item.latents_npz,) if has_one_size else (item.latents_npz, item.bucket)
        other = wanted.setdefault(place, item)
        if other is item:
            continue
        if (other.bucket, other.clip) != (item.bucket, item.clip):
            problems.append(
                f"{item.absolute_path} is used at {_words(other)} ({other.subset.label}) and at {_words(item)}"
                f" ({item.subset.label}); its cache file {item.latents_npz} has room for one of them: give each"
                " dataset a cache_directory of its own"
            )
        elif other.subset.resize_interpolation != item.subset.resize_interpolation:
            problems.append(
                f"{item.absolute_path} is used at {'x'.join(map(str, item.bucket.key))} with resize_interpolation"
                f" {other.subset.resize_interpolation} ({other.subset.label}) and {item.subset.resize_interpolation}"
                f" ({item.subset.label}); its cache file has room for one of them"
            )
        elif _beside(other, strategy) != _beside(item, strategy):
            problems.append(
                f"{item.absolute_path} is used at {'x'.join(map(str, item.bucket.key))} with"
                f" {', '.join(strategy.encoder.pictures_for(item.bucket))} of {other.subset.label} and of"
                f" {item.subset.label}; its cache file has room for one of them"
            )
    return problems


def _beside(item: ImageItem, strategy: LatentCache) -> dict[str, str]:
    return condition_paths(item, strategy.encoder.pictures_for(item.bucket))


def _words(item: ImageItem) -> str:
    """Size, and what is taken of a video."""
    size = "x".join(map(str, item.bucket.key))
    return size if item.clip is None else f"{size} ({item.clip.words})"


# ---- the pipeline ----------------------------------------------------------------------------------------------------

def encode_latents(
    jobs: Sequence[LatentsJob],
    strategy: LatentCache,
    vae: torch.nn.Module,
    *,
    num_threads: int | None = None,
    skip_bad_images: bool = False,
    show_progress: bool = True,
    parts: Mapping[str, torch.nn.Module] | None = None,
) -> list[ImageItem]:
    """Encode the jobs and store the results: files in the background, memory on the items. The VAE, and the `parts`
    that the family has beside it, run where they are, in their own dtype.

    Images that cannot be decoded do not stop the others: their items are returned with `skip_bad_images`, else one
    ConfigError names them all in the end. Raises TrainingError for latents that are not finite, and writes none of
    those.
    """
    if strategy.stores_batches:
        _store_by_plugin(jobs, strategy, vae, show_progress)
        return []
    bad: list[tuple[LatentsJob, BaseException]] = []
    threads = num_threads or min(os.cpu_count() or 1, 8)
    bar = tqdm(total=len(jobs), desc="caching latents", unit=_word(jobs), disable=not show_progress)
    is_on_gpu = next(vae.parameters()).device.type == "cuda"
    prepare = functools.partial(inputs_of, pinned=is_on_gpu)
    batches = _batches(_decoded(jobs, threads, strategy, bad), strategy.batch_size)
    with bar, BackgroundWriter() as writer:
        for batch, inputs in map_ahead(prepare, batches, num_threads=1, ahead=1):
            if isinstance(inputs, BaseException):
                raise inputs
            outputs = [run_encoder(strategy, vae, batch, each, parts) for each in inputs]
            writer.submit(_store_batch, strategy, vae, batch, outputs)
            bar.update(len(batch))
    if bad and not skip_bad_images:
        raise ConfigError(
            [f"{error}; repair or remove it, or go on without it with --skip_bad_images" for _, error in bad]
        )
    for _, error in bad:
        logger.warning("%s; the image is left out", error)
    return [item for job, _ in bad for item in job.items]


def _store_by_plugin(
    jobs: Sequence[LatentsJob], strategy: LatentCache, vae: torch.nn.Module, show_progress: bool
) -> None:
    """Batches go to the `cache_batch_latents` of a user's class, with every item of their images."""
    for batch in tqdm(
        list(_batches(jobs, strategy.batch_size)), desc="caching latents", unit="batch", disable=not show_progress
    ):
        items = [item for job in batch for item in job.items]
        strategy.cache_batch_latents(vae, items, batch[0].flip_aug, batch[0].alpha_mask, False)


def _decoded(jobs: Sequence[LatentsJob], threads: int, strategy: LatentCache, bad: list) -> Iterator[Decoded]:
    read = functools.partial(decode, encoder=strategy.encoder)
    ahead = _backlog(jobs, max(threads, strategy.batch_size) * 2)
    for job, result in map_ahead(read, jobs, num_threads=min(threads, ahead), ahead=ahead):
        if isinstance(result, ImageFileError):
            bad.append((job, result))
        elif isinstance(result, BaseException):
            raise result
        else:
            yield result


def _backlog(jobs: Sequence[LatentsJob], most: int) -> int:
    """How many samples are decoded ahead: clips are large."""
    buckets = [job.item.bucket for job in jobs]
    largest = max((3 * bucket.width * bucket.height * bucket.frames for bucket in buckets), default=1)
    return max(1, min(most, MOST_BYTES_AHEAD // largest))


def decode(job: LatentsJob, encoder: LatentEncoder | None = None) -> Decoded:
    """With the pictures that the encoder reads beside the image."""
    names = () if encoder is None else encoder.pictures_for(job.item.bucket)
    identity, geometry = ImageIdentity.of(job.item.absolute_path, with_content=True), Geometry.centred(job.item)
    pixels = read_pixels(job.item, geometry, with_alpha=job.alpha_mask)
    return Decoded(job, pixels, identity, read_pictures(job.item, geometry, names) if names else {})


def _batches(entries: Iterable[T], size: int) -> Iterator[list[T]]:
    """Consecutive jobs of one bucket and one set of needs, at most `size`."""
    batch: list[T] = []
    for entry in entries:
        if batch and (len(batch) == size or batch[0].batch_key != entry.batch_key):
            yield batch
            batch = []
        batch.append(entry)
    if batch:
        yield batch


def inputs_of(batch: Sequence[Decoded], pinned: bool = False) -> list[Inputs]:
    """Of decoded images of one size what the encoder takes: once, or with flip_aug a second time mirrored."""
    ways = (False, True) if batch[0].job.flip_aug else (False,)
    inputs = [_inputs(batch, is_flipped) for is_flipped in ways]
    return [each.pinned() for each in inputs] if pinned else inputs


def _inputs(batch: Sequence[Decoded], is_flipped: bool) -> Inputs:
    images = torch.stack([image_tensor(entry.pixels.image, is_flipped) for entry in batch])
    rows = [picture_tensors(entry.pictures, is_flipped) for entry in batch]
    pictures = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    return Inputs(images, pictures, [seed_of(entry.job.item, entry.identity.content, is_flipped) for entry in batch])


def run_encoder(
    strategy: LatentCache, vae: torch.nn.Module, batch: Sequence[Decoded], inputs: Inputs,
    parts: Mapping[str, torch.nn.Module] | None = None,
) -> Outputs:
    """Latents and conditions of a batch. A GPU is only told what to do: it encodes the next batch while this one comes
    back."""
    facts = [entry.job.item.facts for entry in batch]
    latents, conditions = strategy.encode_as_made(
        vae, parts or {}, inputs.images, inputs.seeds, inputs.pictures, facts
    )
    if latents.device.type != "cuda":
        return Outputs(latents.cpu(), {name: tensor.cpu() for name, tensor in conditions.items()}, lambda: None)
    host = Outputs(_to_pinned(latents), {name: _to_pinned(tensor) for name, tensor in conditions.items()}, lambda: None)
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(latents.device))
    host.arrived = copied.synchronize
    return host


def _to_pinned(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in main memory, complete when the device has come so far."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


def _store_batch(
    strategy: LatentCache, vae: torch.nn.Module, batch: Sequence[Decoded], outputs: Sequence[Outputs]
) -> None:
    """Wait for what was encoded, check it, and put it into files or on the items."""
    for decoded, encoded in zip(batch, encoded_of(strategy, vae, batch, outputs)):
        if strategy.cache_to_disk:
            _store_on_disk(strategy, decoded, encoded)
        else:
            _store_in_memory(strategy, decoded, encoded)


def encoded_of(
    strategy: LatentCache, vae: torch.nn.Module, batch: Sequence[Decoded], outputs: Sequence[Outputs]
) -> list[Encoded]:
    """The results of each job, from those of the images and, with flip_aug, of the mirrored ones. Raises TrainingError
    naming the images for which they are not finite."""
    for each in outputs:
        each.arrived()
        _check_finite(strategy, vae, batch, each)
    plain, mirrored = outputs[0], outputs[1] if len(outputs) > 1 else None
    return [
        Encoded(
            plain.latents[i].clone(), _row(plain.conditions, i),
            None if mirrored is None else mirrored.latents[i].clone(),
            {} if mirrored is None else _row(mirrored.conditions, i),
        )
        for i in range(len(batch))
    ]


def _row(tensors: Mapping[str, torch.Tensor], i: int) -> dict[str, torch.Tensor]:
    return {name: tensor[i].clone() for name, tensor in tensors.items()}


def _check_finite(strategy: LatentCache, vae: torch.nn.Module, batch: Sequence[Decoded], outputs: Outputs) -> None:
    most_nan = strategy.store.most_nan if strategy.cache_to_disk else 0.0  # which only files turn into 0
    tensors = (outputs.latents, *outputs.conditions.values())
    finite = torch.stack([_is_usable(tensor.flatten(1), most_nan) for tensor in tensors]).all(dim=0)
    if not finite.all():
        names = ", ".join(entry.job.item.absolute_path for entry, good in zip(batch, finite.tolist()) if not good)
        raise TrainingError(
            f"the VAE, running in {str(next(vae.parameters()).dtype).removeprefix('torch.')}, gave latents that are "
            f"not finite for {names};"
            " nothing was cached for them. Run the VAE in float32 (--no_half_vae) or bfloat16"
        )


def _is_usable(rows: torch.Tensor, most_nan: float) -> torch.Tensor:
    """Of each row [B, N], whether it is finite but for so small a part of NaN."""
    is_nan = torch.isnan(rows)
    return (is_nan | torch.isfinite(rows)).all(dim=1) & (is_nan.sum(dim=1) <= most_nan * rows.shape[1])


def _store_on_disk(strategy: LatentCache, decoded: Decoded, encoded: Encoded) -> None:
    item = decoded.job.item
    arrays = LatentArrays(
        latents=encoded.latents, original_size=item.image_size, crop_ltrb=Geometry.centred(item).crop_ltrb,
        latents_flipped=encoded.flipped, alpha_mask=strategy.learned_mask(item, decoded.pixels.alpha_mask),
        conditions=encoded.conditions, conditions_flipped=encoded.conditions_flipped,
    )
    paths = condition_paths(item, decoded.pictures)
    pictures = {name: ImageIdentity.of(path, with_content=True) for name, path in paths.items()}
    record = strategy.record_of(item, decoded.identity, pictures)
    strategy.store.save(item.latents_npz, strategy.architecture, item.bucket, arrays, record)


def _store_in_memory(strategy: LatentCache, decoded: Decoded, encoded: Encoded) -> None:
    mask = strategy.learned_mask(decoded.job.item, decoded.pixels.alpha_mask)
    for item in decoded.job.items:
        item.latents = encoded.latents.float()
        item.latents_flipped = None if encoded.flipped is None else encoded.flipped.float()
        item.conditions = _float32(encoded.conditions)
        item.conditions_flipped = _float32(encoded.conditions_flipped)
        item.latents_original_size = item.image_size
        item.latents_crop_ltrb = Geometry.centred(item).crop_ltrb
        item.alpha_mask = None if mask is None else torch.from_numpy(mask)


def _float32(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor] | None:
    return {name: float32_if_floats(tensor) for name, tensor in tensors.items()} or None


def unusable_items(
    items: Iterable[ImageItem], strategy: LatentCache, index: CacheIndex | None = None
) -> list[ImageItem]:
    """After all processes have encoded their part: items that still have no latents, the same list on every process."""
    if not strategy.cache_to_disk:
        return [item for item in items if item.latents is None]
    jobs = _jobs_of(items, strategy)
    return [
        item for job, reason in zip(jobs, check_jobs(jobs, strategy, index)) if reason is not None for item in job.items
    ]


def cache_one_batch(
    strategy: LatentCache, vae: torch.nn.Module, items: Sequence[ImageItem], *, flip_aug: bool, alpha_mask: bool
) -> None:
    """Decode, encode and store exactly these items, which have one bucket size."""
    batch = []
    for item in items:
        if strategy.cache_to_disk and item.latents_npz is None:
            item.latents_npz = strategy.path_of(item)
        batch.append(decode(LatentsJob([item], flip_aug, alpha_mask)))
    _store_batch(strategy, vae, batch, [run_encoder(strategy, vae, batch, inputs) for inputs in inputs_of(batch)])
