"""The image script of Anima: what its files must be."""

from __future__ import annotations

from typing import TYPE_CHECKING

from library.core.errors import Problems
from library.core.options import Config
from library.families.anima import FAMILY
from library.generation.adapter_files import ListedAdapterOptions
from library.generation.anima_options import (
    GROUPS,
    LINE_OPTIONS,
    SIZE_STEP,
    AnimaModelOptions,
    AnimaPromptOptions,
    AnimaRequest,
)
from library.generation.latent_script import LatentScript
from library.generation.script import format_problems
from library.generation.speed_options import speed_of
from library.training.wiring.base import tokenizer_problems

if TYPE_CHECKING:
    import torch

    from library.families.latents import SideLimit
    from library.generation.anima_pipeline import AnimaPipeline
    from library.generation.pipeline import PictureMaker


class AnimaScript(LatentScript[AnimaRequest]):
    """Its pictures can be written as latents, and latents be read for pictures."""

    family = "anima"
    title = "Anima"
    adapters = ListedAdapterOptions
    pictures = AnimaPromptOptions
    groups = GROUPS
    line_options = LINE_OPTIONS
    size_step = SIZE_STEP
    texts = {"flow-shift": "flow_shift", "sampler": "sampler"}

    def check(self, config: Config) -> None:
        check(config)

    def notices(self, config: Config) -> list[str]:
        return ["latents are kept in float32 between the steps (known scripts round them to the type of the weights)"]

    def side_limit(self, config: Config) -> SideLimit | None:
        from library.anima_utils import inspect_anima

        path = config[AnimaModelOptions].dit
        return FAMILY.latents.side_limit(inspect_anima(path).params.most_patches) if path else None

    def load(self, config: Config) -> PictureMaker[AnimaRequest]:
        from library.generation.anima_pipeline import load_pipeline

        needs_vae = config[AnimaPromptOptions].output_type != "latent"
        groups = config[AnimaModelOptions], config[ListedAdapterOptions]
        return load_pipeline(*groups, needs_vae=needs_vae, speed=speed_of(config))

    def load_decoder(self, config: Config) -> tuple[AnimaPipeline, torch.device]:
        from library.generation.anima_pipeline import AnimaPipeline, device_of, load_decoder

        model = config[AnimaModelOptions]
        return AnimaPipeline(None, load_decoder(model)), device_of(model)


# -- checks ------------------------------------------------------------------------------------------------------------


def check(config: Config) -> None:
    """Everything that is wrong with options and files, from headers alone; ConfigError."""
    problems, model = Problems(), config[AnimaModelOptions]
    for problem in [*SCRIPT.prompt_problems(config, is_fp8=model.fp8 or model.fp8_scaled), *_file_problems(config)]:
        problems.add(problem)
    if not problems.messages and not config[AnimaPromptOptions].latent_path:
        for problem in _fitting_problems(config[AnimaModelOptions], problems):
            problems.add(problem)
    problems.raise_if_any()


def _file_problems(config: Config) -> list[str]:
    from library.anima_utils import adapter_file_problem
    from library.checkpoints.kinds import check_slot
    from library.device_utils import device_problem

    model, pictures = config[AnimaModelOptions], config[AnimaPromptOptions]
    slots = [("vae", {"vae_wan"})] if pictures.output_type != "latent" or model.vae else []
    if not pictures.latent_path:
        slots = [("dit", {"anima", "cosmos"}), *slots, ("text_encoder", {"qwen3"})]
    found = [check_slot(getattr(model, slot), slot, kinds, for_pictures=True) for slot, kinds in slots]
    found += [adapter_file_problem(model.llm_adapter_path), *SCRIPT.extra_file_problems(config)]
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
