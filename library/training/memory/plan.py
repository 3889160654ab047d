"""MemoryPlan: what each phase of a run will hold, on the device and in main memory, and the table of it."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from library.core.errors import AtelierError
from library.dataset import CachingOptions
from library.training.memory.measure import PhaseTracer, Sizes
from library.training.memory.samples import demands
from library.training.option_groups import EmaOptions, LoopOptions, MemoryOptions

if TYPE_CHECKING:
    from library.dataset.strategies import StrategySet
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
    """`phases`: on the device; `host`: in main memory as long as the run lasts, name -> bytes. On a CPU both are one."""

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


def plan_of(
    trainer: Trainer, data: DataGroups, strategies: StrategySet, runtime: Runtime, *, demand: Demand | None = None,
    keeps_vae: bool = False,
) -> MemoryPlan:
    """The plan of a run whose data is known and of which nothing is loaded. `trainer` is used up: hand in a twin
    (`Trainer.twin`). `demand`: the batch to plan for; the largest of the data when None.

    AtelierError when a model cannot be followed without its values.
    """
    demand = demand or demands(data, trainer.family.architecture.latents)[0]
    kind = runtime.device.type
    sizes = traced(trainer, runtime, strategies, demand, kind)
    return assembled(trainer, data, sizes, runtime, keeps_vae=keeps_vae)


def traced(trainer: Trainer, runtime: Runtime, strategies: StrategySet, demand: Demand, kind: str) -> Sizes:
    """What `PhaseTracer` finds, without a word of the log. What models raise becomes an AtelierError."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        return PhaseTracer(trainer, runtime, strategies, kind).sizes(demand)
    except AtelierError:
        raise
    except (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError, KeyError, IndexError) as error:
        raise AtelierError(f"the models cannot be followed without their values ({_first_line(error)})") from error
    finally:
        logging.disable(before)


def assembled(
    trainer: Trainer, data: DataGroups, sizes: Sizes, runtime: Runtime, *, keeps_vae: bool = False
) -> MemoryPlan:
    """The moments of a run from what its phases take."""
    config, kind = trainer.config, runtime.device.type
    phases = []
    encoders = {name: size for name, size in sizes.weights.items() if name.startswith("text encoder")}
    of_images = {name: size for name, size in sizes.weights.items() if name not in encoders and name != "denoiser"}
    if "latents" in sizes.encoding and config[CachingOptions].caches_latents:
        phases.append(Phase("caching latents", {**of_images, "activations": sizes.encoding["latents"]}))
    if "captions" in sizes.encoding:
        phases.append(Phase("caching captions", {**encoders, "activations": sizes.encoding["captions"]}))
    held = {name: size for name, size in sizes.weights.items() if name in sizes.in_step}
    ema, host = config[EmaOptions], {"the program": _resident()}
    average = 4 * sizes.num_trained if ema.ema else 0
    held |= {
        name: size
        for name, size in (
            ("adapter", sizes.trained), ("optimizer", sizes.optimizer), ("average", 0 if ema.ema_on_cpu else average),
        )
        if size
    }
    phases.append(Phase("forward", {**held, "activations": sizes.forward}))
    both = {"gradients": sizes.gradients, "activations": max(0, sizes.backward - sizes.gradients)}
    phases.append(Phase("backward", {**held, **both}))
    phases.append(Phase("update", {**held, "gradients": sizes.gradients, "temporary": sizes.update}))
    caching = config[CachingOptions]
    in_memory = (caching.caches_latents and not caching.cache_latents_to_disk) + (
        caching.caches_text and not caching.cache_text_encoder_outputs_to_disk
    )
    if in_memory:
        host["caches"] = sizes.sample_bytes * sum(len(group.items) for group in data.groups)
    workers = min(config[LoopOptions].max_data_loader_n_workers, os.cpu_count() or 1)
    if workers:
        host["batches ahead"] = workers * BATCHES_AHEAD * sizes.sample_bytes * len(sizes.demand.items)
    if ema.ema and ema.ema_on_cpu:
        host["average"] = average
    if keeps_vae and "VAE" in sizes.weights and "VAE" not in sizes.in_step:
        host["VAE for samples"] = sum(of_images.values())
    return MemoryPlan(
        device=str(runtime.device), phases=tuple(phases), host=host, settings=_settings(config[MemoryOptions], sizes),
        capacity=capacity_of(runtime.device),
        left_out=("modules of hooks",) if trainer.own_hooks else (),
    )  # fmt: skip


def capacity_of(device: torch.device) -> int | None:
    """Bytes of memory of a device; of main memory for the CPU. None where it cannot be told."""
    if device.type == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_properties(device).total_memory
    if device.type == "cpu" and hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _settings(memory: MemoryOptions, sizes: Sizes) -> str:
    count = len(sizes.demand.items)
    words = [f"batch of {count} at {sizes.demand.size}"]
    words.append("gradient checkpointing" if memory.gradient_checkpointing else "no gradient checkpointing")
    if memory.blocks_to_swap:
        words.append(f"{memory.blocks_to_swap} blocks swapped")
    return ", ".join(words)


def _resident() -> int:
    """Bytes of main memory that this process has now; 0 where the system does not tell."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError, AttributeError):
        return 0


def _gb(size: int) -> str:
    return f"{size / GB:.2f} GB" if size >= 0.05 * GB else f"{size / 1e6:.1f} MB"


def _parts(parts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {_gb(size)}" for name, size in parts.items() if size) or "nothing"


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
