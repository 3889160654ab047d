"""Which layers of a model family take an adapter, and under which names. One table per family, one way to read it.

Names: `<prefix>_<path with dots as underscores>`. The way back from underscores to dots is ambiguous, so names are
always made from the model (or from the table of networks/files/file_names.py) and looked up, never taken apart.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from library.core.errors import ConfigError
from library.core.registry import import_target
from library.families.registry import FAMILIES, family_of_denoiser, record_of

if TYPE_CHECKING:
    from torch import nn

LEAF_CLASSES = ("Linear", "Conv2d")
NORM_CLASSES = ("LayerNorm", "GroupNorm", "RMSNorm", "Qwen3RMSNorm", "T5LayerNorm")
"""norm layers whose output is proportional to their weight (and bias)"""


CLIP_CLASSES = ("CLIPAttention", "CLIPSdpaAttention", "CLIPFlashAttention2", "CLIPMLP")
CLIP_PATHS = tuple(
    f"text_model.encoder.layers.{{i}}.{leaf}"
    for leaf in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2")
)
T5_PATHS = (
    *(f"encoder.block.{{i}}.layer.0.SelfAttention.{leaf}" for leaf in "qkvo"),
    *(f"encoder.block.{{i}}.layer.1.DenseReluDense.{leaf}" for leaf in ("wi_0", "wi_1", "wo")),
)


@dataclass(frozen=True)
class TextEncoderTargets:
    """One text encoder. `root` is a level that names in files always carry, whatever the installed library calls its
    modules; `switch` names the network argument without which this encoder is not trained; `aliases` are prefixes that
    other programs write for it; `diffusers_name` is the model's part in diffusers, `comfy_name` its place in dotted
    names, and `paths` its layers, with `{i}` for the block (none: its adapters cannot be rewritten)."""

    prefix: str
    classes: tuple[str, ...]
    root: str = ""
    switch: str | None = None
    aliases: tuple[str, ...] = ()
    diffusers_name: str = ""
    comfy_name: str = ""
    paths: tuple[str, ...] = ()
    file_state: str | None = None
    """"module:function" that picks this encoder out of a checkpoint's state and renames it to the module tree"""


@dataclass(frozen=True)
class PartRule:
    """`arg=<rank>` sets the rank of the layers whose path matches `pattern` (whole path); 0 leaves them out."""

    arg: str
    pattern: str


@dataclass(frozen=True)
class EntryRule:
    """`arg=[r1,r2,...]` trains layers outside the target classes: one rank per (name, path pattern); 0 leaves one
    out."""

    arg: str
    parts: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class IndexRule:
    """`arg=0-3,7` selects blocks; `pattern` finds the block number of a path in its first group."""

    arg: str
    pattern: str


@dataclass(frozen=True)
class ChoiceRule:
    """`arg=<choice>` narrows the target classes, and within them to the layers whose path matches (whole path) where
    `paths` has an expression for the choice."""

    arg: str
    classes: Mapping[str, tuple[str, ...]]
    paths: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class BlockTable:
    """Numbers the blocks of a U-Net for `block_dims` and its relatives: `count` values, `index_of(path)`.

    `down`, `mid` and `up` are the numbers that `down_lr_weight` and its relatives have factors for."""

    count: int
    index_of: Callable[[str], int | None]
    down: range
    mid: range
    up: range


@dataclass(frozen=True)
class SplitRule:
    """A fused projection: `sizes(out_features, in_features)` gives the rows of each part."""

    pattern: str
    sizes: Callable[[int, int], list[int]]


