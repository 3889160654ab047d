"""Files of an earlier run of Self-Flow, by their headers: whether they can be the teacher and the head of another."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from library.checkpoints.safetensors_header import TensorInfo, read_header
from library.core.errors import CheckpointError

if TYPE_CHECKING:
    from library.training.alignment.options import SelfFlowOptions
    from library.training.trainables.base import Trainable


def head_shapes(kind: str, width: int) -> dict[str, tuple[int, ...]]:
    """Of the tensors of a head, by the width of the model's tokens."""
    middle = width if kind == "gelu" else 2 * width
    return {"0.weight": (middle, width), "0.bias": (middle,), "2.weight": (width, middle), "2.bias": (width,)}


def file_problems(options: SelfFlowOptions, trainable: Trainable) -> list[str]:
    """What is wrong with --network_weights_ema and --network_weights_proj."""
    found = []
    if options.network_weights_ema:
        found += _teacher_problems(options.network_weights_ema, trainable)
    if options.network_weights_proj:
        infos = _infos("network_weights_proj", options.network_weights_proj, found)
        last = infos.get("2.bias") if infos is not None else None
        shapes = {name: info.shape for name, info in (infos or {}).items()}
        if infos is not None and (last is None or shapes != head_shapes(options.self_flow_head, *last.shape[:1])):
            found.append(
                f"--network_weights_proj is {options.network_weights_proj}, which is no head {options.self_flow_head}"
                " of Self-Flow; needed: NAME-proj.safetensors of a run with this --self_flow_head"
            )
    return found


def _teacher_problems(path: str, trainable: Trainable) -> list[str]:
    if not hasattr(trainable.opts, "network_weights"):
        return [
            f"--network_weights_ema is {path}, and what this script trains begins with no file of an adapter; its"
            " teacher is read from a state alone (--resume)"
        ]
    found: list[str] = []
    infos, weights = _infos("network_weights_ema", path, found), trainable.opts.network_weights
    if weights is None:
        found.append(
            "--network_weights_ema is given without --network_weights, the weights that the teacher belongs to"
        )
    elif infos is not None and (own := _names_of(weights)) and not own & infos.keys():
        found.append(
            f"--network_weights_ema is {path}, which has none of the layers of --network_weights {weights}; needed: the"
            " NAME-ema.safetensors beside it"
        )
    return found


def _infos(option: str, path: str, found: list[str]) -> dict[str, TensorInfo] | None:
    """The header of a file; None where it has none, which is added to what was found."""
    if not Path(path).is_file():
        found.append(f"--{option} is {path}, which is not there")
        return None
    try:
        return read_header(path)[0]
    except CheckpointError as error:
        found.append(f"--{option}: {error}")
        return None


def _names_of(path: str) -> set[str]:
    """None where the file is told of elsewhere, or is no safetensors file."""
    try:
        return set(read_header(path)[0])
    except CheckpointError:
        return set()
