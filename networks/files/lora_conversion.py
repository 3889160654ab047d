"""Adapter files under other names: kohya names <-> diffusers (PEFT) and dotted (ComfyUI) names, for every family.

| layout | parameters | alpha |
|---|---|---|
| kohya | lora_down.weight, lora_up.weight | kept; fused layers fused |
| diffusers | lora_A.weight, lora_B.weight | folded into lora_B; parts of fused layers apart |
| dotted | lora_A.weight, lora_B.weight | kept |
| lycoris | lora_down.weight, lora_up.weight | kept |

Programs differ in what they do with alpha; networks/files/lora_layouts.py says which one gets what. Reading goes
through one hub, `to_kohya`: names by the table of the family (networks/files/file_names.py), parameters by the table
below. Kinds other than LoRA (LoHa, LoKr, ...) keep their parameters and alpha in every layout; only layers are renamed.
Sizes are read from the tensors, so models of any width work.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from library.checkpoints.embeddings import BUNDLED
from library.checkpoints.number_formats import narrowed
from library.core.errors import CheckpointError
from library.families.registry import FAMILIES
from networks.files.file_names import (
    DOTTED_PREFIX,
    KOHYA_PREFIX,
    LYCORIS_PREFIX,
    OFT_PREFIX,
    LayerNames,
    Place,
    is_kohya_name,
    names_of_family,
)
from networks.files.fused_rows import rows_of_parts, with_missing_rows
from networks.files.layer_tensors import alpha_of, problem_of, scale_from
from networks.files.parameter_names import DOWN, MID, PARAMETERS, UP, ending_of
from networks.files.stacked import ROWS, parts_of, stacked
from networks.files.xlabs_names import from_xlabs, is_xlabs
from networks.kinds.fused_pairs import fuse_pairs, split_pair
from networks.kinds.registry import known_kind_of
from networks.kinds.targets import targets_of_family

__all__ = ["LayerNames", "fold_factors", "to_diffusers", "to_dotted", "to_kohya", "to_lycoris"]

logger = logging.getLogger(__name__)

Tensors = Mapping[str, torch.Tensor]
Module = dict[str, torch.Tensor]
"""parameter name of kohya files -> tensor"""

_PEFT = {DOWN: "lora_A.weight", UP: "lora_B.weight"}
_PROCESSOR = re.compile(r"(?P<path>.+)\.(?P<leaf>to_q|to_k|to_v|to_out)_lora\.(?P<side>down|up)\.weight")
"""diffusers before PEFT: the layers of an attention stood in its processor"""


@dataclass(frozen=True)
class _Lora:
    """The tensors of one LoRA module; alpha None = the rank."""

    down: torch.Tensor
    up: torch.Tensor
    alpha: float | None

    @property
    def scale(self) -> float:
        return scale_from(self.alpha, self.up.shape[1])


def to_kohya(family: str, tensors: Tensors) -> dict[str, torch.Tensor]:
    """An adapter of any known layout under kohya names.

    LoRA parts of a fused layer become one module: with the same down matrix as they are, else with rank k*r, a
    block-diagonal up matrix and alpha = k*r; absent parts count as zero. An adapter of a family whose adapters fit too
    (`NetworkTargets.reads`) has its fused layers taken apart. Kohya names that are in no table stay as they
    are, for the reader to report, and so does what may stand beside layers (`is_beside`); other unknown names are a
    CheckpointError.
    """
    origin = _family_read(family, tensors)
    if origin is not None:
        tensors = to_diffusers(origin, tensors, fold=None)
    result: dict[str, torch.Tensor] = {}
    parts: dict[str, list[Module | None]] = {}
    fused: dict[str, LayerNames] = {}
    written: dict[tuple[str, int | None], str] = {}
    unknown: list[str] = []
    modules, others = _modules(from_xlabs(tensors) if any(map(is_xlabs, tensors)) else tensors)
    refuse_unknown(others)
    result.update(others)
    table = names_of_family(family, modules)
    for name, module in modules.items():
        place = table.find(name)
        _refuse_twice(written, place, name)
        if place is None and is_kohya_name(name):
            _put(result, name, module)  # a name of OFT files, or one that the reader has to judge
        elif place is None:
            unknown.append(name)
        elif place.part is None:
            foreign = not is_kohya_name(name)
            _put(result, place.kohya, _with_alpha(module) if foreign else module)
        else:
            parts.setdefault(place.kohya, [None] * len(place.layer.parts))[place.part] = module
            fused[place.kohya] = place.layer
    _refuse(unknown, "kohya names")
    for name, own in parts.items():
        _put(result, name, _joined(name, own, fused[name]))
    return result


def _family_read(family: str, tensors: Tensors) -> str | None:
    """The other family that an adapter was made for, of those whose adapters fit this one: its table knows more of the
    names."""
    others = targets_of_family(family).reads if family in FAMILIES else ()
    if not others:
        return None
    names = {found[0] for key in tensors if (found := named_parameter(key, tensors)) is not None}

    def known(of: str) -> int:
        table = names_of_family(of, names)
        return sum(table.find(name) is not None for name in names)

    best = max((family, *(other for other in others if other in FAMILIES)), key=known)
    return None if best == family else best


def _refuse_twice(written: dict[tuple[str, int | None], str], place: Place | None, name: str) -> None:
    """CheckpointError for a layer that stands in a file under two names, of which one would be lost."""
    if place is None:
        return
    parts = (
        [None, place.part] if place.part is not None else [None, *range(len(place.layer.parts) if place.layer else 0)]
    )
    other = next((written[place.kohya, part] for part in parts if (place.kohya, part) in written), None)
    if other is not None:
        raise CheckpointError(f"{other} and {name} are one layer, {place.kohya}; a file must hold it once")
    written[place.kohya, place.part] = name


def _joined(name: str, parts: Sequence[Module | None], layer: LayerNames) -> Module:
    """The parts of a fused layer as one module: LoRA where all are LoRA, else side by side
    (networks/files/stacked.py)."""
    present = [part for part in parts if part is not None]
    if all(set(part) <= {DOWN, UP, MID, "alpha"} for part in present):
        return _with_alpha(
            _as_module(_fused([part and _lora_of(name, part, "a part of a fused layer") for part in parts], layer))
        )
    if layer.rows == "swapped":
        raise CheckpointError(
            f"{name} has {', '.join(sorted(present[0]))} for rows in another order; only LoRA can be rewritten there"
        )
    shapes = [None if part is None else _shape_of(name, part) for part in parts]
    width = next(shape[1] for shape in shapes if shape)
    return stacked(parts, with_missing_rows(layer, [shape and shape[0] for shape in shapes], width))


def _shape_of(name: str, part: Module) -> tuple[int, ...]:
    """Shape of the weight that a part changes."""
    kind = known_kind_of(part, name)
    shape = kind.module_class.change_shape({key: tensor for key, tensor in part.items() if key != "dora_scale"})
    if shape is None:
        raise CheckpointError(
            f"{name} has a part of kind {kind.name}, whose tensors do not tell the size of the layer; only other kinds "
            "can be joined"
        )
    return shape


def fold_factors(fold: str | None, scale: float) -> tuple[float, float]:
    """What down and up are multiplied by when alpha / rank (= `scale`) goes into them.

    None: nothing, alpha stays; "up": all into up; "root": the square root into each (a sign into up); "balanced": into down, of which powers of two go over to up until
    both are of about one size (16-bit numbers lose least so).
    """
    if fold is None:
        return 1.0, 1.0
    if fold == "up":
        return 1.0, scale
    if fold == "root":
        return math.sqrt(abs(scale)), math.copysign(math.sqrt(abs(scale)), scale)
    down, up = scale, 1.0
    while 0 < 2 * down < up:
        down, up = 2 * down, up / 2
    return down, up


def to_diffusers(family: str, tensors: Tensors, fold: str | None = "up") -> dict[str, torch.Tensor]:
    """An adapter of any layout rewritten for diffusers: `lora_A` = down, `lora_B` = up * alpha / rank, no alpha.

    `fold`: see fold_factors; with None each part keeps its alpha. A fused layer whose up matrix is block-diagonal
    (trained with split_qkv) is taken apart into its own pairs; otherwise all parts share the down matrix.
    CheckpointError names the modules that have no counterpart.
    """
    result: dict[str, torch.Tensor] = {}
    for place, name, module in _placed(family, tensors, "diffusers"):
        keys = place.diffusers
        if not keys:
            continue
        if ROWS in module:
            for number, part in parts_of(module).items():
                _put(result, keys[number], {_PEFT.get(key, key): tensor for key, tensor in part.items()})
            continue
        if not {DOWN, UP} <= set(module):
            if len(keys) > 1:
                held = ", ".join(sorted(module))
                raise CheckpointError(
                    f"{name} has {held}; diffusers keeps its {len(keys)} parts apart, which only LoRA can be"
                )
            _put(result, keys[0], module)
            continue
        lora = _lora_of(name, module, "an adapter")
        if place.layer is not None and place.layer.rows == "swapped":
            lora = _swapped(lora)
        whole, width = lora.up.shape[0], lora.down.shape[1]
        rows = rows_of_parts(place.layer, whole, width) if len(keys) > 1 else [whole]
        pairs = [(lora.down, lora.up)] if len(rows) == 1 else split_pair(lora.down, lora.up, rows)
        if pairs is None:
            pairs = [(lora.down, part) for part in lora.up.split(rows)]
        factors = fold_factors(fold, lora.scale)
        for key, (down, up) in zip(keys, pairs, strict=True):
            result[f"{key}.lora_A.weight"] = _scaled(f"{key}.lora_A.weight", down, factors[0])
            result[f"{key}.lora_B.weight"] = _scaled(f"{key}.lora_B.weight", up, factors[1])
            if fold is None and lora.alpha is not None:
                result[f"{key}.alpha"] = torch.tensor(lora.alpha * down.shape[0] / lora.down.shape[0])
        if "dora_scale" in module:
            magnitudes = _magnitudes(name, module["dora_scale"], lora).split(rows, dim=0 if lora.down.ndim == 2 else 1)
            result.update(
                {f"{key}.lora_magnitude_vector": part.contiguous() for key, part in zip(keys, magnitudes, strict=True)}
            )
    return result


def to_dotted(
    family: str, tensors: Tensors, prefix: str = DOTTED_PREFIX, fold: str | None = None
) -> dict[str, torch.Tensor]:
    """An adapter of any layout rewritten to `diffusion_model.<original path>.lora_A/B.weight` with its alpha.

    `prefix` stands in front of the denoiser's paths; `fold`: see fold_factors. A text encoder that has no dotted name
    keeps its kohya names, which ComfyUI reads in the same file. So do all layers of families that ComfyUI reads under
    kohya names of the original paths alone (`NetworkTargets.comfy_is_kohya`). Tensors come in the form that ComfyUI
    reads (comfy_forms); where its result differs all the same, the log tells.
    """
    from networks.files.comfy_forms import difference, for_comfy

    result: dict[str, torch.Tensor] = {}
    different: dict[str, list[str]] = {}
    for place, name, module in _placed(family, tensors, "the dotted layout"):
        refuse_parts(name, module)
        module = for_comfy(name, module)
        reason = difference(module)
        if reason:
            different.setdefault(reason, []).append(name)
        if fold is not None and DOWN in module:
            module = _without_alpha(name, _lora_of(name, module, "an adapter"), module, fold)
        if names_of_family(family).targets.comfy_is_kohya:
            _put(result, place.original_kohya, module)
        elif place.dotted:
            path = place.dotted
            if path.startswith(DOTTED_PREFIX):
                path = prefix + path[len(DOTTED_PREFIX) :]
            _put(result, path, {_PEFT.get(key, key): tensor for key, tensor in module.items()})
        else:
            _put(result, name, module)
    for reason, names in different.items():
        logger.warning("ComfyUI gives another result for %d layers (first: %s): %s", len(names), names[0], reason)
    return result


def to_lycoris(family: str, tensors: Tensors) -> dict[str, torch.Tensor]:
    """An adapter of any layout with `lycoris_` in front of the denoiser's layers, as LyCORIS writes outside trainers.
    Text encoders keep their kohya names: that prefix does not say which encoder a layer is in."""
    result: dict[str, torch.Tensor] = {}
    for place, name, module in _placed(family, tensors, "the layout of LyCORIS"):
        refuse_parts(name, module)
        _put(result, name if place.encoder else LYCORIS_PREFIX + place.kohya[len(KOHYA_PREFIX) :], module)
    return result


def _modules(tensors: Tensors) -> tuple[dict[str, Module], dict[str, torch.Tensor]]:
    """(module name as written -> its parameters, tensors whose keys are no adapter's)."""
    modules: dict[str, Module] = {}
    others: dict[str, torch.Tensor] = {}
    for key, tensor in tensors.items():
        found = named_parameter(key, tensors)
        if found is None:
            others[key] = tensor
        else:
            modules.setdefault(found[0], {})[found[1]] = tensor
    for name, module in modules.items():
        module = modules[name] = _unsplit(module)
        for have, lack in ((DOWN, UP), (UP, DOWN)):
            if have in module and lack not in module:
                raise CheckpointError(f"{name} has {have} and no {lack}; the file is incomplete")
        wrong = problem_of(module)
        if wrong:
            raise CheckpointError(f"{name}: {wrong}")
    return modules, others


def _unsplit(module: Module) -> Module:
    """The matrices of a layer that was trained in parts, one pair each, as one pair."""
    count = sum(key.startswith("lora_down.") and key != DOWN for key in module)
    pairs = [tuple(module.get(f"lora_{side}.{number}.weight") for side in ("down", "up")) for number in range(count)]
    if not count or any(tensor is None for pair in pairs for tensor in pair):
        return module
    down, up = fuse_pairs(pairs)
    rest = {key: tensor for key, tensor in module.items() if not re.fullmatch(r"lora_(down|up)\.\d+\.weight", key)}
    alpha = {"alpha": rest["alpha"] * count} if "alpha" in rest else {}
    return {**rest, **alpha, DOWN: down, UP: up}


def is_beside(key: str) -> bool:
    """Whether a tensor may stand in an adapter file and is no layer's: embeddings that were trained with it."""
    return key.startswith(BUNDLED)


def refuse_unknown(others: Iterable[str], label: str = "") -> None:
    """CheckpointError that names tensors which are no layer's, but for those that may stand beside layers."""
    unknown = [key for key in others if not is_beside(key)]
    if unknown:
        more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        raise CheckpointError(
            f"{label}{': ' if label else ''}no known kind of adapter has these tensors: {', '.join(unknown[:5])}{more}."
            " What they do would be lost; use the file with the program that wrote it, or have that write one without "
            "them"
        )


def refuse_parts(name: str, module: Iterable[str]) -> None:
    """CheckpointError for a layer with adapters on its parts, where a layout has no names for these."""
    if ROWS in module:
        raise CheckpointError(
            f"{name} is one layer here and has an adapter other than plain LoRA on each part of it; no single adapter "
            "has that change."
            " Merge the file into a model (tools/merge_lora.py --model), or keep its layout, --to diffusers"
        )


def named_parameter(key: str, tensors: Tensors) -> tuple[str, str] | None:
    """(name of the layer as written, parameter under its kohya name) of a key of any layout; None when it is no
    adapter's. `tensors` is the whole file, of which other keys may tell."""
    name, _, parameter = key.partition(".")
    return (name, PARAMETERS.get(parameter, parameter)) if is_kohya_name(name) else _split(key, tensors)


def _split(key: str, tensors: Tensors) -> tuple[str, str] | None:
    """(module name, parameter) of a dotted key; None for a key that is no adapter's."""
    match = _PROCESSOR.fullmatch(key)
    if match:
        path, leaf = match["path"].removesuffix(".processor"), match["leaf"]
        if path.endswith(".self_attn"):  # a CLIP layer under the name of an attention's
            leaf = {"to_out": "out_proj"}.get(leaf, f"{leaf[3:]}_proj")
        elif leaf == "to_out":
            leaf = "to_out.0"
        return f"{path}.{leaf}", DOWN if match["side"] == "down" else UP
    ending = ending_of(key)
    if ending is not None:
        return key[: -len(ending) - 1], PARAMETERS.get(ending, ending)
    is_ia3 = key.endswith(".weight") and f"{key.removesuffix('.weight')}.on_input" in tensors
    return (key.removesuffix(".weight"), "weight") if is_ia3 else None


def _placed(family: str, tensors: Tensors, layout: str) -> list[tuple[Place, str, Module]]:
    """(place, kohya name, parameters) of every module of a file. Those without a name in the layout are told in the log
    when they are text encoders' and refused otherwise."""
    modules, others = _modules(to_kohya(family, tensors))
    found, unknown, silent = [], [key for key in others if not is_beside(key)], []
    table = names_of_family(family, modules)
    for name, module in modules.items():
        place = table.find(name.replace(OFT_PREFIX, KOHYA_PREFIX, 1) if name.startswith(OFT_PREFIX) else name)
        if place is None or (layout == "diffusers" and place.encoder is None and not place.diffusers):
            unknown.append(name)
            continue
        if place.encoder is not None and layout == "diffusers" and not place.diffusers:
            silent.append(name)
        found.append((place, name, module))
    _refuse(unknown, layout)
    if silent:
        logger.warning(
            "%d text encoder modules have no name in %s and are left out (first: %s)", len(silent), layout, silent[0]
        )
    return found


def _without_alpha(name: str, lora: _Lora, module: Module, fold: str) -> Module:
    down, up = fold_factors(fold, lora.scale)
    rest = {key: tensor for key, tensor in module.items() if key == "dora_scale"}
    return {DOWN: _scaled(f"{name}.{DOWN}", lora.down, down), UP: _scaled(f"{name}.{UP}", lora.up, up), **rest}


def _lora_of(name: str, module: Module, what: str) -> _Lora:
    """A module as LoRA; a Tucker convolution with its middle multiplied into down, which is the same change."""
    rest = set(module) - {DOWN, UP, MID, "alpha", "dora_scale"}
    if rest or DOWN not in module:
        raise CheckpointError(f"{name} is {what} and has {', '.join(sorted(module))}; only LoRA can be rewritten there")
    down, up = module[DOWN], module[UP]
    if MID in module:
        down = torch.einsum("ij...,jq->iq...", module[MID].float(), down.float().flatten(1)).to(down.dtype)
    return _Lora(down, up, alpha_of(module))


def _as_module(lora: _Lora) -> Module:
    module = {DOWN: lora.down, UP: lora.up}
    return module if lora.alpha is None else module | {"alpha": torch.tensor(lora.alpha)}


def _with_alpha(module: Module) -> Module:
    """A LoRA module says its alpha: kohya readers that are strict miss it otherwise."""
    if DOWN not in module or "alpha" in module:
        return module
    return module | {"alpha": torch.tensor(float(module[UP].shape[1]))}


def _fused(loras: Sequence[_Lora | None], layer: LayerNames) -> _Lora:
    """The parts of a fused layer as one module."""
    if layer.rows == "swapped":
        return _swapped(loras[0])
    present = [lora for lora in loras if lora is not None]
    width = present[0].down.shape[1]
    rows = with_missing_rows(layer, [lora and lora.up.shape[0] for lora in loras], width)
    first = present[0]
    same_scale = all(lora.scale == first.scale for lora in present)
    if same_scale and all(torch.equal(lora.down, first.down) for lora in present):
        ups = [lora.up if lora else first.up.new_zeros(rows[i], first.up.shape[1]) for i, lora in enumerate(loras)]
        return _Lora(first.down, torch.cat(ups), first.alpha)
    pairs = [
        (lora.down, lora.up if same_scale else _scaled(f"a part of {layer.path}", lora.up, lora.scale))
        if lora else (first.down.new_zeros(0, width), first.up.new_zeros(rows[i], 0))
        for i, lora in enumerate(loras)
    ]  # fmt: skip
    down, up = fuse_pairs(pairs)
    return _Lora(down, up, float(down.shape[0]) * (first.scale if same_scale else 1.0))


def _swapped(lora: _Lora) -> _Lora:
    """The two halves of the output change places."""
    return replace(lora, up=torch.cat(lora.up.chunk(2)[::-1]))


def _magnitudes(name: str, scale: torch.Tensor, lora: _Lora) -> torch.Tensor:
    """The magnitudes of DoRA as PEFT keeps them: [out] of a linear layer, [1, out, 1, 1] of a convolution."""
    out = lora.up.shape[0]
    if scale.numel() != out or (scale.ndim > 1 and scale.shape[0] != out):
        raise CheckpointError(
            f"{name}.dora_scale is {list(scale.shape)}, norms of input columns; diffusers needs those of its {out} "
            "output rows"
        )
    return scale.reshape(1, out, 1, 1) if lora.down.ndim == 4 else scale.reshape(out)


def _scaled(name: str, up: torch.Tensor, scale: float) -> torch.Tensor:
    return up.contiguous() if scale == 1 else narrowed(name, up.float() * scale, up.dtype).contiguous()


def _put(result: dict[str, torch.Tensor], name: str, module: Module) -> None:
    result.update({f"{name}.{key}": tensor.contiguous() for key, tensor in module.items()})


def _refuse(unknown: list[str], layout: str) -> None:
    if unknown:
        more = " ..." if len(unknown) > 5 else ""
        raise CheckpointError(f"{len(unknown)} modules have no name in {layout}: {', '.join(unknown[:5])}{more}")
