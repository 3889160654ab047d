"""What records and calls of a run say of themselves: every annotation names a type, and what stands there keeps the
promise."""

from __future__ import annotations

import ast
import inspect
import sys
import typing
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from library.core.registry import import_target
from library.dataset.batch import Batch
from library.dataset.collate import Sample
from library.dataset.custom import CustomDatasetGroup
from library.dataset.dataset import DatasetGroup
from library.dataset.latent_cache import LatentCache, LatentEncoder
from library.dataset.strategies import StrategySet
from library.dataset.text_cache import TextCache
from library.families.registry import FAMILIES, record_of
from library.strategy_base import TextEncodingStrategy, TokenizeStrategy
from library.training import objective, optimizers, protocols, schedulers
from library.training.accelerator_setup import Runtime
from library.training.data import TrainingData
from library.training.data_phase import DataGroups, FoundData
from library.training.hooks.base import Hook
from library.training.loss import LossFunction
from library.training.objective import NoisyLatents, Objective
from library.training.optimizers import OptimizerOptions
from library.training.protocols import (
    AdapterNetwork,
    BatchSource,
    LossBody,
    LrSchedule,
    NetworkModule,
    SampleLoss,
    StepBody,
)
from library.training.run import DiTOutput, Models, Run, StepOutput
from library.training.run_settings import RunSettings
from library.training.schedulers import SchedulerOptions
from library.training.step import TrainStep
from library.training.timestep_samplers import FLOW_MODES, TIMESTEP_SAMPLERS, TimestepOptions, TimestepSampler
from library.training.trainables.base import Trainable
from library.training.trainables.network import NetworkTrainable
from library.training.trainables.network_hook import NetworkHook
from library.training.wiring.base import FlowFamily, ModelFamily
from networks.kinds.additional_network import AdditionalNetwork
from networks.kinds.network_base import NetworkFunctions

RECORDS = (
    Run, Models, DiTOutput, StepOutput, TrainStep, StrategySet, Runtime, NoisyLatents, RunSettings, LossFunction,
    DataGroups, FoundData, Batch, Sample,
)  # fmt: skip
CONTRACTS = (
    Hook, Trainable, NetworkTrainable, ModelFamily, FlowFamily, TrainStep, StrategySet, Objective,
    objective.FlowMatchingObjective, objective.DdpmObjective, TrainingData, Runtime, LossFunction, LatentCache,
    LatentEncoder, TextCache, TokenizeStrategy, TextEncodingStrategy, NetworkHook,
    *(import_target(record_of(name).family) for name in FAMILIES),
)  # fmt: skip


def names_for(thing: type) -> dict[str, object]:
    """What annotations of its module may name: its globals, what it imports for type checkers alone, and the names of
    the recursive types."""
    module = sys.modules[thing.__module__]
    names = {**vars(protocols), **vars(module)}
    for node in ast.parse(Path(module.__file__).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            exec(compile(ast.Module(node.body, []), module.__file__, "exec"), names)  # noqa: S102
    return {**names, "torch": torch, "Tensor": torch.Tensor}


def parts(hint: object) -> Iterator[object]:
    """A type and all that it is made of."""
    yield hint
    for part in hint if isinstance(hint, list) else typing.get_args(hint):
        yield from parts(part)


def open_annotations(thing: Callable | type, names: dict[str, object]) -> list[str]:
    hints = typing.get_type_hints(thing, globalns=names)
    return [f"{thing.__qualname__}: {name}" for name, hint in hints.items() if typing.Any in list(parts(hint))]


def methods_of(thing: type) -> list[Callable]:
    """Its public methods, among them properties and static ones."""
    found = []
    for name, value in vars(thing).items():
        function = value.fget if isinstance(value, property) else inspect.unwrap(getattr(value, "__func__", value))
        if inspect.isfunction(function) and (not name.startswith("_") or name in ("__call__", "__init__")):
            found.append(function)
    return found


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.__name__)
def test_records_say_what_they_hold(record: type) -> None:
    assert not open_annotations(record, names_for(record))


