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
    tensors are the original ones under other names, none for names that are not in it; `pipeline`: the other parts of a
    pipeline folder, which are written where a file holds them.
    """

    inspect: Callable[[str], Any]
    rules: Callable[[Mapping[str, object]], Iterable[Rule]]
    config: Callable[[Any], dict[str, Any]]
    rows_of: Callable[[Any], Callable[[Rule, int], list[int]]] = lambda params: equal_rows
    unused: Mapping[str, str] = field(default_factory=dict)
    part: str = "transformer"
    further: Callable[[Mapping[str, object]], Iterable[Rule]] = lambda keys: ()
    pipeline: PipelineLayout | None = None


@dataclass(frozen=True)
class PipelineTokenizer:
    """The tokenizer of a text encoder in a pipeline folder: its sub-folder, its class in transformers, and `load`: what
    --tokenizer and --tokenizer_cache_dir say and the file -> the tokenizer. `is_needed`: a folder is not made without
    it."""

    folder: str
    class_name: str
    load: Callable[[str | None, str | None, str], Any]
    is_needed: bool = True


@dataclass(frozen=True)
class PipelinePart:
    """A part of a pipeline folder beside the denoiser. `folder`: its sub-folder; `prefixes`: what may stand before its
    names in one file, the usual one first; `reader`: (library, class) that reads the sub-folder; `config`: path ->
    config.json; `passes`: its tensors have the same names in both layouts and pass one by one; `needs_projection`: of a
    CLIP; `left_out`: names that its class has no place for."""

    folder: str
    prefixes: tuple[str, ...]
    reader: tuple[str, str]
    config: Callable[[str], dict[str, Any]]
    tokenizer: PipelineTokenizer | None = None
    passes: bool = False
    needs_projection: bool = False
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class PipelineLayout:
    """A pipeline of diffusers: the class `name`, that of its denoiser, `scheduler`: hyper-parameters of the denoiser ->
    scheduler_config.json, whose class is known to all flow models, its `parts`, and `settings`: what else stands in
    model_index.json. `places`: sub-folder -> what stands before its names in the one file that any such folder becomes;
    none where the denoiser alone becomes a file, unless the folder was made of a file of all parts."""

    name: str
    denoiser: str
    scheduler: Callable[[Any], dict[str, Any]]
    parts: tuple[PipelinePart, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    places: Mapping[str, str] = field(default_factory=dict)

    def readers(self) -> dict[str, tuple[str, str]]:
        """Sub-folder -> (library, class) that reads it, of everything that may be there."""
        readers = {"transformer": ("diffusers", self.denoiser)}
        readers["scheduler"] = ("diffusers", "FlowMatchEulerDiscreteScheduler")
        for part in self.parts:
            readers[part.folder] = part.reader
            if part.tokenizer is not None:
                readers[part.tokenizer.folder] = ("transformers", part.tokenizer.class_name)
        return readers
