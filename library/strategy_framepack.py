"""FramePack: captions to conditioning [states of LLaMA, their mask, CLIP-L's state of the whole], clips to their
sections, and the caches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from library.components.framepack_sections import (
    FAR,
    MIDDLE,
    NEAR,
    WINDOW,
    Frames,
    OneFrame,
    Section,
    one_frame,
    sections_of,
)
from library.components.siglip_utils import encode_pictures
from library.core.errors import ConfigError
from library.dataset.batch import CONDITIONING_ALPHA, CONDITIONING_IMAGES, numbered
from library.dataset.items import SampleFacts
from library.dataset.latent_cache import LatentEncoder
from library.families.framepack import FAMILY
from library.families.latents import Bucket, SampleKind
from library.strategy_base import TextEncodingStrategy
from library.strategy_llama_clip import LlamaClipTokenizeStrategy, llama_states, padded, pooled_clip

TEXT_LENGTH = 512
"""places for the states of a caption"""
IMAGE_ENCODER = "image_encoder"
"""the part beside the VAE that reads the first picture"""


class FramePackTokenizeStrategy(LlamaClipTokenizeStrategy):
    """LLaMA with the template of videos, and CLIP-L."""


class FramePackTextEncodingStrategy(TextEncodingStrategy):
    """A caption's states do not depend on its batch."""

    def encode_tokens(
        self, tokenize_strategy: FramePackTokenizeStrategy, models: list[Any], tokens: list[Tensor]
    ) -> list[Tensor | None]:
        """[states [B, 512, D] without those of the template's head, 0 where there is no token, their mask [B, 512]
        (bool), state of the caption as a whole [B, E]]; states are None where a model is absent.

        `models` = [LLaMA, CLIP-L]. ConfigError when an id has no embedding row.
        """
        ids, mask, clip_ids, _ = tokens
        llama, clip_l = models[0] if models else None, models[1] if len(models) > 1 else None
        states = None if llama is None else llama_states(tokenize_strategy, llama, ids, mask, TEXT_LENGTH)
        pooled = None if clip_l is None else pooled_clip(tokenize_strategy, clip_l, clip_ids)
        return [states, padded(mask[:, tokenize_strategy.num_head :], TEXT_LENGTH).bool(), pooled]


@dataclass
class _LastClip:
    """The clip that was encoded last: its sections come one after the other. A copy in another process is empty."""

    seed: int | None = None
    clip: Tensor | None = None
    latents: Tensor | None = None

    def __getstate__(self) -> dict[str, None]:
        return {"seed": None, "clip": None, "latents": None}


