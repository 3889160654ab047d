"""Making pictures: prompts, conditioning, sampling, pipelines and the image scripts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from library.core.registry import import_target
from library.families.registry import record_of

if TYPE_CHECKING:
    from library.generation.pipeline import PicturePipeline


def pipeline_class(family: str) -> type[PicturePipeline]:
    """The pipeline of a family by its record: the one that makes samples while training and pictures in its image
    scripts."""
    return import_target(record_of(family).pipeline)
