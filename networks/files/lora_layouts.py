"""The layouts of adapter files that programs read, by the name that a user gives: names of layers and place of the
strength.

| layout | names | strength |
|---|---|---|
| kohya | lora_unet_..., lora_te_... | alpha |
| diffusers | unet., transformer., text_encoder. | folded into lora_B |
| peft | as diffusers; in `adapter_model.safetensors` base_model.model. | alpha in PEFT's configuration, tensors untouched |
| comfy | diffusion_model., text_encoders. | alpha |
| ai-toolkit | as diffusers, comfy or kohya: `ai_toolkit` of the record | folded, balanced (LoKr and kohya names: alpha) |
| xlabs | double_blocks.N.processor.qkv_lora1 | folded, balanced |
| lycoris | lycoris_... | alpha |
| other | any prefix, then original paths | folded, half into each matrix |
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from library.core.errors import CheckpointError
from library.families.record import AdapterFacts
from library.families.registry import records
from networks.files.file_names import (
    DENOISER_MODELS,
    DOTTED_PREFIX,
    LYCORIS_PREFIX,
    PEFT_PREFIX,
    is_kohya_name,
    names_of_family,
)
from networks.files.lora_conversion import (
    is_beside,
    named_parameter,
    refuse_parts,
    to_diffusers,
    to_dotted,
    to_kohya,
    to_lycoris,
)
from networks.files.network_files import by_module
from networks.files.parameter_names import RENAMED
from networks.files.peft_config import METADATA_KEY, with_alphas
from networks.files.xlabs_names import is_xlabs, to_xlabs

_LORA = {"lora_down.weight", "lora_up.weight", "lora_mid.weight", "alpha", "dora_scale"}
_ALPHA = ".alpha"


@dataclass(frozen=True)
class AdapterFile:
    """What an adapter file holds. `configs`: PEFT's configurations, model ("" for all) -> fields
    (networks/files/peft_config.py); `prefix`: what stands before the denoiser's paths where that is no known word."""

    tensors: dict[str, torch.Tensor]
    metadata: dict[str, str] = field(default_factory=dict)
    configs: dict[str, dict[str, Any]] = field(default_factory=dict)
    prefix: str = DOTTED_PREFIX


@dataclass(frozen=True)
class Layout:
    """`names`: kohya, diffusers, dotted, lycoris or xlabs; `fold`: where alpha goes (lora_conversion.fold_factors);
    `config`: alpha goes into PEFT's configuration; `prefix` of dotted names; `wrapped`: names of one model as PEFT
    itself writes them."""

    names: str
    fold: str | None = None
    config: bool = False
    prefix: str = DOTTED_PREFIX
    wrapped: bool = False


def layout_for(name: str, family: str, prefix: str | None = None, wrapped: bool = False) -> Layout:
    """The layout that `--to` means for a family. CheckpointError when the family has no such files."""
    facts = records()[family].adapters or AdapterFacts(title=family)
    if name == "ai-toolkit":
        return Layout("kohya") if facts.ai_toolkit == "kohya" else Layout(facts.ai_toolkit, "balanced")
    if name == "xlabs" and not facts.has_xlabs:
        owners = [
            record.title for record in records().values() if record.adapters is not None and record.adapters.has_xlabs
        ]
        raise CheckpointError(f"the layout of XLabs is for adapters of {', '.join(owners)}; this one is for {family}")
    return {
        "kohya": Layout("kohya"),
        "diffusers": Layout("diffusers", "up"),
        "peft": Layout("diffusers", config=True, wrapped=wrapped),
        "comfy": Layout("dotted"),
        "xlabs": Layout("xlabs", "balanced"),
        "lycoris": Layout("lycoris"),
        "other": Layout("dotted", "root", prefix=prefix or DOTTED_PREFIX),
    }[name]


def layout_of(file: AdapterFile, family: str) -> Layout:
    """The layout of a file by its names; files without alpha count as those of layouts into which it is folded."""
    has_alpha = any(key.endswith(_ALPHA) for key in file.tensors)
    for key in file.tensors:
        if is_xlabs(key):
            return Layout("xlabs", "balanced")
        if key.startswith(PEFT_PREFIX):
            return Layout("diffusers", config=True, wrapped=True)
        if key.startswith((DOTTED_PREFIX, file.prefix, "text_encoders.")):
            return Layout("dotted", None if has_alpha else "balanced", prefix=file.prefix)
        if key.startswith(LYCORIS_PREFIX):
            return Layout("lycoris")
        prefix = next((f"{model}." for model in DENOISER_MODELS if key.startswith(f"{model}.")), None)
        if prefix and _is_own_path(key, prefix, family):
            return Layout("dotted", None if has_alpha else "balanced", prefix=prefix)
    if all(is_kohya_name(key.partition(".")[0]) or is_beside(key) for key in file.tensors):
        return Layout("kohya")
    return Layout("diffusers", config=True) if file.configs else Layout("diffusers", None if has_alpha else "up")


def _is_own_path(key: str, prefix: str, family: str) -> bool:
    """Whether what stands behind the prefix is a path of our module tree, and none of diffusers."""
    found = named_parameter(key, {})
    place = names_of_family(family).find(found[0]) if found else None
    return place is not None and place.layer is not None and found[0] not in place.diffusers and place.part is None


def kohya_tensors(family: str, file: AdapterFile) -> dict[str, torch.Tensor]:
    """The tensors of a file under kohya names, with the strength as alpha."""
    tensors: Mapping[str, torch.Tensor] = file.tensors
    if file.configs:
        tensors = with_alphas(tensors, file.configs)
    if file.prefix != DOTTED_PREFIX:
        start = len(file.prefix)
        tensors = {
            DOTTED_PREFIX + key[start:] if key.startswith(file.prefix) else key: tensor
            for key, tensor in tensors.items()
        }
    return to_kohya(family, tensors)


