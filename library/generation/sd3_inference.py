"""The image script of SD3: what its files must be, and what a request leaves to the model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from library.core.errors import ConfigError
from library.core.options import Config
from library.families.sd3 import FAMILY
from library.generation.adapter_files import adapter_problems
from library.generation.script import ImageScript, format_problems
from library.generation.sd3_options import (
    GROUPS,
    LINE_OPTIONS,
    SIZE_STEP,
    Sd3ModelOptions,
    Sd3PromptOptions,
    Sd3Request,
)
from library.generation.speed_options import speed_of

if TYPE_CHECKING:
    from library.checkpoints.embeddings import Widths
    from library.families.latents import SideLimit
    from library.generation.pipeline import PictureMaker


class Sd3Script(ImageScript[Sd3Request]):
    family = "sd3"
    title = "SD3"
    adapters = Sd3ModelOptions
    pictures = Sd3PromptOptions
    groups = GROUPS
    line_options = LINE_OPTIONS
    size_step = SIZE_STEP

    def check(self, config: Config) -> None:
        from library.sd3_utils import file_problems

        options = config[Sd3ModelOptions]
        parts = {slot: getattr(options, slot) for slot in ("clip_l", "clip_g", "t5xxl", "vae")}
        found = file_problems("ckpt_path", options.ckpt_path, parts, for_pictures=True)
        asked = {f"--{'fp16' if options.fp16 else 'bf16'}": options.dtype_name}
        found += format_problems(asked | ({"--fp8_scaled": "float8_e4m3fn"} if options.fp8_scaled else {}))
        problems = [problem for problem in [*found, *adapter_problems(options.lora_weights, "sd3")] if problem]
        if problems:
            raise ConfigError(problems)

    def embedding_widths(self, config: Config) -> Widths:
        from library.sd3_utils import ENCODER_SLOTS, embedding_widths

        options = config[Sd3ModelOptions]
        return embedding_widths(options.ckpt_path, {slot: getattr(options, slot) for slot in ENCODER_SLOTS})

    def side_limit(self, config: Config) -> SideLimit | None:
        from library.sd3_utils import inspect_sd3

        options = config[Sd3ModelOptions]
        if not options.ckpt_path or options.enable_scaled_pos_embed:
            return None
        patches = inspect_sd3(options.ckpt_path).params.pos_embed_max_size
        return FAMILY.latents.side_limit(patches, "enable_scaled_pos_embed")

    def load(self, config: Config) -> PictureMaker[Sd3Request]:
        from library.generation.sd3_pipeline import load_pipeline

        return load_pipeline(config[Sd3ModelOptions], speed_of(config))


SCRIPT = Sd3Script()
build_parser, main, run = SCRIPT.build_parser, SCRIPT.main, SCRIPT.run
