"""What a conversion writes: one file, or a folder in the layout of diffusers; tensors are made while they are
written."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from library.components.ldm_folder_files import REST
from library.core.atomic_file import atomic_folder
from library.safetensors_utils import save_file_atomic, stream_file_atomic

Infos = dict[str, tuple[torch.dtype, tuple[int, ...]]]
Items = Callable[[], Iterable[tuple[str, Tensor]]]


@dataclass(frozen=True)
class SinglePlan:
    """One file to be written: `infos` as stream_file_atomic takes them."""

    infos: Infos
    items: Items
    metadata: dict[str, str]

    def write(self, target: str) -> None:
        stream_file_atomic(self.infos, self.items(), target, self.metadata or None)


@dataclass
class FolderPlan:
    """A folder to be written. `parts`: sub-folder -> (infos, tensors); `configs`: file -> its content; `rest`: tensors
    without a place, kept with the `metadata` of the file; `tokenizers`: sub-folder -> tokenizer."""

    parts: dict[str, tuple[Infos, Items]] = field(default_factory=dict)
    configs: dict[str, dict[str, Any]] = field(default_factory=dict)
    rest: dict[str, Tensor] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    tokenizers: dict[str, Any] = field(default_factory=dict)

    def write(self, target: str, variant: str | None = None) -> None:
        """The folder appears whole or not at all."""
        ending = f".{variant}.safetensors" if variant else ".safetensors"
        with atomic_folder(os.path.abspath(target)) as work:
            for name, content in self.configs.items():
                (work / name).parent.mkdir(exist_ok=True)
                (work / name).write_text(f"{json.dumps(content, indent=2)}\n", encoding="utf-8")
            for name, (infos, items) in self.parts.items():
                stem = "model" if name.startswith("text_encoder") else "diffusion_pytorch_model"
                stream_file_atomic(infos, items(), work / name / f"{stem}{ending}", {"format": "pt"})
            for name, tokenizer in self.tokenizers.items():
                tokenizer.save_pretrained(work / name)
            if self.rest or self.metadata:
                save_file_atomic(self.rest, work / REST, self.metadata or None)


def as_written(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A tensor without data, of the type that it is written in (None: its own)."""
    return tensor.to("meta").to(dtype) if dtype and tensor.is_floating_point() else tensor.to("meta")


def infos_of(metas: Mapping[str, Tensor]) -> Infos:
    return {name: (meta.dtype, tuple(meta.shape)) for name, meta in metas.items()}
