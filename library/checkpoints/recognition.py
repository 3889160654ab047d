"""Which model a table of tensor names and shapes belongs to. Names only: no weight is read.

What each kind of file is recognised by stands in the records of families and in part_kinds.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from library.checkpoints.adapter_tensors import holds_adapter, holds_layered_word
from library.checkpoints.part_kinds import PART_KINDS
from library.core.registry import import_target
from library.families.record import FamilyRecord, ModelKind, Signature
from library.families.registry import records

_INPUTS = ("lora_down.weight", "lora_A.weight", "lora.down.weight", "hada_w1_b")
"""tensors of an adapter's layer that have its inputs as columns"""
PREFIXES: tuple[str, ...] = (
    "",
    "model.diffusion_model.",
    "diffusion_model.",
    "net.",
    "model.model.",
    "model.net.",
    "model.",
    "module.",
    "first_stage_model.",
    "vae.",
    "cond_stage_model.transformer.",
    "cond_stage_model.model.",
    "conditioner.embedders.0.transformer.",
    "conditioner.embedders.1.model.",
    "language_model.model.",
    "model.language_model.",
    "transformer.",
    "unet.",
    "control_model.",
)
"""what may stand before the names of a part, in files as they are passed around"""

PART = re.compile(r"text_encoders\.[^.]+\.|first_stage_model\.|vae\.")
"""the beginning of a name in a file of several parts, which is that of its part: as ComfyUI writes them"""
_ENCODER = re.compile(r"text_encoders\.[^.]+\.")
_ENCODER_ENDINGS = ("", "model.", "transformer.", "transformer.model.")
"""what may stand behind the name of a text encoder there"""
WHOLE_FILE_PREFIXES = ("first_stage_model.", "vae.", "cond_stage_model.", "conditioner.embedders.", "text_encoders.")


class KeyTable:
    """Names and shapes of a file, looked at without the prefix that stands before the names."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.shapes = shapes

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Shape of the tensor with this name under any known prefix, or None."""
        return next((self.shapes[p + name] for p in self.prefixes if p + name in self.shapes), None)

    @cached_property
    def prefixes(self) -> tuple[str, ...]:
        """Those that are known, and those of the text encoders that are named in the file."""
        named = dict.fromkeys(match[0] for key in self.shapes if (match := _ENCODER.match(key)))
        return (*PREFIXES, *(start + ending for start in named for ending in _ENCODER_ENDINGS))

    def has(self, *names: str) -> bool:
        return all(self.shape(name) is not None for name in names)

    def size(self, name: str, dim: int) -> int | None:
        shape = self.shape(name)
        return shape[dim] if shape is not None and len(shape) > dim else None

    def rank(self, name: str) -> int:
        return len(self.shape(name) or ())

    def count(self, name: str) -> int:
        """Highest number + 1 at the place of `{}` in a name: `double_blocks.{}.` -> number of double blocks."""
        pattern = re.compile(r"(?:^|\.)" + re.escape(name).replace(r"\{\}", r"(\d+)"))
        return 1 + max((int(m.group(1)) for key in self.shapes if (m := pattern.search(key))), default=-1)

    def contains(self, *parts: str) -> bool:
        """Whether each part occurs in some name."""
        return all(any(part in key for key in self.shapes) for part in parts)

    @cached_property
    def is_whole_file(self) -> bool:
        return any(key.startswith(WHOLE_FILE_PREFIXES) for key in self.shapes)


@dataclass(frozen=True)
class Recognised:
    """`parts`: kinds of what a file of several parts holds beside this one."""

    kind: str
    title: str
    layout: str
    parts: frozenset[str] = frozenset()


ROLES = ("denoiser", "vae", "text_encoder", "other")
"""in the order in which files are asked; a relative of a denoiser stands among these"""


def latent_channels(table: KeyTable) -> str:
    """The detail of autoencoders."""
    return f"{table.size('decoder.conv_in.weight', 1)} latent channels"


def model_kinds() -> list[ModelKind]:
    """Of all families, then those that several use."""
    return [*(kind for record in records().values() for kind in record.model_kinds), *PART_KINDS]


def denoiser_kinds() -> frozenset[str]:
    """Names of the kinds that stand where a denoiser does."""
    return frozenset(kind.name for kind in model_kinds() if kind.role in ("denoiser", "relative"))


def is_adapter(table: KeyTable) -> bool:
    return holds_adapter(table.shapes)


def adapter_record(table: KeyTable) -> FamilyRecord | None:
    """The record of the family that an adapter file was made for, or None when its names do not tell."""
    known = [record for record in records().values() if record.adapters is not None]
    width = _unet_text_width(table)
    for record in known:
        if width in record.adapters.text_widths:
            return record
    for record in known:
        pattern = record.adapters.pattern
        if pattern and any(re.search(pattern, key) for key in table.shapes):
            return record
    for record in known:
        if _has_width(table, record.adapters.shared_parts, record.adapters.widths):
            return record
    known.sort(key=lambda record: -record.adapters.priority)
    return next((record for record in known if any(table.contains(part) for part in record.adapters.parts)), None)


