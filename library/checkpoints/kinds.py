"""What a model file or folder is, from its header alone, and whether it fits the option it was given for."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from library.checkpoints.loading import INDEX_SUFFIX, files_of_split_model, names_of_index
from library.checkpoints.recognition import (
    KeyTable,
    adapter_family,
    denoiser_kinds,
    may_be_for,
    model_kinds,
    recognise,
    told_by_metadata,
)
from library.core.errors import AtelierError, CheckpointError, did_you_mean
from library.core.text_files import open_file, read_json
from library.families.registry import options_away_from, records, script_of_kind
from library.safetensors_utils import header_bytes, is_pickle_name, load_pickled_tensors, read_header

NOT_A_MODEL = frozenset({"missing", "empty", "truncated", "damaged", "pickle", "gguf", "text", "folder", "other"})
"""kinds of things from which no weight can be read"""

PICKLED_NAMES = ("diffusion_pytorch_model.bin", "pytorch_model.bin")
MODEL_ENDINGS = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".gguf")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
"""owner/name"""


def wanted_texts() -> dict[str, str]:
    """What a slot needs, in words; other kinds are named as they are."""
    return {kind.name: kind.wanted for kind in model_kinds() if kind.wanted}


def wanted_together() -> dict[frozenset[str], str]:
    """Kinds that a slot takes together, in fewer words than one by one."""
    return {frozenset(record.kinds): record.wanted_denoiser for record in records().values() if record.wanted_denoiser}


def preferred_subfolders() -> dict[str, str]:
    """Kind of model -> where it lies in a pipeline folder of diffusers."""
    return {kind.name: kind.subfolder for kind in model_kinds() if kind.subfolder}


@dataclass(frozen=True)
class CheckpointKind:
    """`kind`: name of a ModelKind (clip_l, t5, ...), adapter, embedding, one of NOT_A_MODEL, or unknown;
    `detail`: in words, "a T5 text encoder (...)"; `layout`: original, diffusers, whole file, adapter, folder; `parts`:
    kinds of what a file of several parts holds beside it."""

    kind: str
    detail: str
    layout: str = ""
    parts: frozenset[str] = frozenset()

    @property
    def is_model(self) -> bool:
        return self.kind not in NOT_A_MODEL and self.kind != "unknown"


def describe_checkpoint(path: str | os.PathLike, with_pickles: bool = False) -> CheckpointKind:
    """Say what lies at `path`. Reads headers only and never raises for a damaged or strange file.

    `with_pickles`: files of torch with a usual ending are opened as data, which runs no code, and looked at too.
    """
    place = Path(path)
    if place.is_dir():
        return _describe_folder(place, with_pickles)
    if not place.exists():
        return CheckpointKind("missing", f"there is no such file or folder{_nearest_file(place)}")
    if place.name.endswith(INDEX_SUFFIX):
        return _describe_shards(place.parent, place)
    broken = _what_is_not_safetensors(place)
    read = (
        _pickled_shapes
        if broken is not None and broken.kind == "pickle" and with_pickles and is_pickle_name(place)
        else _shapes
    )
    if broken is not None and read is _shapes:
        return broken
    try:
        parts = files_of_split_model(place)
        if parts is not None:
            return _describe_files([Path(part) for part in parts])
        shapes = read(place)
    except CheckpointError as error:
        return CheckpointKind("truncated" if "truncated" in str(error) else "damaged", str(error))
    return _kind_of(shapes)


def check_slot(
    path: str | os.PathLike | None, slot: str, wanted: set[str], with_pickles: bool = False, *,
    for_pictures: bool = False, inside: set[str] | None = None,
) -> str | None:
    """A message when what `--{slot}` names is not one of the wanted kinds, or None when it fits.

    A folder fits when the part that is needed lies in its usual sub-folder, where readers look first, whatever lies
    beside it; a file of several parts when one of them is of these kinds, or of those of `inside` where the file tells
    more than shapes do. `for_pictures`: the caller makes images, so a model of another family is sent to the script
    that makes images with it.
    """
    needed = _in_words(wanted)
    if not path:
        return f"--{slot} is not given; needed: {needed}"
    found = describe_checkpoint(path, with_pickles)
    if found.kind in wanted or found.parts & (inside or wanted):
        return None
    if Path(path).is_dir():
        for kind in sorted(wanted):
            part = Path(path) / preferred_subfolders().get(kind, "")
            if part != Path(path) and part.is_dir() and describe_checkpoint(part, with_pickles).kind == kind:
                return None
    told = found.detail if found.kind in ("missing", "truncated", "damaged") else f"this is {found.detail}"
    told = f"it {told.removeprefix(f'{path} ')}" if told.startswith(f"{path} ") else told
    told += _about_parts(Path(path), wanted, with_pickles) if found.kind == "folder" else ""
    told += ", with an autoencoder of its own" if found.parts and _holds_another(found, wanted) else ""
    return f"--{slot} is {path}: {told}; needed: {needed}{_strength(path, slot, found)}{_way_out(path, found, wanted, for_pictures)}"


def _holds_another(found: CheckpointKind, wanted: set[str]) -> bool:
    """Whether a file of several parts has an autoencoder of the shapes that are needed, and it is another model's."""
    same = {kind for record in records().values() for kind, own in record.autoencoders.items() if own in found.parts}
    return bool((same | found.parts) & wanted)


