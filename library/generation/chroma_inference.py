"""The image script for Chroma, which `--model_type chroma` chooses in that of FLUX.1: what its files must be."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from library.core.options import Config
from library.generation.chroma_options import (
    GROUPS,
    LINE_OPTIONS,
    STEPS,
    ChromaModelOptions,
    ChromaPromptOptions,
    ChromaRequest,
)
from library.generation.flux_inference import raise_file_problems
from library.generation.flux_options import SIZE_STEP
from library.generation.script import ImageScript
from library.generation.speed_options import speed_of

if TYPE_CHECKING:
    from library.generation.pipeline import PictureMaker


class ChromaScript(ImageScript[ChromaRequest]):
    family = "chroma"
    title = "Chroma"
    adapters = ChromaModelOptions
    pictures = ChromaPromptOptions
    groups = GROUPS
    line_options = LINE_OPTIONS
    size_step = SIZE_STEP

    def check(self, config: Config) -> None:
        slots = {"ckpt_path": "chroma", "t5xxl": "t5", "ae": "vae_flux"}
        raise_file_problems(config[ChromaModelOptions], self.family, slots, ("ae_dtype", "t5xxl_dtype", "flux_dtype"))

    def load(self, config: Config) -> PictureMaker[ChromaRequest]:
        from library.generation.chroma_pipeline import load_pipeline

        return load_pipeline(config[ChromaModelOptions], speed_of(config))

    def completed(self, request: ChromaRequest, maker: PictureMaker[ChromaRequest]) -> ChromaRequest:
        request = super().completed(request, maker)
        return dataclasses.replace(request, steps=request.steps or STEPS)


SCRIPT = ChromaScript()
