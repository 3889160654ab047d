"""Native resolution: every picture is trained at its own size, as far as the grid of the family and a budget of tokens
allow. Pure functions; sizes are (width, height)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from library.core.errors import listed
from library.families.latents import Bucket, LatentSpec

if TYPE_CHECKING:
    from library.config_util import Blueprint
    from library.dataset.datasources import ScanResult
    from library.dataset.items import DatasetParams, ImageItem

Size = tuple[int, int]

RULE = "native"
"""of DatasetParams.bucket_rule"""


@dataclass(frozen=True, kw_only=True)
class NativeSizes:
    """Which size a picture is trained at. `step`: what sides are a multiple of; `token_budget`: tokens that the
    denoiser makes of one sample, at most; `side_limit`: pixels that a side has, at most; `scales`: what is larger is
    scaled down, else it is refused."""

    latents: LatentSpec
    step: int
    token_budget: int
    side_limit: int | None = None
    scales: bool = True

    def floored(self, size: Size) -> Size:
        """The largest size on the grid that can be cut out; 0 where a side is shorter than one step."""
        return size[0] // self.step * self.step, size[1] // self.step * self.step

    def tokens(self, size: Size, frames: int = 1) -> int:
        return self.latents.tokens(Bucket(*size, frames))

    def fits(self, size: Size, frames: int = 1) -> bool:
        return self.tokens(size, frames) <= self.token_budget and max(size) <= (self.side_limit or max(size))

    def size_of(self, size: Size, frames: int = 1) -> Size | None:
        """The size at which a picture or clip of `size` is trained; None when a side is shorter than one step. A clip
        of very many frames may be over the budget at the smallest size."""
        own = self.floored(size)
        if 0 in own:
            return None
        return own if not self.scales or self.fits(own, frames) else self._smaller(size, own, frames)

    def _smaller(self, size: Size, own: Size, frames: int) -> Size:
        """Scaled by what keeps the shape, put on the grid, and then shortened where that is still too much."""
        factor = min(1.0, math.sqrt(self.token_budget / self.tokens(own, frames)))
        if self.side_limit is not None:
            factor = min(factor, self.side_limit / max(size))
        width, height = (max(int(side * factor + 1e-6) // self.step, 1) * self.step for side in size)
        while not self.fits((width, height), frames) and max(width, height) > self.step:
            if width >= height:
                width -= self.step
            else:
                height -= self.step
        return width, height


def native_problems(blueprint: Blueprint, scan: ScanResult) -> Iterator[str]:
    """A message for each dataset with pictures that are refused, as they are too large."""
    for params, train, held_out in zip(blueprint.datasets, scan.train, scan.validation, strict=True):
        sizes = params.native
        if sizes is None or sizes.scales:
            continue
        over = list(dict.fromkeys(_over(item, sizes) for item in (*train, *held_out) if not _is_in(item, sizes)))
        if not over:
            continue
        side = "" if sizes.side_limit is None else f" or a side of more than {sizes.side_limit} pixels"
        yield (
            f"--navit_native_over_budget is fail, and {len(over)} of the samples of {params.label} have more tokens"
            f" than --navit_token_budget {sizes.token_budget}{side}: {listed(over)}; needed: smaller files, a larger"
            " budget, or --navit_native_over_budget downscale"
        )


def _is_in(item: ImageItem, sizes: NativeSizes) -> bool:
    own = sizes.floored(item.image_size)
    return 0 in own or sizes.fits(own, item.frames)


def _over(item: ImageItem, sizes: NativeSizes) -> str:
    width, height = item.image_size
    frames = "" if item.frames == 1 else f"x{item.frames}"
    tokens = sizes.tokens(sizes.floored(item.image_size), item.frames)
    return f"{item.absolute_path} ({width}x{height}{frames}, {tokens} tokens)"


def without_copies(blueprint: Blueprint, scan: ScanResult) -> ScanResult:
    """The samples without those that a later dataset repeats: datasets of the same files and several resolutions give
    the same sizes."""
    seen: dict[tuple, int] = {}
    lists: dict[str, list[list[ImageItem]]] = {"train": [], "validation": []}
    warnings = []
    for number, (params, train, held_out) in enumerate(
        zip(blueprint.datasets, scan.train, scan.validation, strict=True)
    ):
        dropped = 0
        for name, items in (("train", train), ("validation", held_out)):
            kept = [item for item in items if seen.setdefault(_copy_key(item, params), number) == number]
            dropped += len(items) - len(kept)
            lists[name].append(kept)
        if dropped:
            warnings.append(
                f"{params.label}: {dropped} samples are those of a dataset before, at the same size with"
                " --navit_native_resolution; each is trained once, with the num_repeats of the first"
            )
    if not warnings:
        return scan
    return dataclasses.replace(scan, **lists, warnings=(*scan.warnings, *warnings))


def _copy_key(item: ImageItem, params: DatasetParams) -> tuple:
    """What two samples have in common that are one and the same, but for the resolution of their datasets."""
    beside = (item.cond_path, item.control_paths, item.target_paths)
    return item.absolute_path, item.window_key, item.caption, item.is_reg, beside, params.network_multiplier
