"""The four strategy classes that plug-ins and notebooks derive from, by the signatures that they know: tokens, text
encoding, and the caches of latents and text outputs.

Tokenizers and text encoders of families are subclasses. The caching classes are thin: what they do is done by
library/dataset/latent_cache.py and text_cache.py, which a run uses without them. Where a subclass overrides one of
their methods, the run calls it.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from library.core.errors import UnsupportedCombination
from library.dataset import cache_io, caching, text_caching
from library.dataset.cache_io import LatentArrays
from library.dataset.cache_stores import latent_store, text_store
from library.dataset.latent_cache import LatentCache, LatentEncoder, posterior_seed
from library.dataset.strategies import StrategySet
from library.dataset.text_cache import TextCache

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from library.dataset.cache_index import CacheIndex
    from library.dataset.items import ImageItem

__all__ = [
    "LatentsCachingStrategy", "PluginSlot", "StrategySet", "TextEncoderOutputsCachingStrategy", "TextEncodingStrategy",
    "TokenizeStrategy", "posterior_seed",
]  # fmt: skip


class PluginSlot:
    """`set_strategy` and `get_strategy` for plug-ins that call them: one slot per base class, never read by this code
    base."""

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
    negative_differs = False
    """whether negative prompts are read otherwise than prompts, by `tokenize_negative`"""

    @property
    def tokenizers(self) -> list[PreTrainedTokenizerBase | None]:
        """Of each text encoder to which words can be added, in their order; None for one that is left out."""
        return []

    @property
    def reading_tokenizers(self) -> list[PreTrainedTokenizerBase | None]:
        """Of each text encoder, in the order of what `tokenize` gives first."""
        return self.tokenizers

    @abstractmethod
    def tokenize(self, text: str | list[str]) -> list[torch.Tensor]:
        """One tensor [B, ...] per tokenizer output, in the order that the text encoding strategy expects."""

    def tokenize_with_weights(self, text: str | list[str]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Tokens and their weights from captions with (word:1.2) marks."""
        raise UnsupportedCombination(
            f"{type(self).__name__} does not read weighted captions; leave --weighted_captions out"
        )

    def tokens_of(self, text: str | list[str]) -> tuple[list[torch.Tensor], list[torch.Tensor] | None]:
        """Tokens as this run reads captions, and their weights where captions carry them."""
        return self.tokenize_with_weights(text) if self.is_weighted else (self.tokenize(text), None)

    def tokenize_prompt(self, text: str) -> tuple[list[torch.Tensor], list[torch.Tensor] | None]:
        """Tokens of one sample prompt and their weights; some families read prompts otherwise than captions (longer,
        with weights)."""
        return self.tokens_of(text)

    def tokenize_negative(self, text: str) -> list[torch.Tensor]:
        """Tokens of a negative prompt."""
        return self.tokenize(text)

    def overlong(self, text: str) -> bool:
        """Whether tokenize() cuts this text off; families override it. False = not known to."""
        return False

    def _load_tokenizer(
        self, model_class: type[PreTrainedTokenizerBase], model_id: str, subfolder: str | None = None,
        tokenizer_cache_dir: str | None = None,
    ) -> PreTrainedTokenizerBase:
        """A tokenizer from `<tokenizer_cache_dir>/<model id with _ for />` when it is there, else from the hub; in that
        case it is stored there for the next run."""
        from library.huggingface_util import is_hub_reachable

        local = os.path.join(tokenizer_cache_dir, model_id.replace("/", "_")) if tokenizer_cache_dir else None
        if local and os.path.isdir(local):
            return model_class.from_pretrained(local)
        tokenizer = model_class.from_pretrained(
            model_id, subfolder=subfolder or "", local_files_only=not is_hub_reachable()
        )
        if local:
            tokenizer.save_pretrained(local)
        return tokenizer

    def _get_input_ids(
        self, tokenizer: PreTrainedTokenizerBase, text: str, max_length: int | None = None, weighted: bool = False
    ) -> torch.Tensor:
        """Padded ids [1, max_length] of one text; the tokenizer's own length without `max_length`."""
        if weighted:
            raise UnsupportedCombination(
                f"{type(self).__name__} does not read weighted captions; leave --weighted_captions out"
            )
        length = max_length or tokenizer.model_max_length
        return tokenizer(text, padding="max_length", truncation=True, max_length=length, return_tensors="pt").input_ids


