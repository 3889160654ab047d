"""`--vram_budget` and `--blocks_to_swap auto`: which options make a run fit, the ones first that cost least and change
nothing of its result."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from library.core.errors import ConfigError
from library.core.options import AUTO, Config
from library.training.computing_options import MemoryOptions, PrecisionOptions

if TYPE_CHECKING:
    from library.training.memory.measure import Sizes
    from library.training.memory.plan import MemoryPlan

RESERVED = 0.06
"""share of a device's memory that is left to others and to what no plan sees, where no budget is given"""


WORTH = 0.01
"""share of the peak that an option must save to be chosen"""


@dataclass(frozen=True)
class Choice:
    """A configuration that fits, with its plan; `lines`: what was chosen and why."""

    config: Config
    plan: MemoryPlan
    lines: tuple[str, ...] = ()


@dataclass(frozen=True)
class Candidate:
    """A configuration that was looked at."""

    config: Config
    plan: MemoryPlan
    words: str
    """the options that were added, "" as asked"""


class SmallerBatches(Protocol):
    most: int
    """samples of the largest of them, 0 when there is none"""
    otherwise: str
    """what needs less, where there is none"""

    def plan(self, config: Config, count: int) -> MemoryPlan:
        """With batches of `count` samples."""


class Chooser:
    """`measure` traces a configuration, whose plan for any number of swapped blocks `assemble` then gives; `is_valid`
    tells whether nothing of the run has something against it; `smaller` gives the plans of smaller batches."""

    def __init__(
        self, measure: Callable[[Config], Sizes], assemble: Callable[[Config, Sizes], MemoryPlan],
        is_valid: Callable[[Config], bool], smaller: SmallerBatches,
    ) -> None:
        self._measure, self._assemble, self._is_valid, self._smaller = measure, assemble, is_valid, smaller

    def choose(self, config: Config, budget: float, *, given: bool) -> Choice:
        """The first configuration whose peak is within `budget` bytes. `given`: the user said so with --vram_budget,
        so that all options that are off are open, those too that front ends write as 0 or false; otherwise the swapped
        blocks alone. ConfigError with the nearest."""
        asked = changed(config, MemoryOptions, blocks_to_swap=_number(config))
        swaps = config[MemoryOptions].blocks_to_swap == AUTO or (given and not config[MemoryOptions].blocks_to_swap)
        seen: list[Candidate] = []
        for candidate in self._candidates(asked, budget, given, swaps):
            seen.append(candidate)
            if candidate.plan.device_peak <= budget:
                return Choice(candidate.config, candidate.plan, tuple(_reasons(seen, budget, given)))
        nearest = min(seen, key=lambda one: one.plan.device_peak)
        raise ConfigError(_refusal(nearest, seen[0], budget, given, self._advice(nearest.config, budget)))

    def _advice(self, config: Config, budget: float) -> str:
        """Which smaller batch fits with this configuration, found by halving."""
        plans, lowest, most = {}, 1, self._smaller.most
        if not most:
            return self._smaller.otherwise
        highest = most
        while lowest <= highest:
            count = (lowest + highest) // 2
            plans[count] = self._smaller.plan(config, count)
            lowest, highest = (count + 1, highest) if plans[count].device_peak <= budget else (lowest, count - 1)
        if highest:
            return f"A batch of {highest} fits, with {_gb(plans[highest].device_peak)}; a smaller resolution"
        return f"Not even a batch of 1 fits, which holds {_gb(plans[1].device_peak)}; a smaller resolution"

    def _candidates(self, config: Config, budget: float, given: bool, swaps: bool) -> Iterator[Candidate]:
        """From what was asked on, each with what came before, unless that was no use."""
        words: list[str] = []
        least: int | None = None
        further = list(_further(config)) if given else []
        for name, (group, values) in (("", (MemoryOptions, {})), *further):
            wider = changed(config, group, **values)
            if name and not self._is_valid(wider):
                continue
            sizes = self._measure(wider)
            plan = self._assemble(wider, sizes)
            if least is not None and plan.device_peak > (1 - WORTH) * least:
                continue
            config, least = wider, plan.device_peak
            words += [f"--{name}"] if name else []
            yield Candidate(config, plan, " ".join(words))
            if swaps and (config[MemoryOptions].gradient_checkpointing or not given):
                yield from self._swapped(config, sizes, budget, words)

    def _swapped(self, config: Config, sizes: Sizes, budget: float, words: list[str]) -> Iterator[Candidate]:
        """With as few blocks swapped as the budget allows, or with all that can be."""
        for count in range(1, len(sizes.swaps)):
            swapped = changed(config, MemoryOptions, blocks_to_swap=count)
            plan = self._assemble(swapped, sizes)
            if (plan.device_peak <= budget or count == len(sizes.swaps) - 1) and self._is_valid(swapped):
                yield Candidate(swapped, plan, " ".join([*words, f"--blocks_to_swap {count}"]))
                return


def changed(config: Config, group: type, **values: object) -> Config:
    """A configuration with other values in one group."""
    groups = {one: config[one] for one in config.classes()}
    return Config({**groups, group: dataclasses.replace(groups[group], **values)}, config.explicit, config.ignored)


def _number(config: Config) -> int | None:
    asked = config[MemoryOptions].blocks_to_swap
    return 0 if asked == AUTO else asked


def _further(config: Config) -> Iterator[tuple[str, tuple[type, Mapping[str, object]]]]:
    """The options that are off, in the order in which they are tried."""
    memory, precision = config[MemoryOptions], config[PrecisionOptions]
    if not memory.gradient_checkpointing:
        yield "gradient_checkpointing", (MemoryOptions, {"gradient_checkpointing": True})
    if not memory.cpu_offload_checkpointing:
        yield "cpu_offload_checkpointing", (MemoryOptions, {"cpu_offload_checkpointing": True})
    is_stored = precision.denoiser_form is not None or precision.mixed_precision_transformer
    if not is_stored and precision.mixed_precision != "no":
        yield "fp8_scaled", (PrecisionOptions, {"fp8_scaled": True})


def _reasons(seen: list[Candidate], budget: float, given: bool) -> Iterator[str]:
    """What was chosen, and what each step towards it would hold."""
    name = f"--vram_budget {budget / 1e9:g}" if given else "--blocks_to_swap auto"
    chosen = seen[-1]
    asked = f"as asked the run holds {_gb(seen[0].plan.device_peak)} in its largest moment ({seen[0].plan.peak.name})"
    if not chosen.words:
        yield f"{name}: nothing is changed; {asked}, within {_gb(budget)}"
        return
    steps = [f"with {one.words} {_gb(one.plan.device_peak)}" for one in seen[1:]]
    yield f"{name}: chosen {chosen.words}, to stay within {_gb(budget)}; {asked}, {', '.join(steps)}"


def _refusal(nearest: Candidate, asked: Candidate, budget: float, given: bool, advice: str) -> str:
    part, size = nearest.plan.largest_part
    name = f"--vram_budget is {budget / 1e9:g} GB" if given else f"--blocks_to_swap is auto, on {_gb(budget)}"
    how = f" with {nearest.words}" if nearest.words else ""
    return (
        f"{name}; the nearest that this run can come to is {_gb(nearest.plan.device_peak)}{how} (largest moment:"
        f" {nearest.plan.peak.name}, {part} {_gb(size)}; as asked"
        f" {_gb(asked.plan.device_peak)}, {asked.plan.settings}). {advice}, caches that are filled"
        " beforehand, or a smaller rank need less; tools/plan_memory.py shows the table"
    )


def _gb(size: float) -> str:
    return f"{size / 1e9:.3g} GB"
