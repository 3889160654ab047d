"""Files of textual inversions: vectors of new words, for each text encoder of a family or for each layer of a U-Net."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from library.checkpoints.adapter_tensors import holds_layered_word
from library.checkpoints.kinds import describe_checkpoint
from library.core.errors import CheckpointError
from library.families.registry import FAMILIES
from library.safetensors_utils import load_pickled, load_pickled_tensors, load_safetensors, read_header

OLD_KEYS = ("emb_params", "*")
"""names of the vectors in files for a single text encoder"""
BUNDLED = "bundle_emb."
"""vectors of words in an adapter file that was trained with them: `bundle_emb.WORD.KEY`"""
_WEB_UI = "string_to_param"
_OTHER_NAMES = {"t5": "t5xxl"}
"""what some bundles call the vectors of an encoder -> our key"""

_SHOWN = 16
"""tensors that a message names: those of a word for the layers of a U-Net"""
_NO_TENSORS = ("text", "empty", "damaged", "folder", "gguf")
"""kinds of files that hold no vectors under any name"""

Widths = Mapping[str, "int | None"]
"""of the vectors of each text encoder of a family, under the name that its files have for it; None for one that is left
out"""


@dataclass(frozen=True)
class WordVectors:
    """The vectors of a word: [n, D] under the name that the family's files have for each text encoder, or under the
    name of each layer that has vectors of its own. `source`: option and file, for messages; `trained_as`: the word of
    the training, where the metadata of a file tell."""

    word: str
    vectors: Mapping[str, Tensor]
    source: str
    trained_as: str = ""

    @property
    def count(self) -> int:
        return len(next(iter(self.vectors.values())))

    def checked(self, widths: Mapping[str, int]) -> WordVectors:
        """Itself. CheckpointError where the vectors differ in number or are not as wide as `widths` says, by
        name."""
        found = [
            f"{self.source} holds vectors of {rows.shape[1]} values in {key}; the text encoder has {widths[key]}. It "
            "belongs to another model"
            for key, rows in self.vectors.items()
            if rows.shape[1] != widths.get(key, rows.shape[1])
        ]
        if len({len(rows) for rows in self.vectors.values()}) > 1:
            held = ", ".join(f"{len(rows)} in {key}" for key, rows in self.vectors.items())
            found.append(f"{self.source} holds {held}; the same number of vectors is needed in each")
        if found:
            raise CheckpointError("; ".join(found))
        return self


def read_inversion(path: str, keys: Sequence[str], *, partly: bool = False) -> list[Tensor | None]:
    """Vectors [n, D] for each text encoder, by the names that the family has for them; one encoder alone takes the only
    tensor of a file under any name. `partly`: encoders may be missing (None). CheckpointError."""
    return _by_encoder(_read(path), path, keys, partly=partly)


def read_word(path: str, word: str, widths: Widths, option: str) -> WordVectors:
    """A file of a single word, with vectors for every text encoder that is there. CheckpointError."""
    try:
        tensors = _read(path)
    except CheckpointError as error:
        raise CheckpointError(f"--{option}: {error}") from error
    found = _word_of(tensors, path, word, widths, f"--{option}: {path}")
    return replace(found, trained_as=_trained_as(path))


def read_layered(path: str, word: str, layers: Sequence[str], option: str, width: int | None = None) -> WordVectors:
    """A file with vectors of its own for each of the `layers` with cross-attention, in their order; `width` None: of
    any width. CheckpointError."""
    tensors = _read(path)
    lacking = [name for name in layers if name not in tensors]
    if lacking:
        raise CheckpointError(
            f"--{option}: {path} holds {_held(tensors)}; vectors for each layer with cross-attention are needed, it "
            f"lacks {', '.join(lacking)}"
        )
    rows = {name: _as_rows(tensors[name], path) for name in layers}
    found = WordVectors(word, rows, f"--{option}: {path}", _trained_as(path))
    return found.checked({} if width is None else dict.fromkeys(layers, width))


def bundle_of(word: str, vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a word in an adapter file."""
    return {f"{BUNDLED}{word}.{key}": rows for key, rows in vectors.items()}


def bundled_words(path: str, widths: Widths, option: str) -> list[WordVectors]:
    """The words that an adapter file was trained with; none where it has none. CheckpointError when one does not fit
    the text encoders."""
    return [
        _word_of(tensors, path, word, widths, f"--{option}: the word '{word}' in {path}")
        for word, tensors in _bundles(path).items()
    ]


def bundled_rows(path: str, keys: Sequence[str] | None = None) -> dict[str, dict[str, Tensor]]:
    """word -> key -> vectors of the words that an adapter file was trained with: those of `keys`, as far as they are
    there (None: all as they are). CheckpointError."""
    words = _bundles(path)
    if keys is None:
        return words
    found = {}
    for word, tensors in words.items():
        rows = _by_encoder(tensors, f"the word '{word}' in {path}", keys, partly=True)
        found[word] = {key: own for key, own in zip(keys, rows, strict=True) if own is not None}
    return found


