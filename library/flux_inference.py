"""The image script of FLUX.1: options, prompt lines and the order of things. Models and numerics are in flux_pipeline."""

from __future__ import annotations

import dataclasses
import logging
import random
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.errors import AtelierError, ConfigError, Problems
from library.options import add_options, option, option_fields, read_options, refused_option
from library.training import cli
from library.training.option_groups import ConsoleOptions
from library.training.parser_common import OptionParser

if TYPE_CHECKING:
    import argparse

    from library.flux_pipeline import FluxPipeline

logger = logging.getLogger(__name__)

SIZE_STEP = 16
STEPS_SCHNELL, STEPS_DEV = 4, 50
LARGEST_DRAWN_SEED = 2**32 - 1

DTYPE_NAMES: dict[str, str] = {
    "float32": "float32", "fp32": "float32", "float": "float32",
    "float16": "float16", "fp16": "float16", "half": "float16",
    "bfloat16": "bfloat16", "bf16": "bfloat16",
    "float8_e4m3fn": "float8_e4m3fn", "fp8": "float8_e4m3fn", "fp8_e4m3fn": "float8_e4m3fn", "e4m3fn": "float8_e4m3fn",
}  # fmt: skip
"""spellings of --dtype -> the name in torch"""


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
    t5xxl_max_token_length: int | None = option(None, help="longest prompt in T5 tokens; 512 for dev, 256 for schnell when not given")
    apply_t5_attn_mask: bool = option(False, help="keep T5 and the denoiser from attending to padding")
    dtype: str = option("bfloat16", help=f"number format of all parts: {', '.join(DTYPE_NAMES)}")
    clip_l_dtype: str | None = option(None, help="number format of CLIP-L; that of --dtype when not given")
    ae_dtype: str | None = option(None, help="number format of the autoencoder")
    t5xxl_dtype: str | None = option(None, help="number format of T5")
    flux_dtype: str | None = option(None, help="number format of the denoiser; float8_e4m3fn halves its memory")
    offload: bool = option(False, help="keep only the part that computes on the GPU, the others in main memory")
    lora_weights: list[str] | None = option(None, nargs="*", help='adapter files, each as "path" or "path;multiplier"')
    merge_lora_weights: bool = option(False, help="add the adapters to the weights instead of hooking them")

    def __post_init__(self) -> None:
        problems = Problems()
        for name in ("dtype", "clip_l_dtype", "ae_dtype", "t5xxl_dtype", "flux_dtype"):
            value = getattr(self, name)
            if value is not None and value.lower() not in DTYPE_NAMES:
                problems.add(f"--{name} is '{value}'; known: {', '.join(DTYPE_NAMES)}")
            elif value is not None and name in ("clip_l_dtype", "ae_dtype", "t5xxl_dtype") and self.dtype_of(name).startswith("float8"):
                problems.add(f"--{name} is {value}; only the denoiser is stored in 8 bits (--flux_dtype)")
        if self.merge_lora_weights and self.dtype_of("flux_dtype").startswith("float8"):
            problems.add("--merge_lora_weights into a denoiser of 8 bits would lose most of the adapter; leave it out, hooks are exact")
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
    width: int = option(1360, help="width in pixels, rounded down to a multiple of 16")
    height: int = option(768, help="height in pixels, rounded down to a multiple of 16")
    seed: int | None = option(None, help="number that fixes the picture; a drawn one is shown when not given")
    steps: int | None = option(None, help=f"steps; {STEPS_SCHNELL} for schnell, {STEPS_DEV} for dev when not given")
    guidance: float = option(3.5, help="embedded guidance (dev)")
    cfg_scale: float = option(1.0, help="classifier-free guidance with --negative_prompt; 1 = off, else two forwards per step")
    output_dir: str = option(".", help="folder of the pictures; made when missing")
    interactive: bool = option(False, help="ask for prompts, one per line: PROMPT --w --h --s --d --g --m --n --c")

    def __post_init__(self) -> None:
        problems = Problems()
        for name, least in (("width", SIZE_STEP), ("height", SIZE_STEP), ("steps", 1), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                problems.add(f"--{name} is {value}; needed: {least} or more")
        problems.raise_if_any()


@dataclass(frozen=True)
class PictureRequest:
    """One picture, as asked for. `multipliers`: strengths of the adapters, None = as loaded."""

    prompt: str
    negative_prompt: str | None
    width: int
    height: int
    steps: int | None
    seed: int | None
    guidance: float
    cfg_scale: float
    multipliers: tuple[float, ...] | None = None


LINE_OPTIONS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "w": ("width", int),
    "h": ("height", int),
    "s": ("steps", int),
    "d": ("seed", int),
    "g": ("guidance", float),
    "c": ("cfg_scale", float),
    "m": ("multipliers", lambda text: tuple(float(part) for part in text.split(","))),
    "n": ("negative_prompt", lambda text: "" if text == "-" else text),
}


def parse_prompt_line(line: str, default: PictureRequest) -> PictureRequest:
    """`PROMPT --w 512 --d 7 ...` on top of `default`; an empty prompt keeps the default's.

    The first piece is always the prompt. ConfigError for an unknown option or a bad value.
    """
    prompt, *pieces = re.split(r"\s+--(?=[A-Za-z]+(?:\s|$))", " " + line.strip())
    changes: dict[str, Any] = {"prompt": prompt.strip() or default.prompt}
    problems = Problems()
    for piece in pieces:
        letter, _, text = piece.strip().partition(" ")
        if letter.lower() not in LINE_OPTIONS:
            problems.add(f"--{letter} is no option of a prompt line; known: {', '.join('--' + known for known in LINE_OPTIONS)}")
            continue
        name, convert = LINE_OPTIONS[letter.lower()]
        try:
            changes[name] = convert(text.strip())
        except ValueError:
            problems.add(f"--{letter} is '{text.strip()}', which is not a number")
    for name, least in (("width", SIZE_STEP), ("height", SIZE_STEP), ("steps", 1), ("seed", 0)):
        if changes.get(name) is not None and changes[name] < least:
            problems.add(f"{name} is {changes[name]}; needed: {least} or more")
    problems.raise_if_any()
    return dataclasses.replace(default, **changes)


