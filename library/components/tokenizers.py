"""Tokenizers of CLIP, T5, Qwen and LLaMA from what is at hand: a folder, a cache folder, the model file, an installed
package, the hub.

All of them come out as fast tokenizers of transformers that pad on the right and know their own end and padding ids;
those of CLIP and T5 end every text with their end token.
"""

from __future__ import annotations

import functools
import gzip
import importlib.util
import logging
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from library.core.errors import CheckpointError, ConfigError, foreign_errors
from library.core.text_files import read_json, read_text

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerFast

R = TypeVar("R")

logger = logging.getLogger(__name__)

CLIP_L_HUB_ID = "openai/clip-vit-large-patch14"
T5_XXL_HUB_ID = "google/t5-v1_1-xxl"
QWEN3_HUB_ID = "Qwen/Qwen3-0.6B-Base"
QWEN25_VL_HUB_ID = "Qwen/Qwen2.5-VL-7B-Instruct"
LLAMA_HUB_ID = "xtuner/llava-llama-3-8b-v1_1-transformers"
CLIP_MAX_LENGTH = 77
_NUM_CLIP_MERGES = 48894
_CLIP_BOS, _CLIP_EOS = "<|startoftext|>", "<|endoftext|>"
_T5_PAD, _T5_EOS, _T5_UNK = "<pad>", "</s>", "<unk>"
_QWEN_PAD = "<|endoftext|>"
_LLAMA_BOS, _LLAMA_EOS = "<|begin_of_text|>", "<|end_of_text|>"
_CHAT_MARKS = ("<|im_start|>", "<|im_end|>")


def load_clip_tokenizer(
    folder: str | None = None,
    cache_dir: str | None = None,
    *,
    hub_id: str = CLIP_L_HUB_ID,
    hub_subfolder: str | None = None,
    pad_token: str | None = None,
    option: str = "--clip_l_tokenizer",
) -> PreTrainedTokenizerFast:
    """A CLIP tokenizer, 77 tokens. All CLIP models share the vocabulary; `pad_token` None keeps the folder's own (or
    EOS).

    ConfigError naming every way to provide one when none is there.
    """
    tokenizer = first_found(
        [
            lambda: from_option(folder, option, read_clip_folder),
            lambda: from_cache(cache_dir, hub_id, read_clip_folder),
            _clip_from_installed_package,
            lambda: from_hub(hub_id, hub_subfolder, cache_dir, read_clip_folder),
        ],
        f"no CLIP tokenizer: give its folder with {option}, or put it under --tokenizer_cache_dir as "
        f"{hub_id.replace('/', '_')},"
        " or pip install --no-deps open-clip-torch (its vocabulary file is read), or allow access to the hub "
        f"({hub_id})",
    )
    if pad_token is not None:
        tokenizer.pad_token = pad_token
    tokenizer.model_max_length = CLIP_MAX_LENGTH
    return tokenizer


def load_t5_tokenizer(
    folder: str | None = None,
    cache_dir: str | None = None,
    model_path: str | None = None,
    *,
    max_length: int = 512,
    option: str = "--t5xxl_tokenizer",
    hub_id: str = T5_XXL_HUB_ID,
    name: str = "T5",
) -> PreTrainedTokenizerFast:
    """The T5 tokenizer, or one of its kind; `model_path` is the T5 file, which may carry it as `spiece_model`, or the
    model's folder.

    ConfigError naming every way to provide one when none is there.
    """
    tokenizer = first_found(
        [
            lambda: from_option(folder, option, read_t5_folder),
            lambda: from_cache(cache_dir, hub_id, read_t5_folder),
            lambda: _t5_from_model(model_path),
            lambda: from_hub(hub_id, None, cache_dir, read_t5_folder),
        ],
        f"no {name} tokenizer: give a folder with tokenizer.json or spiece.model with {option}, or put it under "
        "--tokenizer_cache_dir"
        f" as {hub_id.replace('/', '_')}, or use a {name} file that carries it (an entry spiece_model), or allow access to "
        f"the hub ({hub_id})",
    )
    tokenizer.model_max_length = max_length
    return tokenizer