def qkv_rows(out_features: int, in_features: int) -> list[int]:
    """Rows of q, k and v in a fused projection."""
    return [out_features // 3] * 3


def linear1_rows(out_features: int, in_features: int) -> list[int]:
    """Rows of q, k, v and the feed-forward in the first layer of a single block."""
    return [in_features] * 3 + [out_features - 3 * in_features]


@dataclass(frozen=True)
class NetworkTargets:
    """Everything an adapter needs to know of a family."""

    family: str
    classes: tuple[str, ...]
    prefix: str = "lora_unet"
    aliases: tuple[str, ...] = ("lora_unet", "oft_unet", "lycoris")
    """prefixes that files have for the denoiser"""
    file_state: str | None = None
    """"module:function" that picks the denoiser out of a checkpoint's state and renames it to the module tree"""
    conv_classes: tuple[str, ...] = ()
    """classes that become targets when `conv_dim` is given"""
    attention_classes: tuple[str, ...] = ()
    """classes of the attention layers, for kinds that train these alone"""
    attention_paths: str = ""
    """expression for the paths of attention layers, where these are in no class of their own"""
    narrowed: tuple[str, str] | None = None
    """(expression, argument): of the denoiser's layers only those whose whole path matches, but with this argument"""
    part_by_part: bool = False
    """every Linear of the denoiser is trained in parts: a fused one in its own, another in one"""
    optional_classes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """network argument -> classes that it adds"""
    text_encoders: tuple[TextEncoderTargets, ...] = ()
    choice: ChoiceRule | None = None
    parts: tuple[PartRule, ...] = ()
    entries: EntryRule | None = None
    indices: tuple[IndexRule, ...] = ()
    blocks: BlockTable | None = None
    splits: tuple[SplitRule, ...] = ()
    default_excludes: tuple[str, ...] = ()
    encoder_excludes: tuple[str, ...] = ()
    leaf_classes: tuple[str, ...] = LEAF_CLASSES
    """classes of the layers inside the target classes that take an adapter"""
    comfy_is_kohya: bool = False
    """ComfyUI reads adapters of the family under kohya names of the original paths alone"""
    regex_on_path: bool = False
    """rank and rate patterns: True = the whole dotted path; False = a search in the layer's name or dotted path"""
    reads: tuple[str, ...] = ()
    """families whose adapters fit too, under the names that diffusers gives the parts of their layers"""

    @property
    def prefixes(self) -> tuple[str, ...]:
        return (self.prefix, *(encoder.prefix for encoder in self.text_encoders))

    def encoder_of(self, lora_name: str) -> int | None:
        """Position of the text encoder that a name belongs to; None for the denoiser."""
        for position, encoder in enumerate(self.text_encoders):
            if lora_name.startswith(encoder.prefix + "_"):
                return position
        return None

    def canonical_names(self, lora_name: str) -> list[str]:
        """Names under which this module may stand in the model: as written, then with other programs' spellings
        undone."""
        names = [lora_name]
        for prefix in self.aliases:
            if lora_name.startswith(prefix + "_"):
                names.append(f"{self.prefix}_{lora_name[len(prefix) + 1 :]}")
        for encoder in self.text_encoders:
            for prefix in (encoder.prefix, *encoder.aliases):
                if not lora_name.startswith(prefix + "_"):
                    continue
                rest = lora_name[len(prefix) + 1 :]
                names.append(f"{encoder.prefix}_{rest}")
                if encoder.root and not rest.startswith(encoder.root + "_"):
                    names.append(f"{encoder.prefix}_{encoder.root}_{rest}")
        return names


@dataclass(frozen=True)
class Layer:
    """One layer that may take an adapter. `path` is dotted and canonical; `encoder` is None for the denoiser."""

    lora_name: str
    path: str
    module: nn.Module
    encoder: int | None = None

    @property
    def is_kxk_conv(self) -> bool:
        return type(self.module).__name__ == "Conv2d" and tuple(self.module.kernel_size) != (1, 1)

    @property
    def is_norm(self) -> bool:
        return type(self.module).__name__ in NORM_CLASSES


def weight_name(module: nn.Module) -> str | None:
    """The parameter of a layer that an adapter changes, None for layers without. Some norms call it `scale`."""
    names = ("weight", "scale") if type(module).__name__ in NORM_CLASSES else ("weight",)
    return next((name for name in names if getattr(module, name, None) is not None), None)


def targets_of_family(family: str) -> NetworkTargets:
    """The table of a family by its name."""
    return import_target(record_of(family).targets)


def targets_of_denoiser(denoiser: nn.Module) -> NetworkTargets:
    """The table of the family that this denoiser belongs to, found by its class name (or that of a base class)."""
    module = getattr(denoiser, "_orig_mod", denoiser)  # torch.compile wraps the module
    for cls in type(module).__mro__:
        family = family_of_denoiser(cls.__name__)
        if family is not None:
            return targets_of_family(family)
    known = ", ".join(name for entry in FAMILIES.values() for name in entry.denoisers)
    raise ConfigError(
        f"no adapter targets are known for a denoiser of class {type(module).__name__}; known classes: {known}"
    )


def denoiser_layers(denoiser: nn.Module, targets: NetworkTargets, classes: Sequence[str]) -> list[Layer]:
    """Every Linear and Conv2d inside a module of the given classes, in the order of the model."""
    denoiser = getattr(denoiser, "_orig_mod", denoiser)
    found = [
        Layer(_name(targets.prefix, path), path, module)
        for path, module in _leaves(denoiser, classes, targets.leaf_classes)
    ]
    return _without_clashes(found)


def entry_layers(denoiser: nn.Module, targets: NetworkTargets) -> list[Layer]:
    """The layers outside the target classes that an EntryRule names."""
    if targets.entries is None:
        return []
    patterns = [re.compile(pattern) for _, pattern in targets.entries.parts]
    return [
        Layer(_name(targets.prefix, path), path, module)
        for path, module in getattr(denoiser, "_orig_mod", denoiser).named_modules()
        if type(module).__name__ in targets.leaf_classes and any(pattern.fullmatch(path) for pattern in patterns)
    ]


def weighted_layers(part: nn.Module, position: int | None, targets: NetworkTargets) -> list[Layer]:
    """Every module with a weight, norms and embeddings included, of the denoiser (position None) or of a text
    encoder."""
    encoder = None if position is None else targets.text_encoders[position]
    layers = {}
    for path, module in getattr(part, "_orig_mod", part).named_modules():
        if weight_name(module) is None:
            continue
        name = layer_name(encoder or targets, path)
        layers.setdefault(name, Layer(name, path, module, position))
    return list(layers.values())


def layer_name(part: NetworkTargets | TextEncoderTargets, path: str) -> str:
    """The name that adapters have for the layer at this path of the denoiser or of a text encoder."""
    root = getattr(part, "root", "")
    if root and not path.startswith(root + "."):
        path = f"{root}.{path}"
    return _name(part.prefix, path)


def text_encoder_layers(encoder: nn.Module, position: int, targets: NetworkTargets) -> list[Layer]:
    """The layers of one text encoder. `position` is its place in the family's list."""
    table = targets.text_encoders[position]
    found = []
    for path, module in _leaves(encoder, table.classes, targets.leaf_classes):
        if table.root and not path.startswith(table.root + "."):
            path = f"{table.root}.{path}"
        found.append(Layer(_name(table.prefix, path), path, module, position))
    return _without_clashes(found)


def _name(prefix: str, path: str) -> str:
    return f"{prefix}.{path}".replace(".", "_")


def _leaves(root: nn.Module, classes: Sequence[str], leaves: Sequence[str]) -> Iterator[tuple[str, nn.Module]]:
    seen: set[str] = set()
    for name, block in root.named_modules():
        if type(block).__name__ not in classes:
            continue
        for child_name, child in block.named_modules():
            path = ".".join(part for part in (name, child_name) if part)
            if type(child).__name__ not in leaves or weight_name(child) is None:
                continue
            if path not in seen:  # a target inside a target counts once
                seen.add(path)
                yield path, child


def _without_clashes(layers: list[Layer]) -> list[Layer]:
    by_name: dict[str, str] = {}
    for layer in layers:
        other = by_name.setdefault(layer.lora_name, layer.path)
        assert other == layer.path, f"layers {other} and {layer.path} would share the name {layer.lora_name}"
    return layers
