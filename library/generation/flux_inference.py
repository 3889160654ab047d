"""The image script of FLUX.1: what its files must be, and what a request leaves to the model."""

from __future__ import annotations

import dataclasses
import logging
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

if TYPE_CHECKING:
    from library.generation.pipeline import PictureMaker

logger = logging.getLogger(__name__)


def complete(request: FluxRequest, is_schnell: bool) -> FluxRequest:
    """Sizes rounded down to 16, steps of the model, a drawn seed where none is given."""
    request = with_seed_and_size(request, SIZE_STEP)
    if request.cfg_scale != 1.0 and request.negative_prompt is None:
        logger.warning("--cfg_scale is %s without a negative prompt; no effect", request.cfg_scale)
    return dataclasses.replace(request, steps=request.steps or (STEPS_SCHNELL if is_schnell else STEPS_DEV))


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
        from library.checkpoints.kinds import check_slot

        options = config[InferenceModelOptions]
        found: list[str | None] = []
        for slot, kind in (("ckpt_path", "flux"), ("clip_l", "clip_l"), ("t5xxl", "t5"), ("ae", "vae_flux")):
            found.append(check_slot(getattr(options, slot), slot, {kind}, for_pictures=True))
        names = ("clip_l_dtype", "ae_dtype", "t5xxl_dtype", "flux_dtype")
        found += format_problems(
            {f"--{name if getattr(options, name) else 'dtype'}": options.dtype_of(name) for name in names}
        )
        problems = [problem for problem in [*found, *adapter_problems(options.lora_weights, "flux")] if problem]
        if problems:
            raise ConfigError(problems)

    def load(self, config: Config) -> PictureMaker[FluxRequest]:
        from library.generation.flux_pipeline import load_pipeline

        return load_pipeline(config[InferenceModelOptions])

    def completed(self, request: FluxRequest, maker: PictureMaker[FluxRequest]) -> FluxRequest:
        return complete(request, maker.pipeline.is_schnell)


SCRIPT = FluxScript()
build_parser, main, run = SCRIPT.build_parser, SCRIPT.main, SCRIPT.run
