"""Tables between the key names of two layouts of a part of a model: how one tensor is made of one or more others, read
both ways."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rule:
    """`original` = rows of `parts` one below the other; `swap_halves`: the two halves of the rows change places."""

    original: str
    parts: tuple[str, ...]
    swap_halves: bool = False


def with_kinds(original: str, other: str, rules: Sequence[Rule]) -> Iterator[Rule]:
    """The rules of layers at their places, for weights and biases."""
    for kind in (".weight", ".bias"):
        for rule in rules:
            yield Rule(
                original + rule.original + kind, tuple(other + part + kind for part in rule.parts), rule.swap_halves
            )


def placed(original: str, other: str, rules: Sequence[Rule]) -> Iterator[Rule]:
    """The rules of single tensors at their places."""
    for rule in rules:
        yield Rule(original + rule.original, tuple(other + part for part in rule.parts), rule.swap_halves)


def to_original(state: Mapping[str, Tensor], rules: Iterable[Rule]) -> dict[str, Tensor]:
    """The state under the original names. Names outside the table stay as they are."""
    rest = dict(state)
    converted: dict[str, Tensor] = {}
    for rule in rules:
        if not all(part in rest for part in rule.parts):
            continue
        tensors = [rest.pop(part) for part in rule.parts]
        joined = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
        converted[rule.original] = swapped_halves(joined) if rule.swap_halves else joined
    return {**converted, **rest}


def equal_rows(rule: Rule, rows: int) -> list[int]:
    """Rows of each part where all have as many."""
    return [rows // len(rule.parts)] * len(rule.parts)


def from_original(
    state: Mapping[str, Tensor], rules: Iterable[Rule], rows_of: Callable[[Rule, int], list[int]] = equal_rows
) -> dict[str, Tensor]:
    """The state under the other names; the inverse of `to_original`. `rows_of`: (rule, rows of its tensor) -> rows of
    each part."""
    rest = dict(state)
    converted: dict[str, Tensor] = {}
    for rule in rules:
        if rule.original not in rest:
            continue
        tensor = rest.pop(rule.original)
        if rule.swap_halves:
            tensor = swapped_halves(tensor)
        pieces = [tensor] if len(rule.parts) == 1 else tensor.split(rows_of(rule, tensor.shape[0]))
        converted.update(zip(rule.parts, pieces))
    return {**converted, **rest}


def swapped_halves(tensor: Tensor) -> Tensor:
    first, second = tensor.chunk(2)
    return torch.cat((second, first))


@dataclass(frozen=True)
class DenoiserLayouts:
    """The two layouts of a family's denoiser, or of another `part` of a pipeline folder, for the tool that rewrites
    model files.

    `inspect`: path -> what its headers tell (source, prefix, is_diffusers, params, keys); `rules`: names in either
    layout -> every rule; `config`: hyper-parameters -> config.json of a diffusers folder; `rows_of`: hyper-parameters
    -> what `from_original` takes; `unused`: a name that diffusers leaves out and nothing computes with -> one whose
    shape and type it has, in the original layout; `further`: names -> the rules of another layout that is read, whose
    tensors are the original ones under other names, none for names that are not in it.
    """

    inspect: Callable[[str], Any]
    rules: Callable[[Mapping[str, object]], Iterable[Rule]]
    config: Callable[[Any], dict[str, Any]]
    rows_of: Callable[[Any], Callable[[Rule, int], list[int]]] = lambda params: equal_rows
    unused: Mapping[str, str] = field(default_factory=dict)
    part: str = "transformer"
    further: Callable[[Mapping[str, object]], Iterable[Rule]] = lambda keys: ()