@pytest.mark.parametrize("contract", CONTRACTS, ids=lambda contract: contract.__name__)
def test_calls_say_what_they_take_and_give(contract: type) -> None:
    names = names_for(contract)
    assert not [line for method in methods_of(contract) for line in open_annotations(method, names)]


def test_an_open_annotation_is_found() -> None:
    class Loose:
        value: dict[str, typing.Any]

        def call(self, batch: typing.Any) -> typing.Callable[[typing.Any], int]: ...

    names = {"typing": typing}
    assert open_annotations(Loose, names) and len(open_annotations(Loose.call, names)) == 2


def subclasses_of(base: type) -> list[type]:
    return [found for child in base.__subclasses__() for found in (child, *subclasses_of(child))]


def taken_by(function: Callable) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name != "self"]


@pytest.mark.parametrize("base", [Hook, Trainable, ModelFamily], ids=lambda base: base.__name__)
def test_what_overrides_a_call_takes_the_same(base: type) -> None:
    """Arguments by the names of the base, so that they can be given by name too."""
    own = [child for child in subclasses_of(base) if child.__module__.startswith("library.training")]
    assert own
    for child in own:
        for name in vars(child).keys() & vars(base).keys():
            function, wanted = getattr(child, name), getattr(base, name)
            if name.startswith("_") or not inspect.isfunction(function) or not inspect.isfunction(wanted):
                continue
            assert taken_by(function)[: len(taken_by(wanted))] == taken_by(wanted), f"{child.__qualname__}.{name}"


def schedules() -> Iterator[object]:
    for options, optimizer in (
        (SchedulerOptions(), OptimizerOptions()),
        (SchedulerOptions(lr_scheduler_type="CosineAnnealingLR", lr_scheduler_args=["T_max=9"]), OptimizerOptions()),
        (SchedulerOptions(), OptimizerOptions(optimizer_type="adafactor", optimizer_args=["relative_step=True"])),
    ):
        built = optimizers.build(optimizer, [{"params": [torch.nn.Parameter(torch.zeros(2))], "lr": 1e-3, "name": "a"}])
        yield schedulers.build(options, built, learning_rate=1e-3, max_train_steps=9)


def test_schedules_keep_their_promise() -> None:
    kinds = set()
    for schedule in schedules():
        kinds.add(type(schedule).__name__)
        assert isinstance(schedule, LrSchedule) and len(schedule.get_last_lr()) == 1
    assert kinds == {"LambdaLR", "CosineAnnealingLR", "AdafactorRates"}
    assert issubclass(schedulers.factory.FixedRates, LrSchedule)


def test_functions_and_groups_take_what_the_protocols_say() -> None:
    assert taken_by(LossFunction.__call__) == taken_by(SampleLoss.__call__)
    assert ["step", *taken_by(TrainStep.process_batch)] == taken_by(StepBody.__call__)
    assert ["step", *taken_by(TrainStep.compute_loss)] == taken_by(LossBody.__call__)
    for name in FLOW_MODES:
        sampler = TIMESTEP_SAMPLERS.resolve(name)(TimestepOptions(timestep_sampling=name))
        assert taken_by(sampler.sample) == taken_by(TimestepSampler.sample)
    for group in (DatasetGroup, CustomDatasetGroup):
        for name in ("__len__", "__getitem__", "load", "plan", "set_strategies", "set_max_train_steps", "metadata"):
            assert taken_by(getattr(group, name)) == taken_by(getattr(BatchSource, name)), f"{group.__name__}.{name}"


def test_networks_and_their_modules_take_what_the_protocols_say() -> None:
    for protocol, own in ((AdapterNetwork, AdditionalNetwork), (NetworkModule, NetworkFunctions)):
        calls = [name for name, value in vars(protocol).items() if inspect.isfunction(value) and name[0] != "_"]
        for name in set(calls) - {"to", "train", "parameters"}:  # those of torch
            assert taken_by(getattr(own, name)) == taken_by(getattr(protocol, name)), name
