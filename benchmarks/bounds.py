"""The physical bound of a step: how long its multiplications and its reading of weights take at the rates at which this
machine multiplies and copies, measured in the same run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import contextmanager

import torch

SIDE = 1024
"""of the square matrices whose product is timed: large enough for the full rate, small enough to take milliseconds"""
COPIED = 64 << 20
"""bytes of the timed copy, beyond all caches"""


@contextmanager
def threads(number: int):
    """Inside, torch computes on so many threads: on one, the time of the processor is the time of the work."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def matmul_rate(
    device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, side: int = SIDE, repeats: int = 3,
    clock: Callable[[], float] = time.process_time, wait: Callable[[], object] = lambda: None,
) -> float:
    """FLOPs per second of a square product, the best of some. `wait` is called before the clock is read: it waits for
    the device where there is one."""
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in "ab")
    best = _best_of(lambda: torch.mm(a, b), repeats, clock, wait)
    return 2.0 * side**3 / best


def copy_rate(
    source: torch.Tensor, target: torch.Tensor, repeats: int = 3,
    clock: Callable[[], float] = time.process_time, wait: Callable[[], object] = lambda: None,
) -> float:
    """Bytes per second of a copy from one tensor into another, the best of some."""
    best = _best_of(lambda: target.copy_(source, non_blocking=True), repeats, clock, wait)
    return source.numel() * source.element_size() / best


def _best_of(
    work: Callable[[], object], repeats: int, clock: Callable[[], float], wait: Callable[[], object]
) -> float:
    work()
    seconds = []
    for _ in range(repeats):
        wait()
        started = clock()
        work()
        wait()
        seconds.append(clock() - started)
    return max(min(seconds), 1e-9)


def flops_of(work: Callable[[], object]) -> int:
    """Multiplications and additions of matrix products, convolutions and attention in one call, backward passes in it
    counted, as torch counts them from shapes."""
    from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # torch counts those of GPUs alone
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    of_cpu = {
        kernel: lambda *shapes, **_: sdpa_flop_count(*shapes[:3]),
        backward: lambda *shapes, **_: sdpa_backward_flop_count(*shapes[:4]),
    }
    with FlopCounterMode(display=False, custom_mapping=of_cpu) as counter:
        work()
    return counter.get_total_flops()


def bytes_of(parameters: Iterable[torch.nn.Parameter]) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)
