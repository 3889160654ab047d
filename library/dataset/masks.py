"""Loss masks: weights per latent pixel, from a conditioning image or from the alpha channel."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from library.dataset.batch import Batch


def mask_for_loss(batch: Batch, latent_hw: tuple[int, int]) -> torch.Tensor | None:
    """Weights [B, 1, h, w] in 0..1 for a loss of spatial size `latent_hw`, or None when the batch has no mask.

    Sources, the first wins: the R channel of `conditioning_images` [B, 3, H, W] in -1..1, then `alpha_masks` [B, H, W].
    Resized by area averaging. The loss is multiplied by it and the mean still runs over all elements: the mask area does
    not normalise it. Latents with frames broadcast it: [B, 1, h, w] -> [B, 1, 1, h, w] is the caller's.
    """
    if batch.conditioning_images is not None:
        mask = batch.conditioning_images[:, 0:1].float() / 2 + 0.5  # [B, 1, H, W]
    elif batch.alpha_masks is not None:
        mask = batch.alpha_masks.unsqueeze(1).float()  # [B, 1, H, W]
    else:
        return None
    return resize_mask(mask, latent_hw)


def resize_mask(mask: torch.Tensor, latent_hw: tuple[int, int]) -> torch.Tensor:
    """Area-average weights [B, 1, H, W] to [B, 1, h, w]."""
    return F.interpolate(mask, size=tuple(latent_hw), mode="area")


def apply_mask(loss: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Element-wise loss [B, C, ..., h, w] times its mask [B, 1, h, w]; unchanged without a mask."""
    if mask is None:
        return loss
    while mask.dim() < loss.dim():
        mask = mask.unsqueeze(2)
    return loss * mask.to(loss.dtype)
