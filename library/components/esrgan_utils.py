"""Reading files of RRDBNet under the three sets of names that they have."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from library.components.esrgan_models import RRDBNet, RRDBParams
from library.core.errors import CheckpointError
from library.safetensors_utils import is_pickled, load_pickled, load_pickled_tensors, load_safetensors

_RENAMES = (
    (r"^RRDB_trunk\.(\d+)\.RDB(\d)\.", r"body.\1.rdb\2."),  # the first release of ESRGAN, BSRGAN
    (r"^trunk_conv\.", "conv_body."), (r"^HRconv\.", "conv_hr."), (r"^(?:upconv|conv_up)(\d)\.", r"conv_up.\1."),
)  # fmt: skip
_OLD_MARK = "model.1.sub.0.RDB1.conv1.0.weight"
_OLD = re.compile(r"^model\.(\d+)\.(.*)$")


def is_rrdb(names: Mapping[str, object]) -> bool:
    """Whether a file with tensors of these names is an RRDBNet."""
    return any(f"{block}.conv1.weight" in names for block in ("body.0.rdb1", "RRDB_trunk.0.RDB1")) or _OLD_MARK in names


def renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under the names of RRDBNet."""
    if _OLD_MARK in tensors:
        tensors = _of_old_names(tensors)
    found = {}
    for name, tensor in tensors.items():
        for pattern, new in _RENAMES:
            name = re.sub(pattern, new, name)
        found[name] = tensor
    ups = sorted({int(name.split(".")[1]) for name in found if name.startswith("conv_up.")})
    places = {number: place for place, number in enumerate(ups)}  # upconv1 is the first
    return {
        re.sub(r"^conv_up\.(\d+)", lambda match: f"conv_up.{places[int(match[1])]}", name): tensor
        for name, tensor in found.items()
    }


def _of_old_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names of places in a sequence: the first convolution, the trunk, doublings, the last two convolutions."""
    places = sorted({int(match[1]) for name in tensors if (match := _OLD.match(name))} - {0, 1})
    *ups, hr, last = places
    names = {0: "conv_first", hr: "conv_hr", last: "conv_last", **{at: f"conv_up.{n}" for n, at in enumerate(ups)}}
    found = {}
    for name, tensor in tensors.items():
        match = _OLD.match(name)
        if match is None:
            continue
        place, rest = int(match[1]), match[2]
        if place == 1:
            block = re.match(r"sub\.(\d+)\.(?:RDB(\d)\.conv(\d)\.0\.)?(\w+)$", rest)
            if block is None:
                continue
            own = f"body.{block[1]}.rdb{block[2]}.conv{block[3]}" if block[2] else "conv_body"
            found[f"{own}.{block[4]}"] = tensor
        else:
            found[f"{names[place]}.{rest}"] = tensor
    return found


def _of_pickle(path: str | os.PathLike[str]) -> Mapping[str, Tensor]:
    """Averaged weights before those of the last step, as training programs write both."""
    state = load_pickled(path)
    state = state if isinstance(state, Mapping) else {}
    inner = next((state[name] for name in ("params_ema", "params") if isinstance(state.get(name), Mapping)), None)
    if inner is None:
        return load_pickled_tensors(path)
    return {name: value for name, value in inner.items() if isinstance(value, Tensor)}


def params_of(tensors: Mapping[str, Tensor]) -> RRDBParams:
    """Sizes from the shapes of renamed tensors."""
    width, channels = tensors["conv_first.weight"].shape[:2]
    blocks = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("body."))
    doublings = len({name.split(".")[1] for name in tensors if name.startswith("conv_up.")})
    unshuffle = round((channels / 3) ** 0.5)
    return RRDBParams(width, tensors["body.0.rdb1.conv1.weight"].shape[0], blocks, doublings, unshuffle)


def load_rrdb(path: str | os.PathLike[str]) -> RRDBNet | None:
    """The network of a .safetensors or .pth file in float32 on the CPU; None for a file of another network.
    CheckpointError for one that is damaged or not complete."""
    tensors = _of_pickle(path) if is_pickled(path) else load_safetensors(path)
    if not is_rrdb(tensors):
        return None
    tensors = renamed(tensors)
    try:
        model = RRDBNet(params_of(tensors))
        model.load_state_dict(tensors)
    except (KeyError, ValueError, IndexError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise CheckpointError(f"{path} is an ESRGAN file that is not complete: {reason}") from error
    return model.float().eval().requires_grad_(False)


@torch.no_grad()
def enlarged(model: RRDBNet, pixels: Tensor, tile: int = 0, overlap: int = 16) -> Tensor:
    """[3, H, W] in 0..1 -> [3, scale H, scale W] in 0..1. `tile`: sides of the parts that are computed one by one, each
    with `overlap` pixels around it; 0 = the whole picture."""
    scale, height, width = model.params.scale, *pixels.shape[1:]
    step = tile or max(height, width)
    result = pixels.new_zeros(3, height * scale, width * scale)
    for top in range(0, height, step):
        for left in range(0, width, step):
            box = (max(top - overlap, 0), min(top + step + overlap, height), max(left - overlap, 0),
                   min(left + step + overlap, width))  # fmt: skip
            part = _whole(model, pixels[:, box[0] : box[1], box[2] : box[3]])
            bottom, right = min(top + step, height), min(left + step, width)
            rows = slice((top - box[0]) * scale, (bottom - box[0]) * scale)
            columns = slice((left - box[2]) * scale, (right - box[2]) * scale)
            result[:, top * scale : bottom * scale, left * scale : right * scale] = part[:, rows, columns]
    return result.clamp_(0, 1)


def _whole(model: RRDBNet, pixels: Tensor) -> Tensor:
    """Sides that are no multiple of `unshuffle` get copies of their last row and column, which are cut off behind."""
    factor, (height, width) = model.params.unshuffle, pixels.shape[1:]
    padded = torch.nn.functional.pad(pixels[None], (0, -width % factor, 0, -height % factor), mode="replicate")
    return model(padded)[0, :, : height * model.params.scale, : width * model.params.scale]
