"""What the tensors of one layer of an adapter file tell, whatever their kind: rank, alpha, strength, and whether they
fit together."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

Tensors = Mapping[str, torch.Tensor]
Side = tuple[str, int]
"""(name of a tensor, axis)"""

RANK_SIDES: tuple[Side, ...] = (
    ("lora_up.weight", 1), ("lora_up.0.weight", 1), ("hada_w1_b", 0), ("lokr_w2_b", 0), ("lokr_w1_b", 0),
    ("a2.weight", 0),
)  # fmt: skip
"""where the rank stands; the first one that is there counts"""
SEAMS: tuple[tuple[Side, Side], ...] = (
    (("lora_down.weight", 0), ("lora_up.weight", 1)), (("hada_w1_a", 1), ("hada_w1_b", 0)),
    (("hada_w2_a", 1), ("hada_w2_b", 0)),
    (("lokr_w1_a", 1), ("lokr_w1_b", 0)), (("lokr_w2_a", 1), ("lokr_w2_b", 0)), (("a1.weight", 1), ("a2.weight", 0)),
    (("b1.weight", 1), ("b2.weight", 0)),
)  # fmt: skip
"""sides along which two matrices are multiplied: both have the rank"""
CORES: dict[str, tuple[tuple[Side, Side], ...]] = {
    "lora_mid.weight": (
        (("lora_down.weight", 0), ("lora_mid.weight", 1)),
        (("lora_mid.weight", 0), ("lora_up.weight", 1)),
    ),
    "bm.weight": ((("b2.weight", 0), ("bm.weight", 1)), (("bm.weight", 0), ("b1.weight", 1))),
    "hada_t1": ((("hada_w1_a", 0), ("hada_t1", 0)), (("hada_w1_b", 0), ("hada_t1", 1))),
    "hada_t2": ((("hada_w2_a", 0), ("hada_t2", 0)), (("hada_w2_b", 0), ("hada_t2", 1))),
    "lokr_t2": ((("lokr_w2_a", 0), ("lokr_t2", 0)), (("lokr_w2_b", 0), ("lokr_t2", 1))),
}
"""core of a Tucker form -> the seams that it has with the matrices that would meet without it"""
MATRICES = frozenset(
    {name for seams in (SEAMS, *CORES.values()) for seam in seams for name, _ in seam} | {"lokr_w1", "lokr_w2"}
)

_AXES = (2, 4, 5)


def rank_of(tensors: Tensors) -> int | None:
    """The rank of a layer; None for kinds without one."""
    return next((tensors[name].shape[axis] for name, axis in RANK_SIDES if name in tensors), None)


def alpha_of(tensors: Tensors) -> float | None:
    """The alpha that a layer of a file has; None without one, and for 0, which stands for the neutral one."""
    return (float(tensors["alpha"]) or None) if "alpha" in tensors else None


def scale_of(tensors: Tensors) -> float:
    """alpha / rank of a layer's tensors, the factor of its change."""
    return scale_from(alpha_of(tensors), rank_of(tensors))


def scale_from(alpha: float | None, rank: int | None) -> float:
    """alpha / rank; 1 without an alpha and for kinds without a rank."""
    return alpha / rank if alpha and rank else 1.0


def missing_alphas(layers: Mapping[str, Tensors]) -> str | None:
    """A sentence on layers of LoRA that have no alpha, where names are those of kohya files, which say it; None when
    all have one."""
    without = [
        name for name, own in layers.items() if "lora_down.weight" in own and "alpha" not in own and "." not in name
    ]
    return f"{len(without)} layers have no alpha, which means alpha = rank (first: {without[0]})" if without else None


def problem_of(tensors: Tensors) -> str | None:
    """What is wrong with the numbers of one layer: an alpha that is no number, matrices without a rank or of different
    ones. None when nothing is."""
    alpha = tensors.get("alpha")
    if alpha is not None and (alpha.numel() != 1 or not math.isfinite(float(alpha))):
        return f"alpha is {_told(alpha)}; needed: one finite number. The file is damaged"
    flat = next(
        (
            name
            for name, tensor in tensors.items()
            if name in MATRICES and (tensor.ndim not in _AXES or name == "lokr_w1" and tensor.ndim > 2)
        ),
        None,
    )
    if flat is not None:
        return f"{flat} has shape {list(tensors[flat].shape)}; needed: a matrix with two axes, or four or five of a convolution. The file is damaged"
    for (first, axis), (second, other) in _seams(tensors):
        sizes = tensors[first].shape[axis], tensors[second].shape[other]
        if sizes[0] != sizes[1]:
            return f"{first} {list(tensors[first].shape)} and {second} {list(tensors[second].shape)} have different ranks; the file is damaged"
        if sizes[0] == 0:
            return f"{first} {list(tensors[first].shape)} has rank 0; needed: 1 or more. The file is damaged"
    empty = next((name for name, tensor in tensors.items() if not tensor.numel()), None)
    return (
        None
        if empty is None
        else f"{empty} has shape {list(tensors[empty].shape)}, no numbers at all; the file is damaged"
    )


def _seams(tensors: Tensors) -> list[tuple[Side, Side]]:
    found: list[tuple[Side, Side]] = []
    joined: set[frozenset[str]] = set()
    for core, seams in CORES.items():
        if core in tensors and all(name in tensors for seam in seams for name, _ in seam):
            found += seams
            joined.add(frozenset(name for seam in seams for name, _ in seam if name != core))
    for seam in SEAMS:
        names = frozenset(name for name, _ in seam)
        if names <= tensors.keys() and names not in joined:
            found.append(seam)
    return found


def _told(tensor: torch.Tensor) -> str:
    return f"{float(tensor):g}" if tensor.numel() == 1 else f"a tensor of shape {list(tensor.shape)}"
