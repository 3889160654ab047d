"""Trainer: prepares a run in phases, trains it, finishes it. Phases return values; the Run is built once, complete."""

from __future__ import annotations

import gc
import logging
import time
from dataclasses import dataclass
from typing import Any

import torch

from library.dataset import CachingOptions, DatasetOptions
from library.errors import ConfigError
from library.options import Config
from library.strategy_base import StrategySet
from library.training.accelerator_setup import Runtime, prepare_runtime
from library.training.data import TrainingData
from library.training.families.base import ModelFamily
from library.training.hooks.base import Hook, HookList
from library.training.loop import fit
from library.training.option_groups import (
    LoopOptions,
    MemoryOptions,
    ResumeOptions,
    SamplingOptions,
)
from library.training.optimizers import OptimizerOptions
from library.training.progress import Progress
from library.training.run import Models, Run
from library.training.step import TrainStep
from library.training.trainables.base import Trainable

logger = logging.getLogger(__name__)
