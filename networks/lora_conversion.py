"""LoRA files under other names: kohya names <-> diffusers (`transformer.*.lora_A/B`) and dotted original names.

| layout | denoiser | alpha |
|---|---|---|
| kohya | lora_unet_double_blocks_0_img_attn_qkv.lora_down/lora_up.weight | kept; fused layers fused |
| diffusers | transformer.transformer_blocks.0.attn.to_q.lora_A/lora_B.weight | folded into lora_B; q, k, v and mlp apart |
| dotted | diffusion_model.double_blocks.0.img_attn.qkv.lora_A/lora_B.weight | kept |

Sizes are read from the tensors, so models of any width work. Names are looked up in tables, never taken apart by guess.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from library.errors import CheckpointError, ConfigError
from library.family_table import family_entry
from library.registry import import_target
from networks.lora import fuse_pairs, split_pair
from networks.targets import targets_of_family

Tensors = Mapping[str, torch.Tensor]

DIFFUSERS_PREFIX = "transformer"
DOTTED_PREFIX = "diffusion_model"


@dataclass(frozen=True)
class LayerNames:
    """One layer, or one per block where `{i}` stands for the block: its original path and its parts in diffusers.

    `rows` says how many output rows the parts have: "equal", or "linear1" (the input width three times, then the rest).
    """

    path: str
    parts: tuple[str, ...]
    rows: str = "equal"


@dataclass(frozen=True)
class _Found:
    layer: LayerNames
    block: str

    def fill(self, text: str) -> str:
        return text.replace("{i}", self.block)


@dataclass(frozen=True)
class _Lora:
    """The tensors of one module in a file; alpha None = the rank."""

    down: torch.Tensor
    up: torch.Tensor
    alpha: float | None

    @property
    def scale(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.down.shape[0]


def to_diffusers(family: str, tensors: Tensors) -> dict[str, torch.Tensor]:
    """A LoRA under kohya names, rewritten for diffusers: `lora_A` = down, `lora_B` = up * alpha / rank, no alpha.

    A fused layer whose up matrix is block-diagonal (trained with split_qkv) is taken apart into its own pairs; otherwise
    all parts share the down matrix. CheckpointError names the modules that have no counterpart.
    """
    layers = _layers(family)
    result: dict[str, torch.Tensor] = {}
    unknown: list[str] = []
    for name, lora in _modules(tensors, ("lora_down.weight", "lora_up.weight")).items():
        found, path = _find(layers, name, "_", "lora_unet_"), _encoder_path(family, name)
        if found is not None:
            rows = _rows(found.layer, lora)
            pairs = [(lora.down, lora.up)] if len(rows) == 1 else split_pair(lora.down, lora.up, rows)
            if pairs is None:
                pairs = [(lora.down, part) for part in lora.up.split(rows)]
            keys = [f"{DIFFUSERS_PREFIX}.{found.fill(part)}" for part in found.layer.parts]
        elif path is not None:
            pairs, keys = [(lora.down, lora.up)], [path]
        else:
            unknown.append(name)
            continue
        for key, (down, up) in zip(keys, pairs, strict=True):
            result[f"{key}.lora_A.weight"] = down.contiguous()
            result[f"{key}.lora_B.weight"] = _scaled(up, lora.scale)
    _refuse(unknown, "diffusers")
    return result


def to_dotted(family: str, tensors: Tensors) -> dict[str, torch.Tensor]:
    """A LoRA under kohya names, rewritten to `diffusion_model.<original path>.lora_A/B.weight` with its alpha; text
    encoders are left out, the layout has none."""
    layers = _layers(family)
    result: dict[str, torch.Tensor] = {}
    unknown: list[str] = []
    for name, lora in _modules(tensors, ("lora_down.weight", "lora_up.weight")).items():
        found = _find(layers, name, "_", "lora_unet_")
        if found is not None:
            _put(result, f"{DOTTED_PREFIX}.{found.fill(found.layer.path)}", ("lora_A.weight", "lora_B.weight"), lora)
        elif _encoder_path(family, name) is None:
            unknown.append(name)
    _refuse(unknown, "the dotted layout")
    return result


def to_kohya(family: str, tensors: Tensors) -> dict[str, torch.Tensor]:
    """A LoRA of any known layout under kohya names. Parts of a fused layer become one module: with the same down matrix
    as they are, else with rank k*r, a block-diagonal up matrix and alpha = k*r. Absent parts count as zero."""
    layers = _layers(family)
    parts: dict[str, list[_Lora | None]] = {}
    sources: dict[str, LayerNames] = {}
    result = {  # what has kohya names already
        key: tensor
        for key, tensor in tensors.items()
        if not key.endswith((".lora_A.weight", ".lora_B.weight")) and f"{key.removesuffix('.alpha')}.lora_A.weight" not in tensors
    }
    unknown: list[str] = []
    for name, lora in _modules(tensors, ("lora_A.weight", "lora_B.weight")).items():
        encoder = _kohya_encoder_name(family, name)
        dotted = _find_path(layers, name)
        place = _find_part(layers, name)
        if encoder is not None or dotted is not None:
            _put(result, encoder or dotted, ("lora_down.weight", "lora_up.weight"), lora, needs_alpha=True)
        elif place is not None:
            found, number = place
            own = "lora_unet_" + found.fill(found.layer.path).replace(".", "_")
            parts.setdefault(own, [None] * len(found.layer.parts))[number] = lora
            sources[own] = found.layer
        else:
            unknown.append(name)
    _refuse(unknown, "kohya names")
    for own, loras in parts.items():
        _put(result, own, ("lora_down.weight", "lora_up.weight"), _fused(loras, sources[own]), needs_alpha=True)
    return result


def _fused(loras: Sequence[_Lora | None], layer: LayerNames) -> _Lora:
    """The parts of a fused layer as one module."""
    present = [lora for lora in loras if lora is not None]
    if len(loras) == 1:
        return present[0]
    width = present[0].down.shape[1]
    rows = [lora.up.shape[0] if lora else width * (4 if layer.rows == "linear1" and i == 3 else 1) for i, lora in enumerate(loras)]
    first = present[0]
    if len(present) == len(loras) and all(l.scale == first.scale and torch.equal(l.down, first.down) for l in present):
        return _Lora(first.down, torch.cat([lora.up for lora in present]), first.alpha)
    pairs = [
        (lora.down, _scaled(lora.up, lora.scale)) if lora else (first.down.new_zeros(0, width), first.up.new_zeros(rows[i], 0))
        for i, lora in enumerate(loras)
    ]
    down, up = fuse_pairs(pairs)
    return _Lora(down, up, float(down.shape[0]))


def _layers(family: str) -> tuple[LayerNames, ...]:
    module = family_entry(family).targets.partition(":")[0]
    try:
        return import_target(f"{module}:file_layers")()
    except AttributeError:
        raise ConfigError(f"LoRA files of {family} cannot be rewritten: {module} has no file_layers") from None


def _modules(tensors: Tensors, keys: tuple[str, str]) -> dict[str, _Lora]:
    """Module name -> its tensors, for the modules that are written with these two keys."""
    modules: dict[str, _Lora] = {}
    for key in tensors:
        if not key.endswith(f".{keys[0]}"):
            continue
        name = key[: -len(keys[0]) - 1]
        if f"{name}.{keys[1]}" not in tensors:
            raise CheckpointError(f"{name} has {keys[0]} and no {keys[1]}; the file is incomplete")
        alpha = tensors.get(f"{name}.alpha")
        modules[name] = _Lora(tensors[key], tensors[f"{name}.{keys[1]}"], None if alpha is None else float(alpha))
    return modules


def _pattern(text: str, separator: str) -> re.Pattern[str]:
    return re.compile(re.escape(text.replace(".", separator)).replace(re.escape("{i}"), r"(\d+)"))


def _find(layers: Iterable[LayerNames], name: str, separator: str, prefix: str) -> _Found | None:
    if not name.startswith(prefix):
        return None
    for layer in layers:
        match = _pattern(layer.path, separator).fullmatch(name, len(prefix))
        if match:
            return _Found(layer, match[1] if match.groups() else "")
    return None


def _find_path(layers: Iterable[LayerNames], name: str) -> str | None:
    """The kohya name of a dotted original path."""
    found = _find(layers, name, ".", f"{DOTTED_PREFIX}.")
    return "lora_unet_" + found.fill(found.layer.path).replace(".", "_") if found else None


def _find_part(layers: Iterable[LayerNames], name: str) -> tuple[_Found, int] | None:
    """The layer and the number of the part that a diffusers name means."""
    prefix = f"{DIFFUSERS_PREFIX}."
    if not name.startswith(prefix):
        return None
    for layer in layers:
        for number, part in enumerate(layer.parts):
            match = _pattern(part, ".").fullmatch(name, len(prefix))
            if match:
                return _Found(layer, match[1] if match.groups() else ""), number
    return None


def _encoder_path(family: str, name: str) -> str | None:
    """The diffusers name of a text encoder module under its kohya name."""
    for encoder in targets_of_family(family).text_encoders:
        rest = name.removeprefix(f"{encoder.prefix}_")
        for path in encoder.paths if rest != name else ():
            match = _pattern(path, "_").fullmatch(rest)
            if match:
                return f"{encoder.diffusers_name}.{path.replace('{i}', match[1])}"
    return None


def _kohya_encoder_name(family: str, name: str) -> str | None:
    for encoder in targets_of_family(family).text_encoders:
        rest = name.removeprefix(f"{encoder.diffusers_name}.")
        if rest != name and any(_pattern(path, ".").fullmatch(rest) for path in encoder.paths):
            return f"{encoder.prefix}_{rest.replace('.', '_')}"
    return None


def _rows(layer: LayerNames, lora: _Lora) -> list[int]:
    rows, width, count = lora.up.shape[0], lora.down.shape[1], len(layer.parts)
    if layer.rows == "linear1":
        if rows <= 3 * width:
            raise CheckpointError(f"{layer.path}: {rows} rows; needed: more than three times its {width} inputs")
        return [width] * 3 + [rows - 3 * width]
    if rows % count:
        raise CheckpointError(f"{layer.path}: {rows} rows do not divide into {count} parts")
    return [rows // count] * count


def _scaled(up: torch.Tensor, scale: float) -> torch.Tensor:
    return (up.float() * scale).to(up.dtype).contiguous()


def _put(result: dict[str, torch.Tensor], name: str, keys: tuple[str, str], lora: _Lora, needs_alpha: bool = False) -> None:
    result[f"{name}.{keys[0]}"] = lora.down.contiguous()
    result[f"{name}.{keys[1]}"] = lora.up.contiguous()
    if lora.alpha is not None or needs_alpha:
        result[f"{name}.alpha"] = torch.tensor(float(lora.down.shape[0]) if lora.alpha is None else lora.alpha)


def _refuse(unknown: list[str], layout: str) -> None:
    if unknown:
        more = " ..." if len(unknown) > 5 else ""
        raise CheckpointError(f"{len(unknown)} modules have no name in {layout}: {', '.join(unknown[:5])}{more}")
