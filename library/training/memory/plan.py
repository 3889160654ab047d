"""MemoryPlan: what each phase of a run will hold, on the device and in main memory, and the table of it."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from library.core.errors import AtelierError
from library.core.memory_room import resident_memory, total_memory
from library.dataset import CachingOptions
from library.training.accelerator_setup import with_forms
from library.training.adapters import NetworkOptions
from library.training.computing_options import MemoryOptions
from library.training.memory.measure import PhaseTracer, Sizes
from library.training.memory.samples import PackDemand, demands
from library.training.optimizers import OptimizerOptions
from library.training.optimizers.host_states import ROOM
from library.training.optimizers.single_steps import steps_singly
from library.training.option_groups import EmaOptions, HookOptions, LoopOptions

if TYPE_CHECKING:
    from library.core.options import Config
    from library.dataset.strategies import StrategySet
    from library.families.latents import LatentSpec
    from library.training.accelerator_setup import Runtime
    from library.training.data_phase import DataGroups
    from library.training.memory.samples import Demand
    from library.training.trainer_base import Trainer

logger = logging.getLogger(__name__)

GB = 1e9
BATCHES_AHEAD = 2
"""that each loader process has ready"""


@dataclass(frozen=True)
class Phase:
    """A moment of a run: name of a part -> bytes on the device."""

    name: str
    parts: Mapping[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """`phases`: on the device; `host`: in main memory as long as the run lasts, name -> bytes. On a CPU both are one.
    """

    device: str
    phases: Sequence[Phase]
    host: Mapping[str, int]
    settings: str
    """in words, what it holds for: batch, size, checkpointing, swapped blocks"""
    capacity: int | None = None
    """bytes of the device"""
    left_out: Sequence[str] = field(default_factory=tuple)

    @property
    def is_one_memory(self) -> bool:
        return self.device == "cpu"

    @property
    def peak(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.total)

    @property
    def device_peak(self) -> int:
        """Bytes on the device at the largest moment."""
        return self.peak.total + (self.host_total if self.is_one_memory else 0)

    @property
    def largest_part(self) -> tuple[str, int]:
        """What most of the largest moment is, and its bytes."""
        parts = {**self.peak.parts, **(self.host if self.is_one_memory else {})}
        return max(parts.items(), key=lambda part: part[1])

    @property
    def host_total(self) -> int:
        return sum(self.host.values())

    def table(self) -> str:
        """As the start of a run shows it."""
        width = max(len(phase.name) for phase in self.phases)
        rows = [f"memory plan: {self.settings}"]
        rows += [f"  {phase.name:<{width}} {_gb(phase.total):>9}  {_parts(phase.parts)}" for phase in self.phases]
        what = "beside these" if self.is_one_memory else "main memory"
        rows.append(f"  {what:<{width}} {_gb(self.host_total):>9}  {_parts(self.host)}")
        of = "" if self.capacity is None else f" of {_gb(self.capacity)}"
        rows.append(f"  predicted peak {_gb(self.device_peak)}{of} on {self.device}, in: {self.peak.name}")
        rows += [f"  not counted: {text}" for text in self.left_out]
        return "\n".join(rows)


@contextmanager
def quiet() -> Iterator[None]:
    """Inside nothing is logged: what a plan does, the run does again."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


class FewerSamples:
    """Plans of a run whose largest batch, `demand`, is made smaller; packs are made smaller by their budget."""

    def __init__(self, planner: Planner, demand: Demand) -> None:
        self._planner, self._demand = planner, demand
        is_pack = isinstance(demand, PackDemand)
        self.most = 0 if is_pack else len(demand.items) - 1
        self.otherwise = "A smaller --navit_token_budget" if is_pack else "A smaller resolution"

    def plan(self, config: Config, count: int) -> MemoryPlan:
        """With `count` samples, those of the longest captions."""
        return self._planner.plan(config, dataclasses.replace(self._demand, items=self._demand.items[:count]))


