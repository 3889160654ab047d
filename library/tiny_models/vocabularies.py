"""Small vocabularies in the files of real tokenizers: byte pairs as CLIP and Qwen have them, pieces as T5 and Gemma
have them.

All fall back to single characters, so that any caption can be read.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from pathlib import Path

from library.core.atomic_file import atomic_path, write_text_atomically

WORDS = ("a", "the", "of", "red", "blue", "green", "cat", "dog", "photo", "circle", "square", "girl")
CHAT_MARKS = ("<|im_start|>", "<|im_end|>")
"""of Qwen, which follow the last entry of its vocabulary"""
LLAMA_MARKS = (
    "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
)  # fmt: skip
NORMAL_PIECE, UNKNOWN_PIECE, CONTROL_PIECE, BYTE_PIECE = 1, 2, 3, 6  # sentencepiece's piece types
T5_ROWS = 160
"""rows of an embedding that holds the ids of `t5_pieces` and some more"""


def byte_characters() -> list[str]:
    """The 256 printable stand-ins for bytes, in the order in which CLIP numbers them."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(code) for code in printable] + [chr(256 + number) for number in range(256 - len(printable))]


def write_clip_tokenizer(folder: Path) -> int:
    """vocab.json and merges.txt over all bytes, with a few whole words; returns the number of entries (the last is
    EOS)."""
    symbols = byte_characters()
    merges = _unique(pair for word in WORDS for pair in _merges_of([*word[:-1], word[-1] + "</w>"]))
    words = [*symbols, *(symbol + "</w>" for symbol in symbols), *("".join(pair) for pair in merges)]
    return _write_byte_pairs(folder, [*_unique(words), "<|startoftext|>", "<|endoftext|>"], merges)


def write_qwen_tokenizer(folder: Path, more: Iterable[str] = ()) -> int:
    """The same with words that carry the space before them, as Qwen has them, and the padding token. `more`: further
    texts that are one token each, a space before them included."""
    space = chr(256 + 32)  # stands for the space
    merges = _unique(pair for word in WORDS for pair in (*_merges_of(list(word)), (space, word)))
    merges = _unique([*merges, *(pair for text in more for pair in _merges_of(list(text.replace(" ", space))))])
    return _write_byte_pairs(
        folder, _unique([*byte_characters(), *("".join(pair) for pair in merges), "<|endoftext|>"]), merges
    )


def write_llama_tokenizer(folder: Path, more: Iterable[str] = ()) -> int:
    """tokenizer.json as LLaMA 3 has it: words that carry the space before them, the marks of its chats, and a token
    that begins every text. `more` as for `write_qwen_tokenizer`; returns the number of entries."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    space = chr(256 + 32)
    merges = _unique(pair for word in WORDS for pair in (*_merges_of(list(word)), (space, word)))
    merges = _unique([*merges, *(pair for text in more for pair in _merges_of(list(text.replace(" ", space))))])
    words = _unique([*byte_characters(), *("".join(pair) for pair in merges)])
    core = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(mark, special=True) for mark in LLAMA_MARKS])
    begin = LLAMA_MARKS[0]
    core.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, core.token_to_id(begin))]
    )
    write_text_atomically(folder / "tokenizer.json", core.to_str())
    return core.get_vocab_size()


def write_t5_tokenizer(folder: Path) -> None:
    with atomic_path(folder / "spiece.model") as temporary:
        temporary.write_bytes(sentencepiece_model())


def _write_byte_pairs(folder: Path, vocabulary: list[str], merges: list[tuple[str, str]]) -> int:
    write_text_atomically(folder / "vocab.json", json.dumps({word: number for number, word in enumerate(vocabulary)}))
    write_text_atomically(folder / "merges.txt", "\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges)]))
    return len(vocabulary)


def _merges_of(letters: list[str]) -> list[tuple[str, str]]:
    """Merges that build a word from left to right."""
    return [("".join(letters[:count]), letters[count]) for count in range(1, len(letters))]


def _unique(values: Iterable) -> list:
    return list(dict.fromkeys(values))


def t5_pieces() -> list[tuple[str, float, int]]:
    """(text, score, type) of single characters and a few words; the place in the list is the id."""
    characters = "▁abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;!?'\"()-_<>/"
    pieces = [("<pad>", 0.0, CONTROL_PIECE), ("</s>", 0.0, CONTROL_PIECE), ("<unk>", 0.0, UNKNOWN_PIECE)]
    pieces += [(character, -6.0, NORMAL_PIECE) for character in characters]
    return pieces + [("▁" + word, -4.0 - number / 16, NORMAL_PIECE) for number, word in enumerate(WORDS)]


def gemma_pieces() -> list[tuple[str, float, int]]:
    """(text, score, type) of byte pairs as Gemma has them: single characters, the words letter by letter, all bytes."""
    characters = "▁abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;!?'\"()-_<>/"
    words = [start + word for word in WORDS for start in ("", "▁")]
    starts = _unique(word[:count] for word in words for count in range(1, len(word) + 1))
    pieces = [(token, 0.0, CONTROL_PIECE) for token in ("<pad>", "<eos>", "<bos>")] + [("<unk>", 0.0, UNKNOWN_PIECE)]
    pieces += [(f"<0x{byte:02X}>", 0.0, BYTE_PIECE) for byte in range(256)]
    joined = [text for text in starts if len(text) > 1]
    pieces += [(text, -float(number), NORMAL_PIECE) for number, text in enumerate(joined)]
    return pieces + [(character, -float(len(joined)), NORMAL_PIECE) for character in characters]


def sentencepiece_model(pieces: list[tuple[str, float, int]] | None = None) -> bytes:
    """A model of these pieces as the bytes of a sentencepiece file; a unigram model of `t5_pieces` when None."""
    return b"".join(_protobuf_bytes(1, _piece(*piece)) for piece in (t5_pieces() if pieces is None else pieces))


def _piece(text: str, score: float, kind: int) -> bytes:
    return _protobuf_bytes(1, text.encode("utf-8")) + b"\x15" + struct.pack("<f", score) + b"\x18" + bytes([kind])


def _protobuf_bytes(number: int, value: bytes) -> bytes:
    assert len(value) < 128, "lengths of one byte are enough here"
    return bytes([number << 3 | 2, len(value)]) + value
