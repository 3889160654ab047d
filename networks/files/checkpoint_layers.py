"""Which tensors of a checkpoint file are which layers of the model, whatever the layout of the file.

The loaders' own renaming tells: it is run on stand-ins that hold, instead of weights, the number of the file's tensor
and the row. Where the stand-ins end up is where the weights would. So parts that are joined (q, k and v of a diffusers
folder) or taken apart (the joint projection of open_clip) are known without a second table.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch

from library.core.registry import import_target
from networks.kinds.targets import NetworkTargets, layer_name

ROW_BITS = 32
PARAMETERS = {"weight": "weight", "bias": "bias", "scale": "weight"}
"""name in the model -> name that adapters have for it; some norms call their weight scale"""


DENOISER_FOLDERS = ("unet", "transformer")


@dataclass(frozen=True)
class Piece:
    """Rows `start` to `stop` of the tensor `key`; the pieces of a layer stand below one another."""

    key: str
    start: int
    stop: int


@dataclass(frozen=True)
class LayerParameter:
    """The weight or bias of a layer, by the name that adapters have for the layer. `path` is that of the module
    tree."""

    lora_name: str
    path: str
    parameter: str
    pieces: tuple[Piece, ...]


def checkpoint_layers(
    targets: NetworkTargets, shapes: Mapping[str, tuple[int, ...]], prefixes: Collection[str] | None = None
) -> list[LayerParameter]:
    """Every layer of a family that these tensors hold, in the order of the model. Parts that are not there give
    nothing. `prefixes` names the parts to look for, where the file may look like several (default: all)."""
    keys = list(shapes)
    stand_ins = {key: _stand_in(number, shapes[key]) for number, key in enumerate(keys)}
    found: list[LayerParameter] = []
    for part in (targets, *targets.text_encoders):
        if part.file_state is None or (prefixes is not None and part.prefix not in prefixes):
            continue
        for path, rows in import_target(part.file_state)(stand_ins).items():
            module, _, parameter = path.rpartition(".")
            if parameter in PARAMETERS:
                found.append(
                    LayerParameter(layer_name(part, module), module, PARAMETERS[parameter], _pieces(rows, keys))
                )
    return found


def prefixes_of_part(targets: NetworkTargets, part: str) -> Collection[str] | None:
    """For `checkpoint_layers`: the prefix of what a file is said to hold, by its folder in a pipeline or by the name that
    options have for it (text_encoder_2, clip_g). Files of two CLIPs have the same names. None: all are looked for."""
    if not part:
        return None
    if part in DENOISER_FOLDERS:
        return (targets.prefix,)
    meant = [e.prefix for e in targets.text_encoders if e.diffusers_name == part or f".{part}." in e.comfy_name]
    return meant if meant or part.startswith("text_encoder") else None


def _stand_in(number: int, shape: tuple[int, ...]) -> torch.Tensor:
    """[rows, 1] whole numbers: the tensor's number in the upper bits, the row in the lower ones."""
    rows = shape[0] if shape else 1
    return (torch.arange(rows) + (number << ROW_BITS)).view(-1, 1)


def _pieces(rows: torch.Tensor, keys: list[str]) -> tuple[Piece, ...]:
    """Runs of neighbouring rows of one tensor."""
    flat = rows.flatten()
    breaks = torch.nonzero(flat.diff() != 1).flatten() + 1
    pieces = []
    for run in flat.tensor_split(breaks.tolist()):
        first, row = int(run[0]) >> ROW_BITS, int(run[0]) & ((1 << ROW_BITS) - 1)
        pieces.append(Piece(keys[first], row, row + len(run)))
    return tuple(pieces)


