"""Networks that image scripts merge for the whole run, merge for a batch, or hook; and their strengths from batch to batch."""

from __future__ import annotations

import importlib
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from library.core.errors import ConfigError, Problems
from library.families.registry import record_of
from library.generation.adapter_files import AdapterFile, file_problem
from library.generation.adapters import hook, network_of
from library.generation.gen_img.options import GenerationNetworkOptions
from library.training.adapters import check_owner, importable_name
from library.training.keyword_args import parse_keyword_args

if TYPE_CHECKING:
    from torch import nn

logger = logging.getLogger(__name__)


def network_problems(options: GenerationNetworkOptions, family: str) -> list[str]:
    """What is wrong with modules, files and arguments for a model of this family, from headers."""
    problems = Problems()
    for name in options.network_module or []:
        problems.attempt(lambda: check_owner(importable_name(name), record_of(family).network_module))
        problems.attempt(lambda: _module(name))
    for path in options.network_weights or []:
        problem = file_problem(path, "network_weights", family)
        if problem:
            problems.add(problem)
    for text in options.network_args or []:
        problems.attempt(lambda: _arguments(text))
    return problems.messages


def _module(name: str) -> Any:
    try:
        module = importlib.import_module(importable_name(name))
    except ImportError as error:
        raise ConfigError(f"--network_module is {name}, which cannot be imported: {error}; e.g. networks.lora") from error
    if not hasattr(module, "create_network_from_weights"):
        raise ConfigError(f"--network_module is {name}; it has no function create_network_from_weights; name a module that reads adapters, e.g. networks.lora")
    return module


def _arguments(text: str) -> dict[str, Any]:
    """`a=1;b=2` as keyword arguments."""
    return parse_keyword_args([part for part in text.split(";") if part.strip()], "network_args")


def show_metadata(path: str) -> None:
    """The metadata of a network file on the console."""
    from library.safetensors_utils import read_header

    metadata = read_header(path)[1] if path.endswith(".safetensors") else {}
    print(f"{path}:\n{json.dumps(metadata, indent=2, ensure_ascii=False, sort_keys=True)}")


@dataclass
class Networks:
    """All networks in their order. `merged`: the first ones, which are part of the weights and keep their strength."""

    pre_calc: bool = False
    networks: list[Any] = field(default_factory=list)
    merged: int = 0

    @property
    def changing(self) -> list[Any]:
        """Those whose strength can change."""
        return self.networks[self.merged :]

    def add(self, options: GenerationNetworkOptions, place: int, denoiser: Any, encoders: Sequence[nn.Module]) -> None:
        """Load network number `place`. CheckpointError when it has no layer of these models; ConfigError when its module
        cannot be used as asked."""
        path = options.network_weights[place]
        if options.network_show_meta:
            show_metadata(path)
        adapter = AdapterFile(
            path, options.network_mul[place] if options.network_mul else 1.0, importable_name(options.network_module[place]),
            _arguments(options.network_args[place]) if options.network_args else {},
        )  # fmt: skip
        network, tensors = network_of(adapter, encoders, denoiser)
        self.networks.append(network)
        if place < options.num_merged:
            network.merge_to(encoders[0] if len(encoders) == 1 else list(encoders), denoiser, tensors, denoiser.dtype, denoiser.device)
            self.merged += 1
        elif self.pre_calc:
            if not hasattr(network, "backup_weights"):
                raise ConfigError(f"--network_pre_calc: {adapter.module} cannot take a network out of the weights again; leave the option out")
            network.load_weights(path)
            network.to(denoiser.device).eval()
        else:
            hook(network, adapter, encoders, denoiser)
            network.to(denoiser.device)

    @contextmanager
    def at(self, multipliers: Sequence[float]) -> Iterator[None]:
        """The strengths of a batch, one for each network; those that are merged stay as they are."""
        own = list(multipliers[self.merged :])
        for network, multiplier in zip(self.changing, own, strict=True):
            network.set_multiplier(multiplier)
        if not self.pre_calc:
            yield
            return
        try:
            for network in self.changing:
                network.backup_weights()
                network.merge_to(None, None)
            yield
        finally:
            for network in reversed(self.changing):  # networks on one layer: the first one holds the layer's own weight
                network.restore_weights()

    @contextmanager
    def only(self, place: int | None) -> Iterator[None]:
        """Hooked networks other than number `place` switched off (None: all work). ConfigError for one that has no switch."""
        for network in self.changing:
            if not hasattr(network, "set_enabled"):
                raise ConfigError(f"regions of --mask_path need networks that can be switched off; {type(network).__name__} cannot")
        try:
            for number, network in enumerate(self.changing, start=self.merged):
                network.set_enabled(place is None or number == place)
            yield
        finally:
            for network in self.changing:
                network.set_enabled(True)
