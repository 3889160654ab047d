"""What denoisers of clips are given: times of tokens, and captions without their empty places."""

from __future__ import annotations

from torch import Tensor


def times_of_tokens(times: Tensor, frames: int, tokens: int) -> Tensor:
    """Times [B] or one per token [B, L] as they are; one per frame [B, F] for each token of the frame: [B, L].
    `frames`, `tokens`: F and L of the clip."""
    if times.ndim == 1 or times.shape[1] == tokens or times.shape[1] != frames:
        return times
    return times.repeat_interleave(tokens // frames, dim=1)


def needed_text(states: Tensor, mask: Tensor) -> tuple[Tensor, Tensor | None]:
    """(states [B, T, D], their mask [B, T]) without places where no caption has a token, and without a mask that hides
    nothing, where that can be seen without waiting for a device: attention is faster without them."""
    if mask.device.type != "cpu":
        return states, mask
    longest = max(1, int(mask.sum(dim=1).max()))
    states, mask = states[:, :longest], mask[:, :longest]
    return states, None if bool(mask.all()) else mask
