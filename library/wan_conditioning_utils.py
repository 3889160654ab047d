"""What Wan is conditioned on beside text: what stands beside the latents on channels (`y`), made of first and last
frames, control clips and reference frames.

The mask of a latent frame has four channels, one for each frame of the clip that it stands for: 1 where that frame is
given.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from library.core.errors import ConfigError
from library.families.wan_tasks import MASK_CHANNELS

Encode = Callable[[Tensor], Tensor]
"""clips [B, 3, F, H, W] in -1..1 -> latents [B, 16, F', h, w]"""
TEMPORAL_STRIDE, SPATIAL_STRIDE, PATCH = 4, 8, 2


def filled(first: Tensor, frames: int, last: Tensor | None = None) -> Tensor:
    """A clip [B, 3, F, H, W] of a first frame [B, 3, H, W], grey (0.0), and the last frame where one is given."""
    clip = first.new_zeros(*first.shape[:2], frames, *first.shape[2:])
    clip[:, :, 0] = first
    if last is not None and frames > 1:
        clip[:, :, -1] = last
    return clip


def frame_mask(latents: Tensor, given: Sequence[int] = (0,)) -> Tensor:
    """The mask [B, 4, F', h, w] beside latents [B, C, F', h, w] in which these latent frames are given."""
    mask = latents.new_zeros(latents.shape[0], MASK_CHANNELS, *latents.shape[2:])
    for frame in given:
        mask[:, :, frame] = 1
    return mask


def with_mask(latents: Tensor, mask: Tensor) -> Tensor:
    """[B, 20, F', h, w]: the mask, and the latents behind it."""
    return torch.cat((mask, latents), dim=1)


def picture_condition(encode: Encode, first: Tensor, frames: int) -> Tensor:
    """y [B, 20, F', h, w] of clips of `frames` frames that begin with pictures [B, 3, H, W]."""
    latents = encode(filled(first, frames))
    return with_mask(latents, frame_mask(latents))


def ends_condition(encode: Encode, first: Tensor, last: Tensor | None, frames: int) -> Tensor:
    """The same of a model for first and last frames, which are encoded together: of the last latent frame only the last
    frame is given."""
    latents = encode(filled(first, frames, last))
    mask = frame_mask(latents)
    if last is not None and frames > 1:
        mask[:, -1, -1] = 1
    return with_mask(latents, mask)


def appended_condition(encode: Encode, first: Tensor, last: Tensor, frames: int) -> Tensor:
    """y [B, 20, F' + 1, h, w] of a model for first frames alone that is shown a last one too: a latent frame of its own
    follows those of the clip."""
    latents = torch.cat((encode(filled(first, frames)), encode(last[:, :, None])), dim=2)
    return with_mask(latents, frame_mask(latents, (0, latents.shape[2] - 1)))


def without_mask(y: Tensor, *, first_alone: bool = False) -> Tensor:
    """The latents of y [B, 20, F', h, w]; with `first_alone` zeros after those of the first frame."""
    latents = y[:, MASK_CHANNELS:]
    if first_alone:
        latents = torch.cat((latents[:, :, :1], torch.zeros_like(latents[:, :, 1:])), dim=2)
    return latents


def control_condition(control: Tensor, picture: Tensor | None) -> Tensor:
    """y [B, 32, F', h, w] of a model that follows a control clip: its latents [B, 16, F', h, w] and those of a picture,
    zeros where there is none."""
    picture = control.new_zeros(control.shape) if picture is None else picture
    return torch.cat((control, picture.to(control)), dim=1)


def lengthened(clip: Tensor, frames: int) -> Tensor:
    """A clip [B, 3, F, H, W] cut or, with its last frame repeated, filled up to so many frames."""
    missing = frames - clip.shape[2]
    if missing <= 0:
        return clip[:, :, :frames]
    return torch.cat((clip, clip[:, :, -1:].expand(-1, -1, missing, -1, -1)), dim=2)


@dataclass(frozen=True)
class GeneratedCondition:
    """`y` of a clip that is made, None where nothing stands beside the latents, and how many latent frames it has:
    `extra` more than its frames need, where a last frame follows them in a latent frame of its own."""

    y: Tensor | None
    latent_frames: int
    extra: int = 0


def generation_condition(
    encode: Encode, frames: int, *, first: Tensor | None = None, last: Tensor | None = None,
    control: Tensor | None = None, takes_last: bool = False,
) -> GeneratedCondition:
    """What stands beside the latents of a clip of `frames` frames. `first`, `last` [B, 3, H, W], `control` [B, 3, F, H,
    W]: what is given; `takes_last`: the model is one for first and last frames."""
    count = 1 + (frames - 1) // TEMPORAL_STRIDE
    if first is None and control is None:
        return GeneratedCondition(None, count)
    appends = first is not None and last is not None and not takes_last
    count += appends
    picture = None
    if appends:
        picture = appended_condition(encode, first, last, frames)
    elif first is not None:
        picture = ends_condition(encode, first, last if takes_last else None, frames)
    if control is None:
        return GeneratedCondition(picture, count, int(appends))
    latents = encode(lengthened(control, frames + TEMPORAL_STRIDE * appends))
    y = control_condition(latents, None if picture is None else without_mask(picture))
    return GeneratedCondition(y, count, int(appends))


@dataclass(frozen=True)
class OneFrame:
    """A single frame that is learned or made beside reference frames, all of them frames of one clip in the order of
    their places in time. `f_indices`: those places; `order`: which reference frame, by its number, stands at each slot,
    None where the frame itself does."""

    f_indices: tuple[int, ...]
    order: tuple[int | None, ...]

    @property
    def target(self) -> int:
        """The slot of the frame itself."""
        return self.order.index(None)

    @property
    def references(self) -> int:
        return len(self.order) - 1


def one_frame(clean_indices: Sequence[int], target_index: int) -> OneFrame:
    """ConfigError when two frames have one place."""
    own = len(clean_indices)  # after the numbers of the reference frames
    places = sorted((index, number) for number, index in enumerate((*clean_indices, target_index)))
    indices = tuple(index for index, _ in places)
    if len(set(indices)) < len(indices):
        raise ConfigError(
            f"the places of a single frame and its control pictures are {', '.join(map(str, indices))};"
            " needed: each once"
        )
    order = tuple(None if number == own else number for _, number in places)
    return OneFrame(indices, order)


def one_frame_conditions(
    encode: Encode, layout: OneFrame, target: Tensor | None, references: Sequence[Tensor]
) -> tuple[Tensor | None, Tensor]:
    """(latents [B, 16, n, h, w] of all frames, y [B, 20, n, h, w]) of a target and its reference frames, [B, 3, H, W]
    each: of the target y has the latents of grey and a mask of 0, of the others what the latents have and 1. No target
    (one that is to be made): no latents."""
    given = [encode(picture[:, :, None]) for picture in references]  # [B, 16, 1, h, w]
    like = references[0] if target is None else target
    grey = encode(torch.zeros_like(like)[:, :, None])
    slots = [grey if number is None else given[number] for number in layout.order]
    beside = torch.cat(slots, dim=2)
    y = with_mask(beside, frame_mask(beside, [slot for slot, number in enumerate(layout.order) if number is not None]))
    if target is None:
        return None, y
    own = encode(target[:, :, None])
    return torch.cat([own if number is None else given[number] for number in layout.order], dim=2), y


def training_condition(conditions: Mapping[str, Tensor], *, fun_control: bool) -> Tensor | None:
    """y [B, n, F', h, w] of a batch from its conditions by name; None where there are none."""
    picture = conditions.get("latents_image_ends", conditions.get("latents_image"))
    if not fun_control:
        return picture
    picture = None if picture is None else without_mask(picture, first_alone=True)
    return control_condition(conditions["latents_control"], picture)


def vision_tokens(conditions: Mapping[str, Tensor]) -> Tensor | None:
    """States of pictures [B, N, D], those of several behind each other, from the conditions of a batch; None where
    there are none."""
    given = conditions.get("clip")
    if given is None:
        return None
    given = given.flatten(1, -2)  # [B, 257, D], or [B, n, 257, D] of n reference frames
    last = conditions.get("clip_end")
    return given if last is None else torch.cat((given, last.flatten(1, -2)), dim=1)


def size_beside(image: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """(width, height) of a clip of the area of `size` (width, height) in the shape of its first frame `image`."""
    ratio = image[1] / image[0]
    area = size[0] * size[1]
    sides = (math.sqrt(area / ratio), math.sqrt(area * ratio))
    width, height = (int(side // SPATIAL_STRIDE // PATCH) * SPATIAL_STRIDE * PATCH for side in sides)
    return width, height


def tokens_of(latents: Sequence[int]) -> int:
    """Tokens of latents [..., F, h, w]."""
    frames, height, width = latents[-3:]
    return frames * (height // PATCH) * (width // PATCH)
