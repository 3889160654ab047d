"""--show_timesteps: which noise levels a run would draw, and how its loss would weigh them, as text or as a picture."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from library.core.atomic_file import atomic_path
from library.core.errors import ConfigError
from library.core.keyed_random import StepDraws, keyed_generator
from library.core.options import Config
from library.training import loss_weights, timestep_samplers
from library.training.checkpoint import CheckpointNames
from library.training.loss_weights import LossWeightOptions
from library.training.option_groups import LoopOptions, SavingOptions
from library.training.timestep_samplers import TimestepOptions
from library.training.timesteps import NUM_TIMESTEPS

if TYPE_CHECKING:
    from library.training.objective import Objective
    from library.training.wiring.base import ModelFamily

logger = logging.getLogger(__name__)

NUM_DRAWS = 100_000
PER_LINE = 25
COLUMNS = 64


class ManyDraws(StepDraws):
    """Draws of one huge batch from one generator each: keyed draws of so many samples one by one would take long."""

    def normal(self, purpose: str, shape: Sequence[int] = (), *keys: int | str) -> torch.Tensor:
        return torch.randn((len(self.positions), *shape), generator=self._generator(purpose, keys))

    def uniform(self, purpose: str, shape: Sequence[int] = (), *keys: int | str) -> torch.Tensor:
        return torch.rand((len(self.positions), *shape), generator=self._generator(purpose, keys))

    def _generator(self, purpose: str, keys: tuple[int | str, ...]) -> torch.Generator:
        return keyed_generator(self.seed, purpose, self.step, *keys)


@dataclass(frozen=True)
class Shown:
    """Shares of the draws in equal parts of 0..1000, `PER_LINE` timesteps each, and the mean weight of the loss in each
    where it is weighted."""

    title: str
    shares: list[float]
    weights: list[float] | None

    @property
    def starts(self) -> list[int]:
        return list(range(0, NUM_TIMESTEPS, PER_LINE))


def show_timesteps(config: Config, family: ModelFamily) -> None:
    """Print the text, or write the picture into --output_dir (or where the program runs); nothing is loaded."""
    shown = drawn(config, family)
    if config[TimestepOptions].show_timesteps == "console":
        print("\n".join(as_lines(shown)))
        return
    saving = config[SavingOptions]
    folder = Path(saving.output_dir or ".")
    path = folder / f"{CheckpointNames(saving.output_name).last()}-timesteps.png"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--output_dir is {folder}; it cannot be made ({error.strerror or error})") from error
    plot(path, shown)
    logger.info("--show_timesteps: %s; nothing is trained", path)


def drawn(config: Config, family: ModelFamily) -> Shown:
    """What a run with these options draws for samples of --show_timesteps_resolution."""
    options, objective = config[TimestepOptions], family.objective()
    width, height = options.show_timesteps_resolution or (1024, 1024)
    shape = family.architecture.latents.latent_shape((width, height))
    # The law of all steps together, also where a family draws the samples of a step from a part of it.
    sampler = timestep_samplers.build(options, is_flow=objective.is_flow)
    if hasattr(sampler, "know_epochs"):
        sampler.know_epochs(1, NUM_DRAWS)
    seed = config[LoopOptions].seed or 0
    times = sampler.sample((NUM_DRAWS, *shape), ManyDraws(seed, 0, tuple(range(NUM_DRAWS)))).double()
    timesteps = times * NUM_TIMESTEPS if objective.is_flow else times
    counts = torch.histc(timesteps, NUM_TIMESTEPS // PER_LINE, 0, NUM_TIMESTEPS)
    is_table = not objective.is_flow and not timestep_samplers.is_own(options.timestep_sampling)
    law = "whole timesteps, all equally likely" if is_table else f"--timestep_sampling {options.timestep_sampling}"
    title = f"{NUM_DRAWS} noise levels at {width}x{height} (latents {shape[-1]}x{shape[-2]}): {law}"
    return Shown(title, (counts / timesteps.numel()).tolist(), _weights(config[LossWeightOptions], objective))


def _weights(options: LossWeightOptions, objective: Objective) -> list[float] | None:
    """Mean weight of the loss at the whole timesteps of each part; None where all weigh the same."""
    steps = torch.arange(NUM_TIMESTEPS, dtype=torch.float64) + objective.is_flow  # 0..999 of a table, 1..1000 of a flow
    weights = loss_weights.weights_of_levels(options, objective, steps)
    return None if weights is None else weights.view(-1, PER_LINE).mean(dim=1).tolist()


def as_lines(shown: Shown) -> Iterator[str]:
    """A bar for each part, and one for its weight."""
    yield shown.title
    yield from _bars(shown.starts, shown.shares, "{:6.2%}")
    if shown.weights is not None:
        yield "weight of the loss:"
        yield from _bars(shown.starts, shown.weights, "{:9.4g}")


def _bars(starts: Sequence[int], values: Sequence[float], form: str) -> Iterator[str]:
    largest = max(values) or 1.0
    for start, value in zip(starts, values):
        bar = "#" * round(COLUMNS * value / largest)
        yield f"{start:4d}..{start + PER_LINE:4d} {form.format(value)} |{bar}"


def plot(path: Path, shown: Shown) -> None:
    """The same as a PNG. Drawn on a figure of its own: the program's matplotlib settings are not touched."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5 if shown.weights is None else 7), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    parts = [(shown.shares, "share of the draws")]
    parts += [(shown.weights, "weight of the loss")] if shown.weights is not None else []
    for axes, (values, label) in zip(figure.subplots(len(parts), squeeze=False)[:, 0], parts):
        axes.bar(shown.starts, values, width=PER_LINE, align="edge", color="#1f4e8c", edgecolor="white", linewidth=0.5)
        axes.set_xlim(0, NUM_TIMESTEPS)
        axes.set_xlabel("timestep (0 = data, 1000 = noise)")
        axes.set_ylabel(label)
        axes.grid(alpha=0.25)
    figure.suptitle(shown.title, fontsize=10)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})
