"""The latent cache of Stable Diffusion 1, 2 and SDXL."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from library.dataset.architectures import ARCHITECTURES
from library.dataset.latent_cache import LatentEncoder
from library.strategy_base import LatentsCachingStrategy


class LdmLatentEncoder(LatentEncoder):
    """Posterior draws of the 4-channel autoencoder, stored without the scale."""

    def encode(self, vae: nn.Module, images: Tensor, seeds: Sequence[int]) -> Tensor:
        return vae.encode_raw(images, seeds)


class SdSdxlLatentsCachingStrategy(LdmLatentEncoder, LatentsCachingStrategy):
    """`sd` tells whose files are meant."""

    def __init__(self, sd: bool, cache_to_disk: bool, batch_size: int, skip_disk_cache_validity_check: bool) -> None:
        super().__init__(cache_to_disk, batch_size, skip_disk_cache_validity_check)
        self.architecture = ARCHITECTURES["sd" if sd else "sdxl"]
