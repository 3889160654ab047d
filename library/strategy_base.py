"""The four strategies of a model family: tokens, text encoding, and the caches of latents and text-encoder outputs.

A family's caching classes are a few lines: they name the DataArchitecture and say how a batch is encoded. Files, keys and
validity are the same for all families and live in library/dataset/cache_io.py and text_cache_io.py.
"""

from __future__ import annotations

import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from library.core.errors import CheckpointError, TrainingError, UnsupportedCombination
from library.core.keyed_random import key_seed
from library.dataset import cache_io, text_cache_io
from library.dataset.cache_io import ImageIdentity, LatentArrays, LatentsRecord
from library.dataset.strategies import StrategySet
from library.dataset.text_cache_io import TEXT_LAYOUTS, TextLayout, TextRecord
from library.families.latents import Bucket

if TYPE_CHECKING:
    from library.dataset.cache_index import CacheIndex
    from library.dataset.items import ImageItem
    from library.families.record import DataArchitecture, TextKey

__all__ = [
    "LatentsCachingStrategy", "PluginSlot", "StrategySet", "TextEncoderOutputsCachingStrategy", "TextEncodingStrategy",
    "TokenizeStrategy", "as_stored", "encode_apart", "posterior_seed", "to_float32",
]  # fmt: skip

logger = logging.getLogger(__name__)


class PluginSlot:
    """`set_strategy` and `get_strategy` for plug-ins that call them: one slot per base class, never read by this code base."""

    _slots: ClassVar[dict[type, Any]] = {}

    @classmethod
    def _slot_owner(cls) -> type:
        return next(base for base in cls.__mro__ if PluginSlot in base.__bases__)

    @classmethod
    def set_strategy(cls, strategy: Any) -> None:
        if cls._slots.get(cls._slot_owner()) is not None:
            raise RuntimeError(f"a {cls._slot_owner().__name__} is already set")
        cls._slots[cls._slot_owner()] = strategy

    @classmethod
    def get_strategy(cls) -> Any:
        return cls._slots.get(cls._slot_owner())


