"""Batches of a run: the epoch plan cut for this rank, loaded in order, from any point of an epoch on."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import multiprocessing
import os
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from traceback import format_exc
from types import TracebackType
from typing import TYPE_CHECKING

import torch

from library.core.errors import AtelierError, CheckpointError, ConfigError, TrainingError
from library.core.keyed_random import NOISE, StepDraws
from library.dataset.batch import Batch
from library.dataset.packed_batch import PackedBatch
from library.dataset.plan import BatchRequest, StepPlan, requests_of_epoch
from library.training.failures import failure_of
from library.training.option_groups import LoopOptions
from library.training.stopping import leave_signals_to_the_run

if TYPE_CHECKING:
    from library.training.protocols import BatchSource

logger = logging.getLogger(__name__)


class RequestSampler:
    """The requests that the loader hands to its workers; exchanged before each epoch."""

    def __init__(self) -> None:
        self.requests: Sequence[BatchRequest] = ()

    def __iter__(self) -> Iterator[BatchRequest]:
        return iter(self.requests)

    def __len__(self) -> int:
        return len(self.requests)


def leave_quietly(worker: int) -> None:
    """Start of a loader worker: when the run is interrupted, the thread that hands tensors over may find the other end
    gone, which the run itself tells in one word."""
    default = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        if not issubclass(kind, (ConnectionError, EOFError)):
            default(kind, error, traceback)

    sys.excepthook = hook
    leave_signals_to_the_run()


@dataclass(frozen=True)
class Loading:
    """How batches are read: by worker processes (0 = by this one), kept from epoch to epoch, into pinned memory."""

    num_workers: int = 0
    persistent_workers: bool = False
    pin_memory: bool = False


SPAWNED_WORKERS = 2
"""default where a worker begins as a new process, which imports torch anew: 8 of them take gigabytes and a minute at
each epoch"""


def loading_of(options: LoopOptions, given: Collection[str], pin_memory: bool) -> Loading:
    """How a run reads; `given` names the options that the user wrote. Linux forks workers, which costs nothing; Windows
    and macOS spawn them: two that stay are the default there."""
    number, stay = options.max_data_loader_n_workers, options.persistent_data_loader_workers
    if multiprocessing.get_start_method() != "fork":
        stay = True
        if "max_data_loader_n_workers" not in given:
            number = SPAWNED_WORKERS
    return Loading(min(number, os.cpu_count() or 1), stay, pin_memory)


@dataclass(frozen=True)
class Failure:
    """An error on its way from the process that loads to the run, without the traceback that torch would put into its
    text."""

    kind: type[AtelierError]
    message: str
    traceback: str

    @classmethod
    def of(cls, error: Exception) -> Failure:
        known = error if isinstance(error, AtelierError) else failure_of(error)
        told = known or TrainingError(f"a batch cannot be loaded: {type(error).__name__}: {error}")
        kind = next(c for c in (ConfigError, CheckpointError, TrainingError, AtelierError) if isinstance(told, c))
        return cls(kind, str(told), format_exc())

    def as_error(self) -> AtelierError:
        logger.debug("the way to this error\n%s", self.traceback)
        return self.kind(self.message)


def with_noise(batch: Batch | PackedBatch, seed: int) -> Batch | PackedBatch:
    """A training batch whose latents are cached, with the noise of its step: that of a clip takes a tenth of a second,
    which a worker has while the device computes."""
    if isinstance(batch, PackedBatch):
        return batch.with_parts(lambda part: with_noise(part, seed))
    if batch.latents is None or not batch.request.is_training:
        return batch
    draws = StepDraws(seed, batch.request.step, batch.request.positions)
    return dataclasses.replace(batch, noise=draws.normal(NOISE, batch.latents.shape[1:]))


class Guarded:
    """A dataset group whose errors are values. With `noise_seed` its batches have the noise of their steps."""

    def __init__(self, group: BatchSource, noise_seed: int | None = None) -> None:
        self.group = group
        self.noise_seed = noise_seed

    def __getitem__(self, request: BatchRequest) -> Batch | Failure:
        try:
            batch = self.group[request]
            return batch if self.noise_seed is None else with_noise(batch, self.noise_seed)
        except Exception as error:
            return Failure.of(error)

    def __len__(self) -> int:
        return len(self.group)


def _as_it_is(batch: Batch | Failure) -> Batch | Failure:
    """What a group gives is collated."""
    return batch


class BatchLoader:
    """Loads requests in their order. A dataset group takes requests for indices and is a pure function of them, so any
    worker may serve any request."""

    def __init__(self, group: BatchSource, loading: Loading, noise_seed: int | None = None) -> None:
        """`noise_seed`: that of the run's draws, where workers draw the noise of its steps."""
        self.sampler = RequestSampler()
        self.loader = torch.utils.data.DataLoader(
            Guarded(group, noise_seed if loading.num_workers else None),
            batch_size=None,
            sampler=self.sampler,
            num_workers=loading.num_workers,
            persistent_workers=loading.persistent_workers and loading.num_workers > 0,
            pin_memory=loading.pin_memory,
            collate_fn=_as_it_is,
            worker_init_fn=leave_quietly,
            # the loader's own draw for worker seeds must not touch the global generator
            generator=torch.Generator().manual_seed(0),
        )

    def load(self, requests: Sequence[BatchRequest]) -> Iterator[Batch]:
        self.sampler.requests = requests
        for batch in self.loader:
            if isinstance(batch, Failure):
                raise batch.as_error()
            yield batch


