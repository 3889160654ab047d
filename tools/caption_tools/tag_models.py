"""The files of tagging models: which lie in a folder, their tags, what their network takes and gives."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from library.core.errors import CheckpointError, ConfigError
from library.core.text_files import open_file

if TYPE_CHECKING:
    import numpy as np

FILES = {"list": ("model.onnx", "selected_tags.csv"), "mapping": ("model_optimized.onnx", "tag_mapping.json")}
"""layout -> its files: network, tags"""
LIST_CATEGORIES = {"9": "rating", "0": "general", "4": "character"}
MAPPED_CATEGORIES = ("rating", "general", "character", "copyright", "meta", "model", "quality", "artist")
SIZE = 448
PROVIDERS: tuple[tuple[str, dict[str, str]], ...] = (
    ("OpenVINOExecutionProvider", {"device_type": "GPU", "precision": "FP32"}),
    ("CUDAExecutionProvider", {}), ("ROCMExecutionProvider", {}), ("CPUExecutionProvider", {}),
)  # fmt: skip
"""of onnxruntime, the best first"""


@dataclass(frozen=True)
class Tag:
    name: str
    category: str
    """rating, general, character, copyright, meta, model, quality or artist"""


class Network(Protocol):
    """Images of a batch -> numbers [B, tags]. `batch_size`: the only one that it takes, None = any."""

    batch_size: int | None

    def __call__(self, images: np.ndarray) -> np.ndarray: ...


OpenNetwork = Callable[[str], Network]
"""path of the ONNX file -> network"""


def model_folder(model_dir: str, repo_id: str) -> str:
    """Where a model lies: in the folder itself, or in one below it that is named after the repository."""
    if layout_of(model_dir) is not None:
        return model_dir
    return os.path.join(model_dir, repo_id.replace("/", "_"))


def layout_of(folder: str) -> str | None:
    """`list` or `mapping`, whose files are in the folder; None when neither are."""
    return next(
        (
            layout
            for layout, names in FILES.items()
            if all(os.path.isfile(os.path.join(folder, name)) for name in names)
        ),
        None,
    )


def download(repo_id: str, folder: str) -> None:
    """Fetch both files of a model from the hub; `namespace/name/subfolder` has the layout with a mapping.
    ConfigError."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    from library.huggingface_util import is_hub_reachable

    parts = repo_id.split("/")
    layout, subfolder = ("mapping", "/".join(parts[2:])) if len(parts) > 2 else ("list", None)
    if not is_hub_reachable():
        raise ConfigError(
            f"--repo_id is {repo_id}, which cannot be fetched: the hub does not answer; needed: its files in "
            "--model_dir"
        )
    try:
        for name in FILES[layout]:
            found = hf_hub_download("/".join(parts[:2]), name, subfolder=subfolder, force_download=True)
            copy_into(found, os.path.join(folder, name))
    except (HfHubHTTPError, OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"--repo_id is {repo_id}, which cannot be fetched: {first}; needed: a model of the hub, or its files in "
            "--model_dir"
        ) from error


def copy_into(source: str, target: str) -> None:
    import shutil

    from library.core.atomic_file import atomic_path

    with atomic_path(target) as temporary:
        shutil.copyfile(source, temporary)


def read_tags(folder: str) -> list[Tag]:
    """The tags of a model, in the order of its outputs. CheckpointError."""
    layout = layout_of(folder)
    path = os.path.join(folder, FILES[layout or "list"][1])
    try:
        with open_file(path, "r", encoding="utf-8-sig", newline="") as file:
            return _tags_of_list(file) if layout == "list" else _tags_of_mapping(json.load(file))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, csv.Error) as error:
        raise CheckpointError(f"{path} is no list of tags: {type(error).__name__} {error}") from error


def _tags_of_list(file: Any) -> list[Tag]:
    tags = [Tag(row["name"], LIST_CATEGORIES.get(row["category"], "general")) for row in csv.DictReader(file)]
    if not tags:
        raise ValueError("it is empty")
    return tags


def _tags_of_mapping(mapping: dict[str, dict[str, str]]) -> list[Tag]:
    ordered = sorted(mapping.items(), key=lambda entry: int(entry[0]))
    if [int(number) for number, _ in ordered] != list(range(len(ordered))) or not ordered:
        raise ValueError("its numbers do not count from 0 up")
    tags = [Tag(entry["tag"], entry["category"].lower()) for _, entry in ordered]
    return [tag if tag.category in MAPPED_CATEGORIES else Tag(tag.name, "general") for tag in tags]


def pixels_for(image: np.ndarray, layout: str) -> np.ndarray:
    """What the network takes of an image [H, W, 3] RGB over white, padded to a square with white and resized.

    `list`: [448, 448, 3], BGR, 0..255; `mapping`: [3, 448, 448], RGB, -1..1. float32.
    """
    import numpy as np

    from library.dataset.media_utils import resize_image

    height, width = image.shape[:2]
    side = max(height, width)
    square = np.full((side, side, 3), 255, np.uint8)
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = image
    resized = resize_image(square, (SIZE, SIZE), "area" if side > SIZE else "lanczos").astype(np.float32)
    if layout == "list":
        return np.ascontiguousarray(resized[..., ::-1])
    return np.ascontiguousarray(resized.transpose(2, 0, 1) / 127.5 - 1)


def probabilities(outputs: np.ndarray, layout: str) -> np.ndarray:
    """[B, tags] in 0..1: networks of the layout with a mapping give logits."""
    import numpy as np

    return outputs if layout == "list" else 1 / (1 + np.exp(-outputs.astype(np.float64)))


# -- onnxruntime -------------------------------------------------------------------------------------------------------


def package_problem() -> str | None:
    from importlib.util import find_spec

    if find_spec("onnxruntime"):
        return None
    return (
        "tags are made by the package onnxruntime, which is not installed: pip install onnxruntime (or onnxruntime-gpu)"
    )


class OnnxNetwork:
    """A network in an ONNX file, on the best device that onnxruntime has here."""

    def __init__(self, path: str) -> None:
        import onnxruntime

        present = set(onnxruntime.get_available_providers())
        chosen: Sequence[Any] = [(name, options) for name, options in PROVIDERS if name in present]
        try:
            self.session = onnxruntime.InferenceSession(path, providers=chosen)
        except Exception as error:  # of the package's own, which have no common base
            raise CheckpointError(f"{path} cannot be loaded by onnxruntime: {str(error).splitlines()[0]}") from error
        first = self.session.get_inputs()[0]
        self.name = first.name
        self.batch_size = first.shape[0] if isinstance(first.shape[0], int) and first.shape[0] > 0 else None

    def __call__(self, images: np.ndarray) -> np.ndarray:
        return self.session.run(None, {self.name: images})[0]
