"""The image script of FLUX.1: what its files must be, and what a request leaves to the model."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from library.core.errors import ConfigError
from library.core.options import Config
from library.generation.adapter_files import adapter_problems
from library.generation.flux_options import (
    GROUPS,
    LINE_OPTIONS,
    SIZE_STEP,
    STEPS_DEV,
    STEPS_SCHNELL,
    FluxRequest,
    InferenceModelOptions,
    PromptOptions,
)
from library.generation.script import ImageScript, format_problems, with_seed_and_size
from library.generation.speed_options import speed_of

if TYPE_CHECKING:
    from library.checkpoints.embeddings import Widths
    from library.generation.pipeline import PictureMaker

logger = logging.getLogger(__name__)


def complete(request: FluxRequest, is_schnell: bool) -> FluxRequest:
    """Sizes rounded down to 16, steps of the model, a drawn seed where none is given."""
    request = with_seed_and_size(request, SIZE_STEP)
    if request.cfg_scale != 1.0 and request.negative_prompt is None:
        logger.warning("--cfg_scale is %s without a negative prompt; no effect", request.cfg_scale)
    return dataclasses.replace(request, steps=request.steps or (STEPS_SCHNELL if is_schnell else STEPS_DEV))


def raise_file_problems(
    options: InferenceModelOptions, family: str, slots: Mapping[str, str], formats: Sequence[str]
) -> None:
    """ConfigError with every file that is missing or of another kind than its slot needs, every number format that the
    device does not have, and every adapter that does not fit."""
    from library.checkpoints.kinds import check_slot

    found: list[str | None] = [
        check_slot(getattr(options, slot), slot, {kind}, for_pictures=True) for slot, kind in slots.items()
    ]
    asked = {f"--{name if getattr(options, name) else 'dtype'}": options.dtype_of(name) for name in formats}
    found += format_problems(asked | ({"--fp8_scaled": "float8_e4m3fn"} if options.fp8_scaled else {}))
    problems = [problem for problem in [*found, *adapter_problems(options.lora_weights, family)] if problem]
    if problems:
        raise ConfigError(problems)


class FluxScript(ImageScript[FluxRequest]):
    family = "flux"
    title = "FLUX.1"
    adapters = InferenceModelOptions
    pictures = PromptOptions
    groups = GROUPS
    line_options = LINE_OPTIONS
    size_step = SIZE_STEP
    texts = {"guidance": "guidance"}

    def check(self, config: Config) -> None:
        slots = {"ckpt_path": "flux", "clip_l": "clip_l", "t5xxl": "t5", "ae": "vae_flux"}
        formats = ("clip_l_dtype", "ae_dtype", "t5xxl_dtype", "flux_dtype")
        raise_file_problems(config[InferenceModelOptions], self.family, slots, formats)

    def embedding_widths(self, config: Config) -> Widths:
        from library.flux_utils import embedding_widths

        options = config[InferenceModelOptions]
        return embedding_widths(options.clip_l, options.t5xxl)

    def load(self, config: Config) -> PictureMaker[FluxRequest]:
        from library.generation.flux_pipeline import load_pipeline

        return load_pipeline(config[InferenceModelOptions], speed_of(config))

    def completed(self, request: FluxRequest, maker: PictureMaker[FluxRequest]) -> FluxRequest:
        return complete(request, maker.pipeline.is_schnell)


SCRIPT = FluxScript()
build_parser, main, run = SCRIPT.build_parser, SCRIPT.main, SCRIPT.run
