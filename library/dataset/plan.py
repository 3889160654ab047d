"""The order of an epoch: a pure function of (seed, epoch), made for the global batch and cut for the ranks.

An optimizer step trains one *group* of `accumulation` micro-batches. A micro-batch is global: batch_size * processes
samples of one bucket, of which each rank loads its slice, or a pack for each rank. Positions number the samples of a group through, so that two
processes, or two accumulated micro-batches, draw the same noise as one process with twice the batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from library.core.keyed_random import keyed_random


@dataclass(frozen=True)
class BatchRequest:
    """What one rank loads for one micro-batch. An empty `items` is legal: the rank only joins the gradient
    reduction."""

    dataset: int
    """index of the dataset in its group"""
    items: tuple[int, ...]
    """indices into the dataset's `items`"""
    positions: tuple[int, ...]
    """place of each sample in the global batch of the optimizer step"""
    epoch: int
    """counted from 1"""
    step: int
    """optimizer steps done before this one (the global step, from 0)"""
    index: int
    """number of this micro-batch within its epoch, from 0"""
    group_size: int
    """samples of all ranks and micro-batches of this optimizer step"""
    is_last_of_group: bool
    is_last_of_epoch: bool
    is_training: bool = True


@dataclass(frozen=True)
class BucketList:
    """The samples of one bucket: item indices with repeats. `batch_size` is per process, `bucket` the key of a
    Bucket."""

    dataset: int
    bucket: tuple[int, ...]
    samples: tuple[int, ...]
    batch_size: int


class GlobalBatch(NamedTuple):
    """One micro-batch of all ranks."""

    dataset: int
    """its index"""
    items: tuple[int, ...]
    sizes: tuple[int, ...] = ()
    """samples of each rank, where these are packs; else they have even shares"""

    def of_rank(self, rank: int, num_processes: int) -> slice:
        """The part of the items that belongs to a rank."""
        if not self.sizes:
            return rank_slice(len(self.items), rank, num_processes)
        start = sum(self.sizes[:rank])
        return slice(start, start + (self.sizes[rank] if rank < len(self.sizes) else 0))


StepPlan = tuple[GlobalBatch, ...]
"""the micro-batches of one optimizer step"""


def plan_epoch(
    buckets: Sequence[BucketList], *, seed: int, epoch: int, num_processes: int, accumulation: int = 1,
    shuffle: bool = True
) -> list[StepPlan]:
    """The optimizer steps of an epoch. No micro-batch mixes buckets, the last of a bucket may be short, nothing is
    dropped.

    A step takes its `accumulation` micro-batches from one bucket as long as that can fill them, exactly the samples
    that one batch of `accumulation` times the size would have; what is left over in the buckets is gathered into steps
    that may mix buckets, the last of them short. The number of steps is that of cutting the list of micro-batches.
    """
    steps: list[StepPlan] = []
    left_over: list[GlobalBatch] = []
    for bucket in buckets:
        samples = list(bucket.samples)
        if shuffle:
            keyed_random(seed, "order of a bucket", epoch, bucket.dataset, *bucket.bucket).shuffle(samples)
        size = bucket.batch_size * num_processes
        batches = [GlobalBatch(bucket.dataset, tuple(samples[i : i + size])) for i in range(0, len(samples), size)]
        whole, rest = _in_steps(batches, accumulation)
        steps += whole
        left_over += rest
    steps += [tuple(left_over[i : i + accumulation]) for i in range(0, len(left_over), accumulation)]
    if shuffle:
        keyed_random(seed, "order of steps", epoch).shuffle(steps)
    return steps


def plan_packs(
    packs: Sequence[tuple[int, Sequence[tuple[int, ...]]]], *, seed: int, epoch: int, num_processes: int,
    accumulation: int = 1,
) -> list[StepPlan]:
    """The optimizer steps of an epoch of packs, (index of the dataset, its packs) each. Every rank gets a pack; else as
    `plan_epoch`."""
    steps: list[StepPlan] = []
    left_over: list[GlobalBatch] = []
    for dataset, made in packs:
        groups = [made[i : i + num_processes] for i in range(0, len(made), num_processes)]
        batches = [
            GlobalBatch(dataset, tuple(item for pack in group for item in pack), tuple(len(pack) for pack in group))
            for group in groups
        ]
        whole, rest = _in_steps(batches, accumulation)
        steps += whole
        left_over += rest
    steps += [tuple(left_over[i : i + accumulation]) for i in range(0, len(left_over), accumulation)]
    keyed_random(seed, "order of steps", epoch).shuffle(steps)
    return steps


def _in_steps(batches: Sequence[GlobalBatch], accumulation: int) -> tuple[list[StepPlan], Sequence[GlobalBatch]]:
    """(complete optimizer steps, the micro-batches that are left over)"""
    full = len(batches) - len(batches) % accumulation
    return [tuple(batches[i : i + accumulation]) for i in range(0, full, accumulation)], batches[full:]


def rank_slice(count: int, rank: int, num_processes: int) -> slice:
    """The part of `count` samples that belongs to a rank; sizes differ by at most one."""
    base, extra = divmod(count, num_processes)
    start = rank * base + min(rank, extra)
    return slice(start, start + base + (rank < extra))


def requests_of_epoch(
    steps: Sequence[StepPlan],
    *,
    epoch: int,
    first_step: int,
    rank: int,
    num_processes: int,
    start: int = 0,
    is_training: bool = True,
) -> Iterator[BatchRequest]:
    """This rank's requests of an epoch from its optimizer step number `start` on. `first_step` is the global step of
    the epoch's first."""
    index = sum(len(step) for step in steps[:start])
    last_index = sum(len(step) for step in steps) - 1
    for number, step in enumerate(steps[start:], start):
        group_size = sum(len(batch.items) for batch in step)
        offset = 0
        for k, batch in enumerate(step):
            part = batch.of_rank(rank, num_processes)
            yield BatchRequest(
                dataset=batch.dataset,
                items=batch.items[part],
                positions=tuple(range(offset + part.start, offset + part.stop)),
                epoch=epoch,
                step=first_step + number,
                index=index,
                group_size=group_size,
                is_last_of_group=k == len(step) - 1,
                is_last_of_epoch=index == last_index,
                is_training=is_training,
            )
            offset += len(batch.items)
            index += 1
