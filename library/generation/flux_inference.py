"""The image script of FLUX.1: its options and the order of things. Models and numerics are in flux_pipeline."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from library.core.errors import ConfigError, Problems
from library.core.options import LARGEST_PICTURE_SIDE, LARGEST_SEED, LARGEST_STEPS, LARGEST_TOKENS, Config, option, refused_option
from library.generation import script as inference_script
from library.generation.adapters import adapter_problems, multiplier_problems
from library.generation.script import (
    COMMON_LINE_OPTIONS,
    DTYPE_NAMES,
    LineReader,
    PictureRequest,
    SessionOptions,
    dtype_problem,
    too_small_problems,
)
from library.training.option_groups import ConsoleOptions
from library.training.sampling_prompts import DRAWN, LineOption, read_number

if TYPE_CHECKING:
    import argparse

    from library.generation.flux_pipeline import FluxPipeline

logger = logging.getLogger(__name__)

SIZE_STEP = 16
STEPS_SCHNELL, STEPS_DEV = 4, 50


@dataclass(frozen=True, kw_only=True)
class InferenceModelOptions:
    """Models"""

    ckpt_path: str | None = option(None, help="file or diffusers folder of the FLUX.1 denoiser")
    model_type: str = refused_option(
        "flux", help="flux or chroma", choices=("flux", "chroma"), reason="Chroma is a model family of its own that is not there yet; only flux is"
    )
    clip_l: str | None = option(None, help="file of the CLIP-L text encoder")
    t5xxl: str | None = option(None, help="file of the T5-XXL text encoder")
    ae: str | None = option(None, help="file of the autoencoder (ae.safetensors)")
    clip_l_tokenizer: str | None = option(None, help="folder of the CLIP-L tokenizer, for models with a vocabulary of their own")
    t5xxl_tokenizer: str | None = option(None, help="folder or spiece.model file of the T5 tokenizer")
    tokenizer_cache_dir: str | None = option(None, help="folder where tokenizers are kept, so that no network is needed")
    t5xxl_max_token_length: int | None = option(None, help="longest prompt in T5 tokens; 512 for dev, 256 for schnell when not given", most=LARGEST_TOKENS)
    apply_t5_attn_mask: bool = option(False, help="keep T5 and the denoiser from attending to padding")
    dtype: str = option("bfloat16", help=f"number format of all parts: {', '.join(DTYPE_NAMES)}")
    clip_l_dtype: str | None = option(None, help="number format of CLIP-L; that of --dtype when not given")
    ae_dtype: str | None = option(None, help="number format of the autoencoder")
    t5xxl_dtype: str | None = option(None, help="number format of T5")
    flux_dtype: str | None = option(None, help="number format of the denoiser; float8_e4m3fn halves its memory")
    offload: bool = option(False, help="keep only the part that computes on the GPU, the others in main memory")
    lora_weights: list[str] | None = option(None, nargs="*", help='adapter files, each as "path" or "path;multiplier"')
    merge_lora_weights: bool = option(False, help="add the adapters to the weights while these are read, instead of hooking them; 8-bit weights are rounded after that, hooks are exact")

    def __post_init__(self) -> None:
        problems = Problems()
        for name in ("dtype", "clip_l_dtype", "ae_dtype", "t5xxl_dtype", "flux_dtype"):
            value = getattr(self, name)
            problem = dtype_problem(name, value)
            if problem:
                problems.add(problem)
            elif value is not None and name in ("clip_l_dtype", "ae_dtype", "t5xxl_dtype") and self.dtype_of(name).startswith("float8"):
                problems.add(f"--{name} is {value}; only the denoiser is stored in 8 bits (--flux_dtype)")
        if self.t5xxl_max_token_length is not None and self.t5xxl_max_token_length < 1:
            problems.add(f"--t5xxl_max_token_length is {self.t5xxl_max_token_length}; needed: 1 or more")
        problems.raise_if_any()

    def dtype_of(self, name: str) -> str:
        """Name in torch of one part's format. `--dtype` of 8 bits means the denoiser; the other parts are bfloat16 then."""
        value = getattr(self, name)
        if value is not None:
            return DTYPE_NAMES.get(value.lower(), value)
        common = DTYPE_NAMES.get(self.dtype.lower(), self.dtype)
        return "bfloat16" if common.startswith("float8") and name != "flux_dtype" else common