class FramePackLatentEncoder(LatentEncoder):
    """Of a clip the latents of one section with the frames that it sees; of a picture its latents as those of a single
    frame, with its control pictures. All are stored with the scale, of one posterior draw per clip or picture and size.

    `is_f1`: sections see those before them; `middle`, `far`: a single frame sees further frames of zeros, coarsely.
    `image_width`: of the states of the image encoder; `tile_size`: pixels of a side of tiles in which the autoencoder
    was loaded to compute larger frames.
    """

    def __init__(
        self, *, is_f1: bool = False, middle: bool = True, far: bool = True, image_width: int = 1152,
        tile_size: int | None = None,
    ) -> None:
        self.is_f1, self.middle, self.far = is_f1, middle, far
        self.image_width = image_width
        self.tile_size = tile_size
        self._last = _LastClip()

    def manner(self, bucket: Sequence[int]) -> str:
        kind = Bucket(*bucket).kind
        if kind.section_frames:
            return f"sections of {kind.section_frames}{' seen forwards' if self.is_f1 else ''}"
        places = self.one_frame(kind)
        seen = "".join(f", {name}" for name, there in (("2x", places.middle), ("4x", places.far)) if there)
        return f"single frame at {places.target} beside {', '.join(map(str, places.near))}{seen}"

    def pieces(self, bucket: Sequence[int]) -> str:
        tiled = self.tile_size is not None and max(bucket[:2]) > self.tile_size
        return f"in tiles of {self.tile_size} pixels" if tiled else ""

    def one_frame(self, kind: SampleKind) -> OneFrame:
        """Places of a single frame and its control pictures."""
        return one_frame(
            len(kind.controls), WINDOW, target=kind.target_index, control=kind.clean_indices or (),
            post=not kind.no_post, middle=self.middle, far=self.far,
        )  # fmt: skip

    def pictures_for(self, bucket: Sequence[int]) -> tuple[str, ...]:
        """The control pictures of a single frame, with what is to be seen of them. ConfigError for those of another size
        than the frame, as all of them have its places."""
        width, height, _, kind = Bucket(*bucket)
        other = next((size for size in kind.controls if size != (width, height)), None)
        if other is not None:
            raise ConfigError(
                f"control pictures of {'x'.join(map(str, other))} stand beside pictures of {width}x{height}; FramePack"
                " needs both in one size: leave out control_resolution and no_resize_control"
            )
        numbers = range(len(kind.controls))
        return tuple(numbered(name, n) for n in numbers for name in (CONDITIONING_IMAGES, CONDITIONING_ALPHA))

    def condition_shapes(self, bucket: Sequence[int]) -> Mapping[str, tuple[int, ...]]:
        """Of the frames that are seen, their places and those of the latents, and of the states of the image encoder.
        Frames of zeros that a single frame sees coarsely are not stored."""
        kind, picture = Bucket(*bucket).kind, FAMILY.latents.latent_shape(bucket[:2])
        frames = {"": 1 + NEAR, "_2x": MIDDLE, "_4x": FAR}
        stored, made = frames, kind.section_frames
        if not kind.section_frames:
            places = self.one_frame(kind)
            frames = {"": len(places.near), "_2x": len(places.middle), "_4x": len(places.far)}
            stored, made = {"": len(places.near)}, 1
        return {
            **{f"latents_clean{scale}": (picture[0], count, *picture[1:]) for scale, count in stored.items()},
            "latent_indices": (made,),
            **{f"clean_latent{scale}_indices": (count,) for scale, count in frames.items() if count},
            "image_embeddings": (-1, self.image_width),
        }

    def encode(self, vae: Any, images: Tensor, seeds: Sequence[int]) -> Tensor:
        return vae.encode_raw(images, seeds) * vae.params.scaling_factor

    def encode_with_facts(
        self, vae: Any, parts: Mapping[str, Any], images: Tensor, seeds: Sequence[int],
        pictures: Mapping[str, Tensor], facts: Sequence[SampleFacts],
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        if images.ndim == 5:
            first, (latents, conditions) = images[:, :, 0], self._sections(vae, images, seeds, facts)
        else:
            latents, conditions = self._single_frames(vae, images, seeds, pictures, facts[0])
            first = pictures.get(CONDITIONING_IMAGES)
        states = picture_states(parts[IMAGE_ENCODER], first, len(images))
        return latents, {**conditions, "image_embeddings": states}

    # -- sections ------------------------------------------------------------------------------------------------------

    def _sections(
        self, vae: Any, clips: Tensor, seeds: Sequence[int], facts: Sequence[SampleFacts]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        window = facts[0].kind.section_frames
        count = FAMILY.latents.sections_in(clips.shape[2], window)
        used = clips[:, :, : FAMILY.latents.frames_of_sections(count, window)]
        plans = sections_of(1 + count * window, window, is_f1=self.is_f1)
        rows = [self._section(self._whole(vae, used[i], seeds[i]), plans[facts[i].section]) for i in range(len(used))]
        made = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        return made.pop("latents"), made

    def _whole(self, vae: Any, clip: Tensor, seed: int) -> Tensor:
        """Scaled latents [C, F', h, w] of a clip [3, F, H, W]."""
        last = self._last
        if last.seed != seed or last.clip is None or last.clip.shape != clip.shape or not torch.equal(last.clip, clip):
            last = self._last = _LastClip(seed, clip, self.encode(vae, clip[None], [seed])[0])
        return last.latents

    def _section(self, latents: Tensor, section: Section) -> dict[str, Tensor]:
        """What a step gets of a section of a clip with these latents [C, F', h, w]."""
        clean = {"": section.near, "_2x": section.middle, "_4x": section.far}
        places = section.places
        return {
            "latents": frames_at(latents, section.target),
            **{f"latents_clean{scale}": frames_at(latents, frames) for scale, frames in clean.items()},
            **indices_of(places.latent, places.near, places.middle, places.far),
        }

    # -- single frames -------------------------------------------------------------------------------------------------

    def _single_frames(
        self, vae: Any, images: Tensor, seeds: Sequence[int], pictures: Mapping[str, Tensor], facts: SampleFacts
    ) -> tuple[Tensor, dict[str, Tensor]]:
        places = self.one_frame(facts.kind)
        latents = self.encode(vae, images, seeds)  # [B, C, h, w]
        seen = [self._control(vae, pictures, number, seeds) for number in range(len(facts.kind.controls))]
        seen = seen or [torch.zeros_like(latents)]
        seen += [torch.zeros_like(latents)] * places.has_zero
        indices = indices_of((places.target,), places.near, places.middle, places.far)
        rows = {name: row.expand(len(images), -1) for name, row in indices.items()}
        return latents, {"latents_clean": torch.stack(seen, dim=2), **rows}

    def _control(self, vae: Any, pictures: Mapping[str, Tensor], number: int, seeds: Sequence[int]) -> Tensor:
        """Scaled latents [B, C, h, w] of a control picture; what its alpha says is not to be seen is 0."""
        latents = self.encode(vae, pictures[numbered(CONDITIONING_IMAGES, number)], seeds)
        alpha = pictures.get(numbered(CONDITIONING_ALPHA, number))
        return latents if alpha is None else masked(latents, alpha)


def picture_states(encoder: Any, pictures: Tensor | None, count: int) -> Tensor:
    """States [B, L, D] of pictures [B, 3, H, W] in -1..1; zeros for `count` samples without any."""
    if pictures is not None:
        return encode_pictures(encoder, pictures)
    shape = (count, encoder.params.positions, encoder.params.hidden_size)
    return torch.zeros(shape, device=encoder.device, dtype=encoder.dtype)


def masked(latents: Tensor, alpha: Tensor) -> Tensor:
    """Latents [B, C, h, w] times a mask [B, 1, H, W] in 0..1, which is resized to their size."""
    size = latents.shape[-2:]
    return latents * F.interpolate(alpha.float(), size=size, mode="bilinear", align_corners=False).to(latents)


def frames_at(latents: Tensor, frames: Frames) -> Tensor:
    """Frames [C, F, h, w] of latents [C, F', h, w] by their numbers; None is a frame of zeros."""
    zero = torch.zeros_like(latents[:, 0])
    return torch.stack([zero if frame is None else latents[:, frame] for frame in frames], dim=1)


def indices_of(
    latent: Sequence[int], near: Sequence[int], middle: Sequence[int], far: Sequence[int]
) -> dict[str, Tensor]:
    """Places in time under the names of the conditions, int64; none of frames that are not seen."""
    named = {
        "latent_indices": latent, "clean_latent_indices": near, "clean_latent_2x_indices": middle,
        "clean_latent_4x_indices": far,
    }  # fmt: skip
    return {name: torch.tensor(places) for name, places in named.items() if places}
