"""What a family can do with ControlNets: make one from its base, read and write the files of trained ones."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from library.checkpoints.loading import (
    CheckpointFiles,
    assign_state,
    build_on_meta,
    check_finite,
    check_state,
    open_checkpoint,
)
from library.components.control_models import start_values
from library.core.errors import UnsupportedCombination
from library.core.registry import import_target
from library.families.registry import record_of

FOLDER = "controlnet"
"""of a ControlNet inside a pipeline folder of diffusers"""


@dataclass(frozen=True)
class ControlNetInfo:
    """What the headers of a ControlNet's file tell, without its denoiser. `params`: the net without weights."""

    source: CheckpointFiles
    prefix: str
    is_diffusers: bool
    params: nn.Module

    @property
    def keys(self) -> list[str]:
        return [key for key in self.source.shapes if key.startswith(self.prefix)]


class ControlNets(ABC):
    """The ControlNets of a family; its record names the object. `params`: those of the denoiser that a net guides."""

    kinds: ClassVar[frozenset[str]] = frozenset()
    """kinds of files (library/checkpoints/kinds.py) that it reads"""
    picture_range: ClassVar[tuple[float, float]] = (0.0, 1.0)
    """darkest and brightest value of the pictures that nets see"""
    new_layers: ClassVar[tuple[str, ...]] = ()
    """beginnings of the names of what a net has that its base has not"""
    zero_layers: ClassVar[tuple[str, ...]] = ()
    """those of them that start at 0, so that a new net changes nothing"""

    new_notice: ClassVar[str] = ""
    """how a new net differs from that of known trainers, for the log"""

    @staticmethod
    @abstractmethod
    def empty_net(source: CheckpointFiles, params: Any) -> nn.Module:
        """The net of a file, without weights. CheckpointError when it is none for such a denoiser."""

    @staticmethod
    @abstractmethod
    def net_state(state: Mapping[str, Tensor], params: Any) -> dict[str, Tensor]:
        """Tensors of a file in original or diffusers names, under the names of the net's tree."""

    def check(self, path: str | os.PathLike, params: Any) -> None:
        """CheckpointError when a file or folder holds no net for such a denoiser (headers only)."""
        self.empty_net(open_checkpoint(path, FOLDER), params)

    def load(
        self, path: str | os.PathLike, params: Any, dtype: torch.dtype | None, device: torch.device | str,
        disable_mmap: bool = False,
    ) -> nn.Module:
        """The net of a file or folder. CheckpointError when it does not fit, or holds values that are not finite."""
        source = open_checkpoint(path, FOLDER)
        net = self.empty_net(source, params)
        tensors = source.tensors(device, disable_mmap, source.shapes, cast=source.casting(dtype))
        state = self.net_state(tensors, params)
        check_finite(state, source.path)
        return self.filled(net, state, source.path)

    @abstractmethod
    def new_net(self, base: Any) -> nn.Module:
        """A net without weights for a base, of which headers were read."""

    @abstractmethod
    def base_state(
        self, base: Any, wanted: Mapping[str, Tensor], dtype: torch.dtype, disable_mmap: bool
    ) -> dict[str, Tensor]:
        """The weights of the base that have the names `wanted` in the tree of a net, read from its file, on the CPU."""

    def made_from(
        self, base: Any, generator: torch.Generator, dtype: torch.dtype, device: torch.device | str,
        disable_mmap: bool = False,
    ) -> nn.Module:
        """A new net: layers of the base copied from its file, those that end it zero, the others drawn at random."""
        net = build_on_meta(lambda: self.new_net(base))
        expected = net.state_dict()
        state = self.base_state(base, expected, dtype, disable_mmap)
        new = [(name, tensor) for name, tensor in expected.items() if name.startswith(self.new_layers)]
        state |= start_values([pair for pair in new if not pair[0].startswith(self.zero_layers)], generator)
        state |= {name: torch.zeros(tensor.shape) for name, tensor in new if name.startswith(self.zero_layers)}
        return self.filled(net, {name: tensor.to(device, dtype) for name, tensor in state.items()}, base.source.path)

    @staticmethod
    def filled(net: nn.Module, state: Mapping[str, Tensor], path: str) -> nn.Module:
        """A net without storage with these weights. CheckpointError when they do not fit."""
        check_state(net, state, path)
        assign_state(net, state)
        return net

    @abstractmethod
    def file_state(self, net: nn.Module) -> dict[str, Tensor]:
        """The weights under the names that files of this family have."""

    @abstractmethod
    def file_metadata(self, net: nn.Module) -> dict[str, str]:
        """{"model_config": JSON} of a net whose hyper-parameters do not follow from its shapes, else nothing."""

    @abstractmethod
    def diffusers_state(self, net: nn.Module) -> dict[str, Tensor]: ...

    @abstractmethod
    def diffusers_config(self, net: nn.Module) -> dict[str, Any]:
        """What config.json of a folder says."""


def control_nets_of(family: str) -> ControlNets:
    """UnsupportedCombination for a family that has none."""
    record = record_of(family)
    if not record.control_nets:
        raise UnsupportedCombination(f"there are no ControlNets of {record.title} here")
    return import_target(record.control_nets)