def _has_width(table: KeyTable, parts: Sequence[str], widths: Sequence[int]) -> bool:
    """Whether a layer with one of these parts in its name has one of these numbers of inputs."""
    return bool(widths) and any(
        len(shape) == 2 and shape[1] in widths and any(part in key for part in parts)
        for key, shape in table.shapes.items()
        if key.endswith(_INPUTS)
    )


def may_be_for(table: KeyTable, owner: str) -> bool:
    """Whether an adapter file can be for the family whose adapters have this title: its names tell that family or none,
    or they are those of layers that two families call the same, and no width tells which it is."""
    maker = adapter_record(table)
    if maker is None or maker.adapters.title == owner:
        return True
    facts = maker.adapters
    if facts.widths or not facts.released_widths or _has_width(table, facts.parts, facts.released_widths):
        return False
    told_by = [part for part in facts.parts if table.contains(part)]
    shared = [
        part for record in records().values() if record.adapters is not None and record.adapters.title == owner
        for part in record.adapters.shared_parts
    ]  # fmt: skip
    return all(any(part in name for part in shared) for name in told_by)


def told_by_metadata(metadata: Mapping[str, str]) -> FamilyRecord | None:
    """The record of the family that an adapter file says it was made for (ss_base_model_version, then
    modelspec.architecture); the longest beginning counts."""
    for key, facts in (("ss_base_model_version", "base_versions"), ("modelspec.architecture", "modelspec")):
        value = metadata.get(key, "").lower()
        found = [
            (len(start), record)
            for record in records().values()
            if record.adapters is not None
            for start in getattr(record.adapters, facts)
            if value.startswith(start)
        ]
        if found:
            return max(found, key=lambda pair: pair[0])[1]
    return None


def adapter_family(table: KeyTable) -> str | None:
    """Whom an adapter file was made for, in words."""
    record = adapter_record(table)
    return record.adapters.title if record is not None else None


def _unet_text_width(table: KeyTable) -> int | None:
    """Inputs of a cross-attention layer of a U-Net's adapter, whose names are the same otherwise; None when there is
    none."""
    pattern = r"(^|[._])(down|mid|up|input|output|middle)_blocks?[._].*attn2[._]to_k[._].*(lora_down|lora_A|lora\.down|hada_w1_b)"
    return next((shape[1] for key, shape in table.shapes.items() if len(shape) > 1 and re.search(pattern, key)), None)


def holds(signature: Signature, table: KeyTable) -> bool:
    """Whether everything that a signature asks for is there."""
    return (
        table.has(*signature.has)
        and table.contains(*signature.contains)
        and all(table.size(name, dim) in sizes for name, dim, sizes in signature.sizes)
        and all(table.rank(name) == rank for name, rank in signature.ranks)
    )


def _signatures() -> Iterator[tuple[ModelKind, Signature]]:
    """In the order in which they are asked for."""
    kinds = model_kinds()
    for role in ROLES:
        found = [
            (kind, signature)
            for kind in kinds
            if kind.role == role or (role == "denoiser" and kind.role == "relative")
            for signature in kind.signatures
        ]
        yield from sorted(found, key=lambda pair: -pair[1].priority)


def recognise(shapes: Mapping[str, tuple[int, ...]]) -> Recognised | None:
    """What a file with these tensors is, or None. `shapes` maps names as stored to shapes."""
    table = KeyTable(shapes)
    if is_adapter(table):
        family = adapter_family(table)
        return Recognised(
            "adapter", f"a LoRA-type adapter for {family}" if family else "a LoRA-type adapter", "adapter"
        )
    if "emb_params" in shapes or ({"clip_l", "clip_g", "t5xxl"} & set(shapes) and len(shapes) <= 4):
        return Recognised("embedding", "a textual inversion embedding", "embedding")
    if holds_layered_word(shapes):
        return Recognised("embedding", "a textual inversion with vectors for each layer (XTI)", "embedding")
    for kind, signature in _signatures():
        if holds(signature, table):
            whole = table.is_whole_file and kind.role in ("denoiser", "relative")
            parts = [
                import_target(signature.detail)(table) if signature.detail else "",
                "with its VAE or text encoders in one file" if whole else "",
                f"{signature.layout} names" if signature.layout != "original" else "",
            ]
            told = ", ".join(part for part in parts if part)
            return Recognised(
                kind.name, f"{signature.title} ({told})" if told else signature.title,
                "whole file" if whole else signature.layout, parts_of(shapes, kind),
            )  # fmt: skip
    return None


def parts_of(shapes: Mapping[str, tuple[int, ...]], main: ModelKind) -> frozenset[str]:
    """Kinds of the parts of a file that stand under names of their own, as ComfyUI writes them. `main`: what the file
    as a whole is, which tells autoencoders of the same shapes apart."""
    groups: dict[str, dict[str, tuple[int, ...]]] = {}
    for key, shape in shapes.items():
        if match := PART.match(key):
            groups.setdefault(match[0], {})[key] = shape
    if not groups or len(groups) == 1 and len(next(iter(groups.values()))) == len(shapes):
        return frozenset()  # one part with its prefix
    found = {recognised.kind for group in groups.values() if (recognised := recognise(group)) is not None}
    owner = next((record for record in records().values() if main.name in record.kinds), None)
    same = owner.autoencoders if owner is not None else {}
    return frozenset(same.get(kind, kind) for kind in found)
