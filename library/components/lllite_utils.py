"""Files of ControlNet-LLLite: what they hold, whether they fit a U-Net, and loading them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping

import torch

from library.checkpoints.loading import check_finite, check_state, strip_prefix
from library.checkpoints.unet_convert import diffusers_to_original
from library.components.lllite_models import PREFIX, LLLite, LLLiteShape, shape_of_tensors
from library.components.unet_models import UNetBase
from library.components.unet_utils import UNetInfo
from library.core.errors import CheckpointError
from library.safetensors_utils import cast_all, is_pickled, load_pickled_tensors, load_safetensors, read_header

SHOWN = 3
"""names that a message lists"""


def read_shapes(path: str | os.PathLike[str]) -> dict[str, LLLiteShape]:
    """The modules of a file by name, from its header. CheckpointError when it is damaged or something else."""
    found = load_pickled_tensors(path) if is_pickled(path) else read_header(path)[0]
    return shapes_of({key: tuple(entry.shape) for key, entry in found.items()}, path)


def is_lllite(keys: Iterable[str]) -> bool:
    """Whether these are names of tensors of a file."""
    return any(key.startswith(PREFIX) and ".conditioning1." in key for key in keys)


def shapes_of(shapes: Mapping[str, tuple[int, ...]], path: str | os.PathLike[str]) -> dict[str, LLLiteShape]:
    """The modules of tensors with these shapes. CheckpointError when there is another tensor, or one too few."""
    parts: dict[str, dict[str, tuple[int, ...]]] = {}
    for key, shape in shapes.items():
        name, _, parameter = key.partition(".")
        if not name.startswith(PREFIX):
            raise CheckpointError(f"{path} is no ControlNet-LLLite: its tensor {key} does not begin with {PREFIX}")
        parts.setdefault(name, {})[parameter] = shape
    if not parts:
        raise CheckpointError(f"{path} is no ControlNet-LLLite: it holds no tensor")
    found = {}
    for name, tensors in parts.items():
        try:
            found[name] = shape_of_tensors(tensors)
        except ValueError as error:
            raise CheckpointError(f"{path}: {name} is incomplete, or none of a ControlNet-LLLite ({error})") from error
    return found


def misfit(path: str | os.PathLike[str], info: UNetInfo) -> str | None:
    """What is wrong with a file for the U-Net of a header: modules of layers that it has not, or of other widths."""
    shapes = {
        key: tuple(tensor.shape) for key, tensor in strip_prefix(info.source.shapes, info.prefix).items()
    }
    if info.is_diffusers:
        shapes = diffusers_to_original(shapes)
    widths = {
        PREFIX + key.removesuffix(".weight").replace(".", "_"): shape[1]
        for key, shape in shapes.items() if key.endswith(".weight") and len(shape) == 2
    }  # fmt: skip
    modules = read_shapes(path)
    lacking = [name for name in modules if name not in widths]
    other = [name for name, shape in modules.items() if name in widths and widths[name] != shape.width]
    if lacking:
        return (
            f"it changes {len(lacking)} layers that {info.source.path} does not have ({_some(lacking)}): it was made"
            " for another model"
        )
    if other:
        name = other[0]
        return (
            f"{name} has {modules[name].width} inputs, the layer in {info.source.path} {widths[name]}: it was made for"
            " another model"
        )
    return None


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (" ..." if len(names) > SHOWN else "")


def read_tensors(path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    return load_pickled_tensors(path) if is_pickled(path) else load_safetensors(path, device="cpu", disable_mmap=True)


def load_tensors(net: LLLite, tensors: Mapping[str, torch.Tensor], path: str | os.PathLike[str]) -> None:
    """Copy the tensors of a file into a network of the same modules and sizes. CheckpointError for other ones, and for
    values that would make every output NaN."""
    check_state(net, tensors, str(path))
    check_finite(tensors, str(path))
    net.load_state_dict(dict(tensors))


def load_lllite(
    path: str | os.PathLike[str], unet: UNetBase, dtype: torch.dtype | None, device: torch.device | str
) -> LLLite:
    """The network of a file, in the layers of a U-Net. CheckpointError when it is made for another one."""
    net = LLLite(unet, read_shapes(path))
    load_tensors(net, cast_all(read_tensors(path), dtype), path)
    return net.to(device, dtype).requires_grad_(False).eval()