@dataclass(frozen=True, kw_only=True)
class PromptOptions:
    """Pictures"""

    prompt: str = option("A photo of a cat", help="what the picture shows")
    negative_prompt: str | None = option(None, help="what it should not show; needs --cfg_scale")
    width: int = option(1360, help="width in pixels, rounded down to a multiple of 16", most=LARGEST_PICTURE_SIDE)
    height: int = option(768, help="height in pixels, rounded down to a multiple of 16", most=LARGEST_PICTURE_SIDE)
    seed: int | None = option(None, help="number that fixes the picture; a drawn one is shown when not given, or with -1", most=LARGEST_SEED)
    steps: int | None = option(None, help=f"steps; {STEPS_SCHNELL} for schnell, {STEPS_DEV} for dev when not given", most=LARGEST_STEPS)
    guidance: float = option(3.5, help="embedded guidance (dev)")
    cfg_scale: float = option(1.0, help="classifier-free guidance with --negative_prompt; 1 = off, else two forwards per step")
    output_dir: str = option(".", help="folder of the pictures; made when missing")

    def __post_init__(self) -> None:
        problems = too_small_problems(self, ("width", SIZE_STEP), ("height", SIZE_STEP), ("steps", 1), ("seed", DRAWN))
        if problems:
            raise ConfigError(problems)


GROUPS = (InferenceModelOptions, PromptOptions, SessionOptions, ConsoleOptions)


@dataclass(frozen=True, kw_only=True)
class FluxRequest(PictureRequest):
    """A picture of FLUX.1; `guidance` is the embedded one of dev."""

    guidance: float = 3.5


LINE_OPTIONS: Mapping[str, LineOption] = {
    **COMMON_LINE_OPTIONS,
    "g": LineOption("guidance", read_number),
    "c": LineOption("cfg_scale", read_number),
}


def complete(request: FluxRequest, is_schnell: bool) -> FluxRequest:
    """Sizes rounded down to 16, steps of the model, a drawn seed where none is given."""
    request = inference_script.with_seed_and_size(request, SIZE_STEP)
    if request.cfg_scale != 1.0 and request.negative_prompt is None:
        logger.warning("--cfg_scale is %s without a negative prompt; no effect", request.cfg_scale)
    return dataclasses.replace(request, steps=request.steps or (STEPS_SCHNELL if is_schnell else STEPS_DEV))


def build_parser() -> argparse.ArgumentParser:
    return inference_script.script_parser("Make images with FLUX.1", GROUPS)


def check_models(config: Config) -> None:
    """Every missing or wrong file at once, from headers; ConfigError."""
    from library.checkpoints.kinds import check_slot

    options = config[InferenceModelOptions]
    found: list[str | None] = [*inference_script.refused_problems(config)]
    for slot, kind in (("ckpt_path", "flux"), ("clip_l", "clip_l"), ("t5xxl", "t5"), ("ae", "vae_flux")):
        found.append(check_slot(getattr(options, slot), slot, {kind}, for_pictures=True))
    names = ("clip_l_dtype", "ae_dtype", "t5xxl_dtype", "flux_dtype")
    asked = {f"--{name if getattr(options, name) else 'dtype'}": options.dtype_of(name) for name in names}
    found += inference_script.format_problems(asked)
    problems = [problem for problem in [*found, *adapter_problems(options.lora_weights, "flux")] if problem]
    if problems:
        raise ConfigError(problems)


def line_reader(options: InferenceModelOptions) -> LineReader:
    count, merged = len(options.lora_weights or ()), options.merge_lora_weights
    return LineReader(LINE_OPTIONS, SIZE_STEP, lambda request: multiplier_problems(request.multipliers, count, merged=merged))


def main(argv: Sequence[str] | None = None) -> None:
    """Read the options, load, make the pictures; ends the process with the exit code of an error and one message."""
    inference_script.run_to_exit(run, argv)


def run(argv: Sequence[str] | None = None) -> list[Path]:
    """`main` without the handling of errors; returns the files that were written."""
    config = inference_script.read_command(argv, build_parser(), GROUPS)
    options, pictures, session = config[InferenceModelOptions], config[PromptOptions], config[SessionOptions]
    first = FluxRequest(
        prompt=pictures.prompt, negative_prompt=pictures.negative_prompt, width=pictures.width, height=pictures.height,
        steps=pictures.steps, seed=pictures.seed, guidance=pictures.guidance, cfg_scale=pictures.cfg_scale,
    )
    requests = inference_script.planned_requests(session, first, line_reader(options), lambda: check_models(config))
    from library.generation.flux_pipeline import load_pipeline

    pipeline = load_pipeline(options)
    return inference_script.make_each(
        requests, lambda request, index: make_picture(pipeline, request, index, pictures.output_dir, with_texts=not session.no_metadata)
    )


def make_picture(pipeline: FluxPipeline, request: FluxRequest, index: int, output_dir: str, *, with_texts: bool = True) -> Path:
    """Make and write one picture: `{YYYYmmdd_HHMMSS}_{seed}_{index}.png`."""
    request = complete(request, pipeline.is_schnell)
    image = pipeline.generate(request)
    texts = inference_script.picture_texts(request, guidance=request.guidance) if with_texts else None
    return inference_script.write_picture(image, Path(output_dir) / inference_script.output_name(request.seed, index), texts)
