"""What every loader of a model does: find the files, strip prefixes, undo quantisation, build on the meta device,
assign."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from library.checkpoints.scaled_weights import (
    SCALE_SUFFIXES,
    SCALED_FORMS,
    Items,
    is_blob,
    multiplied_out,
    refuse_unknown_forms,
    transformed,
    with_scales,
)
from library.checkpoints.weight_forms import FP8, FP8_SCALED, FP8_STORAGE, INT8, StoredWeight, stored
from library.core.errors import CheckpointError
from library.core.text_files import parse_json, read_json
from library.fp8_optimization_utils import hold
from library.safetensors_utils import (
    FP8_DTYPES,
    cast_floats,
    get_split_weight_filenames,
    is_pickled,
    iterate_tensors,
    load_pickled_tensors,
    read_header,
)

logger = logging.getLogger(__name__)
P = TypeVar("P")
T = TypeVar("T")

INDEX_SUFFIX = ".safetensors.index.json"
"""of the file that tells which tensor of a split model is in which file"""


@dataclass(frozen=True)
class CheckpointFiles:
    """The files of one model part. `shapes`: every tensor without data; `config`: what a config.json beside them says;
    `model_config`: hyper-parameters that the file itself carries in its metadata."""

    path: str
    files: tuple[str, ...]
    shapes: dict[str, Tensor]
    config: dict[str, Any]
    model_config: dict[str, Any]
    part: str = field(default="", kw_only=True)
    """what is read of them where names may not tell, by its folder in a pipeline (text_encoder_2, say)"""

    def config_of(self, part: str) -> Mapping[str, Any]:
        """What `model_config` says of one part: its entry in a file of several, all of it in a file of its own."""
        return self.model_config.get(part, self.model_config)

    def tensors(
        self, device: torch.device | str, disable_mmap: bool, keys: Iterable[str], transform: Transform | None = None,
        cast: Callable[[str, Tensor], Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """The named tensors, less what is no weight. Weights with scales beside them are multiplied out (float32), but
        those that `cast`, a Cast, keeps: these come as StoredWeight, as they are in the file.

        `transform` may change the tensors as they are read, `cast` gives each its type in the same pass.
        """
        items = with_scales(self, self.stream(device, disable_mmap, keys))
        keeps = cast.keeps if isinstance(cast, Cast) else lambda weight: False
        items = transformed(self, items, transform, keeps) if transform else multiplied_out(items, keeps)
        return {key: tensor if cast is None else cast(key, tensor) for key, tensor in items}

    def dtype_of(self, key: str) -> torch.dtype:
        """The type of a tensor in the file; bfloat16 for one in scaled numbers, whose type says nothing of others."""
        kind = self.shapes[key].dtype
        is_scaled = any(key.removesuffix(".weight") + suffix in self.shapes for suffix in SCALE_SUFFIXES)
        return torch.bfloat16 if is_scaled and kind in SCALED_FORMS else kind

    def casting(self, dtype: torch.dtype | None) -> Cast:
        """The usual `cast` of `tensors`: floating-point ones to `dtype`, or as in the file with 8 bits widened to
        bfloat16; inside `keeping_forms` weights in fewer bits stay so."""
        form = _kept_form.get()
        return Cast(self, dtype, form, takes=lambda key: False)

    def storing(
        self, dtype: torch.dtype | None, keys: Iterable[str], form: str | None = None,
        takes: Callable[[str], bool] = lambda key: True, block: int | None = None,
        stays_float32: Callable[[str], bool] = lambda key: False,
    ) -> Cast:
        """The `cast` of `tensors` for a model, with these keys, whose matrices may be in fewer bits: those that it
        `takes` in `form`, one of weight_forms.FORMS (`block`: the inputs that share a scale), those of `stays_float32`
        in float32, the rest in `dtype`.

        `dtype` float8_e4m3fn is the form fp8, with the rest in bfloat16; None keeps the file's own types.
        CheckpointError when 8-bit numbers are to be kept and are of another kind.
        """
        if dtype == FP8_STORAGE:
            dtype, form = torch.bfloat16, form or FP8
        kinds = {self.dtype_of(key) for key in keys if key.endswith(".weight")}
        other = sorted(str(kind).removeprefix("torch.") for kind in kinds & set(FP8_DTYPES) - {FP8_STORAGE})
        if form in (FP8, FP8_SCALED) and other:
            raise CheckpointError(
                f"{self.path} stores weights as {', '.join(other)}; 8-bit storage needs float8_e4m3fn or a wider file"
            )
        return Cast(self, dtype, form, takes, block, stays_float32)

    def stream(
        self, device: torch.device | str | None, disable_mmap: bool, keys: Iterable[str]
    ) -> Iterator[tuple[str, Tensor]]:
        """The named tensors one by one, in the order of the files."""
        wanted = set(keys)
        for file in self.files:
            names = [key for key in _keys_of(file) if key in wanted]
            yield from iterate_tensors(file, device, disable_mmap, names)


@dataclass(frozen=True)
class Cast:
    """What gives the tensors of a file their type as they are read: (name, tensor or weight in fewer bits) -> the same
    to be assigned. See `CheckpointFiles.storing`."""

    files: CheckpointFiles
    dtype: torch.dtype | None
    form: str | None
    takes: Callable[[str], bool]
    block: int | None = None
    stays_float32: Callable[[str], bool] = lambda key: False

    def keeps(self, weight: StoredWeight) -> bool:
        """Whether a weight that has scales in the file stays as it is: scaled 8 bits, where 8 bits are asked for."""
        if self.form is None:
            return self.dtype is None
        return weight.form in {FP8: (FP8_SCALED,), FP8_SCALED: (FP8_SCALED,), INT8: (INT8,)}.get(self.form, ())

    def __call__(self, key: str, tensor: Tensor | StoredWeight) -> Tensor | StoredWeight:
        if isinstance(tensor, StoredWeight):
            return tensor.widened() if self.stays_float32(key) else tensor
        if self.stays_float32(key):
            return cast_floats(tensor, torch.float32, key)
        kind = self.files.dtype_of(key)
        if key.endswith(".weight") and tensor.ndim == 2 and self.takes(key):
            is_own = self.form is None and self.dtype is None
            if kind in FP8_DTYPES and (is_own or (self.form in (FP8, FP8_SCALED) and tensor.dtype == kind)):
                return StoredWeight(FP8, cast_floats(tensor, kind, key), None, tensor.shape)
            if self.form is not None:
                return stored(tensor, self.form, self.block, key)
        return cast_floats(tensor, self.dtype or (torch.bfloat16 if kind in FP8_DTYPES else kind), key)


_kept_form: ContextVar[str | None] = ContextVar("kept_form", default=None)


@contextmanager
def keeping_forms(form: str | None) -> Iterator[None]:
    """While it lasts models whose layers are put into a form after they were read keep those weights that a file has in
    it already; None = nothing is kept."""
    token = _kept_form.set(form)
    try:
        yield
    finally:
        _kept_form.reset(token)


@dataclass(frozen=True)
class TensorsInMemory(CheckpointFiles):
    """A model part whose tensors a caller has read already."""

    held: Mapping[str, Tensor]

    def stream(
        self, device: torch.device | str | None, disable_mmap: bool, keys: Iterable[str]
    ) -> Iterator[tuple[str, Tensor]]:
        wanted = set(keys)
        for key, tensor in self.held.items():
            if key in wanted:
                yield key, tensor if device is None else tensor.to(device)


Transform = Callable[[CheckpointFiles, Items], Items]
"""what a loader lets happen to the tensors of a file while they are read: (file, (key, tensor) pairs) -> pairs"""


Source = str | os.PathLike | Mapping[str, Tensor]
"""where a model part is: a path, or the tensors themselves by the names of a file"""


def open_checkpoint(path: Source, subfolder: str | None = None) -> CheckpointFiles:
    """Headers of a model part: a file, one file of a split set, a folder in the layout of diffusers / transformers, or
    tensors that were read already.

    A folder may be the whole model (then `subfolder` is looked into) or the part itself. CheckpointError otherwise.
    """
    if isinstance(path, Mapping):
        shapes = {key: tensor.to("meta") for key, tensor in path.items()}
        return TensorsInMemory("the state dict", (), shapes, {}, {}, path)
    files, config = _find_files(Path(path), subfolder)
    shapes: dict[str, Tensor] = {}
    model_config: dict[str, Any] = {}
    for file in files:
        if not is_pickled(file):
            infos, metadata = read_header(file)
            shapes.update((key, info.as_meta()) for key, info in infos.items())
            model_config.update(_parse_model_config(file, metadata))
        else:
            shapes.update((key, tensor.to("meta")) for key, tensor in load_pickled_tensors(file).items())
    refuse_unknown_forms(os.fspath(path), shapes)
    return CheckpointFiles(os.fspath(path), tuple(files), shapes, config, model_config)


def names_of_index(index: Path) -> list[str]:
    """The files that an index of a split model lists. CheckpointError."""
    parts = read_json(index, error=CheckpointError, needed=dict).get("weight_map")
    names = (
        set(parts.values())
        if isinstance(parts, dict) and all(isinstance(name, str) for name in parts.values())
        else set()
    )
    if not names:
        raise CheckpointError(f"{index} is no index of a split model: it has no weight_map from tensors to files")
    return sorted(names)


def files_of_split_model(path: str | os.PathLike) -> list[str] | None:
    """All files of a model in several, of which `path` is one, or their index; None for other files. CheckpointError
    when some are missing."""
    place = Path(path)
    if not place.name.endswith(INDEX_SUFFIX):
        return get_split_weight_filenames(place)
    names = names_of_index(place)
    missing = [name for name in names if not (place.parent / name).exists()]
    if missing:
        raise CheckpointError(f"{place.parent}: {place.name} lists files that are missing: {', '.join(missing)}")
    return [str(place.parent / name) for name in names]


def _keys_of(file: str) -> list[str]:
    if is_pickled(file):
        return list(load_pickled_tensors(file))
    return list(read_header(file)[0])


def _parse_model_config(file: str, metadata: Mapping[str, str]) -> dict[str, Any]:
    if "model_config" not in metadata:
        return {}
    config = parse_json(metadata["model_config"], f"{file}: the metadata entry model_config", CheckpointError)
    if not isinstance(config, dict):
        raise CheckpointError(
            f"{file}: the metadata entry model_config is {type(config).__name__}; a JSON object is needed"
        )
    return config


def _find_files(path: Path, subfolder: str | None) -> tuple[list[str], dict[str, Any]]:
    if not path.is_dir():
        if not path.exists():
            raise CheckpointError(f"{path} does not exist")
        parts = files_of_split_model(path)
        return parts or [str(path)], _config_in(path.parent) if parts else {}
    folder = path / subfolder if subfolder and (path / subfolder).is_dir() else path
    config = _config_in(folder)
    for index in sorted(folder.glob(f"*{INDEX_SUFFIX}")):
        return files_of_split_model(index) or [], config
    for stem in ("diffusion_pytorch_model", "model"):
        for name in (f"{stem}.safetensors", f"{stem}.fp16.safetensors", f"{stem}.bf16.safetensors"):
            if (folder / name).exists():
                return [str(folder / name)], config
    for name in ("diffusion_pytorch_model.bin", "pytorch_model.bin"):
        if (folder / name).exists():
            return [str(folder / name)], config
    looked = f"{folder} (no {subfolder} sub-folder)" if subfolder and folder == path else str(folder)
    raise CheckpointError(
        f"{looked} holds no model: expected diffusion_pytorch_model.safetensors or model.safetensors in it"
    )


def _config_in(folder: Path) -> dict[str, Any]:
    """What a config.json says of the model in its folder; nothing without one."""
    file = folder / "config.json"
    return read_json(file, error=CheckpointError, needed=dict) if file.exists() else {}


def find_prefix(keys: Iterable[str], prefixes: Sequence[str], roots: Sequence[str], path: str, what: str) -> str:
    """The prefix that every key of this part carries; "" for none.

    `roots` are the first words of the part's own keys; a key belongs to the part when it starts with one of them after
    the longest fitting prefix is taken away. What is no weight tells nothing. CheckpointError when such keys carry
    different prefixes.
    """
    ordered = sorted(prefixes, key=len, reverse=True)
    found: dict[str, str] = {}
    for key in keys:
        if is_blob(key):
            continue
        prefix = next((p for p in ordered if key.startswith(p) and key[len(p) :].split(".")[0] in roots), None)
        if prefix is None and key.split(".")[0] in roots:
            prefix = ""
        if prefix is not None:
            found.setdefault(prefix, key)
    if len(found) > 1:
        raise CheckpointError(f"{path}: keys of the {what} carry different prefixes: {', '.join(found.values())}")
    return next(iter(found), "")


def strip_prefix(state: Mapping[str, T], prefix: str) -> dict[str, T]:
    """The entries under `prefix`, without it."""
    return {key[len(prefix) :]: tensor for key, tensor in state.items() if key.startswith(prefix)}


def prefixed(prefix: str, state: Mapping[str, T]) -> dict[str, T]:
    """The entries with `prefix` before their names."""
    return {prefix + key: tensor for key, tensor in state.items()}


def part_of(state: Mapping[str, T], prefixes: Sequence[str], roots: Sequence[str]) -> dict[str, T]:
    """The entries of one part of a checkpoint without their prefix; nothing when the part is not there."""
    prefix = find_prefix(state, prefixes, roots, "the file", "part")
    return {key: value for key, value in strip_prefix(state, prefix).items() if key.split(".")[0] in roots}


def count_blocks(keys: Mapping[str, object] | Sequence[str], prefix: str) -> int:
    """1 + the largest number N in keys `<prefix>N.`; 0 when there is none."""
    pattern = re.compile(re.escape(prefix) + r"(\d+)\.")
    return max((int(match[1]) + 1 for match in map(pattern.match, keys) if match), default=0)


def check_marks(shapes: Mapping[str, object], marks: Iterable[str | tuple[str, ...]], path: str, what: str) -> None:
    """CheckpointError unless every mark, the name of a tensor by which a part is known, is among the names of a file;
    it names all that are not. Of a tuple one name is enough. `what`: the part, in words."""
    choices = [(mark,) if isinstance(mark, str) else mark for mark in marks]
    lacking = [" or ".join(names) for names in choices if not any(name in shapes for name in names)]
    if lacking:
        some = ", ".join(list(shapes)[:3]) or "no tensors"
        raise CheckpointError(f"{path} holds no {what} (it lacks {', '.join(lacking)}; it begins with {some})")


def size_of(shapes: Mapping[str, Tensor], key: str, dim: int, path: str, title: str) -> int:
    """One size of a tensor; CheckpointError when it is not there."""
    if key not in shapes or shapes[key].ndim <= dim:
        raise CheckpointError(f"{path} does not fit {title}: {key} is missing or has too few dimensions")
    return shapes[key].shape[dim]


def build_params(params_class: Callable[..., P], inferred: Mapping[str, Any], given: Mapping[str, Any], path: str) -> P:
    """The hyper-parameter record: what shapes tell, overridden by what the file or the caller gives.

    Names that the record does not have are left aside (a `model_config` may describe more than one class).
    CheckpointError when values do not go together; its message names the argument.
    """
    known = {field.name for field in fields(params_class)}
    overrides = {key: value for key, value in given.items() if key in known}
    try:
        return params_class(**{**inferred, **overrides})
    except (ValueError, TypeError) as error:
        raise CheckpointError(
            f"{path}: {error}. Shapes alone do not tell; give it as an argument or under model_config in the file's "
            "metadata"
        ) from error


def config_metadata(params: Any, inferred: Callable[[], Any]) -> dict[str, str]:
    """{"model_config": JSON} for hyper-parameters that do not follow from the shapes of a file, else nothing.
    `inferred` reads them from the shapes; CheckpointError says that they do not tell."""
    try:
        found = inferred()
    except CheckpointError:
        found = None
    return {} if found == params else {"model_config": json.dumps(asdict(params), sort_keys=True)}


class WithoutStartValues(TorchFunctionMode):
    """Inside, the functions of `torch.nn.init` pass tensors without storage by: there is nothing to fill."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        given = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            tensor = args[0] if args else given["tensor"]
            if tensor.is_meta:
                return tensor
        return func(*args, **given)


