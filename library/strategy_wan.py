"""Wan: captions to tokens, tokens to conditioning, clips to latents and what stands beside them."""

from __future__ import annotations

import html
import importlib.util
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from library.components.tokenizers import check_ids, load_t5_tokenizer
from library.core.errors import ConfigError
from library.dataset.batch import CONDITIONING_IMAGES, numbered
from library.dataset.items import SampleFacts
from library.dataset.latent_cache import LatentEncoder, bucket_of
from library.device_utils import to_device
from library.families.latents import Bucket
from library.families.wan import FAMILY
from library.families.wan_tasks import LATENT_CHANNELS, MASK_CHANNELS, TASKS, WanTask
from library.strategy_base import (
    TextEncodingStrategy,
    TokenizeStrategy,
)
from library.wan_clip_utils import vision_states
from library.wan_conditioning_utils import (
    OneFrame,
    ends_condition,
    one_frame,
    one_frame_conditions,
    picture_condition,
)

logger = logging.getLogger(__name__)

HUB_ID = "google/umt5-xxl"
MAX_LENGTH = 512
"""tokens of a caption, its end token among them"""
DEFAULT_TARGET = 1
"""place of a single frame where the dataset names those of its control pictures alone"""
VISION = "clip"
"""name of the vision encoder among the parts, and of its states among the conditions"""


def has_ftfy() -> bool:
    """Whether the package that mends texts which were decoded wrongly is installed."""
    return importlib.util.find_spec("ftfy") is not None


def cleaned(text: str) -> str:
    """A caption as the text encoder was trained with: mended by ftfy where that is installed, entities of HTML written
    out (twice, as `&amp;amp;` is common), one space for every run of white space."""
    if has_ftfy():
        import ftfy

        text = ftfy.fix_text(text)
    return re.sub(r"\s+", " ", html.unescape(html.unescape(text))).strip()


def load_umt5_tokenizer(
    folder: str | None = None, cache_dir: str | None = None, model_path: str | None = None
) -> Any:
    """The tokenizer of umT5; beside the encoder it is looked for where the folders of the released models have it.
    ConfigError naming every way to provide one when none is there."""
    if not folder and model_path:
        place = Path(model_path)
        beside = (place / "tokenizer", place.parent / "tokenizer", place.parent / HUB_ID)
        folder = next((str(one) for one in beside if one.is_dir()), None)
    return load_t5_tokenizer(
        folder, cache_dir, model_path, max_length=MAX_LENGTH, option="--t5_tokenizer", hub_id=HUB_ID, name="umT5"
    )


class WanTokenizeStrategy(TokenizeStrategy):
    """umT5, padded to the longest of the batch, at most 512 tokens.

    The tokenizer comes ready, or from the folder `tokenizer`, `tokenizer_cache_dir`, the text encoder `t5_path`, or the
    hub. ConfigError when it cannot be found.
    """

    def __init__(
        self, tokenizer_cache_dir: str | None = None, tokenizer: Any | None = None, t5_path: str | None = None
    ) -> None:
        self.t5 = tokenizer if callable(tokenizer) else load_umt5_tokenizer(tokenizer, tokenizer_cache_dir, t5_path)

    @property
    def reading_tokenizers(self) -> list[Any]:
        return [self.t5]

    def tokenize(self, text: str | list[str]) -> list[Tensor]:
        """[ids [B, L], mask [B, L]]; the mask has 1 for tokens."""
        texts = [text] if isinstance(text, str) else list(text)
        found = self.t5(
            [cleaned(caption) for caption in texts], padding=True, truncation=True, max_length=MAX_LENGTH,
            return_tensors="pt",
        )  # fmt: skip
        return [found["input_ids"].long(), found["attention_mask"].long()]

    def overlong(self, text: str) -> bool:
        return len(self.t5(cleaned(text), verbose=False).input_ids) > MAX_LENGTH


class WanTextEncodingStrategy(TextEncodingStrategy):
    """The last states of umT5. Texts run one by one and never see padding, so that the states of one do not depend on
    others."""

    def encode_tokens(
        self, tokenize_strategy: WanTokenizeStrategy, models: list[Any], tokens: list[Tensor]
    ) -> list[Tensor | list[Tensor] | None]:
        """[states [L, D] of each text]; None without the model. ConfigError when an id has no embedding row."""
        ids, mask = tokens[:2]
        model = models[0] if models else None
        if model is None:
            return [None]
        check_ids(ids, model, tokenize_strategy.t5, "umT5", "the text encoder")
        device = next(model.parameters()).device
        lengths = mask.sum(dim=1).tolist()
        rows = [to_device(row[None, :length], device) for row, length in zip(ids, lengths)]
        return [[model(row).last_hidden_state[0] for row in rows]]


