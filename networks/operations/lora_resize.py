"""Adapters at another rank: the best approximation of every layer by singular values, under the names that the file
has.

Layers of LoRA are decomposed through their two thin matrices and never multiplied out; other kinds become LoRA.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from library.checkpoints.number_formats import narrowed
from library.core.errors import CheckpointError
from networks.files.adapter_layout import ALPHA, DOWN, UP, FileLayer
from networks.files.file_names import is_kohya_name
from networks.files.layer_tensors import alpha_of, scale_of
from networks.kinds.low_rank import as_matrix, shaped_factors, svd_of_product, widened
from networks.lora import lora_delta
from networks.operations.lora_merge import own_change
from networks.operations.rank_rules import RankRule

logger = logging.getLogger(__name__)

MID, DORA = "lora_mid.weight", "dora_scale"
KEPT_WHOLE = ("diff_b", "w_norm", "b_norm")
LOSSLESS = 1e-5
_FOLDED_CONV = re.compile(
    r"(conv1|conv2|conv_in|conv_out|in_layers[_.]2|out_layers[_.]3|samplers[_.]0[_.]conv|[_.]op|[_.]conv)$"
)
"""ends of names of 3x3 convolutions in U-Nets; some kinds fold the kernel into the inputs, so that shapes do not
tell"""


@dataclass(frozen=True)
class Resized:
    """What became of a layer. `kept`: share of the Frobenius norm of the change; `sum_kept`: of the sum of singular
    values; `spread`: largest kept singular value over the smallest."""

    name: str
    rank: int
    alpha: float
    is_kxk: bool
    kept: float
    sum_kept: float
    spread: float


@dataclass(frozen=True)
class _Decomposed:
    """A change without its scale: U, S, Vh and the shape of the layer's weight."""

    up: torch.Tensor
    values: torch.Tensor
    down: torch.Tensor
    shape: torch.Size
    scale: float

    @property
    def is_kxk(self) -> bool:
        return len(self.shape) > 2 and any(size > 1 for size in self.shape[2:])


@torch.no_grad()
def resized_layer(
    layer: FileLayer, linear: RankRule, conv: RankRule, device: torch.device | str = "cpu"
) -> tuple[dict[str, torch.Tensor], Resized | None]:
    """(tensors of the layer at its new rank under the keys of the file, what became of it). `conv` is for kernels
    larger than 1x1. Norms and changes of biases stay as they are (None). CheckpointError for layers that cannot be
    resized."""
    kept = {layer.keys[name]: tensor for name, tensor in layer.tensors.items() if name in KEPT_WHOLE}
    if set(layer.tensors) <= set(KEPT_WHOLE):
        return kept, None
    parts = _decomposed(layer, device)
    rule = conv if parts.is_kxk else linear
    rank = rule.choose(parts.values, (parts.shape[0], math.prod(parts.shape[1:])))
    report = _report(layer.name, parts, rank)
    if DORA in layer.tensors:
        if report.kept < 1 - LOSSLESS:
            raise CheckpointError(
                f"{layer.name} is DoRA, trained for the change as it is: at rank {rank} a part of it is lost, and the "
                "norms of the"
                " merged weight with it. Merge the file into the model with tools/merge_lora.py and extract a LoRA of "
                "the result with"
                " tools/extract_lora.py"
            )
        kept[layer.keys[DORA]] = layer.tensors[DORA]
    count = min(rank, len(parts.values))
    up, down = widened(parts.up[:, :count] * parts.values[:count], parts.down[:count], rank)
    if not writes_alpha(layer):
        up = up * parts.scale
    down, up = shaped_factors(up, down, parts.shape)
    plain = is_kohya_name(layer.name)
    kept |= {layer.key_of(DOWN, plain): down.cpu(), layer.key_of(UP, plain): up.cpu()}
    if writes_alpha(layer):
        kept[layer.key_of(ALPHA)] = torch.tensor(report.alpha)
    return kept, report


def writes_alpha(layer: FileLayer) -> bool:
    """Readers of PEFT and old diffusers names know no alpha: the scale goes into the up matrix there."""
    return ALPHA in layer.keys or is_kohya_name(layer.name)