def _bundles(path: str) -> dict[str, dict[str, Tensor]]:
    """word -> key -> vectors. A file that cannot be read has none: those who read its layers tell what is wrong."""
    words: dict[str, dict[str, Tensor]] = {}
    try:
        tensors = bundled_tensors(path) if Path(path).is_file() else {}
    except (CheckpointError, OSError):
        return words
    for name, tensor in tensors.items():
        word, _, key = name.removeprefix(BUNDLED).partition(".")
        words.setdefault(word, {})[_own_key(key)] = tensor
    return words


def bundled_tensors(path: str) -> dict[str, Tensor]:
    """The vectors of words in an adapter file, under its own names. CheckpointError."""
    if not path.endswith(".safetensors"):
        tensors = load_pickled_tensors(path)
        return {name: tensor for name, tensor in tensors.items() if name.startswith(BUNDLED)}
    names = [name for name in read_header(path)[0] if name.startswith(BUNDLED)]
    if not names:
        return {}
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name).clone() for name in names}


def _word_of(tensors: Mapping[str, Tensor], path: str, word: str, widths: Widths, source: str) -> WordVectors:
    there = {key: width for key, width in widths.items() if width is not None}
    try:
        found = _by_encoder(tensors, path, list(there), absent=widths.keys() - there.keys())
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {str(error).removeprefix(f'{path} ')}") from error
    return WordVectors(word, dict(zip(there, found, strict=True)), source).checked(there)


def _own_key(key: str) -> str:
    first, _, rest = key.partition(".")
    return (rest or first) if first == _WEB_UI else _OTHER_NAMES.get(key, key)


def _by_encoder(
    tensors: Mapping[str, Tensor], path: str, keys: Sequence[str], *, partly: bool = False, absent: Iterable[str] = ()
) -> list[Tensor | None]:
    """The vectors of `keys` in turn; those of `absent` may be there and are left out."""
    held, several = _held(tensors), {key for keys in _known_keys() for key in keys}
    if holds_layered_word(tensors):
        raise CheckpointError(
            f"{path} holds vectors for each layer of a U-Net ({held}), which gen_img.py reads with --XTI_embeddings; "
            f"vectors for text encoders are needed ({' and '.join(keys)})"
        )
    if len(keys) == 1:
        foreign = sorted(several & tensors.keys())
        if foreign:
            raise CheckpointError(
                f"{path} is a textual inversion for a model with several text encoders ({' and '.join(foreign)}); one "
                "for a single text encoder is needed"
            )
        name = next((key for key in OLD_KEYS if key in tensors), None)
        if name is None and len(tensors) != 1:
            raise CheckpointError(f"{path} holds {held}; one tensor of vectors is needed ({keys[0]})")
        found = [tensors[name] if name else next(iter(tensors.values()))]
    else:
        here = [key for key in keys if key in tensors]
        foreign = sorted((several - {*keys, *absent}) & tensors.keys())
        if not here or foreign or (len(here) < len(keys) and not partly):
            raise CheckpointError(f"{path} holds {held}; {' and '.join(keys)} are needed")
        found = [tensors.get(key) for key in keys]
    return [None if tensor is None else _as_rows(tensor, path) for tensor in found]


def _as_rows(tensor: Tensor, path: str) -> Tensor:
    """[n, D]; a vector alone is one row."""
    rows = tensor[None] if tensor.ndim == 1 else tensor
    if rows.ndim != 2 or not len(rows) or not rows.is_floating_point():
        raise CheckpointError(f"{path} holds tensors that are no rows of vectors")
    rows = rows.float() if rows.element_size() == 1 else rows  # 8 bits are for storage: torch does not compute in them
    if not bool(torch.isfinite(rows).all()):
        raise CheckpointError(f"{path} holds vectors that are not finite; the training of this file failed")
    return rows


def _held(tensors: Mapping[str, Tensor]) -> str:
    names = sorted(tensors)
    more = f" and {len(names) - _SHOWN} more tensors" if len(names) > _SHOWN else ""
    return f"{', '.join(names[:_SHOWN])}{more}" if names else "nothing"


def _known_keys() -> list[tuple[str, ...]]:
    """Of the families with several text encoders."""
    return [record.embedding_keys for record in FAMILIES.values() if len(record.embedding_keys) > 1]


def _read(path: str) -> dict[str, Tensor]:
    if not Path(path).exists():
        raise CheckpointError(f"{path}: there is no such file")
    if path.endswith(".safetensors") and Path(path).is_file():
        return load_safetensors(path, device="cpu")
    found = describe_checkpoint(path)
    if found.kind in _NO_TENSORS:
        raise CheckpointError(f"{path} is {found.detail}; needed: a file with the vectors of a word")
    return _pickled_inversion(path)


def _trained_as(path: str) -> str:
    return read_header(path)[1].get("ss_token_string", "") if path.endswith(".safetensors") else ""


def _pickled_inversion(path: str) -> dict[str, Tensor]:
    """A .pt file: tensors, or the older form with string_to_param around them, whose first writers kept them in a
    container of torch."""
    content = load_pickled(path, containers=[nn.ParameterDict])
    if isinstance(content, Mapping) and _WEB_UI in content:
        content = dict(content[_WEB_UI])
    return (
        {str(key): value.detach() for key, value in content.items() if isinstance(value, Tensor)}
        if isinstance(content, Mapping)
        else {}
    )