def load_qwen3_tokenizer(
    folder: str | None = None,
    cache_dir: str | None = None,
    model_path: str | None = None,
    *,
    max_length: int = 512,
    option: str = "--qwen3_tokenizer",
) -> PreTrainedTokenizerFast:
    """The tokenizer of Qwen3, which adds no tokens of its own; `model_path` is the text encoder, a folder of which may
    hold it.

    ConfigError naming every way to provide one when none is there.
    """
    problem = (
        f"no Qwen3 tokenizer: give a folder with tokenizer.json (or vocab.json with merges.txt) with {option},"
        f" or give --qwen3 as a folder that holds it, or put it under --tokenizer_cache_dir"
        f" as {QWEN3_HUB_ID.replace('/', '_')}, or allow access to the hub ({QWEN3_HUB_ID})"
    )
    tokenizer = _find_beside(QWEN3_HUB_ID, read_qwen_folder, folder, cache_dir, model_path, option, problem)
    tokenizer.model_max_length = max_length
    return tokenizer


def load_qwen25_vl_tokenizer(
    folder: str | None = None,
    cache_dir: str | None = None,
    model_path: str | None = None,
    *,
    option: str = "--text_encoder_tokenizer",
) -> PreTrainedTokenizerFast:
    """The tokenizer of Qwen2.5-VL, with the marks of its chats; `model_path` is the text encoder, a folder of which may
    hold it.

    ConfigError naming every way to provide one when none is there.
    """
    problem = _how_to_get("Qwen2.5-VL", QWEN25_VL_HUB_ID, option, "--text_encoder")
    return _find_beside(QWEN25_VL_HUB_ID, read_qwen_chat_folder, folder, cache_dir, model_path, option, problem)


def load_llama_tokenizer(
    folder: str | None = None,
    cache_dir: str | None = None,
    model_path: str | None = None,
    *,
    option: str = "--text_encoder1_tokenizer",
) -> PreTrainedTokenizerFast:
    """The tokenizer of LLaMA 3 with the image token of LLaVA; `model_path` is the text encoder, a folder of which may
    hold it.

    ConfigError naming every way to provide one when none is there.
    """
    problem = _how_to_get("LLaMA", LLAMA_HUB_ID, option, "--text_encoder1")
    return _find_beside(LLAMA_HUB_ID, read_llama_folder, folder, cache_dir, model_path, option, problem)


def _how_to_get(title: str, hub_id: str, option: str, encoder: str) -> str:
    """That there is no tokenizer, and every way to provide one; `encoder`: the option of the text encoder."""
    return (
        f"no {title} tokenizer: fetch it (hf download {hub_id} --include 'tokenizer*' --local-dir FOLDER) and give"
        f" FOLDER with {option}, or give {encoder} as a folder that holds it, or put it under --tokenizer_cache_dir as"
        f" {hub_id.replace('/', '_')}, or allow access to the hub ({hub_id})"
    )


def _find_beside(
    hub_id: str,
    read: Callable[[Path], Any],
    folder: str | None,
    cache_dir: str | None,
    model_path: str | None,
    option: str,
    problem: str,
) -> PreTrainedTokenizerFast:
    model = Path(model_path) if model_path else None
    beside = [model, model / "tokenizer"] if model is not None and model.is_dir() else []
    return first_found(
        [
            lambda: from_option(folder, option, read),
            lambda: from_cache(cache_dir, hub_id, read),
            lambda: next(filter(None, map(read, beside)), None),
            lambda: from_hub(hub_id, None, cache_dir, read),
        ],
        problem,
    )


def byt5_ids(text: str, max_length: int) -> list[int]:
    """What ByT5 reads of a text, which needs no files: its bytes plus 3, cut to make room for the end token, 1."""
    return [byte + 3 for byte in text.encode("utf-8", "surrogatepass")[: max_length - 1]] + [1]


def vocabulary_problem(
    tokenizer: PreTrainedTokenizerFast, num_rows: int, tokenizer_name: str, model_name: str
) -> str | None:
    """What is wrong when a tokenizer can give ids that the encoder's embedding does not have, or None."""
    largest = max(tokenizer.get_vocab().values())
    if largest < num_rows:
        return None
    return (
        f"the {tokenizer_name} tokenizer gives ids up to {largest}, the embedding of {model_name} has {num_rows} rows;"
        " tokenizer and text encoder belong to different models"
    )


def check_ids(ids: Tensor, model: Any, tokenizer: Any, name: str, model_name: str | None = None) -> None:
    """ConfigError when an id has no row in the embedding of a text encoder: it would be an unreadable device error."""
    rows = model.get_input_embeddings().num_embeddings
    if int(ids.max()) >= rows:
        raise ConfigError(
            vocabulary_problem(tokenizer, rows, name, model_name or f"the {name} text encoder")
            or f"the {name} tokens hold the id {int(ids.max())}, the embedding has {rows} rows"
        )


def first_found(ways: list[Callable[[], Any]], problem: str) -> Any:
    for way in ways:
        tokenizer = way()
        if tokenizer is not None:
            return tokenizer
    raise ConfigError(problem)


