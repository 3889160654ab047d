"""Hooks as a user writes them, for the tests of --hook."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from library.core.errors import ConfigError
from library.core.options import option
from library.training.hooks.base import Hook


@dataclass(frozen=True, kw_only=True)
class PullOptions:
    """Pull towards a number"""

    pull_strength: float = option(0.5, help="weight of the pull")
    pull_fails_at: int | None = option(None, help="step to fail at")

    def __post_init__(self) -> None:
        if self.pull_strength < 0:
            raise ConfigError(f"--pull_strength is {self.pull_strength}; needed: 0 or more")


class Pull(Hook):
    """Trains a number of its own beside the network, towards 1."""

    options = PullOptions
    made: list[Pull] = []

    def __init__(self, options: PullOptions) -> None:
        self.options, self.closed = options, []
        self.made.append(self)

    def on_transformer_loaded(self, denoiser: torch.nn.Module) -> None:
        self.scale = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.zeros_(self.scale.weight)

    def modules(self) -> dict[str, torch.nn.Module]:
        return {"scale": self.scale}

    def compute_loss(self, step, output, sample, batch):
        per_sample, logs = type(step).compute_loss(step, output, sample, batch)
        return per_sample + self.options.pull_strength * (self.scale.weight - 1).square().sum(), logs

    def on_step_end(self, run, output) -> None:
        if run.progress.global_step == self.options.pull_fails_at:
            raise RuntimeError("asked to fail")

    def close(self, run, error) -> None:
        self.closed.append(error)


class Plain(Hook):
    """Without options."""

    steps = 0

    def on_step_end(self, run, output) -> None:
        type(self).steps += 1


class Picky(Hook):
    def check(self, config, family, trainable) -> None:
        raise ConfigError(f"{family.name} is not what this hook wants")


class Clashing(Hook):
    @dataclass(frozen=True, kw_only=True)
    class options:
        """Names that are taken"""

        network_dim: int = option(1, help="of the script")


class Miscalled(Hook):
    """Methods that do not take what they are given."""

    def __init__(self, rate) -> None:
        self.rate = rate

    def on_step_start(self) -> None: ...

    def compute_loss(self, output, batch): ...


class Brief(Hook):
    """Options without a word on how they are kept."""

    options = PullOptions
    seen: list[float] = []

    def on_step_end(self, run, output) -> None:
        self.seen.append(self.opts.pull_strength)


NOT_A_HOOK = 3