class TextEncodingStrategy(PluginSlot, ABC):
    """Token ids -> conditioning."""

    @abstractmethod
    def encode_tokens(
        self, tokenize_strategy: TokenizeStrategy, models: list[torch.nn.Module | None], tokens: list[torch.Tensor]
    ) -> list[torch.Tensor | None]:
        """One entry per output, in the family's order. `models` may hold None; outputs that need it are None then."""

    def encode_tokens_with_weights(
        self, tokenize_strategy: TokenizeStrategy, models: list[torch.nn.Module | None], tokens: list[torch.Tensor],
        weights: list[torch.Tensor]
    ) -> list[torch.Tensor | None]:
        raise UnsupportedCombination(f"{type(self).__name__} does not use token weights; leave --weighted_captions out")


class LatentsCachingStrategy(PluginSlot, LatentCache, LatentEncoder, ABC):
    """A latent cache and its encoder in one. A subclass sets `architecture` and writes `encode` (see LatentEncoder);
    one that writes `cache_batch_latents`, `is_disk_cached_latents_expected` or `load_latents_from_disk` itself is asked
    by the run."""

    def __init__(self, cache_to_disk: bool, batch_size: int, skip_disk_cache_validity_check: bool) -> None:
        LatentCache.__init__(
            self, None, self, to_disk=cache_to_disk, batch_size=batch_size, skip_check=skip_disk_cache_validity_check
        )

    @property
    def cache_suffix(self) -> str:
        return self.architecture.latents_suffix

    def get_image_size_from_disk_cache_path(self, absolute_path: str, npz_path: str) -> tuple[int | None, int | None]:
        """(width, height) from a cache file's name, (None, None) when it is another image's."""
        return cache_io.image_size_from_latents_path(self.architecture, absolute_path, npz_path) or (None, None)

    def is_disk_cached_latents_expected(
        self, bucket_reso: tuple[int, ...], npz_path: str, flip_aug: bool, alpha_mask: bool
    ) -> bool:
        """Whether the file serves this size, as far as it can be told without the image; see `problem_of` for the
        rest."""
        if not self.cache_to_disk or not os.path.exists(npz_path):
            return False
        if self.skip_disk_cache_validity_check:
            return True
        return latent_store(self.architecture).problem(
            npz_path, self.architecture, bucket_reso, flip_aug=flip_aug, alpha_mask=alpha_mask,
            conditions=self.condition_shapes(bucket_reso),
        ) is None

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
            latents=_to_float32(latents), original_size=np.asarray(original_size), crop_ltrb=np.asarray(crop_ltrb),
            latents_flipped=None if flipped is None else _to_float32(flipped),
            alpha_mask=None if alpha_mask is None else _to_float32(alpha_mask),
        )
        cache_io.save_latents(npz_path, key_reso_suffix, arrays)

    def cache_batch_latents(
        self, vae: torch.nn.Module, infos: list[ImageItem], flip_aug: bool, alpha_mask: bool, random_crop: bool
    ) -> None:
        """Read, encode and store one batch of equal bucket size."""
        if random_crop:
            raise UnsupportedCombination("random_crop does not go with a latent cache: it would freeze one crop")
        caching.cache_one_batch(self, vae, infos, flip_aug=flip_aug, alpha_mask=alpha_mask)

    @property
    def stores_batches(self) -> bool:
        return _overrides(self, LatentsCachingStrategy, "cache_batch_latents")

    def problem_with(self, index: CacheIndex) -> Callable[[ImageItem, bool, bool], str | None]:
        if not _overrides(self, LatentsCachingStrategy, "is_disk_cached_latents_expected"):
            return super().problem_with(index)

        def problem_of(item: ImageItem, flip_aug: bool, alpha_mask: bool) -> str | None:
            path = item.latents_npz or self.path_of(item)
            is_expected = self.is_disk_cached_latents_expected(item.bucket.key, path, flip_aug, alpha_mask)
            return None if is_expected else f"not what {type(self).__name__} expects"

        return problem_of


