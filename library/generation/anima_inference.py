"""The image script of Anima: what its files must be, and files of latents."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from library.core.errors import Problems
from library.core.options import Config
from library.generation.adapter_files import file_problem
from library.generation.anima_options import (
    GROUPS,
    LINE_OPTIONS,
    SIZE_STEP,
    AnimaAdapterOptions,
    AnimaModelOptions,
    AnimaPromptOptions,
    AnimaRequest,
)
from library.generation.picture_files import write_picture
from library.generation.requests import SessionOptions
from library.generation.script import ImageScript, format_problems, output_name
from library.training.wiring.base import tokenizer_problems

if TYPE_CHECKING:
    from torch import Tensor

    from library.generation.pipeline import PictureMaker

logger = logging.getLogger(__name__)


class AnimaScript(ImageScript[AnimaRequest]):
    """Its pictures can be written as latents, and latents be read for pictures."""

    family = "anima"
    title = "Anima"
    adapters = AnimaAdapterOptions
    pictures = AnimaPromptOptions
    groups = GROUPS
    line_options = LINE_OPTIONS
    size_step = SIZE_STEP
    texts = {"flow-shift": "flow_shift", "sampler": "sampler"}

    def check(self, config: Config) -> None:
        check(config)

    def notices(self, config: Config) -> list[str]:
        return ["latents are kept in float32 between the steps (known scripts round them to the type of the weights)"]

    def load(self, config: Config) -> PictureMaker[AnimaRequest]:
        from library.generation.anima_pipeline import load_pipeline

        needs_vae = config[AnimaPromptOptions].output_type != "latent"
        return load_pipeline(config[AnimaModelOptions], config[AnimaAdapterOptions], needs_vae=needs_vae)

    def make_all(self, config: Config) -> list[Path]:
        if not config[AnimaPromptOptions].latent_path:
            return super().make_all(config)
        self._check_all(config)
        return decode_files(config)

    def write(
        self, maker: PictureMaker[AnimaRequest], config: Config, latents: Tensor, path: Path, texts: Mapping[str, str]
    ) -> Path:
        """The picture, its latents, or both; the path of the picture where there is one."""
        output_type = config[AnimaPromptOptions].output_type
        if output_type != "images":
            from library.generation.anima_pipeline import save_latents

            written = save_latents(latents, path.with_name(f"{path.stem}_latent.safetensors"), texts)
            if output_type == "latent":
                return written
        return super().write(maker, config, latents, path, texts)


def decode_files(config: Config) -> list[Path]:
    """Pictures of the files of --latent_path: `{YYYYmmdd_HHMMSS}_{index}_{name of the file}.png`."""
    from library.generation.anima_pipeline import AnimaPipeline, device_of, load_decoder, read_latents

    pictures, model = config[AnimaPromptOptions], config[AnimaModelOptions]
    pipeline, device = AnimaPipeline(None, load_decoder(model)), device_of(model)
    paths = []
    for index, source in enumerate(pictures.latent_path):
        latents, texts = read_latents(source, pipeline.vae.params.z_dim)
        name = output_name(None, index, f"_{Path(source).stem.removesuffix('_latent')}.png")
        texts = {} if config[SessionOptions].no_metadata else texts
        paths.append(write_picture(pipeline.decode(latents.to(device)), Path(pictures.output_dir) / name, texts))
        logger.info("%s", paths[-1])
    return paths


# -- checks ------------------------------------------------------------------------------------------------------------


def check(config: Config) -> None:
    """Everything that is wrong with options and files, from headers alone; ConfigError."""
    problems = Problems()
    for problem in [*_prompt_problems(config), *_file_problems(config)]:
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
        found.append(
            "--lycoris needs whole weights; with --fp8 or --fp8_scaled leave it out, our own modules read the same files"
        )
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
    found += [
        f"--latent_path is {path}: there is no such file"
        for path in pictures.latent_path or ()
        if not Path(path).is_file()
    ]
    if adapters.lycoris:
        from importlib.util import find_spec

        if find_spec("lycoris") is None:
            found.append("--lycoris needs the package lycoris-lora: pip install lycoris-lora")
    asked = {f"--{name}": "float8_e4m3fn" for name in ("fp8", "fp8_scaled") if getattr(model, name)}
    found += format_problems({f"--dtype {model.dtype}": model.dtype_name, **asked}, model.device)
    return [problem for problem in (*found, device_problem("device", model.device)) if problem]


def _fitting_problems(options: AnimaModelOptions, problems: Problems) -> list[str]:
    """Sizes of the files against each other, and tokenizers that cannot be found or read, or that are of other
    models."""
    from library.anima_utils import fitting_problems, inspect_anima, inspect_llm_adapter
    from library.components.llm_encoder_utils import inspect_qwen3
    from library.components.tokenizers import load_qwen3_tokenizer, load_t5_tokenizer

    source = options.llm_adapter_path or options.dit
    params = problems.attempt(lambda: inspect_anima(options.dit).params)
    qwen3 = problems.attempt(lambda: inspect_qwen3(options.text_encoder))
    adapter = (
        problems.attempt(lambda: inspect_llm_adapter(source)[2])
        if options.llm_adapter_path
        else params and params.adapter
    )
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


SCRIPT = AnimaScript()
build_parser, main, run = SCRIPT.build_parser, SCRIPT.main, SCRIPT.run
