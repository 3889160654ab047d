"""Names of layers in adapter files: every spelling that programs write, and the one that this project keeps.

| naming | denoiser | text encoder |
|---|---|---|
| kohya | lora_unet_double_blocks_0_img_attn_qkv | lora_te1_text_model_encoder_layers_0_mlp_fc1 |
| diffusers | transformer.transformer_blocks.0.attn.to_q | text_encoder.text_model.encoder.layers.0.mlp.fc1 |
| dotted (ComfyUI) | diffusion_model.double_blocks.0.img_attn.qkv | text_encoders.<name>.transformer.<path>, where there is one |

The kohya name is the hub: a table per family (`file_layers` of networks/lora_<family>.py) leads to it and from it.
Names are looked up there whole, never taken apart by guess: which underscore was a dot cannot be told from the name.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache

from library.families.registry import FAMILIES, record_of
from networks.kinds.targets import NetworkTargets, TextEncoderTargets, targets_of_family

KOHYA_PREFIX = "lora_unet_"
DOTTED_PREFIX = "diffusion_model."
PEFT_PREFIX = "base_model.model."
"""PEFT puts it in front of every name of a model that it wraps"""
LYCORIS_PREFIX = "lycoris_"
OFT_PREFIX = "oft_unet_"
DENOISER_PREFIXES = (KOHYA_PREFIX, LYCORIS_PREFIX, "lora_transformer_")
"""of names with underscores: of kohya files, of LyCORIS outside trainers, of OneTrainer"""
KOHYA_STARTS = ("lora_", LYCORIS_PREFIX, OFT_PREFIX)
DENOISER_MODELS = ("unet", "transformer")

_NUMBERS = re.compile(r"\d+|\{i\}")


@dataclass(frozen=True)
class LayerNames:
    """One layer, or one per block where `{i}` stands for the block: its path in our module tree and its parts in
    diffusers.

    `rows` says how many output rows the parts have: "equal", "linear1" (the input width three times, then the rest) or
    "queries_first" (the input width, then parts that are equal); "swapped": there is one part, whose halves stand the
    other way round. `model` is the diffusers model that holds it; `original` its path in original checkpoints, where our
    tree differs.
    """

    path: str
    parts: tuple[str, ...]
    rows: str = "equal"
    model: str = "transformer"
    original: str = ""
    parameter: str = ""
    """what ComfyUI has behind the path where the layer's parameter is not called weight"""


@dataclass(frozen=True)
class Place:
    """A layer that a name was found to mean. `part` is the number of the part of a fused layer, None for all of it;
    `encoder` the text encoder and `path` its path there."""

    kohya: str
    layer: LayerNames | None = None
    part: int | None = None
    encoder: TextEncoderTargets | None = None
    path: str = ""
    block: str = ""

    @property
    def diffusers(self) -> tuple[str, ...]:
        """Names in diffusers, one per part; none when it has none."""
        if self.layer is not None:
            return tuple(f"{self.layer.model}.{self._fill(part)}" for part in self.layer.parts)
        return (f"{self.encoder.diffusers_name}.{self._fill(self.path)}",) if self.encoder.diffusers_name else ()

    @property
    def dotted(self) -> str | None:
        """The dotted name, or None when the layout has none."""
        if self.layer is not None:
            end = f".{self.layer.parameter}" if self.layer.parameter else ""
            return DOTTED_PREFIX + self._fill(self.layer.original or self.layer.path) + end
        return f"{self.encoder.comfy_name}.{self._fill(self.path)}" if self.encoder.comfy_name else None

    @property
    def original_kohya(self) -> str:
        """The kohya name made of the path in original checkpoints."""
        return (
            self.kohya
            if self.layer is None
            else KOHYA_PREFIX + _underscored(self._fill(self.layer.original or self.layer.path))
        )

    def _fill(self, text: str) -> str:
        return text.replace("{i}", self.block)


