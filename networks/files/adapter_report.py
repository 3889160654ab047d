"""What is in an adapter file: kinds, ranks, strengths and norms of its layers, by part and block, and what is wrong
with it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch

from library.components.lllite_utils import is_lllite, shapes_of
from library.core.errors import AtelierError, CheckpointError
from networks.files.file_names import is_kohya_name, names_of_family
from networks.files.layer_tensors import alpha_of, missing_alphas, rank_of, scale_of
from networks.files.lora_conversion import is_beside, named_parameter
from networks.kinds.low_rank import as_matrix, svd_of_product
from networks.kinds.registry import known_kind_of
from networks.operations.lora_merge import own_change

DOWN, UP = "lora_down.weight", "lora_up.weight"
_ENCODER = re.compile(r"(?:lora_)?(te\d?|text_encoder(?:_\d)?)(?=[_.])")
_BLOCK = re.compile(
    r"((?:double|single|joint|input|output|down|up|transformer|single_transformer)_blocks|middle_block|mid_block|blocks"
    r"|(?:noise|context)_refiner|layers|block)"
    r"(?:[._](\d+))?(?=[._])"
)


@dataclass(frozen=True)
class LayerReport:
    """One layer. `norm`: Frobenius norm of its change at strength 1, None where that depends on the model's weights;
    `rank` and `alpha` None where the kind has none."""

    name: str
    kind: str
    part: str
    block: str
    rank: int | None
    alpha: float | None
    norm: float | None


@dataclass
class FileReport:
    """`problems`: what makes the file unusable, or a part of it; `notes`: what is worth knowing."""

    layers: list[LayerReport] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    naming: str = ""

    def by(self, attribute: str) -> dict[str, list[LayerReport]]:
        """part or block -> its layers, in the order of the file."""
        groups: dict[str, list[LayerReport]] = {}
        for layer in self.layers:
            key = layer.part if attribute == "part" else f"{layer.part} {layer.block}"
            groups.setdefault(key, []).append(layer)
        return dict(sorted(groups.items(), key=lambda item: _natural(item[0])))


def report(tensors: Mapping[str, torch.Tensor], family: str | None) -> FileReport:
    """Everything that the tensors tell. `family` is None when nothing tells it."""
    if is_lllite(tensors):
        return _report_lllite(tensors)
    result, parts = FileReport(), {}
    for key, tensor in tensors.items():
        found = named_parameter(key, tensors)
        if found is None and is_beside(key):
            result.notes.append(
                f"{key} holds {tensor.shape[0] if tensor.ndim > 1 else 1} vectors of a word that was trained with the "
                "adapter: --network_weights with --token_string, and image scripts, read them"
            )
            continue
        if found is None:
            result.problems.append(f"{key} belongs to no adapter that is known")
            continue
        parts.setdefault(found[0], {})[found[1]] = tensor
        result.problems += _not_finite(key, tensor)
    for name, own in parts.items():
        try:
            result.layers.append(_layer(name, own))
        except (AtelierError, RuntimeError, ValueError) as error:
            result.problems.append(str(error))
    _tell(result, parts, family)
    result.naming = _naming(tensors)
    return result


def _not_finite(key: str, tensor: torch.Tensor) -> list[str]:
    finite = not tensor.is_floating_point() or bool(torch.isfinite(tensor.float()).all())
    return [] if finite else [f"{key} has values that are not finite (NaN or infinite)"]


def _report_lllite(tensors: Mapping[str, torch.Tensor]) -> FileReport:
    """A ControlNet-LLLite: what its modules change hangs on the picture, so that there are no norms; the rank is the
    width of their inner layers."""
    result = FileReport(naming="LLLite")
    try:
        shapes = shapes_of({key: tuple(tensor.shape) for key, tensor in tensors.items()}, "the file")
    except CheckpointError as error:
        result.problems.append(str(error))
        return result
    for name, shape in shapes.items():
        result.layers.append(LayerReport(name, "LLLite", "denoiser", _place(name), shape.mlp_dim, None, None))
    for key, tensor in tensors.items():
        result.problems += _not_finite(key, tensor)
    widths = sorted({shape.cond_dim for shape in shapes.values()})
    result.notes.append(f"the control picture is embedded in {' or '.join(map(str, widths))} channels (cond_emb_dim)")
    idle = [name for name in shapes if not any(tensors[f"{name}.up.0.{part}"].any() for part in ("weight", "bias"))]
    if idle:
        result.notes.append(f"{len(idle)} modules change nothing: their last layer is 0 (first: {idle[0]})")
    return result


def _place(name: str) -> str:
    """The block of the model that a layer stands in."""
    block = _BLOCK.search(name)
    return "other" if block is None else block[1] + (f" {block[2]}" if block[2] else "")


def _layer(name: str, tensors: Mapping[str, torch.Tensor]) -> LayerReport:
    kind = known_kind_of(tensors, name)
    rank, alpha = rank_of(tensors), alpha_of(tensors)
    label = kind.name + (
        " with DoRA" if "dora_scale" in tensors else " (Tucker)" if "lora_mid.weight" in tensors else ""
    )
    encoder = _ENCODER.match(name)
    part = encoder[1] if encoder else "denoiser"
    return LayerReport(name, label, part, _place(name), rank, alpha, _norm(name, tensors))


@torch.no_grad()
def _norm(name: str, tensors: Mapping[str, torch.Tensor]) -> float | None:
    if any(not torch.isfinite(tensor.float()).all() for tensor in tensors.values()):
        return None
    if set(tensors) <= {DOWN, UP, "alpha"}:
        up, down = as_matrix(tensors[UP].float()), as_matrix(tensors[DOWN].float())
        return abs(scale_of(tensors)) * float(svd_of_product(up, down)[1].norm())
    try:
        change = own_change(name, tensors, 1.0)
    except AtelierError:
        return None
    return None if change is None else float(change.norm())


def _tell(result: FileReport, parts: Mapping[str, Mapping[str, torch.Tensor]], family: str | None) -> None:
    without = missing_alphas(parts)
    if without:
        result.notes.append(without)
    idle = [layer.name for layer in result.layers if layer.norm == 0]
    if idle:
        result.notes.append(f"{len(idle)} layers change nothing: their norm is 0 (first: {idle[0]})")
    ranks = Counter(layer.rank for layer in result.layers if layer.rank is not None)
    if len(ranks) > 1:
        result.notes.append(
            "layers have different ranks: "
            + ", ".join(f"{rank} ({count} layers)" for rank, count in sorted(ranks.items()))
        )
    table = names_of_family(family, parts) if family else None
    if table is not None and table.layers:
        unknown = [name for name in parts if table.find(name) is None]
        if unknown:
            result.problems.append(
                f"{len(unknown)} layers are in no {family} model that is known (first: {unknown[0]})"
            )


def _naming(keys: Iterable[str]) -> str:
    found = set()
    for key in keys:
        if is_beside(key):
            continue
        name = key.partition(".")[0]
        if is_kohya_name(name):
            found.add("LyCORIS" if name.startswith("lycoris_") else "kohya")
        elif key.startswith(("diffusion_model.", "text_encoders.")):
            found.add("dotted (ComfyUI)")
        elif "lora_A" in key or "lora_B" in key:
            found.add("diffusers (PEFT)")
        else:
            found.add("diffusers (old)" if "lora" in key else "other")
    return " and ".join(sorted(found))


def _natural(text: str) -> list[int | str]:
    return [int(piece) if piece.isdigit() else piece for piece in re.split(r"(\d+)", text)]


def total_norm(layers: Iterable[LayerReport]) -> float | None:
    """Root of the sum of squares of the norms that are known; None when none is."""
    norms = [layer.norm for layer in layers if layer.norm is not None]
    return sum(norm**2 for norm in norms) ** 0.5 if norms else None


def table(report_: FileReport, attribute: str) -> Iterator[str]:
    """Lines of a table by part or block."""
    groups = report_.by(attribute)
    width = max([len(key) for key in groups] + [len(attribute)])
    yield f"{attribute:{width}}  layers  {'kind':18}  {'rank':>9}  {'alpha':>13}  {'norm':>10}"
    for key, layers in groups.items():
        kinds = "/".join(sorted({layer.kind for layer in layers}))
        norm = total_norm(layers)
        told = "-" if norm is None else f"{norm:.4g}"
        rank, alpha = (_range(getattr(layer, name) for layer in layers) for name in ("rank", "alpha"))
        yield f"{key:{width}}  {len(layers):6}  {kinds:18}  {rank:>9}  {alpha:>13}  {told:>10}"


def _range(values: Iterable[float | None]) -> str:
    known = sorted({value for value in values if value is not None})
    if not known:
        return "-"
    return f"{known[0]:g}" if len(known) == 1 else f"{known[0]:g}-{known[-1]:g}"
