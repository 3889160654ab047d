"""`--debug_dataset`: show what the data loader gives, as text and, with a folder, as pictures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from library.dataset.batch import Batch
from library.dataset.dataset import DatasetGroup
from library.dataset.plan import requests_of_epoch


def debug_dataset(
    group: DatasetGroup, *, seed: int, epochs: int = 1, preview_dir: str | None = None, show: Callable[[str], None] = print
) -> int:
    """Describe every sample of some epochs; write the pictures that are not cached to `preview_dir`. Returns the number of
    samples shown."""
    count = 0
    for epoch in range(1, epochs + 1):
        plan = group.plan(epoch, seed, 1)
        first_step = (epoch - 1) * len(plan)
        requests = requests_of_epoch(
            plan, epoch=epoch, first_step=first_step, rank=0, num_processes=1, is_training=group.is_training
        )
        for request in requests:
            batch = group.load(request)
            show(f"epoch {epoch}, batch {request.index + 1} of {len(plan)}, dataset {request.dataset}: {describe(batch)}")
            for i in range(len(batch)):
                count += 1
                show("  " + describe_sample(batch, i))
                if preview_dir is not None and batch.images is not None:
                    save_preview(batch.images[i], Path(preview_dir) / f"{epoch}_{request.index:05d}_{i}.png")
    return count


def describe(batch: Batch) -> str:
    """The tensors of a batch with their shapes."""
    names = ("images", "latents", "alpha_masks", "conditioning_images", "text_encoder_outputs_list", "input_ids_list")
    parts = []
    for name in names:
        value = getattr(batch, name)
        if isinstance(value, torch.Tensor):
            parts.append(f"{name} {list(value.shape)}")
        elif value is not None:
            parts.append(f"{name} {[list(v.shape) if v is not None else None for v in value]}")
    return ", ".join(parts)


def describe_sample(batch: Batch, i: int) -> str:
    (height, width), (top, left) = batch.target_sizes_hw[i].tolist(), batch.crop_top_lefts[i].tolist()
    original_height, original_width = batch.original_sizes_hw[i].tolist()
    flipped = ", mirrored" if batch.flippeds[i] else ""
    weight = f", weight {batch.loss_weights[i].item():g}" if batch.loss_weights[i] != 1 else ""
    attributes = f", {batch.custom_attributes[i]}" if batch.custom_attributes[i] else ""
    return (
        f"{batch.image_keys[i]}: {original_width}x{original_height} to {width}x{height}, cut left {left} top {top}{flipped}{weight}"
        f"{attributes}; caption: {batch.captions[i]!r}"
    )


def save_preview(image: torch.Tensor, path: Path) -> None:
    """Write [3, H, W] in -1..1 as a picture."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = ((image.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(path)
