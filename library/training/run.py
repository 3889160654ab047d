"""The records of a run: models, outputs of the step, progress, and the complete frozen Run."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from library.core.options import Config
from library.dataset.strategies import StrategySet
from library.training.optimizers import switches_weights
from library.training.run_settings import RunSettings
from library.training.stopping import StopSwitch
from library.training.updaters.base import Updater
from library.training.updaters.ordinary import OrdinaryUpdater

if TYPE_CHECKING:
    from library.training.accelerator_setup import Runtime
    from library.training.data import TrainingData
    from library.training.hooks.base import HookList
    from library.training.progress import Progress
    from library.training.protocols import Logs, LrSchedule
    from library.training.step import TrainStep
    from library.training.trainables.base import Trainable
    from library.training.wiring.base import ModelFamily


@dataclass
class Models:
    """The parts of a model that are in memory now; each is None, or not there, before it is loaded and after its last
    use."""

    vae: torch.nn.Module | None = None
    text_encoders: list[torch.nn.Module | None] = field(default_factory=list)
    denoiser: torch.nn.Module | None = None
    extra: dict[str, torch.nn.Module] = field(default_factory=dict)
    """further parts by name (a vision encoder, a second expert, a ControlNet); see `ModelFamily.load_parts`"""

    @property
    def of_step(self) -> list[torch.nn.Module]:
        """The denoiser and the further parts, which are armed and put into evaluation mode like it."""
        return [self.denoiser, *self.extra.values()]

    @contextmanager
    def used(self, name: str, device: torch.device | str):
        """A further part on `device`; one that waits elsewhere goes back after its use."""
        module = self.extra[name]
        home = next(module.parameters()).device
        module.to(device)
        try:
            yield module
        finally:
            module.to(home)


@dataclass
class DiTOutput:
    """What a family's forward hands to the loss. `extra` holds side outputs (hidden features, say) for hooks."""

    pred: torch.Tensor
    target: torch.Tensor
    extra: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass
class StepOutput:
    """`loss`: this rank's part of the loss of the optimizer step (already divided by the global sample count).
    `loss_sum`, `count`: detached sum of the per-sample losses of this micro-batch and their number, for the log."""

    loss: torch.Tensor
    loss_sum: torch.Tensor
    count: int
    logs: Logs = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """Everything of a run that is ready to train. Built once, at the end of Trainer.prepare()."""

    config: Config
    runtime: Runtime
    family: ModelFamily
    trainable: Trainable
    models: Models
    strategies: StrategySet
    step: TrainStep
    data: TrainingData
    optimizer: torch.optim.Optimizer
    lr_scheduler: LrSchedule
    progress: Progress
    hooks: HookList
    max_grad_norm: float = 0.0
    settings: RunSettings = field(default_factory=RunSettings)
    """what its states record"""
    stop: StopSwitch = field(default_factory=StopSwitch)
    updater: Updater = field(default_factory=OrdinaryUpdater)

    @contextmanager
    def weights_for_eval(self, averaged: bool = True):
        """Inside, the trained weights are those to save, sample and validate with: modules are in evaluation mode,
        schedule-free optimizers switch and, unless `averaged` is False, every hook puts in place what it wants (the
        average of --ema, say)."""
        learned = [*self.trainable.modules().values(), *self.hooks.all_modules().values(), *self.models.of_step]
        with ExitStack() as stack:
            stack.enter_context(schedule_free_weights(self.optimizer))
            stack.enter_context(evaluation_mode(learned))
            for hook in self.hooks if averaged else ():
                stack.enter_context(hook.weights_for_eval(self))
            yield


@contextmanager
def evaluation_mode(modules: Iterable[torch.nn.Module]):
    """Inside, modules are in evaluation mode; afterwards each one as a whole is as it was."""
    modes = {module: module.training for module in modules}
    for module in modes:
        module.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.train(mode)


@contextmanager
def schedule_free_weights(optimizer: torch.optim.Optimizer):
    """Inside, the weights of an optimizer that keeps others for evaluation are those.

    Switching there and back rounds. The weights of training are therefore kept aside and put back as they were: a run
    that saves or samples more often trains the same.
    """
    if not switches_weights(optimizer):
        yield
        return
    kept = [(p, p.detach().to("cpu", copy=True)) for group in optimizer.param_groups for p in group["params"]]
    optimizer.eval()
    try:
        yield
    finally:
        optimizer.train()
        with torch.no_grad():
            for parameter, value in kept:
                parameter.copy_(value)