STRENGTHS = {
    "lora_weights": '"FILE;{}"', "lora_weight": "--lora_multiplier {}", "base_weights": "--base_weights_multiplier {}",
    "network_weights": "--network_mul {} in image scripts",
    "models": "--ratios {}",
}  # fmt: skip
"""slot of adapters -> how their strength is given"""


def _strength(path: str | os.PathLike, slot: str, found: CheckpointKind) -> str:
    """A number in the place of a file is the strength of the adapter before it."""
    try:
        float(os.fspath(path))
    except ValueError:
        return ""
    how = STRENGTHS.get(slot)
    return f". The strength of an adapter is given as {how.format(path)}" if how and found.kind == "missing" else ""


def _in_words(wanted: set[str]) -> str:
    """What a slot needs: kinds that belong together first."""
    left, texts = set(wanted), []
    for kinds, text in wanted_together().items():
        if kinds <= left:
            left -= kinds
            texts.append(text)
    known = wanted_texts()
    return " or ".join([*texts, *(known.get(kind, kind) for kind in sorted(left))])


def _about_parts(folder: Path, wanted: set[str], with_pickles: bool) -> str:
    """What a pipeline folder has in the place of the part that is needed."""
    if not (folder / "model_index.json").is_file():
        return ""
    told, places = "", preferred_subfolders()
    for name in sorted({places[kind] for kind in wanted & places.keys()}):
        part = folder / name
        told += (
            f", whose {name} is {describe_checkpoint(part, with_pickles).detail}"
            if part.is_dir()
            else f" without its sub-folder {name}"
        )
    return told


def _way_out(path: str | os.PathLike, found: CheckpointKind, wanted: set[str], for_pictures: bool) -> str:
    """Which script takes the model that was given where another one is needed, or how one of the hub is fetched."""
    looks_like_id = (
        HUB_ID.fullmatch(str(path)) and Path(path).suffix not in MODEL_ENDINGS and not Path(path).parent.exists()
    )
    if found.kind == "missing" and looks_like_id:
        return f"; a model of the hub is fetched beforehand: hf download {path} --local-dir FOLDER, and FOLDER is given here"
    denoisers = denoiser_kinds()
    if not wanted & denoisers:
        return ""
    if found.kind == "folder":
        parts = (Path(path) / name for name in ("unet", "transformer"))
        found = next((describe_checkpoint(part) for part in parts if part.is_dir()), found)
    if found.kind not in denoisers or found.kind in wanted:
        return ""
    script = script_of_kind(found.kind, for_pictures=for_pictures) or "no script here"
    script += "".join(f" without --{option}" for option in options_away_from(found.kind, wanted))
    is_video = any(record.clips and found.kind in record.kinds for record in records().values())
    does = f"makes {'videos' if is_video else 'images'} with" if for_pictures else "trains"
    return f"; {script} {does} such a model"


def check_adapter(path: str | os.PathLike, slot: str, owner: str) -> str | None:
    """A message when an adapter file is made for another model than `owner` (the `title` of AdapterFacts), or None when
    it fits or its names do not tell."""
    place = Path(path)
    if place.suffix != ".safetensors" or not place.is_file():
        return None
    infos, metadata = read_header(place)
    told = told_by_metadata(metadata)
    if told is not None and told.adapters.title == owner:
        return None  # the names of some layers are those of several families
    table = KeyTable({name: tuple(info.shape) for name, info in infos.items()})
    if may_be_for(table, owner):
        return None
    return f"--{slot} is {path}: this is a LoRA-type adapter for {adapter_family(table)}; needed: one for {owner}"


def _kind_of(shapes: Mapping[str, tuple[int, ...]], folder: bool = False) -> CheckpointKind:
    found = recognise(shapes)
    if found is not None:
        layout = "diffusers folder" if folder and found.layout == "diffusers" else found.layout
        return CheckpointKind(found.kind, found.title, layout, found.parts)
    if not shapes:
        return CheckpointKind("empty", "a safetensors file without tensors")
    examples = ", ".join(list(shapes)[:3])
    return CheckpointKind(
        "unknown", f"a safetensors file of a model that is not known here ({len(shapes)} tensors: {examples}, ...)"
    )


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    infos, _ = read_header(path)
    return {name: tuple(info.shape) for name, info in infos.items()}


