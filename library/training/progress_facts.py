"""What there is to show of a run while it trains: where it stands, rate, time and memory, as numbers and as texts."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from library.core.memory_room import resident_memory

if TYPE_CHECKING:
    import torch

KEPT_OF_RATE = 0.9
"""share of the former rate in the next one"""
GIB = 2**30


class Meter:
    """Time, rate and memory of a run. The rate is a running mean, from which pauses (samples) are left out; the first
    reading, with all that is made at a first step, counts only until there is another. Nothing here waits for a device.

    `now`: a clock in seconds.
    """

    def __init__(self, device: torch.device | str, done: int, now: Callable[[], float] = time.monotonic) -> None:
        self._device, self._now = device, now
        self._step, self._readings = done, 0
        self._started = self._mark = now()
        self._paused_at: float | None = None
        self.seconds_per_step: float | None = None

    def put(self, step: int) -> None:
        """`step` steps are done now."""
        steps, now = step - self._step, self._now()
        if steps <= 0:
            return
        value = (now - self._mark) / steps
        self._readings += 1
        if self._readings > 2:
            value = KEPT_OF_RATE * self.seconds_per_step + (1 - KEPT_OF_RATE) * value
        self._step, self._mark, self.seconds_per_step = step, now, value

    def pause(self) -> None:
        self._paused_at = self._now()

    def go_on(self) -> None:
        if self._paused_at is not None:
            self._mark += self._now() - self._paused_at
            self._paused_at = None

    @property
    def elapsed(self) -> float:
        """Seconds since the first step of this process began."""
        return self._now() - self._started

    @property
    def steps_per_second(self) -> float | None:
        return 1 / self.seconds_per_step if self.seconds_per_step else None

    def remaining(self, steps: int) -> float | None:
        """Seconds that so many steps take."""
        return None if self.seconds_per_step is None else steps * self.seconds_per_step

    def memory(self) -> tuple[int, int | None] | None:
        """Bytes in use now, and the most so far where that is known: of the GPU, else of this process. None where
        nothing tells it."""
        import torch

        if torch.device(self._device).type == "cuda":
            return torch.cuda.memory_allocated(self._device), torch.cuda.max_memory_allocated(self._device)
        used = resident_memory()
        return None if used is None else (used, None)


@dataclass(frozen=True)
class Length:
    """How far a run goes, what it has done already and what it is called. `losses`: those of the steps done."""

    total: int
    done: int
    num_epochs: int
    name: str = ""
    losses: Sequence[float] = ()


@dataclass(frozen=True)
class Status:
    """A reading: the newest step and epoch (both count from 1), the losses of the steps that were read, the mean over
    an epoch, and what is logged of the newest step."""

    step: int
    epoch: int
    losses: Sequence[float]
    average: float
    logs: Mapping[str, float]


class Display(ABC):
    """Where a run stands, for who looks at it; on the main process only."""

    @abstractmethod
    def update(self, status: Status) -> None: ...

    @abstractmethod
    def show(self, texts: Mapping[str, str]) -> None:
        """Further short texts by name; they stay until they are replaced."""

    def close(self) -> None: ...

    def telling(self, directly: Callable[[str], object]) -> Callable[[str], object]:
        """How a signal handler says a line while this stands on the console; `directly` writes at once."""
        return directly


def rates_text(logs: Mapping[str, float]) -> str:
    """The learning rates of a step: one for all groups that have the same, with an optimizer's own step size in it
    where it has one."""
    rates = {name.removeprefix("lr/"): value for name, value in logs.items() if name.startswith("lr/")}
    own = {name.removeprefix("d*lr/"): value for name, value in rates.items() if name.startswith("d*lr/")}
    rates = {name: own.get(name, value) for name, value in rates.items() if not name.startswith("d*lr/")}
    if len(set(rates.values())) <= 1:
        return "".join(f"lr {value:.3g}" for value in list(rates.values())[:1])
    return "lr " + " ".join(f"{name} {value:.3g}" for name, value in rates.items())


def time_texts(meter: Meter, steps_left: int) -> list[str]:
    """Rate, time, time that is left and memory, each where it is known."""
    texts, rate = [], meter.steps_per_second
    if rate is not None:
        texts.append(f"{rate:.2f} steps/s" if rate >= 1 else f"{1 / rate:.2f} s/step")
    texts.append(f"{clock(meter.elapsed)} elapsed")
    left = meter.remaining(steps_left)
    if left is not None and steps_left > 0:
        texts.append(f"{clock(left)} left")
    memory = meter.memory()
    if memory is not None:
        used, most = memory
        texts.append(f"{used / GIB:.1f} GiB" + (f" (most {most / GIB:.1f})" if most is not None else ""))
    return texts


def clock(seconds: float) -> str:
    """h:mm:ss"""
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
