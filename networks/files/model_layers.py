"""The layers of a model on disk, read one at a time: a file, a folder, a pipeline folder of diffusers, or several of
these."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from library.checkpoints.loading import CheckpointFiles, open_checkpoint
from library.checkpoints.recognition import recognise
from library.checkpoints.scaled_weights import SCALE_SUFFIXES, SCALED_FORMS, as_in_file
from library.core.errors import CheckpointError
from library.families.registry import FAMILIES, adapter_family_of, records
from library.safetensors_utils import MemoryEfficientSafeOpen, is_pickled, load_pickled_tensors, read_header
from networks.files.checkpoint_layers import (
    DENOISER_FOLDERS,
    LayerParameter,
    checkpoint_layers,
    prefixes_of_part,
)
from networks.kinds.targets import NetworkTargets

Name = tuple[str, str]
"""(name of a layer as adapters have it, weight or bias)"""


@dataclass(frozen=True)
class Source:
    """A file or folder of a model. `part`: what it is in a pipeline (unet, transformer, text_encoder ...), "" for what
    its names tell."""

    files: CheckpointFiles
    part: str = ""


def sources_of(path: str | os.PathLike[str]) -> list[Source]:
    """The parts of a model at a path. CheckpointError when there is none."""
    folder = Path(path)
    if not (folder / "model_index.json").is_file():
        return [Source(open_checkpoint(path))]
    names = [*DENOISER_FOLDERS, "text_encoder", "text_encoder_2", "text_encoder_3"]
    found = [Source(open_checkpoint(folder / name), name) for name in names if (folder / name).is_dir()]
    if not found:
        raise CheckpointError(f"{path} has a model_index.json and none of the folders {', '.join(names)}")
    return found


def kind_of_model(sources: Iterable[Source]) -> str | None:
    """The kind of the denoiser among them (ModelKind.name); None when none is there or known."""
    known = {
        kind for record in records().values() if adapter_family_of(record).name in FAMILIES for kind in record.kinds
    }
    for source in sources:
        found = recognise({key: tuple(tensor.shape) for key, tensor in source.files.shapes.items()})
        if found is not None and found.kind in known:
            return found.kind
    return None


class ModelLayers:
    """The weights and biases of a model's layers by the names that adapters have for them; use it as a context."""

    def __init__(self, targets: NetworkTargets, sources: Sequence[Source], label: str) -> None:
        self.label = label
        self._stack = ExitStack()
        self._layers: dict[Name, tuple[LayerParameter, CheckpointFiles]] = {}
        self._readers: dict[str, _Reader] = {}
        for source in sources:
            shapes = {key: tuple(tensor.shape) for key, tensor in source.files.shapes.items()}
            for layer in checkpoint_layers(targets, shapes, prefixes_of_part(targets, source.part)):
                self._layers[layer.lora_name, layer.parameter] = (layer, source.files)

    def __enter__(self) -> ModelLayers:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def __iter__(self) -> Iterator[Name]:
        return iter(self._layers)

    def __contains__(self, name: object) -> bool:
        return name in self._layers

    def shape(self, name: Name) -> tuple[int, ...]:
        layer, files = self._layers[name]
        first = files.shapes[layer.pieces[0].key].shape
        return (sum(piece.stop - piece.start for piece in layer.pieces), *first[1:])

    def dtype(self, name: Name) -> torch.dtype:
        """The number format in which the weight or bias is stored."""
        layer, files = self._layers[name]
        return files.shapes[layer.pieces[0].key].dtype

    def read(self, name: Name) -> torch.Tensor:
        """The weight or bias in float32. CheckpointError when a value is not finite."""
        layer, files = self._layers[name]
        if files.path not in self._readers:
            self._readers[files.path] = _Reader(files, self._stack)
        reader = self._readers[files.path]
        pieces = [reader.tensor(piece.key)[piece.start : piece.stop] for piece in layer.pieces]
        tensor = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        if not torch.isfinite(tensor).all():
            raise CheckpointError(
                f"{self.label}: {layer.pieces[0].key} has values that are not finite (NaN or infinite)"
            )
        return tensor


class _Reader:
    """Tensors of a checkpoint by name, in any order, in float32; a pickle is held whole, other files are not."""

    def __init__(self, files: CheckpointFiles, stack: ExitStack) -> None:
        self._files = files
        self._places: dict[str, MemoryEfficientSafeOpen] = {}
        self._held: dict[str, torch.Tensor] = {}
        for file in files.files:
            if is_pickled(file):
                self._held |= load_pickled_tensors(file)
            else:
                handle = stack.enter_context(MemoryEfficientSafeOpen(file))
                self._places |= dict.fromkeys(read_header(file)[0], handle)

    def tensor(self, key: str) -> torch.Tensor:
        tensor = self._stored(key)
        scale = next(
            (name for suffix in SCALE_SUFFIXES if (name := key.removesuffix(".weight") + suffix) in self._files.shapes),
            None,
        )
        if scale is None or tensor.dtype not in SCALED_FORMS:
            return tensor.float()
        return as_in_file(tensor, self._stored(scale).float()).widened()

    def _stored(self, key: str) -> torch.Tensor:
        return self._held[key] if key in self._held else self._places[key].get_tensor(key)
