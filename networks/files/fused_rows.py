"""How many output rows the parts of a fused layer have: `LayerNames.rows` says by which rule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from library.core.errors import CheckpointError

if TYPE_CHECKING:
    from networks.files.file_names import LayerNames


def rows_of_parts(layer: LayerNames, rows: int, width: int) -> list[int]:
    """The rows of each part of a layer with `rows` rows and `width` inputs. CheckpointError when they do not divide."""
    count = len(layer.parts)
    if layer.rows == "linear1":
        if rows <= 3 * width:
            raise CheckpointError(f"{layer.path} has {rows} rows; needed: more than three times its {width} inputs")
        return [width] * 3 + [rows - 3 * width]
    first = [width] if layer.rows == "queries_first" else []
    left, among = rows - sum(first), count - len(first)
    if left <= 0 or left % among:
        raise CheckpointError(
            f"{layer.path} has {rows} rows, which do not divide into {count} parts; the file is for another model, or"
            " damaged"
        )
    return first + [left // among] * among


def with_missing_rows(layer: LayerNames, rows: Sequence[int | None], width: int) -> list[int]:
    """The rows of each part of a layer with `width` inputs, None = a part that is not there. CheckpointError when
    nothing tells them."""
    known = next(count for count in rows if count)
    if layer.rows == "linear1":
        return [count or width * (4 if number == 3 else 1) for number, count in enumerate(rows)]
    if layer.rows != "queries_first":
        return [count or known for count in rows]
    known = next((count for count in rows[1:] if count), None)
    if known is None:
        raise CheckpointError(f"{layer.path} has neither keys nor values, so that their size is not told")
    return [rows[0] or width, *(count or known for count in rows[1:])]