def from_option(folder: str | None, option: str, read: Callable[[Path], Any]) -> Any:
    if not folder:
        return None
    if not os.path.exists(folder):
        raise ConfigError(f"{option} is {folder}, which does not exist")
    try:
        tokenizer = read(Path(folder))
    except (CheckpointError, OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{option} is {folder}, whose tokenizer cannot be read: {error}") from error
    if tokenizer is None:
        raise ConfigError(
            f"{option} is {folder}, which holds no tokenizer (tokenizer.json, vocab.json with merges.txt, or "
            "spiece.model)"
        )
    return tokenizer


def _cache_folder(cache_dir: str, hub_id: str) -> Path:
    return Path(cache_dir) / hub_id.replace("/", "_")


def from_cache(cache_dir: str | None, hub_id: str, read: Callable[[Path], Any]) -> Any:
    if not cache_dir or not _cache_folder(cache_dir, hub_id).is_dir():
        return None
    return read(_cache_folder(cache_dir, hub_id))


def from_hub(hub_id: str, subfolder: str | None, cache_dir: str | None, read: Callable[[Path], Any]) -> Any:
    """Fetch the tokenizer files of a hub model and keep them in the cache folder; None when the hub cannot be
    reached."""
    from huggingface_hub import snapshot_download

    from library.huggingface_util import is_hub_reachable

    names = (
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "vocab.json",
        "merges.txt",
        "spiece.model",
    )
    place = f"{subfolder}/" if subfolder else ""
    try:
        folder = Path(
            snapshot_download(
                hub_id, allow_patterns=[place + name for name in names], local_files_only=not is_hub_reachable()
            )
        ) / (subfolder or "")
    except (
        Exception
    ) as error:  # no network, no permission, offline mode: each its own class, differing between versions
        logger.debug("the tokenizer of %s cannot be fetched: %s", hub_id, error)
        return None
    tokenizer = read(folder)
    if tokenizer is not None and cache_dir:
        tokenizer.save_pretrained(_cache_folder(cache_dir, hub_id))
    return tokenizer


def reader(read: Callable[[Path], R]) -> Callable[[Path], R]:
    """A reader of files whose every failure is one message: the packages raise bare exceptions, and panic in native
    code."""

    @functools.wraps(read)
    def guarded(path: Path) -> R:
        with foreign_errors(ConfigError, f"{path} cannot be read as a tokenizer"):
            return read(path)

    return guarded


@reader
def read_clip_folder(path: Path) -> PreTrainedTokenizerFast | None:
    """From a folder with tokenizer.json or with vocab.json and merges.txt (or one that has it in `tokenizer`)."""
    found = tokenizer_json(path, "tokenizer")
    if found is not None:
        return from_tokenizer_json(found, eos=_CLIP_EOS, pad=_CLIP_EOS, bos=_CLIP_BOS)
    folder = path if (path / "vocab.json").exists() else path / "tokenizer"
    if not (folder / "vocab.json").exists() or not (folder / "merges.txt").exists():
        return None
    vocabulary = read_json(folder / "vocab.json", needed=dict)
    lines = read_text(folder / "merges.txt").splitlines()
    merges = [tuple(line.split()) for line in lines if len(line.split()) == 2 and not line.startswith("#version")]
    return _clip_tokenizer(vocabulary, merges, _special_tokens(folder).get("pad_token"))


def _clip_from_installed_package() -> PreTrainedTokenizerFast | None:
    """The vocabulary file inside open_clip's package folder; the package itself is not imported."""
    spec = importlib.util.find_spec("open_clip")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    path = next((Path(folder) / "bpe_simple_vocab_16e6.txt.gz" for folder in folders), None)
    if path is None or not path.exists():
        return None
    lines = gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")
    merges = [tuple(line.split()) for line in lines[1 : _NUM_CLIP_MERGES + 1]]  # line 0 is a version
    symbols = _byte_symbols()
    words = [
        *symbols,
        *(symbol + "</w>" for symbol in symbols),
        *("".join(pair) for pair in merges),
        _CLIP_BOS,
        _CLIP_EOS,
    ]
    return _clip_tokenizer({word: number for number, word in enumerate(words)}, merges, None)


def _byte_symbols() -> list[str]:
    """The character that stands for each byte, in vocabulary order: printable ones as themselves, then the other 68."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(byte) for byte in printable] + [chr(256 + number) for number in range(256 - len(printable))]


def _clip_tokenizer(
    vocabulary: dict[str, int], merges: list[tuple[str, ...]], pad_token: str | None
) -> PreTrainedTokenizerFast:
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges)
    tokenizer.pad_token = pad_token or tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer


@reader
def read_qwen_folder(path: Path) -> PreTrainedTokenizerFast | None:
    """From a folder with tokenizer.json or vocab.json and merges.txt (or one that has it in `tokenizer`), or from such
    a file."""
    return _read_qwen(path)


@reader
def read_qwen_chat_folder(path: Path) -> PreTrainedTokenizerFast | None:
    """The same of a model that chats: vocab.json does not name the marks of a chat, which follow its last entry."""
    return _read_qwen(path, _CHAT_MARKS)


@reader
def read_llama_folder(path: Path) -> PreTrainedTokenizerFast | None:
    """From a folder with tokenizer.json (or one that has it in `tokenizer`), or from such a file."""
    found = tokenizer_json(path, "tokenizer")
    if found is None:
        return None
    return from_tokenizer_json(found, eos=_LLAMA_EOS, pad=_LLAMA_EOS, bos=_LLAMA_BOS, ends_texts=False)


def _read_qwen(path: Path, marks: tuple[str, ...] = ()) -> PreTrainedTokenizerFast | None:
    found = tokenizer_json(path, "tokenizer")
    if found is not None:
        return from_tokenizer_json(found, eos=_QWEN_PAD, pad=_QWEN_PAD, bos=None, ends_texts=False)
    for folder in (path, path / "tokenizer"):
        if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            tokenizer = _qwen_tokenizer(folder)
            if marks:
                tokenizer.add_special_tokens({"additional_special_tokens": list(marks)})
            return tokenizer
    return None


def _qwen_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    from transformers import Qwen2Tokenizer

    vocabulary = read_json(folder / "vocab.json", needed=dict)
    lines = read_text(folder / "merges.txt").splitlines()
    merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=merges, pad_token=_QWEN_PAD, eos_token=_QWEN_PAD)
    tokenizer.padding_side = "right"
    return tokenizer


@reader
def read_t5_folder(path: Path) -> PreTrainedTokenizerFast | None:
    """From a folder with tokenizer.json or spiece.model (or one that has it in `tokenizer_2`), or from such a file."""
    found = tokenizer_json(path, "tokenizer_2")
    if found is not None:
        return from_tokenizer_json(found, eos=_T5_EOS, pad=_T5_PAD, bos=None)
    for candidate in (path, path / "spiece.model", path / "tokenizer_2" / "spiece.model"):
        if candidate.is_file():
            return t5_tokenizer_from_sentencepiece(candidate.read_bytes(), str(candidate))
    return None


def tokenizer_json(path: Path, subfolder: str) -> Path | None:
    candidates = (path, path / "tokenizer.json", path / subfolder / "tokenizer.json")
    return next(
        (candidate for candidate in candidates if candidate.name.endswith(".json") and candidate.is_file()), None
    )


def _special_tokens(folder: Path) -> dict[str, str]:
    """eos_token, pad_token ... as the files beside a tokenizer declare them."""
    found: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        declared = read_json(folder / name, needed=dict) if (folder / name).exists() else {}
        for key in ("bos_token", "eos_token", "unk_token", "pad_token"):
            value = declared.get(key)
            text = value.get("content") if isinstance(value, dict) else value
            if isinstance(text, str):
                found[key] = text
    return found


def from_tokenizer_json(
    path: Path, *, eos: str, pad: str, bos: str | None, ends_texts: bool = True
) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer.from_file(str(path))
    core.no_padding()
    core.no_truncation()
    names = {"eos_token": eos, "pad_token": pad, "bos_token": bos, **_special_tokens(path.parent)}
    names = {key: token for key, token in names.items() if token is not None and core.token_to_id(token) is not None}
    missing = [key for key in ("eos_token", "pad_token") if key not in names]
    if missing:
        raise ConfigError(f"{path} has no {' and no '.join(missing)}; name them in tokenizer_config.json beside it")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, padding_side="right", **names)
    ids = tokenizer("a").input_ids
    if ends_texts and (not ids or ids[-1] != tokenizer.eos_token_id):
        raise ConfigError(
            f"{path} does not end texts with its end token {names['eos_token']}; its post-processor must add it"
        )
    return tokenizer


def _t5_from_model(model_path: str | None) -> PreTrainedTokenizerFast | None:
    """From inside the model file, or the tokenizer in or beside the model's folder."""
    if model_path and os.path.isdir(model_path):
        path = Path(model_path)
        beside = path.parent / ("tokenizer_3" if path.name == "text_encoder_3" else "tokenizer_2")
        return next(filter(None, map(read_t5_folder, (path, beside))), None)
    return from_entry(model_path, t5_tokenizer_from_sentencepiece)


def from_entry(model_path: str | None, make: Callable[[bytes, str], Any]) -> Any:
    """The tokenizer that a safetensors file of a model carries as `spiece_model`, made of its bytes and their source; None
    without one."""
    from library.checkpoints.loading import files_of_split_model
    from library.safetensors_utils import MemoryEfficientSafeOpen

    if not model_path or not os.path.exists(model_path):
        return None
    for part in files_of_split_model(model_path) or [model_path]:
        if Path(part).suffix != ".safetensors":
            continue
        with MemoryEfficientSafeOpen(part) as file:
            name = next((key for key in file.keys() if key.split(".")[-1] == "spiece_model"), None)
            blob = None if name is None else file.get_tensor(name).numpy().tobytes()
        if blob is not None:
            with foreign_errors(CheckpointError, f"the entry {name} of {part} cannot be read as a tokenizer"):
                return make(blob, f"{part} (entry {name})")
    return None


def t5_tokenizer_from_sentencepiece(model: bytes, source: str) -> PreTrainedTokenizerFast:
    """A T5 tokenizer from the bytes of a sentencepiece unigram model, without the sentencepiece package.

    `source` names the bytes in messages. CheckpointError when they are no such model.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    pieces, character_map = read_sentencepiece_model(model, source)
    unknown = next((number for number, (_, _, kind) in enumerate(pieces) if kind == _UNKNOWN_PIECE), None)
    has_bytes = any(kind == _BYTE_PIECE for _, _, kind in pieces)
    core = Tokenizer(models.Unigram([(text, score) for text, score, _ in pieces], unknown, has_bytes))
    steps = [normalizers.Precompiled(character_map)] if character_map else []
    core.normalizer = normalizers.Sequence([*steps, normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")])
    core.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    core.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    ids = {text: number for number, (text, _, _) in enumerate(pieces)}
    missing = [token for token in (_T5_PAD, _T5_EOS) if token not in ids]
    if missing:
        raise CheckpointError(
            f"{source} is a sentencepiece model without {' and '.join(missing)}; a T5 tokenizer has both"
        )
    core.post_processor = processors.TemplateProcessing(
        single=f"$A {_T5_EOS}", special_tokens=[(_T5_EOS, ids[_T5_EOS])]
    )
    core.add_special_tokens([AddedToken(token, special=True) for token in (_T5_PAD, _T5_EOS, _T5_UNK) if token in ids])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=_T5_EOS, pad_token=_T5_PAD, unk_token=_T5_UNK if _T5_UNK in ids else None,
        padding_side="right"
    )


_UNKNOWN_PIECE, _BYTE_PIECE = 2, 6


def read_sentencepiece_model(model: bytes, source: str) -> tuple[list[tuple[str, float, int]], bytes]:
    """(text, score, type) of every piece, and the precompiled character map, of a sentencepiece model file.

    The file is a protobuf message; field 1 repeats {1: text, 2: float score, 3: type, 1 when absent}, field 3 is the
    normaliser, whose field 2 is the map.
    """
    pieces: list[tuple[str, float, int]] = []
    character_map = b""
    try:
        for number, value in _protobuf_fields(model):
            if number == 1 and isinstance(value, bytes):
                entry = dict(_protobuf_fields(value))
                score = struct.unpack("<f", entry[2])[0] if 2 in entry else 0.0
                pieces.append((entry.get(1, b"").decode("utf-8"), score, entry.get(3, 1)))
            elif number == 3 and isinstance(value, bytes):
                character_map = dict(_protobuf_fields(value)).get(2, b"")
    except (ValueError, IndexError, struct.error) as error:
        raise CheckpointError(f"{source} is not a sentencepiece model: {error}") from error
    if not pieces:
        raise CheckpointError(f"{source} is not a sentencepiece model: it has no pieces")
    return pieces, character_map


def _protobuf_fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """(field number, value) of a message: integers for varints, bytes for everything else."""
    position = 0

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while True:
            byte = message[position]
            position += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7

    while position < len(message):
        number, wire = divmod(varint(), 8)
        if wire == 0:
            yield number, varint()
            continue
        size = {1: 8, 5: 4}.get(wire)
        if size is None:
            if wire != 2:
                raise ValueError(f"byte {position} has the wire type {wire}, which is not known")
            size = varint()
        if position + size > len(message):
            raise ValueError(f"a field of {size} bytes at byte {position} runs past the end")
        yield number, message[position : position + size]
        position += size
