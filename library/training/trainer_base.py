"""Trainer: prepares a run in phases, trains it, finishes it. Phases return values; the Run is built once, complete."""

from __future__ import annotations

import gc
import logging
import secrets
import time
from typing import Any

import torch

from library.dataset import CachingOptions
from library.errors import Problems
from library.options import Config
from library.strategy_base import StrategySet
from library.training import checks, losses, loss_weights, optimizers, schedulers, timestep_samplers
from library.training.accelerator_setup import Runtime, prepare_runtime
from library.training.data import TrainingData
from library.training.data_phase import DataGroups, build_data, cache_latents, cache_text
from library.training.families.base import ModelFamily
from library.training.hooks.base import Hook, HookList
from library.training.loop import fit
from library.training.loss import LossFunction
from library.training.option_groups import LoopOptions, MemoryOptions
from library.training.optimizers import OptimizerOptions
from library.training.progress import Progress
from library.training.run import Models, Run
from library.training.schedulers import SchedulerOptions
from library.training.step import TrainStep
from library.training.trainables.base import Trainable

logger = logging.getLogger(__name__)


class Trainer:
    """One run of one family and one trainable.

    `prepare` goes through the phases in the order in which memory is needed: text encoders and denoiser meet only when the
    text encoders run in the step. `run` is prepare, fit and the last messages.
    """

    def __init__(self, config: Config, family: ModelFamily, trainable: Trainable, hooks: list[Hook] | None = None) -> None:
        self.config = config
        self.family = family
        self.trainable = trainable
        self.own_hooks = list(hooks or [])
        self.started_at = time.time()

    def run(self) -> None:
        """Prepare, train, finish; returns early for --debug_dataset."""
        run = self.prepare()
        if run is not None:
            fit(run)

    def prepare(self) -> Run | None:
        """Every phase up to the complete Run; None when there is nothing to train (--debug_dataset)."""
        blueprint = self.check()
        runtime = prepare_runtime(self.config)
        seed = self.draw_seed(runtime)
        data = build_data(self.config, blueprint, self.family, seed=seed)
        strategies = self.family.strategies()
