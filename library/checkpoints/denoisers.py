"""Files of denoisers: what a file holds, loading and saving it, by a record of what is special to a family's."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from library.checkpoints.layout_rules import Rule, to_original
from library.checkpoints.loading import (
    CheckpointFiles,
    Source,
    Transform,
    assign_state,
    build_on_meta,
    build_params,
    check_marks,
    check_state,
    config_metadata,
    find_prefix,
    open_checkpoint,
    part_of,
    size_of,
    strip_prefix,
)
from library.checkpoints.scaled_weights import is_blob
from library.checkpoints.weight_forms import FP8, FP8_STORAGE
from library.safetensors_utils import cast_all, save_file_atomic

SizeOf = Callable[[str, int], int]
"""(name of a tensor, dimension) -> its size; CheckpointError when it is not there"""


@dataclass(frozen=True, kw_only=True)
class DenoiserKind:
    """What is special to the files of a family's denoiser. Layers and tensors are called by their original names.

    `params`: the record of its hyper-parameters; `prefixes`, `roots`: words before its names, and first words of names
    in any layout; `marks`: tensors by which it is known; `infer`: (sizes, names -> shapes, what is given) ->
    hyper-parameters; `takes_scale`: whether a layer is stored in fewer bits, where each `scale_block` inputs of a row
    have a scale of their own in 8 bits, None = all of them.
    """

    title: str
    model: Callable[[Any], nn.Module]
    params: Callable[..., Any]
    prefixes: tuple[str, ...]
    roots: tuple[str, ...]
    marks: tuple[str, ...]
    infer: Callable[[SizeOf, Mapping[str, Tensor], Mapping[str, Any]], dict[str, Any]]
    takes_scale: Callable[[str], bool]
    scale_block: int | None = None
    stays_float32: Callable[[str], bool] = lambda name: False
    """whether a tensor is kept in float32, as what is computed with it is, whatever type the others are cast to"""
    is_diffusers: Callable[[Mapping[str, object]], bool] = lambda names: False
    rules: Callable[[Mapping[str, object]], Iterable[Rule]] = lambda names: ()
    """names in a file -> the rules by which they become the original ones, none where they are"""
    of_config: Mapping[str, str] = field(default_factory=dict)
    """names in a config.json beside the file -> ours, of what shapes do not tell"""


@dataclass(frozen=True)
class DenoiserInfo:
    """What the headers of a denoiser file tell. `rules`: by which its names become the original ones, none where they
    are; `params`: hyper-parameters, of the record of its kind; `dtypes`: types of the stored weights."""

    kind: DenoiserKind
    source: CheckpointFiles
    prefix: str
    is_diffusers: bool
    rules: tuple[Rule, ...]
    params: Any
    dtypes: frozenset[torch.dtype]

    @property
    def keys(self) -> list[str]:
        """Those of the denoiser, as the file has them."""
        named = [key for key in self.source.shapes if key.startswith(self.prefix)]
        return [key for key in named if key[len(self.prefix) :].split(".")[0] in self.kind.roots]


def inspect_denoiser(kind: DenoiserKind, path: Source, config: Mapping[str, Any] | None = None) -> DenoiserInfo:
    """Recognise a denoiser of this kind from headers alone; `config` overrides hyper-parameters by the names of its
    record.

    CheckpointError when the file is damaged or no such denoiser.
    """
    source = open_checkpoint(path, "transformer")
    prefix = find_prefix(source.shapes, kind.prefixes, kind.roots, source.path, "denoiser")
    stripped = strip_prefix(source.shapes, prefix)
    own = {key: tensor for key, tensor in stripped.items() if key.split(".")[0] in kind.roots and not is_blob(key)}
    rules = tuple(kind.rules(own))
    shapes = to_original(own, rules)
    check_marks(shapes or stripped, kind.marks, source.path, f"{kind.title} denoiser")
    told = {ours: source.config[theirs] for theirs, ours in kind.of_config.items() if theirs in source.config}
    given = {**told, **source.model_config, **(config or {})}
    params = build_params(kind.params, _inferred(kind, shapes, given, source.path), given, source.path)
    check_state(build_on_meta(lambda: kind.model(params)), shapes, source.path)
    dtypes = frozenset(tensor.dtype for key, tensor in shapes.items() if key.endswith(".weight"))
    return DenoiserInfo(kind, source, prefix, kind.is_diffusers(own), rules, params, dtypes)


def _inferred(kind: DenoiserKind, shapes: Mapping[str, Tensor], given: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Hyper-parameters from shapes in original names."""
    title = getattr(kind.model, "__name__", kind.title)
    return kind.infer(lambda key, dim: size_of(shapes, key, dim, path, title), shapes, given)


def load_denoiser(
    info: DenoiserInfo,
    dtype: torch.dtype | None,
    device: torch.device | str,
    disable_mmap: bool = False,
    *,
    form: str | None = None,
    by_rows: bool = False,
    transform: Transform | None = None,
) -> Any:
    """The denoiser of a file in any layout: a file, one of a split set, or a folder.

    `form`, one of weight_forms.FORMS, stores the large matrices of the blocks in fewer bits (`by_rows`: with one scale
    per row in any case); `dtype` float8_e4m3fn without a form the weights of all linear layers, without scales, and the
    rest in bfloat16; None keeps the file's own types. What the kind keeps in float32 stays so in any case. `transform`
    may change the tensors as they are read. CheckpointError when the file does not fit.
    """
    kind = info.kind
    rule_of = {part: rule for rule in info.rules for part in rule.parts}

    def ours(key: str) -> str:
        name = key[len(info.prefix) :]
        return rule_of[name].original if name in rule_of else name

    def takes(key: str) -> bool:
        name = ours(key)
        is_large = form in (None, FP8) or kind.takes_scale(name.removesuffix(".weight"))
        return is_large and not kind.stays_float32(name)

    wide = torch.bfloat16 if form and dtype == FP8_STORAGE else dtype
    cast = info.source.storing(
        wide, info.keys, form, takes, None if by_rows else kind.scale_block, lambda key: kind.stays_float32(ours(key))
    )
    state = strip_prefix(info.source.tensors(device, disable_mmap, info.keys, transform, cast), info.prefix)
    state = to_original(state, info.rules)
    model = build_on_meta(lambda: kind.model(info.params))
    check_state(model, state, info.source.path)
    assign_state(model, state)
    return model


def state_of_denoiser(kind: DenoiserKind, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The denoiser's entries of a checkpoint's state under the names of the module tree."""
    own = part_of(state, kind.prefixes, kind.roots)
    return to_original(own, tuple(kind.rules(own)))


def save_denoiser(
    kind: DenoiserKind,
    model: nn.Module,
    path: str | os.PathLike,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a denoiser in the original layout. Hyper-parameters that its shapes do not tell go into `model_config`."""
    state = cast_all({key: tensor.detach().cpu() for key, tensor in model.state_dict().items()}, dtype)
    found = config_metadata(
        model.params, lambda: build_params(kind.params, _inferred(kind, model.state_dict(), {}, ""), {}, "")
    )
    save_file_atomic(state, path, {"format": "pt", **(metadata or {}), **found})
