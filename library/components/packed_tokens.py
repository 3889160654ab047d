"""Tokens of samples of several sizes end to end in one row, [1, tokens, D], and which of them belong together.

A *part* is a batch of samples of one size, a *stream* what it has of one kind of tokens (those of the picture, those of
the text). Layers that treat every token by itself take the row as it is; attention is computed part by part, with the
tensors that the part alone would have.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from library.device_utils import to_device

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""attention of [B, heads, L, D], keys and values of them and a mask of keys -> [B, L, heads * D]"""


@dataclass(frozen=True)
class Stream:
    """The tokens of one kind of all parts, part after part and in a part sample after sample."""

    sizes: tuple[tuple[int, int], ...]
    """(samples, tokens of each) of every part"""

    @classmethod
    def of(cls, parts: Sequence[Tensor]) -> Stream:
        """That of tokens [B, L, ...] of each part."""
        return cls(tuple((part.shape[0], part.shape[1]) for part in parts))

    @property
    def lengths(self) -> list[int]:
        """Tokens of each part."""
        return [samples * tokens for samples, tokens in self.sizes]

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Tokens [B or 1, L, ...] of each part as one row [1, all, ...]; what has no axis of samples is that of each of
        them."""
        rows = [
            part.expand(samples, *part.shape[1:]).reshape(samples * tokens, *part.shape[2:])
            for part, (samples, tokens) in zip(parts, self.sizes, strict=True)
        ]
        return torch.cat(rows).unsqueeze(0)

    def split(self, row: Tensor) -> list[Tensor]:
        """A row [1, all, ...] as the tokens [B, L, ...] of each part, views."""
        cut = row[0].split(self.lengths)
        return [part.unflatten(0, size) for part, size in zip(cut, self.sizes, strict=True)]

    def spread(self, values: Tensor) -> Tensor:
        """One value for each sample [n, ...] as that of each of its tokens [1, all, ...]."""
        parts = values.split([samples for samples, _ in self.sizes])
        return self.join([
            part.unsqueeze(1).expand(-1, tokens, *part.shape[1:]) for part, (_, tokens) in zip(parts, self.sizes)
        ])  # fmt: skip


@dataclass(frozen=True)
class SampleVectors:
    """A vector of each sample [n, ...], of which a layer makes what modulates its tokens: made once for a sample, and
    then spread over the tokens of a stream."""

    values: Tensor
    stream: Stream
    text: Stream | None = None
    """the tokens of text that follow the same vector"""

    def through(self, project: Callable[[Tensor], Tensor]) -> Tensor:
        """What a layer makes of the vectors, for each token: [1, all, ...]."""
        return self.stream.spread(project(self.values))

    def of_text(self) -> SampleVectors:
        return SampleVectors(self.values, self.text)


class Piece(NamedTuple):
    """Where in a row the tokens of a part lie."""

    start: int
    samples: int
    tokens: int


@dataclass(frozen=True)
class Segments:
    """Which tokens of a row attend to which, in the place of a mask of keys: those of a sample to those of the same
    one."""

    queries: tuple[tuple[Piece, ...], ...]
    """of each part, in the order in which its tokens would stand"""
    keys: tuple[tuple[Piece, ...], ...]
    masks: tuple[Tensor | None, ...]
    """of the keys of each part [B, T], true = attend"""

    def attend(self, attention: Attend, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query [1, heads, all, D], key and value of the keys' row -> [1, all, heads * D], a call for each part."""
        made = [
            attention(cut(query, own), cut(key, others), cut(value, others), mask)  # [B, L, heads * D]
            for own, others, mask in zip(self.queries, self.keys, self.masks, strict=True)
        ]
        pieces = [part.split([piece.tokens for piece in own], dim=1) for part, own in zip(made, self.queries)]
        rows = [part.flatten(0, 1) for stream in zip(*pieces) for part in stream]
        return torch.cat(rows).unsqueeze(0)


    @property
    def has_masks(self) -> bool:
        return any(mask is not None for mask in self.masks)

    def attend_at_once(self, call: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The same in one call, `call(query, key, value, ends of queries, ends of keys, most queries, most keys)` with
        [tokens, heads, D]; for parts without masks."""
        device = query.device
        query_places, key_places = _places(self.queries, device), _places(self.keys, device)
        ordered = [
            states[0].transpose(0, 1).index_select(0, places)  # [all, heads, D], sample after sample
            for states, places in ((query, query_places), (key, key_places), (value, key_places))
        ]
        ends, lengths = zip(*(_ends(pieces, device) for pieces in (self.queries, self.keys)))
        attended = call(*ordered, *ends, *lengths).flatten(1)
        back = torch.empty_like(query_places)
        back[query_places] = torch.arange(len(back), device=device)
        return attended.index_select(0, back).unsqueeze(0)


def _places(parts: Sequence[Sequence[Piece]], device: torch.device) -> Tensor:
    """Where in the row each token lies, sample after sample."""
    found = []
    for pieces in parts:
        of_part = [
            torch.arange(start, start + samples * tokens, device=device).view(samples, tokens)
            for start, samples, tokens in pieces
        ]
        found.append(torch.cat(of_part, dim=1).flatten())
    return torch.cat(found)


def _ends(parts: Sequence[Sequence[Piece]], device: torch.device) -> tuple[Tensor, int]:
    """(where the tokens of each sample end, from 0 on, int32; the most of one)"""
    lengths = [sum(piece.tokens for piece in pieces) for pieces in parts for _ in range(pieces[0].samples)]
    ends = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    return to_device(ends, device), max(lengths)


def cut(states: Tensor, pieces: Sequence[Piece]) -> Tensor:
    """The states [B, heads, L, D] of a part, from those of the row [1, heads, all, D]."""
    row = states[0].transpose(0, 1)  # [all, heads, D]
    found = [row[start : start + samples * tokens].unflatten(0, (samples, tokens)) for start, samples, tokens in pieces]
    joined = found[0] if len(found) == 1 else torch.cat(found, dim=1)  # [B, L, heads, D]
    return joined.transpose(1, 2)


# -- what blocks are given of several parts ----------------------------------------------------------------------------


def segments(
    queries: Sequence[Stream], keys: Sequence[Stream] | None = None, masks: Sequence[Tensor | None] | None = None
) -> Segments:
    """Attention of the tokens of some streams, which stand in the row one stream after another, to those of others, or
    to each other. `masks`: of the keys of each part."""
    own = _pieces(queries)
    return Segments(own, own if keys is None else _pieces(keys), tuple(masks or [None] * len(own)))


def _pieces(streams: Sequence[Stream]) -> tuple[tuple[Piece, ...], ...]:
    start, columns = 0, []
    for stream in streams:
        column = []
        for samples, tokens in stream.sizes:
            column.append(Piece(start, samples, tokens))
            start += samples * tokens
        columns.append(column)
    return tuple(zip(*columns, strict=True))


def vectors(parts: Sequence[Tensor], stream: Stream, text: Stream | None = None) -> SampleVectors | Tensor:
    """The vectors [B, ...] of each part; where each token has one of its own [B, L, ...], as they stand in the row.
    `text`: tokens that have none of their own and follow that of their sample."""
    if parts[0].ndim == 2:
        return SampleVectors(torch.cat(list(parts)), stream, text)
    if text is not None:
        raise ValueError("the vectors are those of single tokens; packed text follows the one of its sample")
    return stream.join(parts)


def ropes(parts: Sequence[tuple[Tensor, ...]], streams: Sequence[Stream]) -> tuple[Tensor, ...]:
    """The tables (cosines, sines) [B or 1, L, d] of each part over the tokens of some streams, as these stand in the
    row. Tokens behind the end of a table are not turned."""
    tables = []
    for number, of_parts in enumerate(zip(*parts)):
        whole = [sum(stream.sizes[i][1] for stream in streams) for i in range(len(parts))]
        filled = [
            F.pad(table, (0, 0, 0, tokens - table.shape[1]), value=1.0 - number)  # cosine 1, sine 0
            for table, tokens in zip(of_parts, whole)
        ]
        cut_up = [
            table.split([stream.sizes[i][1] for stream in streams], dim=1) for i, table in enumerate(filled)
        ]
        tables.append(torch.cat([stream.join(pieces) for stream, pieces in zip(streams, zip(*cut_up))], dim=1))
    return tuple(tables)
