"""Buckets by the area rule: all shapes of about one area, and sizes of control pictures. Pure functions; sizes are
(width, height)."""

from __future__ import annotations

import math

Size = tuple[int, int]

TRIED = (-2, -1, 0, 1, 2)
"""steps around the exact width within which a control picture's own bucket is looked for"""


def area_problem(resolution: Size, step: int) -> str | None:
    """Why there are no buckets of this area; None where there are."""
    if min(resolution) > 0 and int(math.sqrt(resolution[0] * resolution[1])) // 2 >= step:
        return None
    return (
        f"is {resolution[0]}x{resolution[1]}; buckets need an area of {2 * step}x{2 * step} or more (two steps of"
        f" {step} pixels)"
    )


def area_buckets(resolution: Size, step: int) -> list[Size]:
    """Sizes on the grid with no more pixels than `resolution`, from half its side to twice that, sorted. ValueError for
    an area that holds none (`area_problem`)."""
    if problem := area_problem(resolution, step):
        raise ValueError(f"resolution {problem}")
    area = resolution[0] * resolution[1]
    side = int(math.sqrt(area))
    widths = range(on_grid(side // 2, step), side + step, step)
    sizes = [(width, on_grid(area // width, step)) for width in widths]
    return sorted({*sizes, *((height, width) for width, height in sizes)})


def own_bucket(size: Size, resolution: Size, step: int) -> Size:
    """The size on the grid of about the area of `resolution` that has the shape of a picture of this size."""
    area, ratio = resolution[0] * resolution[1], size[0] / size[1]
    exact = on_grid(int(math.sqrt(area * ratio)), step)
    widths = [width for width in (exact + i * step for i in TRIED) if width > 0]
    sizes = [(width, on_grid(int(area / width), step)) for width in widths]
    return min((s for s in sizes if s[1] > 0), key=lambda found: abs(found[0] / found[1] - ratio))


def control_bucket(
    size: Size, bucket: Size, step: int, *, no_resize: bool = False, resolution: Size | None = None
) -> Size:
    """Size of a control picture of `size` beside a picture in `bucket`: that bucket; with `resolution` its own for that
    area; with `no_resize` its own size, with both no more than that area. 0 on a side: the picture is too small."""
    if no_resize and (resolution is None or size[0] * size[1] <= resolution[0] * resolution[1]):
        return on_grid(size[0], step), on_grid(size[1], step)
    return bucket if resolution is None else own_bucket(size, resolution, step)


def on_grid(length: int, step: int) -> int:
    """Rounded down."""
    return length // step * step