class TextEncoderOutputsCachingStrategy(PluginSlot, TextCache):
    """A text cache. A subclass sets `architecture` and, where it has them, `flags`; one that writes
    `cache_batch_outputs`, `is_disk_cached_outputs_expected` or `load_outputs_npz` itself is asked by the run.

    `is_partial`: the keys of the encoders that known trainers train beside a cache are left to them.
    """

    def __init__(
        self,
        cache_to_disk: bool,
        batch_size: int | None,
        skip_disk_cache_validity_check: bool,
        is_partial: bool = False,
        is_weighted: bool = False,
    ) -> None:
        TextCache.__init__(
            self, None, to_disk=cache_to_disk, batch_size=batch_size, skip_check=skip_disk_cache_validity_check,
            is_weighted=is_weighted
        )
        self._is_partial = is_partial

    @property
    def is_partial(self) -> bool:
        """Whether keys are left to encoders that learn."""
        return bool(self.live)

    @property
    def live(self) -> frozenset[str]:
        return self.layout.made_by(self.layout.partial) if self._is_partial and not any(self.trained) else super().live

    def is_disk_cached_outputs_expected(self, npz_path: str) -> bool:
        """Whether the file has all outputs, with equal flags. The caption is not looked at; `find` does."""
        if not self.cache_to_disk or not os.path.exists(npz_path):
            return False
        if self.skip_disk_cache_validity_check:
            return True
        store, expected = text_store(self.architecture), self.record_of("")
        return store.keys_problem(npz_path, self.architecture, self.layout, expected, self.needed) is None

    def load_outputs_npz(self, npz_path: str, suffix: str = "") -> list[np.ndarray | None]:
        """The outputs in the order of the layout, dtypes as stored; None for those of a training encoder."""
        return self.layout.listed(text_store(self.architecture).load(npz_path, self.layout, suffix, self.live))

    def cache_batch_outputs(
        self,
        tokenize_strategy: TokenizeStrategy,
        models: list[torch.nn.Module | None],
        text_encoding_strategy: TextEncodingStrategy,
        infos: list[ImageItem],
    ) -> None:
        """Encode and store one batch of captions."""
        text_caching.cache_one_batch(
            self, StrategySet(tokenize_strategy, text_encoding_strategy, None, self), models, infos
        )

    @property
    def stores_batches(self) -> bool:
        return _overrides(self, TextEncoderOutputsCachingStrategy, "cache_batch_outputs")

    def find_with(self, index: CacheIndex) -> Callable[[str, str, bool], tuple[str | None, str]]:
        if not _overrides(self, TextEncoderOutputsCachingStrategy, "is_disk_cached_outputs_expected"):
            return super().find_with(index)

        def find(npz_path: str, caption: str, accept_unrecorded: bool) -> tuple[str | None, str]:
            return (
                ("", "")
                if self.is_disk_cached_outputs_expected(npz_path)
                else (None, f"not what {type(self).__name__} expects")
            )

        return find

    def read(self, npz_path: str, suffix: str) -> dict[str, torch.Tensor]:
        if not _overrides(self, TextEncoderOutputsCachingStrategy, "load_outputs_npz"):
            return super().read(npz_path, suffix)
        arrays = self.load_outputs_npz(npz_path, *([suffix] if suffix else []))
        return self.layout.named(
            [None if array is None else torch.from_numpy(array) for array in arrays],
            type(self).__name__,
            has_batch=False,
        )


class _FamilyLatents(LatentsCachingStrategy):
    """The latent cache of a run as plug-ins know it."""

    def __init__(self, cache: LatentCache) -> None:
        self.__dict__.update(cache.__dict__)

    def encode(self, vae: torch.nn.Module, images: torch.Tensor, seeds: Sequence[int]) -> torch.Tensor:
        return self.encoder.encode(vae, images, seeds)


class _FamilyText(TextEncoderOutputsCachingStrategy):
    """The text cache of a run as plug-ins know it."""

    def __init__(self, cache: TextCache) -> None:
        self.__dict__.update(cache.__dict__)
        self._is_partial = any(cache.trained)


def latents_strategy_of(cache: LatentCache) -> LatentsCachingStrategy:
    """The same cache by the known interface."""
    return cache if isinstance(cache, LatentsCachingStrategy) else _FamilyLatents(cache)


def text_strategy_of(cache: TextCache | None) -> TextEncoderOutputsCachingStrategy | None:
    """The same cache by the known interface; None stays None."""
    return cache if cache is None or isinstance(cache, TextEncoderOutputsCachingStrategy) else _FamilyText(cache)


def _overrides(strategy: Any, base: type, method: str) -> bool:
    """Whether a subclass has its own version of a method."""
    return getattr(type(strategy), method) is not getattr(base, method)


def _to_float32(value: torch.Tensor | np.ndarray) -> np.ndarray:
    return value.detach().float().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value, np.float32)
