"""The latent cache of every family: where latents lie, whether a file may be used, and the one way in which images are
encoded, for caches and for steps without one. What a family writes is a LatentEncoder."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from library.core.errors import CheckpointError, ConfigError
from library.core.keyed_random import key_seed
from library.dataset import cache_io
from library.dataset.batch import CONDITIONING_ALPHA, CONDITIONING_IMAGES, numbered
from library.dataset.cache_io import Array, ImageIdentity, LatentsRecord, fits
from library.dataset.cache_names import latents_base
from library.dataset.cache_pruning import listed_in
from library.dataset.cache_stores import LatentStore, latent_store
from library.dataset.items import SampleFacts
from library.families.latents import PLAIN, Bucket, SampleKind

if TYPE_CHECKING:
    import numpy as np

    from library.dataset.cache_index import CacheIndex
    from library.dataset.items import ImageItem
    from library.families.record import DataArchitecture


LISTED = 3
"""images named in a message"""


class LatentEncoder(ABC):
    """From pictures to latents, as a family writes it. Objects travel to loader workers, so they must pickle."""

    @abstractmethod
    def encode(self, vae: torch.nn.Module, images: torch.Tensor, seeds: Sequence[int]) -> torch.Tensor:
        """Images [B, 3, H, W] in -1..1 -> latents [B, C, h, w] as the cache stores them; a VAE with frames leaves out
        the axis of the one frame, which `ModelFamily.scale_latents` puts back. Clips [B, 3, F, H, W] -> [B, C, F', h,
        w], for families that learn from them. Callers use `LatentCache.encode_images`.

        `seeds[i]` seeds the posterior draw of sample i, on the CPU and apart from all other samples, so that the cache
        and live encoding agree whatever the batches are. Families that take the mode ignore it.
        """

    def manner(self, bucket: Sequence[int]) -> str:
        """What latents of samples of this Bucket hang on beside the VAE's file, in words that a cache file keeps ("in
        tiles"); "" where they are made in one piece."""
        return ""

    def pieces(self, bucket: Sequence[int]) -> str:
        """How the VAE computes pictures or clips of this size ("in tiles of 256 pixels"), where latents hang on it; ""
        at once. As `manner`, but a run without a VAE takes caches whatever it was."""
        return ""

    condition_pictures: tuple[str, ...] = ()
    """conditions that are pictures (CONDITIONING_IMAGES: control pictures) and that `encode_conditions` reads: caches
    hold what is made of them, and the step gets that in their place"""

    def pictures_for(self, bucket: Sequence[int]) -> tuple[str, ...]:
        """The pictures that `encode_conditions` reads of a sample of this Bucket: `condition_pictures`, and with
        CONDITIONING_IMAGES all control pictures that the samples have, the further ones under names with a number. A
        family that reads them of some samples only, or their alpha channels (CONDITIONING_ALPHA), writes this."""
        if CONDITIONING_IMAGES not in self.condition_pictures:
            return self.condition_pictures
        further = range(1, len(Bucket(*bucket).kind.controls))
        return (*self.condition_pictures, *(numbered(CONDITIONING_IMAGES, number) for number in further))

    def condition_shapes(self, bucket: Sequence[int]) -> Mapping[str, tuple[int, ...]]:
        """What the family needs of a sample beside its latents and caches with them (first-frame latents, the embedding
        of a vision encoder), for a sample of this Bucket: name -> shape, in which -1 stands for a size that the encoder
        decides. Nothing by default. `kind` of the bucket says which control pictures there are, and how a single frame
        is learned."""
        return {}

    def encode_conditions(
        self, vae: torch.nn.Module, parts: Mapping[str, torch.nn.Module], images: torch.Tensor, seeds: Sequence[int],
        pictures: Mapping[str, torch.Tensor],
    ) -> Mapping[str, torch.Tensor]:
        """The tensors of `condition_shapes` [B, ...] from images or clips as `encode` gets them. `parts`: what the
        family loads beside the VAE (`ModelFamily.load_parts`); `pictures`: those that `pictures_for` names, [B, 3, h,
        w] in -1..1 or, of a control clip, [B, 3, F, h, w], scaled, cropped and mirrored like the images; alpha channels
        [B, 1, h, w] in 0..1."""
        return {}

    def encode_with_facts(
        self, vae: torch.nn.Module, parts: Mapping[str, torch.nn.Module], images: torch.Tensor, seeds: Sequence[int],
        pictures: Mapping[str, torch.Tensor], facts: Sequence[SampleFacts],
    ) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
        """(`encode`, `encode_conditions`), where they hang on more than the pixels, or are made of the same latents: a
        family that learns clips in sections gets the whole clips, and gives of each the section that `facts` names."""
        latents = self.encode(vae, images, seeds)
        has_more = self.condition_shapes(bucket_of(images, facts[0].kind))
        return latents, self.encode_conditions(vae, parts, images, seeds, pictures) if has_more else {}