def rewritten(family: str, file: AdapterFile, layout: Layout) -> AdapterFile:
    """A file in another layout. CheckpointError when that cannot hold what the file has. What stands beside layers is
    carried along."""
    beside = {key: tensor for key, tensor in file.tensors.items() if is_beside(key)}
    result = _rewritten(
        family,
        replace(file, tensors={key: tensor for key, tensor in file.tensors.items() if key not in beside}),
        layout,
    )
    return replace(result, tensors={**result.tensors, **beside})


def _rewritten(family: str, file: AdapterFile, layout: Layout) -> AdapterFile:
    tensors = kohya_tensors(family, file)
    metadata = {key: value for key, value in file.metadata.items() if key != METADATA_KEY}
    result = AdapterFile(tensors, metadata)
    if layout.names == "kohya":
        for name, module in by_module(tensors).items():
            refuse_parts(name, module)
        return result
    if layout.names == "lycoris":
        return replace(result, tensors=to_lycoris(family, tensors))
    if layout.names == "dotted":
        return replace(result, tensors=to_dotted(family, tensors, layout.prefix, layout.fold), prefix=layout.prefix)
    if layout.names == "xlabs":
        return replace(result, tensors=_as_xlabs(family, tensors))
    if layout.config:
        return _with_config(to_diffusers(family, _only_lora(tensors), None), metadata, layout.wrapped)
    return replace(result, tensors=to_diffusers(family, tensors, layout.fold))


def _as_xlabs(family: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    dotted = to_dotted(family, _only_lora(tensors), fold="balanced")
    modules: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in dotted.items():
        name, _, parameter = key.rpartition(".lora_")
        place = names_of_family(family).find(name) if parameter else None
        if place is None:
            raise CheckpointError(f"{key} is no part of a plain LoRA; the layout of XLabs holds nothing else")
        parameter = f"lora_{parameter}"
        modules.setdefault(place.kohya, {})[RENAMED.get(parameter, parameter)] = tensor
    return to_xlabs(modules)


def _only_lora(tensors: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    """CheckpointError when a module is of a kind that a configuration of LoRA does not speak of."""
    for name, module in by_module(tensors).items():
        if not set(module) <= _LORA:
            raise CheckpointError(
                f"{name} has {', '.join(sorted(module))}; this layout holds LoRA and DoRA only. --to kohya, comfy, "
                "lycoris and"
                " diffusers keep other kinds"
            )
    return tensors


# -- the strength in PEFT's configuration ------------------------------------------------------------------------------


def _with_config(tensors: Mapping[str, torch.Tensor], metadata: dict[str, str], wrapped: bool) -> AdapterFile:
    """`<module>.alpha` moved into configurations: in the metadata (as diffusers writes it), or, with `wrapped`, for a
    file `adapter_config.json` beside, which holds one model."""
    kept = {key: tensor for key, tensor in tensors.items() if not key.endswith(_ALPHA)}
    models: dict[str, dict[str, tuple[int, float]]] = {}
    has_dora: set[str] = set()
    for key, tensor in kept.items():
        name, mark, _ = key.partition(".lora_A.weight")
        model, _, path = name.partition(".")
        if mark:
            rank = tensor.shape[0]
            models.setdefault(model, {})[path] = (rank, float(tensors.get(name + _ALPHA, torch.tensor(float(rank)))))
        elif key.endswith(".lora_magnitude_vector"):
            has_dora.add(model)
    configs = {model: _config(layers, model in has_dora) for model, layers in models.items()}
    if not wrapped:
        flat = {f"{model}.{name}": value for model, config in configs.items() for name, value in config.items()}
        return AdapterFile(kept, {**metadata, METADATA_KEY: json.dumps(flat, sort_keys=True)}, configs)
    if len(configs) != 1:
        raise CheckpointError(
            f"the adapter has layers of {', '.join(sorted(configs))}; a folder of PEFT holds one model. Write to "
            "another file name"
            " than adapter_model.safetensors, which diffusers reads for all of them"
        )
    renamed = {PEFT_PREFIX + key.partition(".")[2]: tensor for key, tensor in kept.items()}
    return AdapterFile(renamed, metadata, {"": next(iter(configs.values()))})


def _config(layers: Mapping[str, tuple[int, float]], use_dora: bool) -> dict[str, Any]:
    """The configuration of one model: path -> (rank, alpha). The commonest values stand for all, the others in
    patterns, whose keys are regular expressions for the whole path."""
    ranks, alphas = [rank for rank, _ in layers.values()], [alpha for _, alpha in layers.values()]
    rank, alpha = max(sorted(set(ranks)), key=ranks.count), max(sorted(set(alphas)), key=alphas.count)
    return {
        "peft_type": "LORA", "r": rank, "lora_alpha": _plain(alpha), "target_modules": sorted(map(_unrooted, layers)),
        "use_dora": use_dora,
        "rank_pattern": {_exact(path): own for path, (own, _) in layers.items() if own != rank},
        "alpha_pattern": {_exact(path): _plain(own) for path, (_, own) in layers.items() if own != alpha},
        "lora_dropout": 0.0, "bias": "none", "use_rslora": False, "init_lora_weights": True,
    }  # fmt: skip


def _unrooted(path: str) -> str:
    """transformers 5 has no level `text_model`; without it the end of a path matches in older versions too."""
    return path.removeprefix("text_model.")


def _exact(path: str) -> str:
    end = re.escape(_unrooted(path))
    return end if end != re.escape(path) else f"^{end}"


def _plain(value: float) -> float | int:
    return int(value) if value == int(value) else value
