"""modelspec.* metadata of a model that is told by switches: v2, sdxl, and `model_config`, a family with its variant
({"flux": "dev"})."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from library.core.registry import import_target
from library.dataset import parse_resolution
from library.families.registry import record_of
from library.sai_model_spec import OPTIONAL, PREFIX, VERSION, ModelSpec, build_model_spec, thumbnail_url
from library.training.metadata import commit_hash


@dataclass
class ModelSpecMetadata:
    """The entries without their prefix; None are left out. `additional_fields` are further ones."""

    architecture: str
    implementation: str
    title: str
    resolution: str
    sai_model_spec: str = VERSION
    date: str | None = None
    implementation_version: str | None = None
    prediction_type: str | None = None
    timestep_range: str | None = None
    encoder_layer: str | None = None
    author: str | None = None
    description: str | None = None
    license: str | None = None
    tags: str | None = None
    merged_from: str | None = None
    usage_hint: str | None = None
    thumbnail: str | None = None
    trigger_phrase: str | None = None
    preprocessor: str | None = None
    is_negative_embedding: str | None = None
    additional_fields: dict[str, str] = field(default_factory=dict)

    def to_metadata_dict(self) -> dict[str, str]:
        values = {
            name: value
            for name, value in dataclasses.asdict(self).items()
            if name != "additional_fields" and value is not None
        }
        return {
            PREFIX + name.removeprefix(PREFIX): str(value)
            for name, value in {**values, **self.additional_fields}.items()
        }


def _facts(
    v2: bool, v_parameterization: bool, sdxl: bool, model_config: Mapping[str, str] | None
) -> dict[str, str | None]:
    """What the family writes into its own files. ConfigError for a family that is not trained here."""
    name, variant = next(iter((model_config or {}).items()), ("sdxl" if sdxl else "sd", None))
    switches = SimpleNamespace(is_v2=bool(v2), is_v=bool(v_parameterization), is_schnell=variant == "schnell")
    return import_target(record_of(name).family).modelspec(switches)


def _kind(lora: bool, textual_inversion: bool) -> str:
    return "lora" if lora else "textual-inversion" if textual_inversion else ""


def determine_architecture(
    v2: bool, v_parameterization: bool, sdxl: bool, lora: bool, textual_inversion: bool,
    model_config: Mapping[str, str] | None = None
) -> str:
    architecture, kind = (
        _facts(v2, v_parameterization, sdxl, model_config)["architecture"],
        _kind(lora, textual_inversion),
    )
    return f"{architecture}/{kind}" if kind else str(architecture)


def determine_implementation(
    lora: bool, textual_inversion: bool, sdxl: bool, model_config: Mapping[str, str] | None = None,
    is_stable_diffusion_ckpt: bool | None = None
) -> str:
    """Where names of tensors come from. Embeddings and whole files of Stable Diffusion have those of its original
    code."""
    original = not model_config and (textual_inversion or bool(is_stable_diffusion_ckpt))
    return str(_facts(False, False, sdxl or original, model_config)["implementation"])


def determine_resolution(
    reso: Any = None, sdxl: bool = False, model_config: Mapping[str, str] | None = None, v2: bool = False,
    v_parameterization: bool = False
) -> str:
    """WIDTHxHEIGHT of "S", "W,H", a number or a pair; of the model's usual size without one."""
    usual = 1024 if sdxl or model_config else 768 if v2 and v_parameterization else 512
    width, height = parse_resolution(usual if reso is None else tuple(reso) if isinstance(reso, list) else reso)
    return f"{width}x{height}"


def file_to_data_url(file_path: str) -> str:
    """A picture as a data: URL. ConfigError when it is none."""
    return str(thumbnail_url(file_path))


