"""`--debug_dataset`: show what the data loader gives, as text and as a sheet of pictures with their captions."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from PIL import Image

from library.core.atomic_file import atomic_path
from library.dataset.batch import CONDITIONING_IMAGES, Batch
from library.dataset.dataset import DatasetGroup
from library.dataset.packed_batch import PackedBatch
from library.dataset.plan import requests_of_epoch
from library.generation.image_grid import GridCell, image_grid

MOST_CELLS = 64
"""samples on the sheet"""
FRAMES_SHOWN = 4
"""of a clip, side by side: the first, the last, and those evenly between"""


def debug_dataset(
    group: DatasetGroup, *, seed: int, epochs: int = 1, sheet: str | os.PathLike[str] | None = None,
    show: Callable[[str], None] = print
) -> int:
    """Describe every sample of some epochs; draw the first ones with their captions on one `sheet` (PNG), as the model
    sees them, of clips a few frames. Returns the number of samples shown."""
    count, cells = 0, []
    for epoch in range(1, epochs + 1):
        plan = group.plan(epoch, seed, 1)
        first_step = (epoch - 1) * len(plan)
        requests = requests_of_epoch(
            plan, epoch=epoch, first_step=first_step, rank=0, num_processes=1, is_training=group.is_training
        )
        for request in requests:
            loaded = group.load(request)
            is_pack = isinstance(loaded, PackedBatch)
            what = f"{'pack' if is_pack else 'batch'} {request.index + 1} of {len(plan)}"
            items = group.datasets[request.dataset].items
            for batch in loaded.parts if is_pack else [loaded]:
                show(f"epoch {epoch}, {what}, dataset {request.dataset}: {describe(batch)}")
                for i in range(len(batch)):
                    count += 1
                    clip = items[batch.request.items[i]].clip
                    show("  " + describe_sample(batch, i, "" if clip is None else f", {clip.words}"))
                    if sheet is not None and batch.images is not None and len(cells) < MOST_CELLS:
                        cells.append(_cell(batch, i))
    if cells:
        title = f"the first {len(cells)} of {count} samples" if len(cells) < count else f"{count} samples"
        with atomic_path(sheet) as temporary:
            image_grid(cells, title=title).save(temporary, "PNG")
        show(f"wrote {sheet}: {title} with their captions")
    return count


def _cell(batch: Batch, i: int) -> GridCell:
    return GridCell(picture(batch.images[i]), f"{describe_size(batch, i)}: {batch.captions[i] or '(no caption)'}")


def describe(batch: Batch) -> str:
    """The tensors of a batch: pictures by their size, width x height, clips with their frames, and others by their
    shapes."""
    parts = []
    for name in ("images", "latents", "alpha_masks", "conditioning_images"):
        value = getattr(batch, name)
        if value is not None:
            frames = f"x{value.shape[2]}" if value.ndim == 5 else ""
            parts.append(f"{name} {len(value)} of {value.shape[-1]}x{value.shape[-2]}{frames}")
    parts += [f"{name} {list(value.shape)}" for name, value in batch.conditions.items() if name != CONDITIONING_IMAGES]
    if batch.conditioning is not None:
        shapes = {name: _shapes_text(value) for name, value in batch.conditioning.items()}
        parts.append(f"conditioning {', '.join(f'{name} {shape}' for name, shape in shapes.items())}")
    if batch.input_ids_list is not None:
        parts.append(f"input_ids_list {[list(value.shape) for value in batch.input_ids_list]}")
    return ", ".join(parts)


def _shapes_text(value: torch.Tensor | list[torch.Tensor]) -> str:
    return str([list(tensor.shape) for tensor in value] if isinstance(value, list) else list(value.shape))


def describe_size(batch: Batch, i: int) -> str:
    """Size of the picture and of the sample made of it."""
    (height, width), (original_height, original_width) = (
        batch.target_sizes_hw[i].tolist(),
        batch.original_sizes_hw[i].tolist(),
    )
    return f"{original_width}x{original_height} to {width}x{height}"


def describe_sample(batch: Batch, i: int, frames: str = "") -> str:
    """`frames`: which ones a clip has."""
    top, left = batch.crop_top_lefts[i].tolist()
    flipped = ", mirrored" if batch.flippeds[i] else ""
    weight = f", weight {batch.loss_weights[i].item():g}" if batch.loss_weights[i] != 1 else ""
    attributes = f", {batch.custom_attributes[i]}" if batch.custom_attributes[i] else ""
    return (
        f"{batch.image_keys[i]}{frames}: {describe_size(batch, i)}, cut left {left} top {top}{flipped}{weight}"
        f"{attributes}; caption: {batch.captions[i]!r}"
    )


def picture(image: torch.Tensor) -> Image.Image:
    """[3, H, W] in -1..1 as a picture; of a clip [3, F, H, W] some frames side by side."""
    if image.ndim == 4:
        shown = min(image.shape[1], FRAMES_SHOWN)
        numbers = [place * (image.shape[1] - 1) // (shown - 1) for place in range(shown)]
        image = torch.cat([image[:, number] for number in numbers], dim=-1)  # [3, H, n W]
    return Image.fromarray(((image.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy())