def build_on_meta(factory: Callable[[], nn.Module]) -> nn.Module:
    """Construct a module without allocating its weights."""
    with torch.device("meta"), WithoutStartValues():
        return factory()


def check_state(
    model: nn.Module, state: Mapping[str, Tensor], path: str, tolerated: Callable[[str], bool] = lambda key: False
) -> None:
    """CheckpointError unless `state` has exactly the model's keys with the model's shapes (`tolerated` extra keys
    aside)."""
    expected = model.state_dict()
    missing = [key for key in expected if key not in state]
    extra = [key for key in state if key not in expected and not tolerated(key)]
    wrong = [
        f"{key} is {list(state[key].shape)}, needed {list(tensor.shape)}"
        for key, tensor in expected.items()
        if key in state and state[key].shape != tensor.shape
    ]
    problems = [
        f"{len(names)} {text}: {', '.join(names[:4])}{' ...' if len(names) > 4 else ''}"
        for names, text in ((missing, "keys are missing"), (extra, "keys are unknown"), (wrong, "shapes do not fit"))
        if names
    ]
    if problems:
        raise CheckpointError(f"{path} does not fit {type(model).__name__}: " + "; ".join(problems))


def check_finite(state: Mapping[str, Tensor], path: str) -> None:
    """CheckpointError for values that would make every output NaN. For small files: it reads all of them."""
    for key, tensor in state.items():
        if not bool(torch.isfinite(tensor.float()).all()):
            raise CheckpointError(f"{path}: {key} has values that are not finite; the training of this file failed")


def assign_state(model: nn.Module, state: Mapping[str, Tensor | StoredWeight]) -> None:
    """Make the tensors of `state` the model's own; every key of the model must be there. Layers hold weights in fewer
    bits as they are, and what is no layer has them widened."""
    state = dict(state)
    wide = next((t.dtype for t in state.values() if isinstance(t, Tensor) and t.is_floating_point()), torch.bfloat16)
    for key, weight in state.items():
        if isinstance(weight, StoredWeight):
            layer = model.get_submodule(key.rpartition(".")[0])
            if isinstance(layer, (nn.Linear, nn.Conv2d)):
                hold(layer, weight)
                state[key] = weight.data
            else:
                state[key] = weight.widened(wide)
    names = model.state_dict().keys()
    model.load_state_dict({key: state[key] for key in names}, strict=True, assign=True)
    model.requires_grad_(False)
    model.eval()
