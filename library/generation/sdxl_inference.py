"""The image script of SDXL: its options and the order of things. Models and numerics are in sdxl_pipeline."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from library.core.errors import CheckpointError, ConfigError, Problems
from library.core.options import LARGEST_PICTURE_SIDE, LARGEST_SEED, option
from library.dataset.architectures import ARCHITECTURES
from library.generation import script as inference_script
from library.generation.adapters import adapter_problems, multiplier_problems
from library.generation.script import (
    COMMON_LINE_OPTIONS,
    DTYPE_NAMES,
    LineReader,
    PictureRequest,
    SessionOptions,
    dtype_problem,
    read_negative,
    too_small_problems,
)
from library.training.inference_samplers import SAMPLER_NAMES, sampler_notices
from library.training.option_groups import ConsoleOptions
from library.training.sampling_prompts import DRAWN, LineOption, read_number
from library.training.wiring.base import tokenizer_problems
from library.training.wiring.unet import about_slot, slot_problem

if TYPE_CHECKING:
    import argparse

    from library.generation.sdxl_pipeline import SdxlPipeline

logger = logging.getLogger(__name__)

SIZE_STEP = 8
LARGEST_STEPS = 1000


@dataclass(frozen=True, kw_only=True)
class SdxlModelOptions:
    """Models"""

    ckpt_path: str | None = option(None, help="file or diffusers folder of the SDXL model")
    vae: str | None = option(None, help="file of another VAE than the model's own")
    clip_tokenizer: str | None = option(None, help="folder of the CLIP tokenizer, for models with a vocabulary of their own")
    tokenizer_cache_dir: str | None = option(None, help="folder where tokenizers are kept, so that no network is needed")
    v_parameterization: bool = option(False, help="the model predicts velocity; not needed where the file says so")
    zero_terminal_snr: bool = option(False, help="the model was trained with a zero-terminal schedule; not needed where the file says so")
    dtype: str = option("float16", help=f"number format of U-Net and text encoders: {', '.join(DTYPE_NAMES)}; the VAE is float32")
    lora_weights: list[str] | None = option(None, nargs="*", help='adapter files, each as "path" or "path;multiplier"')
    merge_lora_weights: bool = option(False, help="add the adapters to the weights instead of hooking them")

    def __post_init__(self) -> None:
        problem = dtype_problem("dtype", self.dtype)
        if problem is None and self.dtype_name.startswith("float8"):
            problem = f"--dtype is {self.dtype}; 8-bit storage is there for transformers only; use float16"
        if problem:
            raise ConfigError(problem)

    @property
    def dtype_name(self) -> str:
        return DTYPE_NAMES[self.dtype.lower()]


@dataclass(frozen=True, kw_only=True)
class SdxlPromptOptions:
    """Pictures"""

    prompt: str = option("A photo of a cat", help="what the picture shows")
    prompt2: str | None = option(None, help="prompt of the second text encoder; the first prompt when not given")
    negative_prompt: str = option("", help="what it should not show")
    width: int = option(1024, help="width in pixels, rounded down to a multiple of 8", most=LARGEST_PICTURE_SIDE)
    height: int = option(1024, help="height in pixels, rounded down to a multiple of 8", most=LARGEST_PICTURE_SIDE)
    steps: int = option(50, help="steps")
    cfg_scale: float = option(7.0, help="classifier-free guidance; 1 = off, else two forwards per step")
    sampler: str = option("euler", choices=SAMPLER_NAMES, help="how a step is made")
    seed: int | None = option(None, help="number that fixes the picture; a drawn one is shown when not given, or with -1", most=LARGEST_SEED)
    output_dir: str = option(".", help="folder of the pictures; made when missing")

    def __post_init__(self) -> None:
        problems = too_small_problems(self, ("width", SIZE_STEP), ("height", SIZE_STEP), ("steps", 1), ("seed", DRAWN))
        if self.steps > LARGEST_STEPS:
            problems.append(f"--steps is {self.steps}; needed: {LARGEST_STEPS} or less, the steps of the training schedule")
        if problems:
            raise ConfigError(problems)


GROUPS = (SdxlModelOptions, SdxlPromptOptions, SessionOptions, ConsoleOptions)


@dataclass(frozen=True, kw_only=True)
class SdxlRequest(PictureRequest):
    """A picture of SDXL. `prompt2`: for the second text encoder, None = `prompt`."""

    prompt2: str | None
    sampler: str


def read_steps(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= LARGEST_STEPS:
        raise ValueError(f"a whole number from 1 to {LARGEST_STEPS} is needed")
    return int(text)


LINE_OPTIONS: Mapping[str, LineOption] = {
    **COMMON_LINE_OPTIONS,
    "s": LineOption("steps", read_steps),
    "p2": LineOption("prompt2", read_negative),
    "l": LineOption("cfg_scale", read_number),
}


def build_parser() -> argparse.ArgumentParser:
    return inference_script.script_parser("Make images with SDXL", GROUPS)


def main(argv: Sequence[str] | None = None) -> None:
    """Read the options, load, make the pictures; ends the process with the exit code of an error and one message."""
    inference_script.run_to_exit(run, argv)


def run(argv: Sequence[str] | None = None) -> list[Path]:
    """`main` without the handling of errors; returns the files that were written."""
    config = inference_script.read_command(argv, build_parser(), GROUPS)
    options, pictures, session = config[SdxlModelOptions], config[SdxlPromptOptions], config[SessionOptions]
    first = SdxlRequest(
        prompt=pictures.prompt, prompt2=pictures.prompt2, negative_prompt=pictures.negative_prompt, width=pictures.width,
        height=pictures.height, steps=pictures.steps, seed=pictures.seed, cfg_scale=pictures.cfg_scale, sampler=pictures.sampler,
    )  # fmt: skip
    requests = inference_script.planned_requests(session, first, line_reader(options), lambda: check(options))
    from library.generation.sdxl_pipeline import load_pipeline

    logger.info("--prompt2 goes to the second text encoder with its own padding (known scripts give both encoders the first prompt)")
    for line in sampler_notices(pictures.sampler):
        logger.info(line)
    pipeline = load_pipeline(options)
    return inference_script.make_each(
        requests, lambda request, index: make_picture(pipeline, request, index, pictures.output_dir, with_texts=not session.no_metadata)
    )


def make_picture(pipeline: SdxlPipeline, request: SdxlRequest, index: int, output_dir: str, *, with_texts: bool = True) -> Path:
    """Make and write one picture: `{YYYYmmdd_HHMMSS}_{seed}_{index}.png`."""
    request = inference_script.with_seed_and_size(request, SIZE_STEP)
    image = pipeline.decode(pipeline.generate(request))
    more = {"prompt2": request.prompt2, "sampler": request.sampler}
    texts = inference_script.picture_texts(request, **more) if with_texts else None
    return inference_script.write_picture(image, Path(output_dir) / inference_script.output_name(request.seed, index), texts)


def line_reader(options: SdxlModelOptions) -> LineReader:
    count, merged = len(options.lora_weights or ()), options.merge_lora_weights
    return LineReader(LINE_OPTIONS, SIZE_STEP, lambda request: multiplier_problems(request.multipliers, count, merged=merged))


def check(options: SdxlModelOptions) -> None:
    """Every missing or wrong file at once, from headers; ConfigError."""
    problems = Problems()
    model_problem = slot_problem(options.ckpt_path, "ckpt_path", {"sdxl"}, for_pictures=True)
    vae_problem = slot_problem(options.vae, "vae", {"vae_sd", "sdxl"}) if options.vae else None
    formats = inference_script.format_problems({f"--dtype {options.dtype}": options.dtype_name})
    for problem in (model_problem, vae_problem, *formats, *adapter_problems(options.lora_weights, "sdxl")):
        if problem:
            problems.add(problem)
    if not model_problem:
        found = _model_problems(options)
        for problem in found if found or options.vae else _vae_problems("ckpt_path", options.ckpt_path):
            problems.add(problem)
    if options.vae and not vae_problem:
        for problem in _vae_problems("vae", options.vae):
            problems.add(problem)
    problems.raise_if_any()


def _model_problems(options: SdxlModelOptions) -> list[str]:
    """U-Net and text encoders against each other, and the tokenizer against the text encoders."""
    from library.components.tokenizers import load_clip_tokenizer
    from library.sdxl_utils import inspect_sdxl_unet, text_encoder_sizes, text_width_problem

    try:
        sizes = text_encoder_sizes(options.ckpt_path)
        width = text_width_problem(options.ckpt_path, sizes, inspect_sdxl_unet(options.ckpt_path).params)
    except CheckpointError as error:
        return [about_slot("ckpt_path", options.ckpt_path, error)]
    found = tokenizer_problems(
        lambda: load_clip_tokenizer(options.clip_tokenizer, options.tokenizer_cache_dir, option="--clip_tokenizer"),
        lambda: min(values["vocab"] for values in sizes), "CLIP", "--clip_tokenizer",
    )  # fmt: skip
    return [*found, width] if width else found


def _vae_problems(slot: str, path: str) -> list[str]:
    from library.sdxl_utils import inspect_vae_sdxl

    try:
        channels, wanted = inspect_vae_sdxl(path).params.z_channels, ARCHITECTURES["sdxl"].latents.channels
    except CheckpointError as error:
        return [about_slot(slot, path, error)]
    return [] if channels == wanted else [f"--{slot} is {path}: its autoencoder has {channels} latent channels; {wanted} are needed"]
