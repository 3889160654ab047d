"""From element-wise losses to one number per sample: weights, masks, mean."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from library.training.objective import expand_like


def per_sample_loss(
    elementwise: torch.Tensor,
    *,
    flow_weight: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    sample_weights: torch.Tensor | None = None,
    factors: torch.Tensor | None = None,
) -> torch.Tensor:
    """Losses [B] from element-wise ones [B, C, ...], in the order: flow weight, mask, mean over all but the batch,
    sample weights [B] (prior_loss_weight), factors of the DDPM options.

    Flow weight and factors are [B], or one per frame or token (`expand_like`); such factors act before the mean. A flow
    weight with as many dimensions as the elements broadcasts to them. `mask`
    broadcasts to `elementwise` (see `loss_mask`). The mean divides by all elements, so a small mask makes a small loss.
    Works for B = 0.
    """
    if factors is not None and factors.ndim > 1:
        elementwise, factors = elementwise * expand_like(factors.to(elementwise), elementwise), None
    if flow_weight is not None:
        flow_weight = flow_weight.to(elementwise)
        is_elementwise = flow_weight.ndim == elementwise.ndim
        elementwise = elementwise * (flow_weight if is_elementwise else expand_like(flow_weight, elementwise))
    if mask is not None:
        elementwise = elementwise * mask.to(elementwise)
    losses = elementwise.flatten(1).mean(dim=1)  # [B]
    if sample_weights is not None:
        losses = losses * sample_weights.to(losses)
    if factors is not None:
        losses = losses * factors.to(losses)
    return losses


def loss_mask(
    conditioning_images: torch.Tensor | None, alpha_masks: torch.Tensor | None, latents_shape: torch.Size, *,
    masked_loss: bool
) -> torch.Tensor | None:
    """The mask [B, 1, ..., h, w] for losses of `latents_shape` [B, C, ..., h, w], or None when there is none.

    With `masked_loss` the first channel of the conditioning images [B, 3, H, W] (-1..1 becomes 0..1) comes first; else
    the alpha masks [B, H, W], or [B, F, H, W] of clips, in 0..1. Conditioning images without `masked_loss` are a
    ControlNet's input and no mask. Resized by area; of frames that the VAE encodes together (all but the first) the
    mean counts. A sample without a mask has ones in its alpha mask.
    """
    if masked_loss and conditioning_images is not None:
        mask = conditioning_images[:, 0].float() / 2 + 0.5
    elif alpha_masks is not None:
        mask = alpha_masks.float()
    else:
        return None
    if mask.shape[0] == 0:
        return mask.new_ones((0, *[1] * (len(latents_shape) - 1)))
    if mask.ndim == 4:
        mask = F.interpolate(mask, size=tuple(latents_shape[-2:]), mode="area")  # [B, F, h, w]
        return _of_latent_frames(mask, latents_shape[2]).unsqueeze(1)
    mask = F.interpolate(mask.unsqueeze(1), size=tuple(latents_shape[-2:]), mode="area")  # [B, 1, h, w]
    return mask.reshape(mask.shape[0], *[1] * (len(latents_shape) - 3), *mask.shape[-2:])


def _of_latent_frames(mask: torch.Tensor, count: int) -> torch.Tensor:
    """[B, F, h, w] in frames of the clip -> [B, count, h, w] in frames of its latents."""
    if mask.shape[1] == count:
        return mask
    later = mask[:, 1:].unflatten(1, (count - 1, -1)).mean(dim=2)
    return torch.cat([mask[:, :1], later], dim=1)
