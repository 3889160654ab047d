"""The image script of Anima: its options and the order of things. Models and numerics are in anima_pipeline."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from library.core.errors import ConfigError, Problems
from library.core.options import LARGEST_PICTURE_SIDE, LARGEST_SEED, LARGEST_STEPS, LARGEST_TOKENS, Config, equivalent_option, option
from library.generation import script as inference_script
from library.generation.adapters import OWN_MODULE, AdapterFile, LayerFilter, file_problem, multiplier_problems
from library.generation.script import (
    COMMON_LINE_OPTIONS,
    DTYPE_NAMES,
    LineReader,
    PictureRequest,
    SessionOptions,
    dtype_problem,
    too_small_problems,
)
from library.training.inference_samplers import FLOW_SAMPLER_NAMES
from library.training.option_groups import ConsoleOptions
from library.training.sampling_prompts import DRAWN, LineOption, read_number
from library.training.wiring.base import tokenizer_problems

if TYPE_CHECKING:
    import argparse

    from library.generation.anima_pipeline import AnimaPipeline

logger = logging.getLogger(__name__)

SIZE_STEP = 16
TOKEN_LENGTH = 512
LYCORIS_MODULE = "lycoris.kohya"
OUTPUT_TYPES = ("images", "latent", "latent_images")
_ATTENTION = "attention is always computed by torch's scaled_dot_product_attention"


@dataclass(frozen=True, kw_only=True)
class AnimaModelOptions:
    """Models"""

    dit: str | None = option(None, help="file of the Anima denoiser")
    vae: str | None = option(None, help="file of the autoencoder (qwen_image_vae.safetensors)")
    text_encoder: str | None = option(None, help="file or folder of the Qwen3-0.6B text encoder")
    llm_adapter_path: str | None = option(None, help="file whose LLM adapter replaces that of the model")
    qwen3_tokenizer: str | None = option(None, help="folder of the Qwen3 tokenizer")
    t5_tokenizer_path: str | None = option(None, help="folder or spiece.model file of the T5 tokenizer")
    tokenizer_cache_dir: str | None = option(None, help="folder where tokenizers are kept, so that no network is needed")
    qwen3_max_token_length: int = option(TOKEN_LENGTH, help="longest prompt in Qwen3 tokens", most=LARGEST_TOKENS)
    t5_max_token_length: int = option(TOKEN_LENGTH, help="longest prompt in T5 tokens; also the length of the denoiser's context", most=LARGEST_TOKENS)
    dtype: str = option("bfloat16", help=f"number format of all parts: {', '.join(DTYPE_NAMES)}")
    fp8: bool = option(False, help="keep the large matrices of the denoiser in 8 bits, as they are")
    fp8_scaled: bool = option(False, help="keep the large matrices of the denoiser in 8 bits, each row scaled to the whole range; closer than --fp8")
    text_encoder_cpu: bool = option(False, help="let the text encoder compute on the CPU")
    device: str | None = option(None, help="device of the denoiser, e.g. cuda:1; the first GPU when not given, else the CPU")
    attn_mode: str = equivalent_option(
        "torch", help="which package computes the attention", choices=("flash", "torch", "sageattn", "xformers", "sdpa"),
        reason=f"--attn_mode: {_ATTENTION}",
    )  # fmt: skip
    vae_chunk_size: int | None = option(None, help="rows that the VAE computes at once, an even number: less memory, equal results")
    vae_disable_cache: bool = equivalent_option(
        False, help="no feature cache in the VAE",
        reason="--vae_disable_cache: a single image has no earlier frames, so there is nothing that would be kept",
    )  # fmt: skip

    def __post_init__(self) -> None:
        problems = too_small_problems(self, ("qwen3_max_token_length", 1), ("t5_max_token_length", 1))
        unknown = dtype_problem("dtype", self.dtype)
        if unknown:
            problems.append(unknown)
        elif self.dtype_name.startswith("float8"):
            problems.append(f"--dtype is {self.dtype}; 8 bits are for the denoiser only: --fp8 or --fp8_scaled")
        if self.vae_chunk_size is not None and (self.vae_chunk_size < 2 or self.vae_chunk_size % 2):
            problems.append(f"--vae_chunk_size is {self.vae_chunk_size}; needed: an even number of 2 or more, e.g. 64")
        if problems:
            raise ConfigError(problems)

    @property
    def dtype_name(self) -> str:
        return DTYPE_NAMES[self.dtype.lower()]


@dataclass(frozen=True, kw_only=True)
class AnimaAdapterOptions:
    """LoRAs"""

    lora_weight: list[str] | None = option(None, nargs="*", help="adapter files")
    lora_multiplier: list[float] | None = option(None, nargs="*", help="strength of each of the --lora_weight; 1 when not given")
    include_patterns: list[str] | None = option(None, nargs="*", help="use only the layers that one of these regular expressions finds")
    exclude_patterns: list[str] | None = option(None, nargs="*", help="leave out the layers that one of these regular expressions finds")
    lycoris: bool = option(False, help="read the adapter files with the package lycoris-lora")
    merge_lora_weights: bool = option(False, help="add the adapters to the weights instead of hooking them")

    def __post_init__(self) -> None:
        problems = self.layer_filter.problems()
        files, multipliers = len(self.lora_weight or ()), len(self.lora_multiplier or ())
        if multipliers > 1 and multipliers != files or multipliers and not files:
            problems.append(f"--lora_multiplier has {multipliers} values for {files} --lora_weight; give one for each file, or one for all")
        if (self.include_patterns or self.exclude_patterns) and not files:
            problems.append("--include_patterns and --exclude_patterns choose layers of --lora_weight, which is not given")
        if self.lycoris and self.merge_lora_weights:
            problems.append("--merge_lora_weights: the package lycoris-lora merges without multipliers; leave out it or --lycoris")
        if problems:
            raise ConfigError(problems)

    @property
    def layer_filter(self) -> LayerFilter:
        return LayerFilter(tuple(self.include_patterns or ()), tuple(self.exclude_patterns or ()))

    @property
    def files(self) -> list[AdapterFile]:
        paths, multipliers = self.lora_weight or [], self.lora_multiplier or [1.0]
        strengths = multipliers * len(paths) if len(multipliers) == 1 else multipliers
        return [AdapterFile(p, m, LYCORIS_MODULE if self.lycoris else OWN_MODULE) for p, m in zip(paths, strengths, strict=True)]


@dataclass(frozen=True, kw_only=True)
class AnimaPromptOptions:
    """Pictures"""

    prompt: str | None = option(None, help="what the picture shows")
    negative_prompt: str = option("", help="what it should not show")
    image_size: tuple[int, ...] = option((1024, 1024), nargs=2, metavar="PIXELS", help="height and width, rounded down to multiples of 16", most=LARGEST_PICTURE_SIDE)
    infer_steps: int = option(50, help="steps", most=LARGEST_STEPS)
    guidance_scale: float = option(3.5, help="classifier-free guidance; 1 = off, else two forwards per step")
    flow_shift: float = option(5.0, help="how far the steps lie towards noise; 1 = evenly spaced")
    sampler: str = option("euler", choices=FLOW_SAMPLER_NAMES, help="how a step is made")
    seed: int | None = option(None, help="number that fixes the picture; a drawn one is shown when not given, or with -1", most=LARGEST_SEED)
    save_path: str | None = option(None, help="folder of the pictures; made when missing")
    output_type: str = option("images", choices=OUTPUT_TYPES, help="what is written: pictures, latents (safetensors), or both")
    latent_path: list[str] | None = option(None, nargs="*", help="decode these latents instead of making new ones")

    def __post_init__(self) -> None:
        problems = too_small_problems(self, ("infer_steps", 1), ("seed", DRAWN))
        if len(self.image_size) != 2 or min(self.image_size) < SIZE_STEP:
            problems.append(f"--image_size is {' '.join(map(str, self.image_size))}; needed: height and width, {SIZE_STEP} or more each")
        if not self.flow_shift > 0:
            problems.append(f"--flow_shift is {self.flow_shift}; needed: a number above 0")
        if self.latent_path and self.output_type != "images":
            problems.append(f"--output_type is {self.output_type} and --latent_path gives latents already; use --output_type images")
        if problems:
            raise ConfigError(problems)


GROUPS = (AnimaModelOptions, AnimaAdapterOptions, AnimaPromptOptions, SessionOptions, ConsoleOptions)


@dataclass(frozen=True, kw_only=True)
class AnimaRequest(PictureRequest):
    """A picture of Anima."""

    flow_shift: float
    sampler: str


def read_shift(text: str) -> float:
    shift = read_number(text)
    if shift <= 0:
        raise ValueError("a number above 0 is needed")
    return shift


LINE_OPTIONS: Mapping[str, LineOption] = {
    **COMMON_LINE_OPTIONS,
    "g": LineOption("cfg_scale", read_number),
    "l": LineOption("cfg_scale", read_number),
    "fs": LineOption("flow_shift", read_shift),
}


def build_parser() -> argparse.ArgumentParser:
    return inference_script.script_parser("Make images with Anima", GROUPS)


def main(argv: Sequence[str] | None = None) -> None:
    """Read the options, load, make the pictures; ends the process with the exit code of an error and one message."""
    inference_script.run_to_exit(run, argv)


def run(argv: Sequence[str] | None = None) -> list[Path]:
    """`main` without the handling of errors; returns the files that were written."""
    config = inference_script.read_command(argv, build_parser(), GROUPS)
    inference_script.tell_equivalent(config)
    if config[AnimaPromptOptions].latent_path:
        check(config)
        return decode_files(config)
    session, reader = config[SessionOptions], line_reader(config)
    requests = inference_script.planned_requests(session, first_request(config), reader, lambda: check(config))
    return make_pictures(config, requests)


def make_pictures(config: Config, requests: Iterable[AnimaRequest]) -> list[Path]:
    from library.generation.anima_pipeline import load_pipeline

    logger.info("latents are kept in float32 between the steps (known scripts round them to the type of the weights)")
    needs_vae = config[AnimaPromptOptions].output_type != "latent"
    pipeline = load_pipeline(config[AnimaModelOptions], config[AnimaAdapterOptions], needs_vae=needs_vae)
    return inference_script.make_each(requests, lambda request, index: make_picture(pipeline, config, request, index))


def make_picture(pipeline: AnimaPipeline, config: Config, request: AnimaRequest, index: int) -> Path:
    """Make and write one picture, its latents, or both; the path of the picture where there is one."""
    request = inference_script.with_seed_and_size(request, SIZE_STEP)
    pictures = config[AnimaPromptOptions]
    latents = pipeline.generate(request)
    more = {"flow-shift": request.flow_shift, "sampler": request.sampler}
    texts = {} if config[SessionOptions].no_metadata else inference_script.picture_texts(request, **more)
    path = Path(pictures.save_path) / inference_script.output_name(request.seed, index)
    if pictures.output_type != "images":
        from library.generation.anima_pipeline import save_latents

        written = save_latents(latents, path.with_name(f"{path.stem}_latent.safetensors"), texts)
        if pictures.output_type == "latent":
            return written
    return inference_script.write_picture(pipeline.decode(latents), path, texts)


def decode_files(config: Config) -> list[Path]:
    """Pictures of the files of --latent_path: `{YYYYmmdd_HHMMSS}_{index}_{name of the file}.png`."""
    from library.generation.anima_pipeline import Decoder, read_latents

    pictures, decoder = config[AnimaPromptOptions], Decoder.load(config[AnimaModelOptions])
    paths = []
    for index, source in enumerate(pictures.latent_path):
        latents, texts = read_latents(source, decoder.channels)
        name = inference_script.output_name(None, index, f"_{Path(source).stem.removesuffix('_latent')}.png")
        texts = {} if config[SessionOptions].no_metadata else texts
        paths.append(inference_script.write_picture(decoder.decode(latents), Path(pictures.save_path) / name, texts))
        logger.info("%s", paths[-1])
    return paths


def first_request(config: Config) -> AnimaRequest:
    pictures = config[AnimaPromptOptions]
    height, width = pictures.image_size
    return AnimaRequest(
        prompt=pictures.prompt or "", negative_prompt=pictures.negative_prompt, width=width, height=height, steps=pictures.infer_steps,
        seed=pictures.seed, cfg_scale=pictures.guidance_scale, flow_shift=pictures.flow_shift, sampler=pictures.sampler,
    )  # fmt: skip


def line_reader(config: Config) -> LineReader:
    adapters = config[AnimaAdapterOptions]
    count, merged = len(adapters.files), adapters.merge_lora_weights
    return LineReader(LINE_OPTIONS, SIZE_STEP, lambda request: multiplier_problems(request.multipliers, count, merged=merged))


# -- checks ----------------------------------------------------------------------------------------------------------------


def check(config: Config) -> None:
    """Everything that is wrong with options and files, from headers alone; ConfigError."""
    problems = Problems()
    for problem in [*inference_script.refused_problems(config), *_prompt_problems(config), *_file_problems(config)]:
        problems.add(problem)
    if not problems.messages and not config[AnimaPromptOptions].latent_path:
        for problem in _fitting_problems(config[AnimaModelOptions], problems):
            problems.add(problem)
    problems.raise_if_any()


def _prompt_problems(config: Config) -> list[str]:
    pictures, session, model = config[AnimaPromptOptions], config[SessionOptions], config[AnimaModelOptions]
    adapters, found = config[AnimaAdapterOptions], []
    if not pictures.save_path:
        found.append("--save_path is not given; needed: the folder for the pictures")
    from_elsewhere = session.interactive or session.from_file
    if pictures.latent_path and (from_elsewhere or pictures.prompt):
        found.append("--latent_path decodes latents that are there; leave out --prompt, --from_file and --interactive")
    if not (pictures.prompt is not None or from_elsewhere or pictures.latent_path):
        found.append("--prompt is not given; needed: it, --from_file, --interactive or --latent_path")
    if adapters.lora_weight and (model.fp8 or model.fp8_scaled) and adapters.lycoris:
        found.append("--lycoris needs whole weights; with --fp8 or --fp8_scaled leave it out, our own modules read the same files")
    return found


def _file_problems(config: Config) -> list[str]:
    from library.checkpoints.kinds import check_slot
    from library.device_utils import device_problem

    model, pictures, adapters = config[AnimaModelOptions], config[AnimaPromptOptions], config[AnimaAdapterOptions]
    slots = [("vae", {"vae_wan"})] if pictures.output_type != "latent" or model.vae else []
    if not pictures.latent_path:
        slots = [("dit", {"anima", "cosmos"}), *slots, ("text_encoder", {"qwen3"})]
    found = [check_slot(getattr(model, slot), slot, kinds, for_pictures=True) for slot, kinds in slots]
    found += [file_problem(path, "lora_weight", "anima") for path in adapters.lora_weight or ()]
    found += [f"--latent_path is {path}: there is no such file" for path in pictures.latent_path or () if not Path(path).is_file()]
    if adapters.lycoris:
        from importlib.util import find_spec

        if find_spec("lycoris") is None:
            found.append("--lycoris needs the package lycoris-lora: pip install lycoris-lora")
    asked = {f"--{name}": "float8_e4m3fn" for name in ("fp8", "fp8_scaled") if getattr(model, name)}
    found += inference_script.format_problems({f"--dtype {model.dtype}": model.dtype_name, **asked}, model.device)
    return [problem for problem in (*found, device_problem("device", model.device)) if problem]


def _fitting_problems(options: AnimaModelOptions, problems: Problems) -> list[str]:
    """Sizes of the files against each other, and tokenizers that cannot be found or read, or that are of other models."""
    from library.anima_utils import fitting_problems, inspect_anima, inspect_llm_adapter
    from library.components.llm_encoder_utils import inspect_qwen3
    from library.components.tokenizers import load_qwen3_tokenizer, load_t5_tokenizer

    source = options.llm_adapter_path or options.dit
    params = problems.attempt(lambda: inspect_anima(options.dit).params)
    qwen3 = problems.attempt(lambda: inspect_qwen3(options.text_encoder))
    adapter = problems.attempt(lambda: inspect_llm_adapter(source)[2]) if options.llm_adapter_path else params and params.adapter
    if problems.messages:
        return []
    cache_dir, vae = options.tokenizer_cache_dir, ("vae", options.vae) if options.vae else None
    found = problems.attempt(lambda: fitting_problems(
        params, adapter, qwen3=("text_encoder", options.text_encoder), vae=vae, model=options.dit, adapter_path=source
    )) or []  # fmt: skip
    found += tokenizer_problems(
        lambda: load_qwen3_tokenizer(options.qwen3_tokenizer, cache_dir, options.text_encoder),
        lambda: qwen3["vocab_size"], "Qwen3", "--qwen3_tokenizer", f"--text_encoder {options.text_encoder}",
    )  # fmt: skip
    found += tokenizer_problems(
        lambda: load_t5_tokenizer(options.t5_tokenizer_path, cache_dir, option="--t5_tokenizer_path"),
        (lambda: adapter.vocab) if adapter else None, "T5", "--t5_tokenizer_path", f"the LLM adapter in {source}",
    )  # fmt: skip
    return found
