"""The networks of the image scripts: merged for the whole run, merged for a batch, or hooked; and their strengths."""

from __future__ import annotations

import importlib
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from library.checkpoint_kinds import check_slot
from library.errors import CheckpointError, ConfigError, Problems
from library.generation_options import GenerationNetworkOptions
from library.safetensors_utils import read_header
from library.training.keyword_args import parse_keyword_args

if TYPE_CHECKING:
    from torch import nn

logger = logging.getLogger(__name__)


def network_problems(options: GenerationNetworkOptions) -> list[str]:
    """What is wrong with modules, files and arguments, from headers."""
    problems = Problems()
    for name in options.network_module or []:
        problems.attempt(lambda: _module(name))
    for path in options.network_weights or []:
        problem = check_slot(path, "network_weights", {"adapter"}, with_pickles=True)
        if problem:
            problems.add(problem)
    for text in options.network_args or []:
        problems.attempt(lambda: _arguments(text))
    return problems.messages


def _module(name: str) -> Any:
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(f"--network_module is {name}, which cannot be imported: {error}; e.g. networks.lora") from error
    if not hasattr(module, "create_network_from_weights"):
        raise ConfigError(f"--network_module is {name}; it has no function create_network_from_weights")
    return module


def _arguments(text: str) -> dict[str, Any]:
    """`a=1;b=2` as keyword arguments."""
    return parse_keyword_args([part for part in text.split(";") if part.strip()], "network_args")


def show_metadata(path: str) -> None:
    """The metadata of a network file on the console."""
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

    def add(self, options: GenerationNetworkOptions, place: int, denoiser: nn.Module, encoders: Sequence[nn.Module]) -> None:
        """Load network number `place`. CheckpointError when it has no layer of these models."""
        path = options.network_weights[place]
        if options.network_show_meta:
            show_metadata(path)
        multiplier = options.network_mul[place] if options.network_mul else 1.0
        arguments = _arguments(options.network_args[place]) if options.network_args else {}
        network, tensors = _module(options.network_module[place]).create_network_from_weights(
            multiplier, path, None, list(encoders), denoiser, for_inference=True, **arguments
        )
        if not [*network.unet_loras, *network.text_encoder_loras]:
            raise CheckpointError(f"{path} has no layer of this model; is it a network for another one?")
        self.networks.append(network)
        if place < options.num_merged:
            network.merge_to(list(encoders), denoiser, tensors)
            self.merged += 1
            return
        if not self.pre_calc:
            network.apply_to(list(encoders), denoiser)
        network.load_weights(path)
        network.to(denoiser.device).eval()
        logger.info("%s: multiplier %s", path, multiplier)

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
        """Hooked networks other than number `place` switched off (None: all work)."""
        try:
            for number, network in enumerate(self.changing, start=self.merged):
                network.set_enabled(place is None or number == place)
            yield
        finally:
            for network in self.changing:
                network.set_enabled(True)