def _pickled_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in load_pickled_tensors(path).items()}


def _what_is_not_safetensors(path: Path) -> CheckpointKind | None:
    """The kind of a file that does not begin like a safetensors file, or None when it does."""
    try:
        size = path.stat().st_size
        with open_file(path) as file:
            start = file.read(512)
    except OSError as error:
        return CheckpointKind("damaged", f"it cannot be read ({error.strerror})")
    if size == 0:
        return CheckpointKind("empty", "an empty file (0 bytes); fetch it again")
    length = header_bytes(
        start
    )  # one of 640 or 896 bytes begins with the two bytes of a pickle, so this is asked first
    if not length and (
        start.startswith(b"PK\x03\x04") or start[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
    ):
        return CheckpointKind(
            "pickle",
            "a pickle (.ckpt, .pt, .bin), which can run any code when it is opened; get or make the safetensors version"
        )
    if start.startswith(b"GGUF"):
        return CheckpointKind("gguf", "a quantised GGUF file; get the safetensors version")
    if start.startswith(b"version https://git-lfs"):
        return CheckpointKind("text", "a git-lfs pointer, not the file itself; run git lfs pull or fetch the file")
    head = start.lstrip()[:15].lower()
    if head.startswith((b"<!doctype", b"<html", b"<?xml")):
        return CheckpointKind("text", "a web page, not the file itself; the download needs a login or another address")
    if length:
        if 8 + length > size:
            return CheckpointKind(
                "truncated", f"the file is truncated: {size} bytes, less than its header of {length}; fetch it again"
            )
        return None
    if start.isascii() and b"\0" not in start:
        return CheckpointKind("text", f"a text file ({size} bytes)")
    return CheckpointKind("other", f"a file of {size} bytes that is not safetensors")


def _describe_folder(folder: Path, with_pickles: bool = False) -> CheckpointKind:
    if (folder / "model_index.json").is_file():  # files beside it (an adapter, what a conversion has kept) are no model
        return CheckpointKind("folder", f"a diffusers pipeline folder ({_pipeline_class(folder)})", "folder")
    index = next(iter(sorted(folder.glob(f"*{INDEX_SUFFIX}"))), None)
    if index is not None:
        return _describe_shards(folder, index)
    files = sorted(folder.glob("*.safetensors"), key=lambda file: (not _has_usual_name(file), file.name))
    if files and (len(files) == 1 or _has_usual_name(files[0])):
        return _as_folder(describe_checkpoint(files[0]))
    pickled = next((folder / name for name in PICKLED_NAMES if with_pickles and (folder / name).is_file()), None)
    if pickled is not None and not files:
        return _as_folder(describe_checkpoint(pickled, with_pickles))
    if files:
        return CheckpointKind(
            "folder", f"a folder with {len(files)} safetensors files, of which one must be named", "folder"
        )
    parts = sorted(child.name for child in folder.iterdir() if child.is_dir())
    return CheckpointKind(
        "folder", "a folder without safetensors files" + (f" (sub-folders: {', '.join(parts[:6])})" if parts else ""),
        "folder"
    )


def _describe_shards(folder: Path, index: Path) -> CheckpointKind:
    """A model in several files: all of them must be there and whole."""
    try:
        names = names_of_index(index)
    except CheckpointError as error:
        return CheckpointKind("damaged", str(error))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        return CheckpointKind("damaged", f"{', '.join(missing)} of {len(names)} files of the model are missing")
    return _describe_files([folder / name for name in names], folder=True)


def _describe_files(files: Sequence[Path], folder: bool = False) -> CheckpointKind:
    """A model in files that are all there. `folder`: it is given as a folder, or by its index."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        broken = _what_is_not_safetensors(file)
        if broken is not None:
            return CheckpointKind(broken.kind, f"{file.name} is {broken.detail}")
        try:
            shapes.update(_shapes(file))
        except CheckpointError as error:
            return CheckpointKind("truncated" if "truncated" in str(error) else "damaged", str(error))
    return _kind_of(shapes, folder=folder)


def _as_folder(kind: CheckpointKind) -> CheckpointKind:
    return replace(kind, layout="diffusers folder") if kind.layout == "diffusers" else kind


def _has_usual_name(file: Path) -> bool:
    return file.name.startswith(("model.", "diffusion_pytorch_model."))


def _pipeline_class(folder: Path) -> str:
    try:
        return str(read_json(folder / "model_index.json", needed=dict).get("_class_name", "of unknown class"))
    except AtelierError:
        return "with an unreadable model_index.json"


def _nearest_file(path: Path) -> str:
    """`; did you mean ...?` from the names beside a missing file."""
    if not path.parent.is_dir():
        return f", and no folder {path.parent}"
    return did_you_mean(path.name, [child.name for child in path.parent.iterdir()])