@dataclass
class FileNames:
    """All names of one family's layers."""

    targets: NetworkTargets
    layers: tuple[LayerNames, ...]
    _entries: dict[str, list[tuple[re.Pattern[str], Place]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for layer in self.layers:
            place = Place(KOHYA_PREFIX + _underscored(layer.path), layer)
            for spelling, part in _denoiser_spellings(layer):
                self._enter(spelling, Place(place.kohya, layer, part))
        own = len(self.targets.text_encoders)
        for encoder in self.targets.text_encoders:
            for path in encoder.paths:
                place = Place(f"{encoder.prefix}_{_underscored(path)}", encoder=encoder, path=path)
                for spelling in _encoder_spellings(encoder, path, is_only=own == 1):
                    self._enter(spelling, place)

    def _enter(self, spelling: str, place: Place) -> None:
        pattern = re.compile(re.escape(spelling).replace(re.escape("{i}"), r"(\d+)"))
        self._entries.setdefault(_NUMBERS.sub("#", spelling), []).append((pattern, place))

    def find(self, name: str) -> Place | None:
        """What a name of any spelling means; None when it is in no table. Entries that were made first win."""
        if name.startswith(PEFT_PREFIX):
            name = name[len(PEFT_PREFIX) :]
        if is_kohya_name(name):
            name = name.rstrip("_")
        name = name.replace(f".{PEFT_PREFIX}", ".", 1)
        for pattern, place in self._entries.get(_NUMBERS.sub("#", name), ()):
            match = pattern.fullmatch(name)
            if match:
                block = match[1] if match.groups() else ""
                kohya = place.kohya.replace("{i}", block)
                return Place(kohya, place.layer, place.part, place.encoder, place.path, block)
        return None


def names_of_family(family: str, names: Iterable[str] = ()) -> FileNames:
    """The table of a family; its denoiser part is empty while the family has no `file_layers`. `names`: of the layers
    of a file, which tell the table where models of the family number their blocks in several ways (`file_layers_of`,
    `other_file_layers`)."""
    tables = _tables(family)
    module = importlib.import_module(record_of(family).targets.partition(":")[0]) if family in FAMILIES else None
    if hasattr(module, "file_layers_of"):
        return _table_of(family, module.file_layers_of(list(names)))
    if len(tables) == 1:
        return tables[0]
    names = [name.replace(OFT_PREFIX, KOHYA_PREFIX, 1) if name.startswith(OFT_PREFIX) else name for name in names]
    return max(tables, key=lambda table: sum(table.find(name) is not None for name in names))


@lru_cache(maxsize=None)
def _table_of(family: str, layers: tuple[LayerNames, ...]) -> FileNames:
    return FileNames(targets_of_family(family), layers)


@lru_cache(maxsize=None)
def _tables(family: str) -> tuple[FileNames, ...]:
    """That of released models first."""
    module = importlib.import_module(record_of(family).targets.partition(":")[0])
    layers = [getattr(module, "file_layers", tuple)(), *getattr(module, "other_file_layers", tuple)()]
    return tuple(FileNames(targets_of_family(family), own) for own in layers)


def is_kohya_name(name: str) -> bool:
    """Whether a name is of the kind with underscores, known or not."""
    return "." not in name and name.startswith(KOHYA_STARTS)


def _underscored(path: str) -> str:
    return path.replace(".", "_")


def _denoiser_spellings(layer: LayerNames) -> Iterator[tuple[str, int | None]]:
    """(name, part of a fused layer), the own names first."""
    single = len(layer.parts) == 1 and layer.rows != "swapped"
    paths = [layer.path, *([layer.original] if layer.original else [])]
    for prefix in DENOISER_PREFIXES:
        yield from ((prefix + _underscored(path), None) for path in paths)
        yield from ((prefix + _underscored(part), None if single else i) for i, part in enumerate(layer.parts))
    for path in paths:
        yield from ((prefix + path, None) for prefix in (DOTTED_PREFIX, f"model.{DOTTED_PREFIX}", ""))
    if layer.parameter:
        yield from ((f"{DOTTED_PREFIX}{path}.{layer.parameter}", None) for path in paths)
    if layer.model in DENOISER_MODELS:
        yield from ((f"{layer.model}.{path}", None) for path in paths if path not in layer.parts)
    for i, part in enumerate(layer.parts):
        yield f"{layer.model}.{part}", None if single else i
        if layer.model in DENOISER_MODELS:
            yield part, None if single else i


def _encoder_spellings(encoder: TextEncoderTargets, path: str, is_only: bool) -> Iterator[str]:
    """`is_only`: the family has no other text encoder, so that a path alone tells."""
    short = path.removeprefix(f"{encoder.root}.") if encoder.root else path
    for prefix in (encoder.prefix, *encoder.aliases):
        yield from (f"{prefix}_{_underscored(form)}" for form in dict.fromkeys((path, short)))
    for prefix in (encoder.diffusers_name, encoder.comfy_name):
        if prefix:
            yield from (f"{prefix}.{form}" for form in dict.fromkeys((path, short)))
    if is_only:
        yield path