def _decomposed(layer: FileLayer, device: torch.device | str) -> _Decomposed:
    tensors = {name: tensor.to(device) for name, tensor in layer.tensors.items()}
    if DOWN not in tensors:
        plain = {name: tensor for name, tensor in tensors.items() if name not in KEPT_WHOLE}
        return _of_matrix(_unfolded(layer.name, own_change(layer.name, plain, 1.0)), 1.0)
    down, up = tensors[DOWN].float(), tensors[UP].float()
    scale = scale_of(tensors)
    if MID in tensors:
        return _of_matrix(lora_delta(down, up, 1.0, tensors[MID].float()), scale)
    return _Decomposed(
        *svd_of_product(as_matrix(up), as_matrix(down)), torch.Size((up.shape[0], *down.shape[1:])), scale
    )


def _of_matrix(change: torch.Tensor, scale: float) -> _Decomposed:
    if change.ndim < 2:
        raise CheckpointError(
            f"a change of shape {list(change.shape)} is no matrix, which could get another rank; the file is damaged"
        )
    return _Decomposed(*torch.linalg.svd(as_matrix(change), full_matrices=False), change.shape, scale)


def _unfolded(name: str, change: torch.Tensor) -> torch.Tensor:
    if change.ndim == 2 and change.shape[1] % 9 == 0 and _FOLDED_CONV.search(name):
        return change.view(change.shape[0], -1, 3, 3)
    return change


def _report(name: str, parts: _Decomposed, rank: int) -> Resized:
    values = parts.values.cpu().double()  # not every device has float64
    kept, norm, total = values[:rank], float(values.norm()), float(values.sum())
    return Resized(
        name, rank, parts.scale * rank, parts.is_kxk, float(kept.norm()) / norm if norm else 1.0,
        float(kept.sum()) / total if total else 1.0,
        float(kept[0] / kept[-1]) if float(kept[-1]) else math.inf,
    )  # fmt: skip


# -- DyLoRA ------------------------------------------------------------------------------------------------------------


def dylora_ranks(layers: Mapping[str, FileLayer], unit: int) -> tuple[int, list[int]]:
    """(trained rank, ranks that are split from it: unit, 2 * unit, ... and the trained one). CheckpointError for files
    that are no plain LoRA."""
    for layer in layers.values():
        more = sorted(set(layer.tensors) - {DOWN, UP, ALPHA})
        if more or DOWN not in layer.tensors:
            raise CheckpointError(
                f"{layer.name} has {', '.join(sorted(layer.tensors))}; DyLoRA has {DOWN}, {UP} and alpha alone"
            )
    full = max(layer.tensors[DOWN].shape[0] for layer in layers.values())
    return full, [*range(unit, full, unit), full]


def dylora_part(layer: FileLayer, rank: int) -> dict[str, torch.Tensor]:
    """The first `rank` rows and columns of a layer that DyLoRA trained at rank R with alpha a, at the strength of
    training.

    There the first k ranks act at a / R * sqrt(R / k); a file of rank k acts at alpha / k, so alpha = a * sqrt(k / R).
    """
    full = layer.tensors[DOWN].shape[0]
    used = min(rank, full)
    alpha = alpha_of(layer.tensors) or float(full)
    down, up = layer.tensors[DOWN][:used].contiguous(), layer.tensors[UP][:, :used].contiguous()
    alpha *= math.sqrt(used / full)
    if not writes_alpha(layer):
        return {layer.keys[DOWN]: down, layer.keys[UP]: narrowed(layer.keys[UP], up.float() * (alpha / used), up.dtype)}
    return {layer.keys[DOWN]: down, layer.keys[UP]: up, layer.key_of(ALPHA): torch.tensor(alpha)}


def lines(reports: list[Resized]) -> Iterator[str]:
    """A table of what became of the layers, for people."""
    for one in reports:
        yield f"{one.name:75} rank {one.rank:4}  sum {one.sum_kept:.4f}  norm {one.kept:.4f}  largest / smallest {one.spread:.1f}"