def build_metadata(
    state_dict: Mapping[str, Any] | None, v2: bool, v_parameterization: bool, sdxl: bool, lora: bool,
    textual_inversion: bool,
    timestamp: float, title: str | None = None, reso: Any = None, is_stable_diffusion_ckpt: bool | None = None,
    author: str | None = None,
    description: str | None = None, license: str | None = None, tags: str | None = None, merged_from: str | None = None,
    timesteps: tuple[int, int] | int | None = None, clip_skip: int | None = None,
    model_config: Mapping[str, str] | None = None,
    optional_metadata: Mapping[str, str | None] | None = None,
) -> dict[str, str]:
    """The entries. `state_dict` is taken for compatibility: nothing of it is told."""
    facts = _facts(v2, v_parameterization, sdxl, model_config)
    own = {"author": author, "description": description, "license": license, "tags": tags, "merged_from": merged_from}
    size = determine_resolution(reso, sdxl, model_config, v2, v_parameterization)
    return build_model_spec(ModelSpec(
        architecture=str(facts["architecture"]),
        implementation=determine_implementation(lora, textual_inversion, sdxl, model_config, is_stable_diffusion_ckpt),
        implementation_version=f"atelier/{commit_hash() or 'unknown'}", kind=_kind(lora, textual_inversion),
        title=title,
        resolution_wh=tuple(int(side) for side in size.split("x")), timestamp=timestamp,
        prediction_type=facts.get("prediction_type"),
        timestep_range=(timesteps, timesteps) if isinstance(timesteps, int) else timesteps, encoder_layer=clip_skip,
        optional={**own, **(optional_metadata or {})},
    ))


def build_metadata_dataclass(
    state_dict: Mapping[str, Any] | None, v2: bool, v_parameterization: bool, sdxl: bool, lora: bool,
    textual_inversion: bool,
    timestamp: float, title: str | None = None, reso: Any = None, is_stable_diffusion_ckpt: bool | None = None,
    author: str | None = None,
    description: str | None = None, license: str | None = None, tags: str | None = None, merged_from: str | None = None,
    timesteps: tuple[int, int] | int | None = None, clip_skip: int | None = None,
    model_config: Mapping[str, str] | None = None,
    optional_metadata: Mapping[str, str | None] | None = None,
) -> ModelSpecMetadata:
    """The same as a record."""
    texts = build_metadata(**locals())
    return ModelSpecMetadata(**{name.removeprefix(PREFIX): text for name, text in texts.items()})


def get_sai_model_spec_dataclass(
    state_dict: Mapping[str, Any] | None, args: Any, sdxl: bool, lora: bool, textual_inversion: bool,
    is_stable_diffusion_ckpt: bool | None = None, sd3: str | None = None, flux: str | None = None,
    lumina: str | None = None,
    hunyuan_image: str | None = None, optional_metadata: Mapping[str, str | None] | None = None,
) -> ModelSpecMetadata:
    """Of the options of a training; `sd3`, `flux` and so on name a family by its variant."""
    variants = {"sd3": sd3, "flux": flux, "lumina": lumina, "hunyuan_image": hunyuan_image}
    low, high = getattr(args, "min_timestep", None), getattr(args, "max_timestep", None)
    written = {key: getattr(args, f"metadata_{key}", None) for key in OPTIONAL}
    return build_metadata_dataclass(
        state_dict, getattr(args, "v2", False), getattr(args, "v_parameterization", False), sdxl, lora,
        textual_inversion, time.time(),
        getattr(args, "metadata_title", None) or getattr(args, "output_name", None), getattr(args, "resolution", None),
        is_stable_diffusion_ckpt,
        timesteps=None if low is None and high is None else (low or 0, 1000 if high is None else high),
        clip_skip=getattr(args, "clip_skip", None),
        model_config={name: text for name, text in variants.items() if text} or None,
        optional_metadata={**written, **(optional_metadata or {})},
    )


def get_sai_model_spec(
    state_dict: Mapping[str, Any] | None, args: Any, sdxl: bool, lora: bool, textual_inversion: bool,
    is_stable_diffusion_ckpt: bool | None = None, sd3: str | None = None, flux: str | None = None,
    lumina: str | None = None,
    hunyuan_image: str | None = None, optional_metadata: Mapping[str, str | None] | None = None,
) -> dict[str, str]:
    """The entries of `get_sai_model_spec_dataclass`."""
    return get_sai_model_spec_dataclass(**locals()).to_metadata_dict()
