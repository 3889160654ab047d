"""The image script of SDXL: what its files must be."""

from __future__ import annotations

from typing import TYPE_CHECKING

from library.core.errors import CheckpointError, Problems, problems_of
from library.core.options import Config
from library.dataset.architectures import ARCHITECTURES
from library.generation.adapter_files import adapter_problems
from library.generation.script import ImageScript, format_problems
from library.generation.sdxl_options import (
    GROUPS,
    LINE_OPTIONS,
    SIZE_STEP,
    SdxlModelOptions,
    SdxlPromptOptions,
    SdxlRequest,
)
from library.training.inference_samplers import check_sd_table, sampler_notices
from library.training.wiring.base import tokenizer_problems
from library.training.wiring.unet import about_slot, slot_problem

if TYPE_CHECKING:
    from library.checkpoints.embeddings import Widths
    from library.generation.pipeline import PictureMaker


class SdxlScript(ImageScript[SdxlRequest]):
    family = "sdxl"
    title = "SDXL"
    adapters = SdxlModelOptions
    pictures = SdxlPromptOptions
    groups = GROUPS
    line_options = LINE_OPTIONS
    size_step = SIZE_STEP
    script_file = "sdxl_minimal_inference.py"
    texts = {"prompt2": "prompt2", "sampler": "sampler"}

    def check(self, config: Config) -> None:
        check(config[SdxlModelOptions])

    def request_problems(self, config: Config, request: SdxlRequest) -> list[str]:
        return problems_of(lambda: check_sd_table(request.sigma_table, "--sigma_table", request.sampler))

    def notices(self, config: Config) -> list[str]:
        told = "--prompt2 goes to the second text encoder with its own padding (known scripts give both encoders the first prompt)"
        return [told, *sampler_notices(config[SdxlPromptOptions].sampler)]

    def embedding_widths(self, config: Config) -> Widths:
        from library.sdxl_utils import embedding_widths

        return embedding_widths(config[SdxlModelOptions].ckpt_path)

    def load(self, config: Config) -> PictureMaker[SdxlRequest]:
        from library.generation.sdxl_pipeline import load_pipeline

        return load_pipeline(config[SdxlModelOptions])


def check(options: SdxlModelOptions) -> None:
    """Every missing or wrong file at once, from headers; ConfigError."""
    problems = Problems()
    model_problem = slot_problem(options.ckpt_path, "ckpt_path", {"sdxl"}, for_pictures=True)
    vae_problem = slot_problem(options.vae, "vae", {"vae_sd", "sdxl"}) if options.vae else None
    formats = format_problems({f"--dtype {options.dtype}": options.dtype_name})
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
    return (
        []
        if channels == wanted
        else [f"--{slot} is {path}: its autoencoder has {channels} latent channels; {wanted} are needed"]
    )


SCRIPT = SdxlScript()
build_parser, main, run = SCRIPT.build_parser, SCRIPT.main, SCRIPT.run
