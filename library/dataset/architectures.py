"""What the data side must know of a model family: latent geometry, bucket step, names of cache files."""

from __future__ import annotations

from collections.abc import Mapping

from library.families.latents import LatentSpec
from library.families.record import DataArchitecture
from library.families.registry import by_family

__all__ = ["ARCHITECTURES", "DataArchitecture", "LatentSpec"]

ARCHITECTURES: Mapping[str, DataArchitecture] = by_family(
    lambda record: record.architecture if record.latents and record.caches else None
)
"""of every family whose latents are cached"""
