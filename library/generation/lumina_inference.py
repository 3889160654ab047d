"""The image script of Lumina-Image 2.0: what its files must be."""

from __future__ import annotations

from typing import TYPE_CHECKING

from library.core.errors import CheckpointError, ConfigError
from library.core.options import Config
from library.families.lumina import FAMILY
from library.generation.adapter_files import adapter_problems
from library.generation.lumina_options import (
    GROUPS,
    LINE_OPTIONS,
    OPTION_NAMES,
    SIZE_STEP,
    LuminaModelOptions,
    LuminaPromptOptions,
    LuminaRequest,
)
from library.generation.script import ImageScript, format_problems
from library.generation.speed_options import speed_of
from library.training.wiring.base import tokenizer_problems

if TYPE_CHECKING:
    from library.families.latents import SideLimit
    from library.generation.pipeline import PictureMaker


class LuminaScript(ImageScript[LuminaRequest]):
    title = "Lumina-Image 2.0"
    family = "lumina"
    adapters = LuminaModelOptions
    pictures = LuminaPromptOptions
    groups = GROUPS
    line_options = LINE_OPTIONS
    size_step = SIZE_STEP
    option_names = OPTION_NAMES
    texts = {"flow-shift": "flow_shift", "cfg-trunc-ratio": "cfg_trunc_ratio", "renorm-cfg": "renorm_cfg"}

    def check(self, config: Config) -> None:
        options = config[LuminaModelOptions]
        problems = _file_problems(options)
        if not problems:
            try:
                problems = _fitting_problems(options)
            except CheckpointError as error:
                problems = [str(error)]
        problems += [*_format_problems(options), *adapter_problems(options.lora_weights, "lumina")]
        if problems:
            raise ConfigError(problems)

    def side_limit(self, config: Config) -> SideLimit | None:
        from library.lumina_utils import inspect_lumina

        path = config[LuminaModelOptions].pretrained_model_name_or_path
        return FAMILY.latents.side_limit(inspect_lumina(path).params.most_patches) if path else None

    def load(self, config: Config) -> PictureMaker[LuminaRequest]:
        from library.generation.lumina_pipeline import load_pipeline

        return load_pipeline(config[LuminaModelOptions], config[LuminaPromptOptions], speed_of(config))


def _file_problems(options: LuminaModelOptions) -> list[str]:
    from library.checkpoints.kinds import check_slot
    from library.lumina_utils import part_problem

    model = options.pretrained_model_name_or_path
    found = [
        check_slot(model, "pretrained_model_name_or_path", {"lumina2"}, for_pictures=True),
        part_problem(options.gemma2_path, "gemma2_path", "gemma2", model, for_pictures=True),
        part_problem(options.ae_path, "ae_path", "vae_flux", model, for_pictures=True),
    ]
    return [problem for problem in found if problem]


def _format_problems(options: LuminaModelOptions) -> list[str]:
    from library.device_utils import device_problem

    names = ("dtype", "gemma2_dtype", "ae_dtype")
    asked = {f"--{name} {getattr(options, name)}": options.dtype_of(name) for name in names}
    asked |= {"--fp8_scaled": "float8_e4m3fn"} if options.fp8_scaled else {}
    found = format_problems(asked, options.device)
    unknown = device_problem("device", options.device)
    return [*found, unknown] if unknown else found


def _fitting_problems(options: LuminaModelOptions) -> list[str]:
    """Sizes of the files against each other, and a tokenizer that cannot be found or read, or that is of another
    model."""
    from library.components.gemma_encoder_utils import inspect_gemma2
    from library.components.gemma_tokenizer import load_gemma2_tokenizer
    from library.lumina_utils import fitting_problems, inspect_lumina

    model = options.pretrained_model_name_or_path
    gemma2, ae = options.gemma2_path or model, options.ae_path or model
    sizes = fitting_problems(
        inspect_lumina(model).params, model, gemma2=("gemma2_path", gemma2), ae=("ae_path", ae),
        tokens=options.gemma2_max_token_length,
    )  # fmt: skip
    return sizes + tokenizer_problems(
        lambda: load_gemma2_tokenizer(options.gemma2_tokenizer, options.tokenizer_cache_dir, gemma2),
        lambda: inspect_gemma2(gemma2)["vocab_size"], "Gemma 2", "--gemma2_tokenizer", f"--gemma2_path {gemma2}",
    )  # fmt: skip


SCRIPT = LuminaScript()
build_parser, main, run = SCRIPT.build_parser, SCRIPT.main, SCRIPT.run
