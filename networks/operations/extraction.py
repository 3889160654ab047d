"""Adapters of the difference between two models: for every layer the best one of a kind, by singular values."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from library.core.errors import CheckpointError
from networks.files.model_layers import ModelLayers, Name
from networks.kinds.factorization import factorization
from networks.kinds.low_rank import as_matrix, shaped_factors
from networks.kinds.targets import NetworkTargets
from networks.lokr import lokr_delta, lokr_rank
from networks.lora import lora_delta
from networks.operations.rank_rules import RankRule, quantile_of_size

logger = logging.getLogger(__name__)

KINDS = ("lora", "lokr", "full", "norm")
_EMBEDDING = re.compile(r"(embed|embedding|embeddings|embed_tokens|shared)$")


@dataclass(frozen=True)
class ExtractionPlan:
    """What is taken. `conv` None leaves convolutions larger than 1x1 out; `include` and `exclude` are patterns searched
    in the names of layers; parts of the model whose weights all differ by no more than `min_diff` are left out."""

    kind: str = "lora"
    linear: RankRule = field(default_factory=lambda: RankRule(4))
    conv: RankRule | None = None
    factor: int = -1
    norms: bool = False
    include: re.Pattern[str] | None = None
    exclude: re.Pattern[str] | None = None
    min_diff: float = 0.0
    clamp_quantile: float | None = None
    device: str = "cpu"

    def wants(self, lora_name: str) -> bool:
        if self.include is not None and not self.include.search(lora_name):
            return False
        return self.exclude is None or not self.exclude.search(lora_name)


@dataclass
class Extracted:
    """`tensors` of the file; `ranks` by layer; `left_out`: reason -> names; `errors`: norm of what the adapter lacks
    over that of the difference, by layer."""

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, list[str]] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)


@torch.no_grad()
def extract(targets: NetworkTargets, original: ModelLayers, tuned: ModelLayers, plan: ExtractionPlan) -> Extracted:
    """The adapter that turns the original model into the tuned one, layer by layer. CheckpointError when the models do
    not have the same layers, or when nothing differs."""
    names = _common(original, tuned)
    result, largest = Extracted(), {}
    for name in names:
        lora_name, parameter = name
        reason = _reason(targets, name, original.shape(name), plan)
        if reason == "":
            continue
        before, diff = _difference(name, original, tuned)
        formats = original.dtype(name), tuned.dtype(name)
        if is_rounding(before, diff, *formats):
            if diff.any():
                label = f"what the rounding from {_word(formats[0])} to {_word(formats[1])}, the formats of the models, explains"
                result.left_out.setdefault(label, []).append(f"{lora_name}.{parameter}")
            continue
        diff = diff.to(plan.device)
        size = float(diff.abs().max()) if diff.numel() else 0.0
        part = targets.encoder_of(lora_name)
        largest[part] = max(largest.get(part, 0.0), size)
        if size == 0:
            continue
        if reason is not None:
            result.left_out.setdefault(reason, []).append(f"{lora_name}.{parameter}")
            continue
        _put(result, name, diff, plan)
    for part, size in largest.items():
        if size <= plan.min_diff:
            _drop_part(targets, result, part, size)
    _complete(result, original, plan.kind)
    if not result.tensors:
        raise CheckpointError(
            f"{tuned.label} and {original.label} do not differ in any layer that is asked for{_but(result)}; there is "
            "nothing to extract"
        )
    return result


def _common(original: ModelLayers, tuned: ModelLayers) -> list[Name]:
    """The names of both. CheckpointError when there are none, or when one model has a part only a piece of which the
    other has."""
    names = [name for name in original if name in tuned]
    if not names:
        raise CheckpointError(
            f"{original.label} and {tuned.label} have no layer in common; they belong to different model families"
        )
    parts = {name[0].split("_")[1] for name in names}
    for first, second in ((original, tuned), (tuned, original)):
        missing = [name[0] for name in first if name not in second and name[0].split("_")[1] in parts]
        if missing:
            raise CheckpointError(
                f"{second.label} lacks {len(missing)} layers of {first.label} (first: {missing[0]}); they are "
                "different models"
            )
    return names


def _but(result: Extracted) -> str:
    return (
        ""
        if not result.left_out
        else " but for " + "; ".join(f"{reason} ({len(names)})" for reason, names in result.left_out.items())
    )


def is_rounding(before: torch.Tensor, diff: torch.Tensor, original: torch.dtype, tuned: torch.dtype) -> bool:
    """Whether storing the original weight in the format of the tuned model explains the whole difference: no number
    moved by more than half a step of that format. Of equal formats, and where the tuned model's is the finer one, only
    no difference is."""
    if (
        not tuned.is_floating_point
        or not original.is_floating_point
        or torch.finfo(tuned).eps <= torch.finfo(original).eps
    ):
        return not bool(diff.any())
    info = torch.finfo(tuned)
    step = (
        before.abs() * (info.eps / 2) + info.smallest_normal * info.eps / 2
    )  # below the smallest normal number steps are equal
    return bool((diff.abs() <= step).all())


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _difference(name: Name, original: ModelLayers, tuned: ModelLayers) -> tuple[torch.Tensor, torch.Tensor]:
    """(the original weight, what the tuned one differs by)."""
    before, after = original.read(name), tuned.read(name)
    if [size for size in before.shape if size != 1] != [size for size in after.shape if size != 1]:
        raise CheckpointError(
            f"{name[0]} is {list(before.shape)} in {original.label} and {list(after.shape)} in {tuned.label}; they are "
            "different models"
        )
    return before, after.view(before.shape) - before


def _reason(targets: NetworkTargets, name: Name, shape: tuple[int, ...], plan: ExtractionPlan) -> str | None:
    """Why a weight is not taken when it differs; None when it is, "" when it is not even looked at."""
    lora_name, parameter = name
    if not plan.wants(lora_name):
        return ""
    if _is_embedding(targets, lora_name, shape):
        return "embeddings, for which there are no adapters"
    is_norm = parameter == "weight" and len(shape) == 1
    if plan.kind == "full":
        return None
    if plan.norms or plan.kind == "norm":
        if is_norm or parameter == "bias":
            return None
    if plan.kind == "norm":
        return ""
    if len(shape) == 1:
        return "norms and biases (--with_norms takes those of norms; --kind full all)"
    if plan.kind == "lora" and len(shape) > 2 and max(shape[2:]) > 1 and plan.conv is None:
        return "convolutions larger than 1x1 (give --conv_dim)"
    return None


def _is_embedding(targets: NetworkTargets, lora_name: str, shape: tuple[int, ...]) -> bool:
    part = targets.encoder_of(lora_name)
    if len(shape) != 2:
        return False
    if part is None:
        return _EMBEDDING.search(lora_name) is not None and "time" not in lora_name
    encoder = targets.text_encoders[part]
    rest = lora_name.removeprefix(f"{encoder.prefix}_")
    patterns = [re.escape(path.replace(".", "_")).replace(r"\{i\}", r"\d+") for path in encoder.paths]
    return bool(patterns) and not any(re.fullmatch(pattern, rest) for pattern in patterns)


# -- one layer ---------------------------------------------------------------------------------------------------------


def _put(result: Extracted, name: Name, diff: torch.Tensor, plan: ExtractionPlan) -> None:
    lora_name, parameter = name
    if diff.ndim == 1:
        key = "b" if parameter == "bias" else "w_norm"
        result.tensors[f"{lora_name}.{key}"] = diff.cpu()  # biases get their name when all layers are known
        return
    made, change = _MAKERS[plan.kind](diff, plan)
    result.errors[lora_name] = float((diff - change).norm() / diff.norm())
    if "lora_down.weight" in made:
        result.ranks[lora_name] = made["lora_down.weight"].shape[0]
    result.tensors |= {f"{lora_name}.{key}": tensor.cpu() for key, tensor in made.items()}


Made = tuple[dict[str, torch.Tensor], torch.Tensor]
"""(tensors of a layer, the change that they make)"""


def lora_of(diff: torch.Tensor, plan: ExtractionPlan) -> Made:
    """The best LoRA of the rank that the rule chooses: up = U * S, down = Vh; alpha is the rank."""
    is_kxk = diff.ndim > 2 and max(diff.shape[2:]) > 1
    rule = plan.conv if is_kxk and plan.conv is not None else plan.linear
    matrix = as_matrix(diff)
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    rank = rule.choose(s, (matrix.shape[0], matrix.shape[1]))
    up, down = u[:, :rank] * s[:rank], vh[:rank]
    if plan.clamp_quantile is not None:
        limit = quantile_of_size([up, down], plan.clamp_quantile)
        up, down = up.clamp(-limit, limit), down.clamp(-limit, limit)
    down, up = shaped_factors(up, down, diff.shape)
    return {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(float(rank))}, lora_delta(
        down, up, 1.0
    )


def lokr_of(diff: torch.Tensor, plan: ExtractionPlan) -> Made:
    """The nearest Kronecker product w1 (x) w2 with halves of the sizes that --factor gives (Van Loan and Pitsianis
    1993).

    The blocks of the weight [l * k, m * n, ..], one per row [l * m, k * n * ..], are nearest to a matrix of rank 1: its
    two sides are the halves.
    """
    rows, columns, *kernel = diff.shape
    (out_l, out_k), (in_m, in_n) = factorization(rows, plan.factor), factorization(columns, plan.factor)
    blocks = diff.reshape(out_l, out_k, in_m, in_n, *kernel).transpose(1, 2).reshape(out_l * in_m, -1)
    u, s, vh = torch.linalg.svd(blocks, full_matrices=False)
    root = s[0].sqrt()
    halves = {"lokr_w1": (u[:, 0] * root).reshape(out_l, in_m), "lokr_w2": (vh[0] * root).reshape(out_k, in_n, *kernel)}
    change = lokr_delta(halves["lokr_w1"], halves["lokr_w2"], 1.0)
    return {**halves, "alpha": torch.tensor(float(lokr_rank(halves)))}, change


def full_of(diff: torch.Tensor, plan: ExtractionPlan) -> Made:
    """The difference as it is."""
    return {"diff": diff}, diff


_MAKERS: dict[str, Callable[[torch.Tensor, ExtractionPlan], Made]] = {"lora": lora_of, "lokr": lokr_of, "full": full_of}


# -- the file ----------------------------------------------------------------------------------------------------------


def _drop_part(targets: NetworkTargets, result: Extracted, part: int | None, size: float) -> None:
    """Leave a part of the model out that hardly differs."""
    own = {key for key in result.tensors if targets.encoder_of(key) == part}
    label = "the denoiser" if part is None else f"text encoder {part + 1}"
    logger.info("%s differs by no more than %g and is left out (%d tensors)", label, size, len(own))
    for key in own:
        del result.tensors[key]
        for table in (result.ranks, result.errors):
            table.pop(key.partition(".")[0], None)


def _complete(result: Extracted, original: ModelLayers, kind: str) -> None:
    """Biases under the name that their layer's kind has for them, beside a weight: those of norms, with `full` all."""
    for key in [key for key in result.tensors if key.endswith(".b")]:
        name, bias = key.removesuffix(".b"), result.tensors.pop(key)
        shape = original.shape((name, "weight"))
        if len(shape) > 1 and kind != "full":
            result.left_out.setdefault("biases of layers that are no norms (--kind full takes them)", []).append(name)
            continue
        weight, own = ("w_norm", "b_norm") if len(shape) == 1 else ("diff", "diff_b")
        result.tensors.setdefault(f"{name}.{weight}", torch.zeros(shape, dtype=bias.dtype))
        result.tensors[f"{name}.{own}"] = bias


def told(result: Extracted) -> Iterator[str]:
    """What was taken and left out, for people."""
    if result.ranks:
        ranks = sorted(set(result.ranks.values()))
        yield f"{len(result.ranks)} layers, rank {ranks[0]}" + (f" to {ranks[-1]}" if len(ranks) > 1 else "")
    if result.errors:
        values = list(result.errors.values())
        yield f"what is lacking, as a share of the difference: mean {sum(values) / len(values):.4f}, most {max(values):.4f}"
    for reason, names in result.left_out.items():
        yield f"{len(names)} weights differ and are left out: {reason}; the first is {names[0]}"
