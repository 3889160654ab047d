"""modelspec.* metadata of model files, version 1.0.1 (https://github.com/Stability-AI/ModelSpec)."""

from __future__ import annotations

import base64
import datetime
import mimetypes
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from library.core.errors import ConfigError
from library.core.lazy_names import homes, lazy_names
from library.core.text_files import open_file

__getattr__, __dir__ = lazy_names(__name__, {
    **homes(
        "library.compat.modelspec", "ModelSpecMetadata", "build_metadata", "build_metadata_dataclass",
        "determine_architecture",
        "determine_implementation", "determine_resolution", "file_to_data_url",
    ),
    **homes("library.compat.arguments", "add_model_spec_arguments"),
    **homes("library.compat.files", "load_metadata_from_safetensors"),
})

VERSION = "1.0.1"
PREFIX = "modelspec."
SOURCE_DATE = "SOURCE_DATE_EPOCH"
LATEST_DATE = 253_402_300_799
"""the last second of the year 9999"""
KIND_TITLES = {"lora": "LoRA", "textual-inversion": "TextualInversion"}
OPTIONAL = (
    "author", "description", "license", "tags", "merged_from", "usage_hint", "thumbnail", "trigger_phrase",
    "preprocessor",
    "is_negative_embedding",
)  # fmt: skip
"""keys that the options --metadata_<key> fill"""


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """What the keys are made of. `kind` is appended to the architecture: lora, textual-inversion, controlnet, or "" for
    a full model; `resolution_wh` is the training size; `optional` holds the keys named in OPTIONAL."""

    architecture: str
    implementation: str
    implementation_version: str
    kind: str = ""
    title: str | None = None
    resolution_wh: tuple[int, int] = (1024, 1024)
    timestamp: float
    prediction_type: str | None = None
    timestep_range: tuple[int, int] | None = None
    encoder_layer: int | None = None
    optional: Mapping[str, str | None] = field(default_factory=dict)


def build_model_spec(spec: ModelSpec) -> dict[str, str]:
    """The metadata entries; values that are None are left out."""
    is_complete = not spec.kind or "/" in spec.architecture  # as users of --metadata_arch may write it
    values: dict[str, Any] = {
        "sai_model_spec": VERSION,
        "architecture": spec.architecture if is_complete else f"{spec.architecture}/{spec.kind}",
        "implementation": spec.implementation,
        "title": spec.title or KIND_TITLES.get(spec.kind, "Checkpoint"),  # no time: equal runs write equal files
        "resolution": f"{spec.resolution_wh[0]}x{spec.resolution_wh[1]}",
        "date": local_date(spec.timestamp),
        "implementation_version": spec.implementation_version,
        "prediction_type": spec.prediction_type,
        "timestep_range": None if spec.timestep_range is None else f"{spec.timestep_range[0]},{spec.timestep_range[1]}",
        "encoder_layer": spec.encoder_layer,
    }
    for key in OPTIONAL:
        values[key] = spec.optional.get(key)
    values["thumbnail"] = thumbnail_url(values["thumbnail"])
    return {PREFIX + key: str(value) for key, value in values.items() if value is not None}


def source_date() -> int | None:
    """Seconds since 1970 that stand for every time in a file (the variable SOURCE_DATE_EPOCH,
    https://reproducible-builds.org/specs/source-date-epoch), so that equal runs write equal files; None when it is not
    set. ConfigError for another text."""
    text = os.environ.get(SOURCE_DATE, "").strip()
    if not text:
        return None
    if not (text.isascii() and text.isdigit() and int(text[:20]) <= LATEST_DATE):
        raise ConfigError(
            f"the environment variable {SOURCE_DATE} is '{text}'; needed: seconds since 1970 as a whole number, or "
            "unset it"
        )
    return int(text)


def local_date(timestamp: float) -> str:
    """ISO 8601 with seconds and the offset of the local time zone; with a source date in UTC, which is the same
    everywhere."""
    zone = datetime.timezone.utc if source_date() is not None else None
    return datetime.datetime.fromtimestamp(int(timestamp), zone).astimezone(zone).isoformat(timespec="seconds")


def thumbnail_url(thumbnail: str | None) -> str | None:
    """A data: URL as it is, an image file as a data: URL."""
    if not thumbnail or thumbnail.startswith("data:"):
        return thumbnail or None
    kind = mimetypes.guess_type(thumbnail)[0] or ""
    if not os.path.isfile(thumbnail) or not kind.startswith("image/"):
        raise ConfigError(f"--metadata_thumbnail is {thumbnail}; needed: an image file, or a data: URL")
    with open_file(thumbnail) as file:
        return f"data:{kind};base64,{base64.b64encode(file.read()).decode('ascii')}"