class Planner:
    """Plans of one run, whose data is known. `twin`: gives a trainer of a configuration, to be used up; `encodes`: the
    parts that have something to encode; `program`: bytes that the process has without models."""

    def __init__(
        self, twin: Callable[[Config], Trainer], data: DataGroups, strategies: StrategySet, runtime: Runtime, *,
        keeps_vae: bool = False, encodes: Collection[str] = ("vae", "text_encoders"), program: int | None = None,
    ) -> None:
        self._twin, self._data, self._strategies, self.runtime = twin, data, strategies, runtime
        self._keeps_vae, self._encodes = keeps_vae, encodes
        self._program = (resident_memory() or 0) if program is None else program

    def demands(self, spec: LatentSpec) -> list[Demand]:
        """The sizes of batches, the largest first."""
        return demands(self._data, spec)

    def plan(self, config: Config, demand: Demand) -> MemoryPlan:
        """AtelierError when a model cannot be followed without its values."""
        return self.assembled(config, self.measured(config, demand))

    def measured(self, config: Config, demand: Demand) -> Sizes:
        """What the phases take, without a word of the log. What models raise becomes an AtelierError."""
        twin, kind, runtime = self._twin(config), self.runtime.device.type, with_forms(self.runtime, config)
        try:
            with quiet():
                return PhaseTracer(twin, runtime, self._strategies, kind, self._encodes).sizes(demand)
        except AtelierError:
            raise
        except Exception as error:  # of modules from outside, say, which read values
            raise AtelierError(f"the models cannot be followed without their values ({_told(error)})") from error

    def assembled(self, config: Config, sizes: Sizes) -> MemoryPlan:
        """The moments of a run from what its phases take."""
        return MemoryPlan(
            device=str(self.runtime.device), phases=tuple(_phases(config, sizes)),
            host={name: size for name, size in self._host(config, sizes) if size},
            settings=_settings(config[MemoryOptions], sizes), capacity=capacity_of(self.runtime.device),
            left_out=tuple(self._left_out(config)),
        )

    def _left_out(self, config: Config) -> Iterator[str]:
        if config[HookOptions].hook:
            yield "modules of --hook"
        if NetworkOptions in config.classes() and config[NetworkOptions].base_weights:
            yield "adapters of --base_weights while they are merged into what is read"
        if self._keeps_vae:
            yield "the making of samples"
        if config[MemoryOptions].compiles:
            yield "what compiled blocks keep less or more than others"

    def _host(self, config: Config, sizes: Sizes) -> Iterator[tuple[str, int]]:
        caching, ema = config[CachingOptions], config[EmaOptions]
        yield "the program", self._program
        kept = (caching.caches_latents and not caching.cache_latents_to_disk) or (
            caching.caches_text and not caching.cache_text_encoder_outputs_to_disk
        )
        yield "caches", sizes.sample_bytes * sum(len(group.items) for group in self._data.groups) if kept else 0
        workers = min(config[LoopOptions].max_data_loader_n_workers, os.cpu_count() or 1)
        yield "batches ahead", workers * BATCHES_AHEAD * sizes.sample_bytes * len(sizes.demand.items)
        yield "average", 4 * sizes.num_trained if ema.ema and ema.ema_on_cpu else 0
        waits = self._keeps_vae and "VAE" not in sizes.in_step
        yield "VAE for samples", sum(_parts_of_images(sizes).values()) if waits else 0
        yield "optimizer", sizes.optimizer if _states_wait(config, sizes) else 0
        yield "swapped blocks", _swapped(config, sizes)[0]
        yield "inputs of checkpoints", sizes.away


def _parts_of_images(sizes: Sizes) -> dict[str, int]:
    return {
        name: size
        for name, size in sizes.weights.items()
        if not name.startswith("text encoder") and name not in sizes.in_step - {"VAE"}
    }


def _states_wait(config: Config, sizes: Sizes) -> bool:
    """Whether the states of the optimizer are in main memory between steps."""
    return sizes.is_paged or (config[OptimizerOptions].offload_optimizer and sizes.kind != "cpu")


def _states_on_visit(config: Config, sizes: Sizes) -> int:
    """Bytes of states that --offload_optimizer has on the device during an update: one part and the next, or all of
    an optimizer that steps all weights as one."""
    options = config[OptimizerOptions]
    if sizes.is_paged or not options.offload_optimizer or sizes.kind == "cpu":
        return 0
    return min(sizes.optimizer, 2 * ROOM) if steps_singly(options) else sizes.optimizer


def _swapped(config: Config, sizes: Sizes) -> tuple[int, int]:
    """Bytes of the denoiser in main memory, and the places on the device through which they pass."""
    count = config[MemoryOptions].blocks_to_swap
    return sizes.swaps[min(count, len(sizes.swaps) - 1)] if isinstance(count, int) else (0, 0)


def _phases(config: Config, sizes: Sizes) -> Iterator[Phase]:
    encoders = {name: size for name, size in sizes.weights.items() if name.startswith("text encoder")}
    if "latents" in sizes.encoding and config[CachingOptions].caches_latents:
        yield Phase("caching latents", {**_parts_of_images(sizes), "activations": sizes.encoding["latents"]})
    if "captions" in sizes.encoding:
        yield Phase("caching captions", {**encoders, "activations": sizes.encoding["captions"]})
    held = {name: size for name, size in sizes.weights.items() if name in sizes.in_step}
    home, places = _swapped(config, sizes)
    held["denoiser"] += places - home
    ema = config[EmaOptions]
    average = 4 * sizes.num_trained if ema.ema and not ema.ema_on_cpu else 0
    states = 0 if _states_wait(config, sizes) else sizes.optimizer
    beside = {"adapter": sizes.trained, "optimizer": states, "average": average, "images": sizes.images}
    held |= {name: size for name, size in beside.items() if size}
    if sizes.images:
        yield Phase("encoding images", {**held, "activations": sizes.encoding["latents"]})
    yield Phase("forward", {**held, "activations": sizes.forward})
    there = min(sizes.gradients, sizes.backward)
    yield Phase("backward", {**held, "gradients": there, "activations": sizes.backward - there})
    visiting = {"optimizer": visit} if (visit := _states_on_visit(config, sizes)) else {}
    yield Phase("update", {**held, **visiting, "gradients": sizes.gradients, "temporary": sizes.update})


def capacity_of(device: torch.device) -> int | None:
    """Bytes of memory of a device; of main memory for the CPU. None where it cannot be told."""
    if device.type == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_properties(device).total_memory
    return total_memory() if device.type == "cpu" else None


def _settings(memory: MemoryOptions, sizes: Sizes) -> str:
    words = [sizes.demand.told_as]
    words.append("gradient checkpointing" if memory.gradient_checkpointing else "no gradient checkpointing")
    if memory.blocks_to_swap:
        words.append(f"{memory.blocks_to_swap} block{'' if memory.blocks_to_swap == 1 else 's'} swapped")
    return ", ".join(words)


def _gb(size: int) -> str:
    return f"{size / GB:.2f} GB" if size >= 0.05 * GB else f"{size / 1e6:.1f} MB"


def _parts(parts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {_gb(size)}" for name, size in parts.items() if size) or "nothing"


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
