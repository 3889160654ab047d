"""Several adapters made into one file, so that its change is the sum of theirs at their strengths.

Three ways: `concat` puts LoRAs side by side (exact; the rank is the sum of the ranks), `svd` sums the changes of any
kinds and keeps the strongest directions, `full` keeps the summed changes whole (exact for all kinds, as large as the
layers).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from library.core.errors import CheckpointError
from library.core.keyed_random import keyed_generator
from library.lora_utils import Adapter
from networks.files.layer_tensors import scale_of
from networks.kinds.low_rank import factors_of
from networks.kinds.registry import bias_change, known_kind_of
from networks.kinds.targets import NetworkTargets
from networks.operations.rank_rules import RankRule

Tensors = Mapping[str, torch.Tensor]
Sources = list[tuple[Tensors, float]]
LORA_KEYS = {"lora_down.weight", "lora_up.weight", "alpha"}


def by_layer(adapters: Sequence[Adapter], targets: NetworkTargets) -> dict[str, Sources]:
    """Layer -> the tensors and strengths of all adapters that change it, under the names of our files."""
    layers: dict[str, Sources] = {}
    for adapter in adapters:
        for name, tensors in adapter.layers.items():
            own = next(
                (other for other in reversed(targets.canonical_names(name)) if other in layers),
                targets.canonical_names(name)[-1],
            )
            layers.setdefault(own, []).append((tensors, adapter.multiplier_of(own)))
    return layers


def concatenated(layers: Mapping[str, Sources], shuffle_seed: int | None = None) -> dict[str, torch.Tensor]:
    """One LoRA whose rank is the sum of the ranks: delta = sum of ratio * alpha / rank * up @ down, exactly.

    Downs stay as they are, ups carry ratio * alpha / rank, and alpha is the rank, so that every reader's scale is 1.
    `shuffle_seed` mixes the order of the ranks. CheckpointError for layers that are no plain LoRA.
    """
    result: dict[str, torch.Tensor] = {}
    for name, sources in layers.items():
        downs, ups = [], []
        for tensors, ratio in sources:
            if set(tensors) - LORA_KEYS:
                raise CheckpointError(
                    f"{name} is no plain LoRA ({', '.join(sorted(set(tensors) - LORA_KEYS))}), which cannot be put "
                    "beside others;"
                    " use --mode svd (a LoRA of --new_rank) or --mode full (exact), or merge into a model"
                )
            down, up = tensors["lora_down.weight"].float(), tensors["lora_up.weight"].float()
            scale = ratio * scale_of(tensors)
            downs.append(down)
            ups.append(up * scale)
        _refuse_other_shapes(name, [down.shape[1:] for down in downs], [up.shape[0] for up in ups])
        down, up = torch.cat(downs), torch.cat(ups, dim=1)
        if shuffle_seed is not None:
            order = torch.randperm(down.shape[0], generator=keyed_generator(shuffle_seed, "merged ranks", name))
            down, up = down[order], up[:, order]
        result[f"{name}.lora_down.weight"] = down.contiguous()
        result[f"{name}.lora_up.weight"] = up.contiguous()
        result[f"{name}.alpha"] = torch.tensor(float(down.shape[0]))
    return result


def _refuse_other_shapes(name: str, inputs: Sequence[torch.Size], outputs: Sequence[int]) -> None:
    if len({*inputs}) > 1 or len({*outputs}) > 1:
        shapes = ", ".join(f"{[out, *tail]}" for out, tail in zip(outputs, inputs, strict=True))
        raise CheckpointError(
            f"{name} is a layer of different sizes in these files: {shapes}; they belong to different models"
        )


def summed_changes(
    name: str, sources: Sources, device: torch.device | str
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(change of the weight, change of the bias) of a layer, float32 on `device`; CheckpointError for kinds whose
    change depends on the weight."""
    weight, bias = None, None
    for tensors, ratio in sources:
        own = {key: tensor.to(device) for key, tensor in tensors.items()}
        change = own_change(name, own, ratio)
        if change is not None:
            whole = change if weight is None else weight
            _refuse_other_shapes(name, [change.shape[1:], whole.shape[1:]], [change.shape[0], whole.shape[0]])
            weight = change if weight is None else weight + change
        of_bias = bias_change(own, ratio, name)
        if of_bias is not None:
            bias = of_bias if bias is None else bias + of_bias
    return weight, bias


def own_change(name: str, tensors: Tensors, ratio: float) -> torch.Tensor | None:
    """Change of a layer's weight by tensors that alone tell it, float32; None when they change the bias alone.
    CheckpointError for kinds whose change depends on the weight."""
    module = known_kind_of(tensors, name).module_class
    shape = module.change_shape(tensors)
    if shape is None or "dora_scale" in tensors:
        kind = "DoRA" if "dora_scale" in tensors else known_kind_of(tensors, name).name
        raise CheckpointError(
            f"{name}: the change of {kind} depends on the weights of the model; merge it into a model (--model), of "
            "which a"
            " LoRA can be extracted then"
        )
    return module.weight_change(tensors, torch.empty(shape, device="meta"), ratio) if shape else None


def full_changes(layers: Mapping[str, Sources], device: torch.device | str) -> dict[str, torch.Tensor]:
    """The summed changes as they are: `diff` and `diff_b` (norms: `w_norm`, `b_norm`)."""
    result: dict[str, torch.Tensor] = {}
    for name, sources in layers.items():
        weight, bias = summed_changes(name, sources, device)
        is_norm = weight is not None and weight.ndim == 1
        for key, change in (("w_norm" if is_norm else "diff", weight), ("b_norm" if is_norm else "diff_b", bias)):
            if change is not None:
                result[f"{name}.{key}"] = change.cpu()
    return result


def low_rank_sum(
    layers: Mapping[str, Sources], rule_of: Callable[[torch.Size], RankRule], device: torch.device | str
) -> dict[str, torch.Tensor]:
    """The best LoRA of the rank that a rule chooses for the summed changes (singular value decomposition, float32).
    `rule_of` gives the rule for the rank by the shape of a layer's weight. Norms and biases are kept whole."""
    result: dict[str, torch.Tensor] = {}
    for name, sources in layers.items():
        weight, bias = summed_changes(name, sources, device)
        if weight is not None and weight.ndim == 1:
            result |= full_changes({name: sources}, device)
            continue
        if weight is not None:
            down, up = factors_of(weight, rule_of(weight.shape))
            result[f"{name}.lora_down.weight"], result[f"{name}.lora_up.weight"] = down.cpu(), up.cpu()
            result[f"{name}.alpha"] = torch.tensor(float(down.shape[0]))
        if bias is not None:
            result[f"{name}.diff_b"] = bias.cpu()
    return result
