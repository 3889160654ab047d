"""Diag-OFT: OFT with the blocks and the names of LyCORIS; --network_dim is the size that blocks come near to.

`--network_module networks.diag_oft`. The formula, the limit and the files' tensors are those of networks/oft.py; a
factor per row can be trained beside the rotation (`rescaled=True`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from library.core.errors import ConfigError
from library.core.options import parse_bool
from networks.kinds.factorization import divisors, factorization
from networks.kinds.network_args import NetworkSettings
from networks.kinds.network_base import NetworkFunctions
from networks.kinds.registry import NetworkKind
from networks.kinds.targets import Layer, NetworkTargets
from networks.oft import REFUSED, OFTModule, rotation_targets, shape_from_file, tell_constraint


class DiagOFTModule(OFTModule):
    """OFT whose blocks are at most as large as they are many."""

    def block_shape(self, rows: int) -> tuple[int, ...]:
        size, count = factorization(rows, self.lora_dim)
        if size == 1:
            fitting = next((number for number in divisors(rows) if number > 1 and number * number <= rows), None)
            advice = f"use --network_dim {fitting} or more" if fitting else "exclude this layer"
            raise ConfigError(
                f"{self.lora_name}: blocks of up to {self.lora_dim} rows cut {rows} rows into single ones, which "
                f"cannot be rotated; {advice}"
            )
        return count, size, size


def shape_from_settings(settings: NetworkSettings, layer: Layer, split: Sequence[int] | None) -> dict[str, Any]:
    return {"rescaled": settings.get("rescaled", False)}


def arguments(targets: NetworkTargets) -> dict[str, Callable[[Any], Any]]:
    """Network arguments of Diag-OFT and BOFT beside those that every adapter has."""
    return {"rescaled": parse_bool}


KIND = NetworkKind(
    "Diag-OFT", DiagOFTModule, shape_from_file, shape_from_settings, arguments, REFUSED,
    targets=rotation_targets, prepare=tell_constraint,
)
_FUNCTIONS = NetworkFunctions(KIND)
check_network_args = _FUNCTIONS.check_network_args
create_network = _FUNCTIONS.create_network
create_network_from_weights = _FUNCTIONS.create_network_from_weights
