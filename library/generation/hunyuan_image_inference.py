"""The image script of HunyuanImage 2.1: what its files must be, and a denoiser that is written with adapters in it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from library.core.errors import Problems
from library.core.options import Config
from library.generation.adapter_files import ListedAdapterOptions, MergedModelOptions
from library.generation.guidance_options import OF_TWO_FORWARDS
from library.generation.hunyuan_image_options import (
    GROUPS,
    LINE_OPTIONS,
    SIZE_STEP,
    HunyuanImageModelOptions,
    HunyuanImagePromptOptions,
    HunyuanImageRequest,
)
from library.generation.latent_script import LatentScript
from library.generation.script import format_problems
from library.generation.speed_options import speed_of
from library.training.wiring.base import tokenizer_problems

if TYPE_CHECKING:
    import torch

    from library.generation.hunyuan_image_pipeline import HunyuanImagePipeline
    from library.generation.pipeline import PictureMaker

GUIDANCE = (
    "negative_prompt", "apg_start_step_ocr", "apg_start_step_general", "guidance_rescale", "guidance_rescale_apg",
    *OF_TWO_FORWARDS,
)  # fmt: skip


class HunyuanImageScript(LatentScript[HunyuanImageRequest]):
    """Its pictures can be written as latents, and the denoiser with its adapters as a file."""

    family = "hunyuan_image"
    title = "HunyuanImage 2.1"
    adapters = ListedAdapterOptions
    pictures = HunyuanImagePromptOptions
    groups = GROUPS
    line_options = LINE_OPTIONS
    size_step = SIZE_STEP
    texts = {"flow-shift": "flow_shift"}

    def check(self, config: Config) -> None:
        check(config)

    def notices(self, config: Config) -> list[str]:
        told = "latents are kept in float32 between the steps (known scripts round them to the type of the weights)"
        return [told, *_without_effect(config)]

    def load(self, config: Config) -> PictureMaker[HunyuanImageRequest]:
        from library.generation.hunyuan_image_pipeline import load_pipeline

        needs_vae = config[HunyuanImagePromptOptions].output_type != "latent"
        groups = config[HunyuanImageModelOptions], config[ListedAdapterOptions]
        return load_pipeline(*groups, needs_vae=needs_vae, speed=speed_of(config))

    def load_decoder(self, config: Config) -> tuple[HunyuanImagePipeline, torch.device]:
        from library.generation.hunyuan_image_pipeline import HunyuanImagePipeline, device_of, load_decoder

        model = config[HunyuanImageModelOptions]
        return HunyuanImagePipeline(None, load_decoder(model)), device_of(model)

    def save_merged(self, config: Config, target: str) -> None:
        from library.generation.hunyuan_image_pipeline import save_merged

        save_merged(config[HunyuanImageModelOptions], config[ListedAdapterOptions], target, speed_of(config))


def _without_effect(config: Config) -> list[str]:
    """Options of guidance by two prompts that are given for a distilled model, which knows none."""
    from library.hunyuan_image_utils import inspect_hunyuan_image

    path, given = config[HunyuanImageModelOptions].dit, [name for name in GUIDANCE if name in config.explicit]
    if not given or config[HunyuanImagePromptOptions].latent_path or not path:
        return []
    if not inspect_hunyuan_image(path).params.guidance_embed:
        return []
    named = ", ".join(f"--{name}" for name in given)
    return [f"{named}: no effect; {path} is a distilled model, which has --guidance_scale embedded in it"]


# -- checks ------------------------------------------------------------------------------------------------------------


def check(config: Config) -> None:
    """Everything that is wrong with options and files, from headers alone; ConfigError."""
    problems = Problems()
    merging = bool(config[MergedModelOptions].save_merged_model)
    for problem in [*(_merge_problems(config) if merging else _prompt_problems(config)), *_file_problems(config)]:
        problems.add(problem)
    if not problems.messages and not merging and not config[HunyuanImagePromptOptions].latent_path:
        for problem in _fitting_problems(config[HunyuanImageModelOptions]):
            problems.add(problem)
    problems.raise_if_any()


def _prompt_problems(config: Config) -> list[str]:
    model = config[HunyuanImageModelOptions]
    return SCRIPT.prompt_problems(config, is_fp8=model.fp8 or model.fp8_scaled)


def _merge_problems(config: Config) -> list[str]:
    model = config[HunyuanImageModelOptions]
    return config[MergedModelOptions].problems(config[ListedAdapterOptions], is_fp8=model.fp8 or model.fp8_scaled)


def _file_problems(config: Config) -> list[str]:
    from library.checkpoints.kinds import check_slot
    from library.device_utils import device_problem

    model, pictures = config[HunyuanImageModelOptions], config[HunyuanImagePromptOptions]
    slots = [("vae", {"vae_hunyuan_image"})] if pictures.output_type != "latent" or model.vae else []
    if config[MergedModelOptions].save_merged_model:
        slots = [("dit", {"hunyuan_image"})]
    elif not pictures.latent_path:
        encoders = [("text_encoder", {"qwen25_vl"}), ("byt5", {"byt5"})]
        slots = [("dit", {"hunyuan_image"}), *slots, *encoders]
    found = [check_slot(getattr(model, slot), slot, kinds, for_pictures=True) for slot, kinds in slots]
    found += SCRIPT.extra_file_problems(config)
    asked = {f"--{name}": "float8_e4m3fn" for name in ("fp8", "fp8_scaled") if getattr(model, name)}
    found += format_problems({f"--dtype {model.dtype}": model.dtype_name, **asked}, model.device)
    return [problem for problem in (*found, device_problem("device", model.device)) if problem]


def _fitting_problems(options: HunyuanImageModelOptions) -> list[str]:
    """Damaged files, sizes of the files against each other, a block swap that the depth does not allow, and a tokenizer
    that cannot be found or read, or that is of another model."""
    from library.components.llm_encoder_utils import inspect_qwen25_vl
    from library.components.tokenizers import load_qwen25_vl_tokenizer
    from library.hunyuan_image_utils import fitting_problems, inspect_hunyuan_image

    found = fitting_problems(
        lambda: inspect_hunyuan_image(options.dit).params, text_encoder=("text_encoder", options.text_encoder),
        byt5=("byt5", options.byt5), vae=("vae", options.vae) if options.vae else None, model=options.dit,
        blocks_to_swap=options.blocks_to_swap,
    )  # fmt: skip
    return found + tokenizer_problems(
        lambda: load_qwen25_vl_tokenizer(
            options.text_encoder_tokenizer, options.tokenizer_cache_dir, options.text_encoder
        ),
        lambda: inspect_qwen25_vl(options.text_encoder)["vocab_size"], "Qwen2.5-VL", "--text_encoder_tokenizer",
        f"--text_encoder {options.text_encoder}",
    )  # fmt: skip


SCRIPT = HunyuanImageScript()
build_parser, main, run = SCRIPT.build_parser, SCRIPT.main, SCRIPT.run