class TrainingData:
    """Training and validation batches of one rank.

    The plan of an epoch depends on (seed, epoch) and the number of processes only; `batches` starts at any optimizer
    step, so that a resumed run sees the rest of its epoch.
    """

    def __init__(
        self, train: BatchSource, validation: BatchSource | None, *, seed: int, accumulation: int, rank: int,
        num_processes: int, loading: Loading,
    ) -> None:
        self.train, self.validation = train, validation
        self.seed, self.accumulation = seed, accumulation
        self.rank, self.num_processes = rank, num_processes
        self._loader = BatchLoader(train, loading, noise_seed=seed)
        self._validation_loader = BatchLoader(validation, loading) if validation is not None else None
        plan = self._plan(1)
        self.steps_per_epoch = len(plan)
        self.batches_per_epoch = sum(len(step) for step in plan)
        self.samples_per_step = max((sum(len(batch.items) for batch in step) for step in plan), default=0)
        """of all processes and of any epoch, at most"""
        if (most := getattr(train, "most_samples", None)) is not None:
            self.samples_per_step = most * num_processes * accumulation

    def _plan(self, epoch: int) -> list[StepPlan]:
        return self.train.plan(epoch, self.seed, self.num_processes, self.accumulation)

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """This rank's batches of an epoch (from 1), from its optimizer step number `start` (from 0) on."""
        requests = requests_of_epoch(
            self._plan(epoch), epoch=epoch, first_step=(epoch - 1) * self.steps_per_epoch, rank=self.rank,
            num_processes=self.num_processes, start=start,
        )
        return self._loader.load(list(requests))

    @property
    def holds_out(self) -> bool:
        """There are images for validation."""
        return self.validation is not None

    def validation_batches(self, limit: int | None = None) -> Iterator[Batch]:
        """Validation batches in fixed order, at most `limit` global ones. Positions number the images through, so that
        an image keeps its noise whatever the batch size and the number of processes."""
        if self.validation is None:
            return iter(())
        plan = self.validation.plan(0, self.seed, self.num_processes)[:limit]
        offsets = [0, *itertools.accumulate(len(batch.items) for step in plan for batch in step)]
        requests = requests_of_epoch(
            plan, epoch=0, first_step=0, rank=self.rank, num_processes=self.num_processes, is_training=False
        )
        return self._validation_loader.load(
            [
                dataclasses.replace(request, step=0, positions=tuple(offset + p for p in request.positions))
                for offset, request in zip(offsets, requests)
            ]
        )