class WanLatentEncoder(LatentEncoder):
    """Normalised latents, the mean of the posterior, so that nothing is drawn; beside them what a task is conditioned
    on. `vision_shape`: (tokens, width) of the vision encoder, where the task looks at its states."""

    def __init__(self, task: WanTask = TASKS["t2v-14B"], vision_shape: tuple[int, int] | None = None) -> None:
        self.task = task
        self.vision_shape = vision_shape if task.needs_vision else None

    def layout(self, bucket: Sequence[int]) -> OneFrame | None:
        """How single frames of this Bucket stand among their reference frames; None of all other samples. ConfigError
        when the task has no place for these."""
        kind = Bucket(*bucket).kind
        if not kind.clean_indices:
            return None
        if not self.task.takes_picture or self.task.fun_control:
            raise ConfigError(
                "the dataset has single frames with control pictures (fp_1f_clean_indices), and the task is"
                f" {self.task.name}: needed: a task with a first frame, i2v-14B for one control picture, flf2v-14B for"
                " two"
            )
        target = DEFAULT_TARGET if kind.target_index is None else kind.target_index
        return one_frame(kind.clean_indices, target)

    def manner(self, bucket: Sequence[int]) -> str:
        layout = self.layout(bucket)
        return "" if layout is None else f"places {layout.f_indices}, the frame itself at {layout.target}"

    def pictures_for(self, bucket: Sequence[int]) -> tuple[str, ...]:
        layout = self.layout(bucket)
        if layout is not None:
            return tuple(numbered(CONDITIONING_IMAGES, number) for number in range(layout.references))
        return (CONDITIONING_IMAGES,) if self.task.fun_control else ()

    def encode(self, vae: Any, images: Tensor, seeds: Sequence[int]) -> Tensor:
        return vae.encode(images)

    def encode_with_facts(
        self, vae: Any, parts: Mapping[str, torch.nn.Module], images: Tensor, seeds: Sequence[int],
        pictures: Mapping[str, Tensor], facts: Sequence[SampleFacts],
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Of a single frame latents and conditions hold its reference frames too."""
        bucket = bucket_of(images, facts[0].kind)
        layout = self.layout(bucket)
        if layout is None:
            return super().encode_with_facts(vae, parts, images, seeds, pictures, facts)
        references = [pictures[name] for name in self.pictures_for(bucket)]
        latents, y = one_frame_conditions(vae.encode, layout, images, references)
        places = torch.tensor([layout.f_indices] * len(images), dtype=torch.int32)
        made = {"latents_image": y, "f_indices": places}
        if self.vision_shape is not None:
            made[VISION] = torch.stack([vision_states(parts[VISION], picture) for picture in references], dim=1)
        return latents, made

    def condition_shapes(self, bucket: Sequence[int]) -> Mapping[str, tuple[int, ...]]:
        """By the task: mask and latents of first, or first and last, frames [20, F', h, w]; latents of a control clip
        [16, F', h, w]; states of the pictures [N, V]."""
        task, spec, layout = self.task, FAMILY.latents, self.layout(bucket)
        if layout is not None:
            return self._one_frame_shapes(bucket, layout)
        width, height, frames = Bucket(*bucket)[:3]
        grid = (
            1 + (frames - 1) // spec.temporal_stride, height // spec.spatial_stride, width // spec.spatial_stride,
        )  # fmt: skip
        shapes: dict[str, tuple[int, ...]] = {}
        if task.takes_picture:
            name = "latents_image_ends" if task.takes_last else "latents_image"
            shapes[name] = (MASK_CHANNELS + LATENT_CHANNELS, *grid)
        if task.fun_control:
            shapes["latents_control"] = (LATENT_CHANNELS, *grid)
        if self.vision_shape is not None:
            shapes[VISION] = self.vision_shape
            if task.takes_last:
                shapes[f"{VISION}_end"] = self.vision_shape
        return shapes

    def _one_frame_shapes(self, bucket: Sequence[int], layout: OneFrame) -> Mapping[str, tuple[int, ...]]:
        channels, *grid = FAMILY.latents.latent_shape(bucket)
        shapes = {"latents_image": (MASK_CHANNELS + channels, *grid), "f_indices": (len(layout.f_indices),)}
        return {**shapes, VISION: (layout.references, *self.vision_shape)} if self.vision_shape else shapes

    def encode_conditions(
        self, vae: Any, parts: Mapping[str, torch.nn.Module], images: Tensor, seeds: Sequence[int],
        pictures: Mapping[str, Tensor],
    ) -> Mapping[str, Tensor]:
        """Those of `condition_shapes`, with the batch before them, of images [B, 3, H, W] or clips [B, 3, F, H, W]."""
        clips = images if images.ndim == 5 else images[:, :, None]  # [B, 3, F, H, W]
        first, last, frames = clips[:, :, 0], clips[:, :, -1], clips.shape[2]
        made: dict[str, Tensor] = {}
        if self.task.takes_last:
            made["latents_image_ends"] = ends_condition(vae.encode, first, last, frames)
        elif self.task.takes_picture:
            made["latents_image"] = picture_condition(vae.encode, first, frames)
        if self.task.fun_control:
            control = pictures[CONDITIONING_IMAGES]
            made["latents_control"] = vae.encode(control if control.ndim == 5 else control[:, :, None])
        if self.vision_shape is not None:
            made[VISION] = vision_states(parts[VISION], first)
            if self.task.takes_last:
                made[f"{VISION}_end"] = vision_states(parts[VISION], last)
        return made