class TokenizeStrategy(PluginSlot, ABC):
    """Captions -> token ids. Objects travel to loader workers, so they must pickle."""

    is_weighted = False
    """whether captions carry weights (--weighted_captions), so that a run reads them with `tokenize_with_weights`"""

    @abstractmethod
    def tokenize(self, text: str | list[str]) -> list[torch.Tensor]:
        """One tensor [B, ...] per tokenizer output, in the order that the text encoding strategy expects."""

    def tokenize_with_weights(self, text: str | list[str]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Tokens and their weights from captions with (word:1.2) marks."""
        raise UnsupportedCombination(f"{type(self).__name__} does not read weighted captions; leave --weighted_captions out")

    def tokens_of(self, text: str | list[str]) -> tuple[list[torch.Tensor], list[torch.Tensor] | None]:
        """Tokens as this run reads captions, and their weights where captions carry them."""
        return self.tokenize_with_weights(text) if self.is_weighted else (self.tokenize(text), None)

    def tokenize_prompt(self, text: str) -> tuple[list[torch.Tensor], list[torch.Tensor] | None]:
        """Tokens of one sample prompt and their weights; some families read prompts otherwise than captions (longer, with
        weights)."""
        return self.tokens_of(text)

    def overlong(self, text: str) -> bool:
        """Whether tokenize() cuts this text off; families override it. False = not known to."""
        return False

    def _load_tokenizer(
        self, model_class: Any, model_id: str, subfolder: str | None = None, tokenizer_cache_dir: str | None = None
    ) -> Any:
        """A tokenizer from `<tokenizer_cache_dir>/<model id with _ for />` when it is there, else from the hub; in that
        case it is stored there for the next run."""
        from library.huggingface_util import is_hub_reachable

        local = os.path.join(tokenizer_cache_dir, model_id.replace("/", "_")) if tokenizer_cache_dir else None
        if local and os.path.isdir(local):
            return model_class.from_pretrained(local)
        tokenizer = model_class.from_pretrained(model_id, subfolder=subfolder or "", local_files_only=not is_hub_reachable())
        if local:
            tokenizer.save_pretrained(local)
        return tokenizer

    def _get_input_ids(self, tokenizer: Any, text: str, max_length: int | None = None, weighted: bool = False) -> torch.Tensor:
        """Padded ids [1, max_length] of one text; the tokenizer's own length without `max_length`."""
        if weighted:
            raise UnsupportedCombination(f"{type(self).__name__} does not read weighted captions; leave --weighted_captions out")
        length = max_length or tokenizer.model_max_length
        return tokenizer(text, padding="max_length", truncation=True, max_length=length, return_tensors="pt").input_ids


class TextEncodingStrategy(PluginSlot, ABC):
    """Token ids -> conditioning."""

    @abstractmethod
    def encode_tokens(
        self, tokenize_strategy: TokenizeStrategy, models: list[Any], tokens: list[torch.Tensor]
    ) -> list[torch.Tensor | None]:
        """One entry per output, in the family's order. `models` may hold None; outputs that need it are None then."""

    def encode_tokens_with_weights(
        self, tokenize_strategy: TokenizeStrategy, models: list[Any], tokens: list[torch.Tensor], weights: list[torch.Tensor]
    ) -> list[torch.Tensor | None]:
        raise UnsupportedCombination(f"{type(self).__name__} does not use token weights; leave --weighted_captions out")


class LatentsCachingStrategy(PluginSlot, ABC):
    """The latent cache of a family. A subclass sets `architecture` and writes `encode`."""

    architecture: DataArchitecture

    def __init__(self, cache_to_disk: bool, batch_size: int, skip_disk_cache_validity_check: bool) -> None:
        self._cache_to_disk = cache_to_disk
        self._batch_size = batch_size
        self.skip_disk_cache_validity_check = skip_disk_cache_validity_check
        self.model_identity = ""
        """library.checkpoints.identity of the VAE file; set by the family, "" = not compared"""

    @property
    def cache_to_disk(self) -> bool:
        return self._cache_to_disk

    @property
    def batch_size(self) -> int:
        return self._batch_size

    @property
    def cache_suffix(self) -> str:
        return self.architecture.latents_suffix

    @abstractmethod
    def encode(self, vae: Any, images: torch.Tensor, seeds: Sequence[int]) -> torch.Tensor:
        """Images [B, 3, H, W] in -1..1 -> latents [B, C, h, w] as the cache stores them; a VAE with frames leaves out the
        axis of the one frame, which `ModelFamily.scale_latents` puts back. Clips [B, 3, F, H, W] -> [B, C, F', h, w], for
        families that learn from them. Callers use `encode_images`.

        `seeds[i]` seeds the posterior draw of sample i, on the CPU and apart from all other samples, so that the cache and
        live encoding agree whatever the batches are. Families that take the mode ignore it.
        """

    @torch.no_grad()
    def encode_images(self, vae: Any, images: torch.Tensor, seeds: Sequence[int]) -> torch.Tensor:
        """`encode` where the VAE is and in its own dtype, for caches and steps alike; float32 [B, C, h, w] or [B, C, F, h, w].

        Raises CheckpointError when these are not latents of the architecture, which no cache could be read back with.
        """
        parameter = next(vae.parameters())
        latents = encode_apart(self, vae, images.to(parameter.device, parameter.dtype), seeds).float()
        wanted = self.architecture.latents.latent_shape(bucket_of(images))
        if tuple(latents.shape[1:]) != wanted:
            raise CheckpointError(
                f"the VAE makes latents of shape {list(latents.shape[1:])} from images of shape {list(images.shape[1:])};"
                f" those of {self.architecture.name} have shape {list(wanted)}: use the VAE that belongs to the model"
            )
        return latents

    def condition_shapes(self, bucket: Sequence[int]) -> Mapping[str, tuple[int, ...]]:
        """What the family needs of a sample beside its latents and caches with them (first-frame latents, the embedding of a
        vision encoder), for a sample of this size (a Bucket or its key): name -> shape. Nothing by default."""
        return {}

    def encode_conditions(
        self, vae: Any, parts: Mapping[str, Any], images: torch.Tensor, seeds: Sequence[int]
    ) -> Mapping[str, torch.Tensor]:
        """The tensors of `condition_shapes` [B, ...] from images or clips as `encode` gets them. `parts`: what the family loads
        beside the VAE (`ModelFamily.load_parts`)."""
        return {}

    @torch.no_grad()
    def encode_samples(
        self, vae: Any, parts: Mapping[str, Any], images: torch.Tensor, seeds: Sequence[int]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Latents (`encode_images`) and conditions by name, float32: what a cache holds of samples, and a step without one
        makes."""
        latents = self.encode_images(vae, images, seeds)
        shapes = self.condition_shapes(bucket_of(images))
        if not shapes:
            return latents, {}
        parameter = next(vae.parameters())
        images = images.to(parameter.device, parameter.dtype)
        rows = [self.encode_conditions(vae, parts, images[part], seeds[part]) for part in parts_apart(images)]
        conditions = {name: torch.cat([row[name] for row in rows]).float() for name in shapes}
        for name, shape in shapes.items():
            if tuple(conditions[name].shape[1:]) != tuple(shape):
                raise CheckpointError(f"{name} has shape {list(conditions[name].shape[1:])}; that of {self.architecture.name} is {list(shape)}")
        return latents, conditions

    def get_image_size_from_disk_cache_path(self, absolute_path: str, npz_path: str) -> tuple[int | None, int | None]:
        """(width, height) from a cache file's name, (None, None) when it is another image's."""
        return cache_io.image_size_from_latents_path(self.architecture, absolute_path, npz_path) or (None, None)

    def get_latents_npz_path(self, absolute_path: str, image_size: tuple[int, int]) -> str:
        return cache_io.latents_npz_path(self.architecture, absolute_path, image_size)

    def is_disk_cached_latents_expected(
        self, bucket_reso: tuple[int, ...], npz_path: str, flip_aug: bool, alpha_mask: bool
    ) -> bool:
        """Whether the file serves this size, as far as it can be told without the image; see `problem_of` for the rest."""
        if not self.cache_to_disk or not os.path.exists(npz_path):
            return False
        if self.skip_disk_cache_validity_check:
            return True
        return cache_io.latents_problem(
            npz_path, self.architecture, bucket_reso, flip_aug=flip_aug, alpha_mask=alpha_mask,
            conditions=self.condition_shapes(bucket_reso),
        ) is None

    def problem_of(self, item: ImageItem, flip_aug: bool, alpha_mask: bool) -> str | None:
        """Why the item's cache file cannot be used, with everything that is known of the item; None when it can."""
        path = item.latents_npz or self.get_latents_npz_path(item.absolute_path, item.image_size)
        if self.skip_disk_cache_validity_check:
            return None if os.path.exists(path) else "no file"
        return cache_io.latents_problem(
            path, self.architecture, item.bucket.key, flip_aug=flip_aug, alpha_mask=alpha_mask,
            expected=self.record_of(item), image_path=item.absolute_path, conditions=self.condition_shapes(item.bucket.key),
        )

    def problem_with(self, index: CacheIndex) -> Callable[[ImageItem, bool, bool], str | None]:
        """`problem_of`, which an index may know without reading the file; for many items, with the settings of now."""
        if self.skip_disk_cache_validity_check:
            return self.problem_of
        questions: dict[tuple, str] = {}  # many images ask the same

        def question(item: ImageItem, *needs: bool) -> str:
            made = self.record_of(item)
            return (
                f"{type(self).__qualname__} {self.architecture.name} {item.bucket.key} {needs} {made.model} {made.latent_space}"
                f" {made.resized} {made.interpolation} {made.exif} {made.version}"
            )

        def problem_of(item: ImageItem, flip_aug: bool, alpha_mask: bool) -> str | None:
            kind = (item.bucket, item.resized_size, item.subset.resize_interpolation, flip_aug, alpha_mask)
            if kind not in questions:
                questions[kind] = question(item, flip_aug, alpha_mask)
            path = item.latents_npz or self.get_latents_npz_path(item.absolute_path, item.image_size)
            answer, problem = index.find(path, questions[kind], lambda: read(item, flip_aug, alpha_mask), source=item.absolute_path)
            return problem if answer is None else None

        def read(item: ImageItem, *needs: bool) -> tuple[str | None, str]:
            problem = self.problem_of(item, *needs)
            return ("", "") if problem is None else (None, problem)

        return problem_of

    def record_of(self, item: ImageItem, image: ImageIdentity | None = None) -> LatentsRecord:
        return LatentsRecord(
            model=self.model_identity, latent_space=self.architecture.latents.fingerprint, image=image,
            resized=tuple(item.resized_size), interpolation=item.subset.resize_interpolation,
        )

    def load_conditions_from_disk(self, npz_path: str, bucket_reso: tuple[int, ...], flipped: bool) -> dict[str, np.ndarray]:
        """What `condition_shapes` names, as stored beside the latents of this size."""
        shapes = self.condition_shapes(bucket_reso)
        return cache_io.load_conditions(npz_path, self.architecture, bucket_reso, shapes, flipped=flipped) if shapes else {}

    def load_latents_from_disk(
        self, npz_path: str, bucket_reso: tuple[int, ...]
    ) -> tuple[np.ndarray, list[int], list[float], np.ndarray | None, np.ndarray | None]:
        """(latents, original size (W, H), crop_ltrb, mirrored latents or None, alpha mask or None), as stored."""
        arrays = cache_io.load_latents(npz_path, self.architecture, bucket_reso)
        return arrays.latents, arrays.original_size.tolist(), arrays.crop_ltrb.tolist(), arrays.latents_flipped, arrays.alpha_mask

    def save_latents_to_disk(
        self,
        npz_path: str,
        latents: torch.Tensor | np.ndarray,
        original_size: Sequence[int],
        crop_ltrb: Sequence[float],
        flipped: torch.Tensor | np.ndarray | None = None,
        alpha_mask: torch.Tensor | np.ndarray | None = None,
        key_reso_suffix: str = "",
    ) -> None:
        """Write one size without a record: such a file is judged by keys and shapes, as another trainer's would be."""
        arrays = LatentArrays(
            latents=to_float32(latents), original_size=np.asarray(original_size), crop_ltrb=np.asarray(crop_ltrb),
            latents_flipped=None if flipped is None else to_float32(flipped),
            alpha_mask=None if alpha_mask is None else to_float32(alpha_mask),
        )
        cache_io.save_latents(npz_path, key_reso_suffix, arrays)

    def cache_batch_latents(self, vae: Any, infos: list[ImageItem], flip_aug: bool, alpha_mask: bool, random_crop: bool) -> None:
        """Read, encode and store one batch of equal bucket size (for plug-ins; a run uses library/dataset/caching.py)."""
        if random_crop:
            raise UnsupportedCombination("random_crop does not go with a latent cache: it would freeze one crop")
        from library.dataset import caching  # it reads this module

        caching.cache_one_batch(self, vae, infos, flip_aug=flip_aug, alpha_mask=alpha_mask)


def encode_apart(strategy: LatentsCachingStrategy, vae: Any, images: torch.Tensor, seeds: Sequence[int]) -> torch.Tensor:
    """`strategy.encode`, in which no image depends on its neighbours: a cache holds what live encoding gives.

    Seeds take care of the draws. On the CPU, convolutions in float32 also round differently with the number of images, so
    that they are encoded one by one there; it is hardly slower.
    """
    return torch.cat([strategy.encode(vae, images[part], seeds[part]) for part in parts_apart(images)])


def parts_apart(images: torch.Tensor) -> list[slice]:
    """The rows of a batch that are encoded together."""
    if images.device.type != "cpu" or len(images) < 2:
        return [slice(None)]
    return [slice(i, i + 1) for i in range(len(images))]


def bucket_of(images: torch.Tensor) -> Bucket:
    """The size of images [B, 3, H, W] or clips [B, 3, F, H, W]."""
    return Bucket(images.shape[-1], images.shape[-2], images.shape[2] if images.ndim == 5 else 1)


def posterior_seed(content: str, bucket_reso: tuple[int, ...], is_flipped: bool) -> int:
    """The seed of an image's posterior draw: a function of the file's content, the size and the flip alone, not of the
    run's seed, so that a cache means the same to every run."""
    return key_seed(0, "posterior", content, "x".join(map(str, bucket_reso)), int(is_flipped))


class TextEncoderOutputsCachingStrategy(PluginSlot):
    """The cache of text encoder outputs of a family. A subclass sets `architecture` and, where it has them, `flags`."""

    architecture: DataArchitecture

    def __init__(
        self,
        cache_to_disk: bool,
        batch_size: int | None,
        skip_disk_cache_validity_check: bool,
        is_partial: bool = False,
        is_weighted: bool = False,
    ) -> None:
        self._cache_to_disk = cache_to_disk
        self._batch_size = batch_size
        self.skip_disk_cache_validity_check = skip_disk_cache_validity_check
        self._is_partial = is_partial
        self.trained: Sequence[bool] | None = None
        """per text encoder, whether it learns; set by the family, None = as `is_partial` says"""
        self._is_weighted = is_weighted
        self.model_identity = ""
        """library.checkpoints.identity of the text encoder files together; set by the family, "" = not compared"""
        self.max_token_length: int | None = None
        """the family's token length, where it has one; set by the family, None = not compared"""

    @property
    def cache_to_disk(self) -> bool:
        return self._cache_to_disk

    @property
    def batch_size(self) -> int | None:
        return self._batch_size

    @property
    def is_partial(self) -> bool:
        """Whether keys are left to encoders that learn."""
        return bool(self.live)

    @property
    def is_weighted(self) -> bool:
        return self._is_weighted

    @property
    def layout(self) -> TextLayout:
        return TEXT_LAYOUTS[self.architecture.name]

    @property
    def flags(self) -> dict[str, bool]:
        """Values of the layout's flags in this run."""
        return {}

    @property
    def live(self) -> frozenset[str]:
        """Keys that are not cached, because an encoder that makes them learns."""
        learning = self.layout.partial if self._is_partial else ()
        if self.trained is not None:
            learning = [number for number, learns in enumerate(self.trained) if learns]
        return self.layout.made_by(learning)

    @property
    def needed(self) -> tuple[str, ...]:
        return tuple(name for name in self.layout.names if name not in self.live)

    def get_outputs_npz_path(self, image_abs_path: str) -> str:
        return cache_io.text_npz_path(self.architecture, image_abs_path)

    def record_of(self, caption: str) -> TextRecord:
        return TextRecord(
            caption=text_cache_io.caption_hash(caption), model=self.model_identity, max_token_length=self.max_token_length,
            is_weighted=self.is_weighted, flags=self.flags,
        )

    def find_with(self, index: CacheIndex) -> Callable[[str, str, bool], tuple[str | None, str]]:
        """`find`, which an index may know without reading the file; for many captions, with the settings of now."""
        made = self.record_of("")
        questions = [
            f"{type(self).__qualname__} {self.architecture.name} {made.model} {made.max_token_length} {made.is_weighted} {made.flags}"
            f" {made.version} {self.needed} {accept_unrecorded} {self.skip_disk_cache_validity_check}"
            for accept_unrecorded in (False, True)
        ]

        def find(npz_path: str, caption: str, accept_unrecorded: bool) -> tuple[str | None, str]:
            return index.find(
                npz_path, questions[accept_unrecorded], lambda: self.find(npz_path, caption, accept_unrecorded),
                detail=text_cache_io.caption_hash(caption),
            )

        return find

    def find(self, npz_path: str, caption: str, accept_unrecorded: bool = True) -> tuple[str | None, str]:
        """(suffix of the keys that hold this caption, "") or (None, why there are none)."""
        if self.skip_disk_cache_validity_check and os.path.exists(npz_path):
            expected = replace(self.record_of(caption), model="")
            suffix, _ = text_cache_io.find_text(npz_path, self.layout, expected, needed=self.needed)
            return suffix or "", ""
        return text_cache_io.find_text(
            npz_path, self.layout, self.record_of(caption), needed=self.needed, accept_unrecorded=accept_unrecorded
        )

    def is_disk_cached_outputs_expected(self, npz_path: str) -> bool:
        """Whether the file has all outputs, with equal flags. The caption is not looked at; `find` does."""
        if not self.cache_to_disk or not os.path.exists(npz_path):
            return False
        if self.skip_disk_cache_validity_check:
            return True
        return text_cache_io.keys_problem(npz_path, self.layout, self.record_of(""), self.needed) is None

    def load_outputs_npz(self, npz_path: str, suffix: str = "") -> list[np.ndarray | None]:
        """The outputs in the order of the layout, dtypes as stored; None for those of a training encoder."""
        return self.layout.listed(text_cache_io.load_text(npz_path, self.layout, suffix, self.live))

    def encode(
        self,
        tokenize_strategy: TokenizeStrategy,
        models: list[Any],
        text_encoding_strategy: TextEncodingStrategy,
        captions: list[str],
    ) -> dict[str, torch.Tensor]:
        """Conditioning [B, ...] of some captions, by name, without what is not cached."""
        strategies = StrategySet(tokenize_strategy, text_encoding_strategy, None, self)
        with torch.no_grad():
            if self.is_weighted:
                found = strategies.encode(models, *tokenize_strategy.tokenize_with_weights(captions))
            else:
                found = strategies.encode(models, tokenize_strategy.tokenize(captions))
        found |= {key.name: torch.full((len(captions),), key.constant) for key in self.layout.keys if key.constant is not None}
        if missing := [name for name in self.needed if name not in found]:
            raise TrainingError(f"{type(text_encoding_strategy).__name__} gave no {', '.join(missing)} to cache")
        return {name: found[name] for name in self.needed}

    def cache_batch_outputs(
        self,
        tokenize_strategy: TokenizeStrategy,
        models: list[Any],
        text_encoding_strategy: TextEncodingStrategy,
        infos: list[ImageItem],
    ) -> None:
        """Encode and store one batch of captions (for plug-ins; a run uses library/dataset/text_caching.py)."""
        from library.dataset import text_caching  # it reads this module

        text_caching.cache_one_batch(self, tokenize_strategy, models, text_encoding_strategy, infos)


def as_stored(output: torch.Tensor, key: TextKey) -> torch.Tensor:
    """One output of one caption in the dtype that the cache gives it: bfloat16 becomes float32, masks and ids integers."""
    output = output.detach().cpu()
    if key.dtype == "float":
        return output.float() if output.dtype == torch.bfloat16 else output
    return output.to(getattr(torch, key.dtype))


def to_float32(value: torch.Tensor | np.ndarray) -> np.ndarray:
    return value.detach().float().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value, np.float32)
