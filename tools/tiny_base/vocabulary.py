"""The two small vocabularies of the tiny base, made from the words of its captions.

Both fall back to single letters, and to bytes where they do not know a letter, so that any word, a trigger word too,
becomes known pieces.
"""

from __future__ import annotations

import json
import struct
from collections import Counter
from pathlib import Path

from library.tiny_models.vocabularies import CONTROL_PIECE, NORMAL_PIECE, UNKNOWN_PIECE, byte_characters
from tools.tiny_base.captions import CONSONANTS, VOWELS, vocabulary_words

CLIP_START, CLIP_END = "<|startoftext|>", "<|endoftext|>"
CLIP_LENGTH = 77
T5_SPECIALS = ("<pad>", "</s>", "<unk>")
BYTE_PIECE = 6  # beside the piece types of tiny_models/vocabularies.py
WORD_SCORE, SYLLABLE_SCORE, CHARACTER_SCORE = (
    -6.0,
    -9.0,
    -12.0,
)  # one word beats its syllables, these beat their letters


def byte_pair_merges(words: dict[str, int]) -> list[tuple[str, str]]:
    """Merges, most frequent pair first, until every word is one piece. Words are spelt with `</w>` at their last
    letter."""
    spelt = {tuple([*word[:-1], word[-1] + "</w>"]): count for word, count in words.items()}
    merges: list[tuple[str, str]] = []
    while True:
        pairs: Counter[tuple[str, str]] = Counter()
        for pieces, count in spelt.items():
            for pair in zip(pieces, pieces[1:]):
                pairs[pair] += count
        if not pairs:
            return merges
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        spelt = {merged(pieces, best): count for pieces, count in spelt.items()}


def merged(pieces: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    """The pieces with every occurrence of the pair joined."""
    result: list[str] = []
    for piece in pieces:
        if result and (result[-1], piece) == pair:
            result[-1] += piece
        else:
            result.append(piece)
    return tuple(result)


def clip_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """(piece -> id, merges) in CLIP's order: bytes, bytes with `</w>`, merges, start, end."""
    merges = byte_pair_merges({word: 1 for word in vocabulary_words()})
    singles = byte_characters()
    pieces = [*singles, *(c + "</w>" for c in singles), *("".join(pair) for pair in merges), CLIP_START, CLIP_END]
    unique = list(dict.fromkeys(pieces))
    return {piece: index for index, piece in enumerate(unique)}, merges


def t5_pieces() -> list[tuple[str, float, int]]:
    """(text, score, type) of every piece; the place in the list is the id."""
    words = vocabulary_words()
    spaced = [f"▁{word}" for word in dict.fromkeys([*words, *(word[0].upper() + word[1:] for word in words)])]
    syllables = [c + v for c in CONSONANTS for v in VOWELS]
    characters = ["▁", *(chr(code) for code in [*range(33, 127), *range(0xC0, 0x180)] if code not in (0xD7, 0xF7))]
    rows = [(text, 0.0, UNKNOWN_PIECE if text == "<unk>" else CONTROL_PIECE) for text in T5_SPECIALS]
    seen = set(T5_SPECIALS)
    for texts, score in ((spaced, WORD_SCORE), (syllables, SYLLABLE_SCORE), (characters, CHARACTER_SCORE)):
        for text in texts:
            if text not in seen:
                seen.add(text)
                rows.append((text, score, NORMAL_PIECE))
    return rows + [(f"<0x{byte:02X}>", 0.0, BYTE_PIECE) for byte in range(256)]


def _varint(number: int) -> bytes:
    parts = bytearray()
    while number > 127:
        parts.append(number & 127 | 128)
        number >>= 7
    return bytes([*parts, number])


def _field(number: int, payload: bytes) -> bytes:
    """A length-delimited protobuf field."""
    return _varint(number << 3 | 2) + _varint(len(payload)) + payload


def sentencepiece_model(pieces: list[tuple[str, float, int]]) -> bytes:
    """The pieces as a sentencepiece model file: field 1 = pieces {1 text, 2 score, 3 type}, 2 = trainer settings (3
    model type unigram, 35 fallback to bytes, 40-43 ids of the special pieces), 3 = normaliser (identity; its rules for
    spaces are the defaults)."""
    blob = b""
    for text, score, kind in pieces:
        blob += _field(
            1, _field(1, text.encode("utf-8")) + b"\x15" + struct.pack("<f", score) + b"\x18" + _varint(kind)
        )
    names = [text for text, _, _ in pieces]
    minus_one = _varint(2**64 - 1)
    special_ids = {
        40: _varint(names.index("<unk>")),
        41: minus_one,
        42: _varint(names.index("</s>")),
        43: _varint(names.index("<pad>")),
    }
    trainer = (
        b"\x18"
        + _varint(1)
        + b"\x98\x02"
        + _varint(1)
        + b"".join(_varint(number << 3) + value for number, value in special_ids.items())
    )
    return blob + _field(2, trainer) + _field(3, _field(1, b"identity"))


def write_clip_tokenizer(folder: Path) -> None:
    """vocab.json, merges.txt and the settings, as known from CLIP repositories."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary, merges = clip_vocabulary()
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8", newline="\n")
    lines = ["#version: 0.2", *(f"{first} {second}" for first, second in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")
    settings = {
        "tokenizer_class": "CLIPTokenizer", "model_max_length": CLIP_LENGTH, "bos_token": CLIP_START,
        "eos_token": CLIP_END,
        "pad_token": CLIP_END, "unk_token": CLIP_END,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8", newline="\n")


def write_t5_tokenizer(folder: Path) -> None:
    """spiece.model and the settings."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spiece.model").write_bytes(sentencepiece_model(t5_pieces()))
    settings = {
        "tokenizer_class": "T5Tokenizer", "model_max_length": 512, "eos_token": "</s>", "pad_token": "<pad>",
        "unk_token": "<unk>",
        "extra_ids": 0,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8", newline="\n")