class LatentCache:
    """Latents of one family in memory or on the disk, and live encoding."""

    architecture: DataArchitecture

    def __init__(
        self, architecture: DataArchitecture | None, encoder: LatentEncoder, *, to_disk: bool, batch_size: int = 1,
        skip_check: bool = False,
        model_identity: str = "",
    ) -> None:
        if architecture is not None:
            self.architecture = architecture
        self.encoder = encoder
        self.cache_to_disk = to_disk
        self.batch_size = batch_size
        self.skip_disk_cache_validity_check = skip_check
        self.model_identity = model_identity
        """library.checkpoints.identity of the VAE file, "" = not compared"""

    @property
    def store(self) -> LatentStore:
        """The files of this family."""
        return latent_store(self.architecture)

    @property
    def stores_batches(self) -> bool:
        """Whether batches are encoded and stored by `cache_batch_latents` of a plug-in."""
        return False

    def learned_mask(self, item: ImageItem, mask: np.ndarray | None) -> np.ndarray | None:
        """Of the weights of a picture or clip those of what is learned: of a section [F, H, W] becomes [F', H, W] in frames
        of its latents, each the mean of the frames that it stands for."""
        facts = item.facts
        if mask is None or facts.section is None:
            return mask
        frames, stride = facts.kind.section_frames, self.architecture.latents.temporal_stride or 1
        first = 1 + facts.section * frames * stride  # behind the clip's first frame, which is a latent frame of its own
        part = mask[first : first + frames * stride]
        return part.reshape(frames, stride, *part.shape[1:]).mean(axis=1)

    @torch.no_grad()
    def encode_images(self, vae: torch.nn.Module, images: torch.Tensor, seeds: Sequence[int]) -> torch.Tensor:
        """`LatentEncoder.encode` where the VAE is and in its own dtype, for caches and steps alike; float32 [B, C, h,
        w] or [B, C, F, h, w]."""
        return self._encoded(vae, images, seeds).float()

    def _encoded(self, vae: torch.nn.Module, images: torch.Tensor, seeds: Sequence[int]) -> torch.Tensor:
        """`encode_images` in the number format that the encoder gives.

        Raises CheckpointError when these are not latents of the architecture, which no cache could be read back with.
        """
        parameter = next(vae.parameters())
        latents = encode_apart(self.encoder, vae, images.to(parameter.device, parameter.dtype), seeds)
        self._check_shape(latents, images, bucket_of(images))
        return latents

    def _check_shape(self, latents: torch.Tensor, images: torch.Tensor, bucket: Bucket) -> None:
        wanted = self.architecture.latents.latent_shape(bucket)
        if tuple(latents.shape[1:]) != wanted:
            raise CheckpointError(
                f"the VAE makes latents of shape {list(latents.shape[1:])} from images of shape "
                f"{list(images.shape[1:])};"
                f" those of {self.architecture.name} have shape {list(wanted)}: use the VAE that belongs to the model"
            )

    @torch.no_grad()
    def encode_samples(
        self, vae: torch.nn.Module, parts: Mapping[str, torch.nn.Module], images: torch.Tensor, seeds: Sequence[int],
        pictures: Mapping[str, torch.Tensor] = {}, facts: Sequence[SampleFacts] = (),
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Latents (`encode_images`) and conditions by name, float32 but for whole numbers: what a step without a cache
        makes. `pictures`: conditions of the samples; those that the family reads must be among them. `facts`: of each
        sample; none where there is nothing special to them."""
        latents, conditions = self.encode_as_made(vae, parts, images, seeds, pictures, facts)
        return latents.float(), {name: float32_if_floats(tensor) for name, tensor in conditions.items()}

    @torch.no_grad()
    def encode_as_made(
        self, vae: torch.nn.Module, parts: Mapping[str, torch.nn.Module], images: torch.Tensor, seeds: Sequence[int],
        pictures: Mapping[str, torch.Tensor] = {}, facts: Sequence[SampleFacts] = (),
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """`encode_samples` in the number formats that the encoder gives, as caches hold them."""
        facts = facts or [SampleFacts()] * len(images)
        bucket = bucket_of(images, facts[0].kind)
        shapes = self.encoder.condition_shapes(bucket)
        parameter = next(vae.parameters())
        goes_ahead = images.is_pinned()  # a GPU fetches them while it computes
        images = images.to(parameter.device, parameter.dtype, non_blocking=goes_ahead)
        names = self.encoder.pictures_for(bucket) if shapes else ()
        read = {name: self._picture(name, pictures).to(images, non_blocking=goes_ahead) for name in names}
        rows = [
            self.encoder.encode_with_facts(
                vae, parts, images[part], seeds[part], {name: picture[part] for name, picture in read.items()},
                facts[part],
            )
            for part in parts_apart(images)
        ]
        latents = torch.cat([row for row, _ in rows])
        self._check_shape(latents, images, bucket)
        conditions = {name: torch.cat([row[name] for _, row in rows]) for name in shapes}
        for name, shape in shapes.items():
            if not fits(conditions[name].shape[1:], shape):
                raise CheckpointError(
                    f"{name} has shape {list(conditions[name].shape[1:])}; that of {self.architecture.name} is "
                    f"{list(shape)}"
                )
        return latents, conditions

    def _picture(self, name: str, pictures: Mapping[str, torch.Tensor]) -> torch.Tensor:
        if pictures.get(name) is None:
            raise ConfigError(f"{self.architecture.name} learns from pictures beside the images; a batch has no {name}")
        return pictures[name]

    def check_pictures(self, items: Iterable[ImageItem]) -> None:
        """ConfigError that names images without the pictures that the family reads beside them."""
        lacking: dict[str, tuple[str, ...]] = {}
        for item in items:
            names = self.encoder.pictures_for(item.bucket)
            if names and not condition_paths(item, names):
                lacking.setdefault(item.absolute_path, names)
        if lacking:
            more = f" and {len(lacking) - LISTED} more" if len(lacking) > LISTED else ""
            names = dict.fromkeys(name for wanted in lacking.values() for name in wanted)
            ways = "conditioning_data_dir" if self.architecture.clips is None else "control_directory"
            raise ConfigError(
                f"{self.architecture.name} learns from {', '.join(names)} beside the images, which"
                f" {', '.join(list(lacking)[:LISTED])}{more} do not have: give their folder a {ways}"
            )

    def get_latents_npz_path(self, absolute_path: str, image_size: tuple[int, int]) -> str:
        return cache_io.latents_npz_path(self.architecture, absolute_path, image_size)

    def path_of(self, item: ImageItem, path: str | None = None) -> str:
        """The cache file of an item: in its cache_directory, with its clip in the name. `path` stands for the item's
        own."""
        return self.get_latents_npz_path(latents_base(item, path), item.image_size)

    def known_path_of(self, item: ImageItem) -> str | None:
        """Where the known video trainer keeps the latents of a clip: it takes the size that it reads frames in for that
        of the file. None where it has no other name for them."""
        if not (self.store.has_one_size and item.window_key):
            return None
        return self.get_latents_npz_path(latents_base(item), item.bucket_reso)

    def problem_of(self, item: ImageItem, flip_aug: bool, alpha_mask: bool) -> str | None:
        """Why the item's cache file cannot be used, with everything that is known of the item; None when it can."""
        path = item.latents_npz or self.path_of(item)
        if self.skip_disk_cache_validity_check:
            return None if os.path.exists(path) else "no file"
        return self.store.problem(
            path, self.architecture, item.bucket, flip_aug=flip_aug, alpha_mask=alpha_mask,
            expected=self.record_of(item), image_path=item.absolute_path,
            conditions=self.encoder.condition_shapes(item.bucket),
            picture_paths=condition_paths(item, self.encoder.pictures_for(item.bucket)),
        )

    def problem_with(self, index: CacheIndex) -> Callable[[ImageItem, bool, bool], str | None]:
        """`problem_of`, which an index may know without reading the file; for many items, with the settings of now."""
        if self.skip_disk_cache_validity_check:
            return self.problem_of
        questions: dict[tuple, str] = {}  # many images ask the same

        def question(item: ImageItem, *needs: bool) -> str:
            made, conditions = self.record_of(item), self.encoder.condition_shapes(item.bucket)
            return (
                f"{type(self.encoder).__qualname__} {self.architecture.name} {item.bucket.key} {needs} {made.model} "
                f"{made.latent_space} {made.manner}{'' if made.pieces is None else f' {made.pieces}'}"
                f" {made.resized} {made.interpolation} {made.exif} {made.version}"
                f"{f' {made.made_with} {made.frame_count}' if item.clip is not None else ''}"
                f"{f' {sorted(conditions.items())}' if conditions else ''}"
            )

        def problem_of(item: ImageItem, flip_aug: bool, alpha_mask: bool) -> str | None:
            is_folder = item.clip is not None and os.path.isdir(item.absolute_path)  # which an index cannot see change
            bucket = item.bucket
            if is_folder or self.encoder.pictures_for(bucket):  # the index knows of one source
                return self.problem_of(item, flip_aug, alpha_mask)
            kind = (bucket, item.clip, item.resized_size, item.subset.resize_interpolation, flip_aug, alpha_mask)
            if kind not in questions:
                questions[kind] = question(item, flip_aug, alpha_mask)
            path = item.latents_npz or self.path_of(item)
            answer, problem = index.find(
                path, questions[kind], lambda: read(item, flip_aug, alpha_mask), source=item.absolute_path
            )
            return problem if answer is None else None

        def read(item: ImageItem, *needs: bool) -> tuple[str | None, str]:
            problem = self.problem_of(item, *needs)
            return ("", "") if problem is None else (None, problem)

        return problem_of

    def record_of(
        self, item: ImageItem, image: ImageIdentity | None = None, pictures: Mapping[str, ImageIdentity] = {}
    ) -> LatentsRecord:
        has_source = self.store.has_one_size
        return LatentsRecord(
            model=self.model_identity, latent_space=self.architecture.latents.fingerprint, image=image,
            pictures=pictures, resized=tuple(item.resized_size), interpolation=item.subset.resize_interpolation,
            manner=self.encoder.manner(item.bucket),
            pieces=self.encoder.pieces(item.bucket) if self.model_identity else None, made_with=_made_with(item),
            source=cache_io.source_of(item.latents_npz, item.absolute_path) if has_source else "",
            listed_in=listed_in(item.latents_npz, item.subset) if has_source else "",
            frame_count=None if item.clip is None else item.clip.length,
        )

    def load_conditions_from_disk(
        self, npz_path: str, bucket_reso: tuple[int, ...], flipped: bool
    ) -> Mapping[str, Array]:
        """What `LatentEncoder.condition_shapes` names, as stored beside the latents of this Bucket."""
        shapes = self.encoder.condition_shapes(bucket_reso)
        return (
            self.store.load_conditions(npz_path, self.architecture, bucket_reso, shapes, flipped=flipped)
            if shapes
            else {}
        )

    def load_latents_from_disk(
        self, npz_path: str, bucket_reso: tuple[int, ...]
    ) -> tuple[Array, list[int], list[float], Array | None, Array | None]:
        """(latents, original size (W, H), crop_ltrb, mirrored latents or None, alpha mask or None), as stored."""
        arrays = self.store.load(npz_path, self.architecture, bucket_reso)
        return (
            arrays.latents,
            arrays.original_size.tolist(),
            arrays.crop_ltrb.tolist(),
            arrays.latents_flipped,
            arrays.alpha_mask,
        )


def _made_with(item: ImageItem) -> dict[str, str]:
    """What the latents of a clip hang on beside its file and size, in words."""
    if item.clip is None:
        return {}
    conversion = item.clip.conversion
    return {
        "frames": "-".join(map(str, item.clip.key)), "frame rate": conversion.words if conversion else "the file's own"
    }


def condition_paths(item: ImageItem, names: Collection[str]) -> dict[str, str]:
    """Where the pictures of these conditions lie, of those that an item has."""
    if not names:
        return {}
    beside = item.control_paths if item.cond_path is None else (item.cond_path,)
    known = {
        numbered(name, number): path
        for number, path in enumerate(beside) for name in (CONDITIONING_IMAGES, CONDITIONING_ALPHA)
    }
    return {name: known[name] for name in names if name in known}


def float32_if_floats(tensor: torch.Tensor) -> torch.Tensor:
    """What samples have in batches: floating-point numbers as float32, indices as they are."""
    return tensor.float() if tensor.is_floating_point() else tensor


def encode_apart(
    encoder: LatentEncoder, vae: torch.nn.Module, images: torch.Tensor, seeds: Sequence[int]
) -> torch.Tensor:
    """`encoder.encode`, in which no image depends on its neighbours: a cache holds what live encoding gives.

    Seeds take care of the draws. On the CPU, convolutions in float32 also round differently with the number of images,
    so that they are encoded one by one there; it is hardly slower.
    """
    return torch.cat([encoder.encode(vae, images[part], seeds[part]) for part in parts_apart(images)])


def parts_apart(images: torch.Tensor) -> list[slice]:
    """The rows of a batch that are encoded together."""
    if images.device.type != "cpu" or len(images) < 2:
        return [slice(None)]
    return [slice(i, i + 1) for i in range(len(images))]


def bucket_of(images: torch.Tensor, kind: SampleKind = PLAIN) -> Bucket:
    """The size of images [B, 3, H, W] or clips [B, 3, F, H, W], which are of this kind."""
    return Bucket(images.shape[-1], images.shape[-2], images.shape[2] if images.ndim == 5 else 1, kind)


def seed_of(item: ImageItem, content: str, is_flipped: bool) -> int:
    """The seed of an item's posterior draw, from its file's content: that of a clip hangs on its first frame too."""
    start = () if item.clip is None else (item.clip.start,)
    return posterior_seed(content, (*item.bucket.key, *start), is_flipped)


def posterior_seed(content: str, bucket_reso: tuple[int, ...], is_flipped: bool) -> int:
    """The seed of an image's posterior draw: a function of the file's content, the size and the flip alone, not of the
    run's seed, so that a cache means the same to every run."""
    return key_seed(0, "posterior", content, "x".join(map(str, bucket_reso)), int(is_flipped))