def complete(request: PictureRequest, is_schnell: bool) -> PictureRequest:
    """Sizes rounded down to 16, steps of the model, a drawn seed where none is given."""
    width, height = (side - side % SIZE_STEP for side in (request.width, request.height))
    if (width, height) != (request.width, request.height):
        logger.warning("the size is %dx%d; made %dx%d, a multiple of %d", request.width, request.height, width, height, SIZE_STEP)
    steps = request.steps or (STEPS_SCHNELL if is_schnell else STEPS_DEV)
    seed = random.SystemRandom().randint(0, LARGEST_DRAWN_SEED) if request.seed is None else request.seed
    if request.cfg_scale != 1.0 and request.negative_prompt is None:
        logger.warning("--cfg_scale is %s without a negative prompt; no effect", request.cfg_scale)
    return dataclasses.replace(request, width=width, height=height, steps=steps, seed=seed)


def parse_lora_argument(text: str) -> tuple[str, float]:
    """`path` or `path;multiplier`; ConfigError when the multiplier is no number."""
    path, separator, multiplier = text.rpartition(";")
    if not separator:
        return text, 1.0
    try:
        return path, float(multiplier)
    except ValueError:
        raise ConfigError(f'--lora_weights has "{text}"; the text after ; is the multiplier, a number') from None


def build_parser() -> argparse.ArgumentParser:
    parser = OptionParser(description="Make images with FLUX.1", allow_abbrev=False, usage="%(prog)s [options]")
    for options_class in (InferenceModelOptions, PromptOptions, ConsoleOptions):
        add_options(parser, options_class)
    return parser


def check_models(options: InferenceModelOptions) -> None:
    """Every missing or wrong file at once, from headers; ConfigError."""
    from library.checkpoint_kinds import check_slot

    problems = Problems()
    for name, (_, spec) in option_fields(InferenceModelOptions).items():
        if spec.status == "refused" and getattr(options, name) != "flux":
            problems.add(f"--{name} is {getattr(options, name)}: {spec.reason}")
    for slot, kind in (("ckpt_path", "flux"), ("clip_l", "clip_l"), ("t5xxl", "t5"), ("ae", "vae_flux")):
        problem = check_slot(getattr(options, slot), slot, {kind})
        if problem:
            problems.add(problem)
    for text in options.lora_weights or []:
        try:
            problem = check_slot(parse_lora_argument(text)[0], "lora_weights", {"adapter"})
            if problem:
                problems.add(problem)
        except ConfigError as error:
            problems.absorb(error)
    problems.raise_if_any()


def main(argv: Sequence[str] | None = None) -> None:
    """Read the options, load, make the pictures; ends the process with the exit code of an error and one message."""
    try:
        run(argv)
    except AtelierError as error:
        sys.exit(cli.report(error))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(cli.INTERRUPTED)


def run(argv: Sequence[str] | None = None) -> list[Path]:
    """`main` without the handling of errors; returns the files that were written."""
    values = vars(build_parser().parse_args(argv))
    problems, groups = Problems(), []
    for options_class in (InferenceModelOptions, PromptOptions, ConsoleOptions):
        try:
            groups.append(read_options(values, options_class))
        except ConfigError as error:
            problems.absorb(error)
    problems.raise_if_any()
    model_options, pictures, console = groups
    cli.set_up_logging(console)
    check_models(model_options)
    from library.flux_pipeline import load_pipeline

    pipeline = load_pipeline(model_options)
    return [make_picture(pipeline, request, index, pictures.output_dir) for index, request in enumerate(requests(pictures))]


def requests(options: PromptOptions) -> Iterator[PictureRequest]:
    """The one picture of the options, or one per line that is typed; an empty line or the end of input ends it."""
    first = PictureRequest(
        options.prompt, options.negative_prompt, options.width, options.height, options.steps, options.seed,
        options.guidance, options.cfg_scale,
    )
    if not options.interactive:
        yield first
        return
    print("Enter a prompt with options: --w --h --s(teps) --d(seed) --g(uidance) --m 1.0,0.5 --n negative --c(fg); an empty line ends")
    while True:
        try:
            line = input("> ")
        except EOFError:
            return
        if not line.strip():
            return
        try:
            yield parse_prompt_line(line, first)
        except ConfigError as error:
            print(f"error: {error}", file=sys.stderr)


def make_picture(pipeline: FluxPipeline, request: PictureRequest, index: int, output_dir: str) -> Path:
    """Make and write one picture: `{YYYYmmdd_HHMMSS}_{seed}_{index}.png`."""
    from library.atomic_file import atomic_path

    request = complete(request, pipeline.is_schnell)
    started = time.perf_counter()
    image = pipeline.generate(request)
    path = Path(output_dir) / f"{time.strftime('%Y%m%d_%H%M%S')}_{request.seed}_{index:02d}.png"
    with atomic_path(path) as temporary:
        image.save(temporary, format="PNG")
    logger.info("%s: %dx%d, %d steps, seed %d, %.1f s", path, request.width, request.height, request.steps, request.seed, time.perf_counter() - started)
    return path
