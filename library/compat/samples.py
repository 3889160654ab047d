"""Sample prompts as dictionaries, and samples in a loop of one's own: the pictures of a run, from models that the
caller holds."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from library.compat.namespace import config_of
from library.components.control_nets import control_nets_of
from library.core.errors import UnsupportedCombination
from library.core.keyed_random import isolated_rng, key_seed
from library.core.registry import import_target
from library.dataset.strategies import StrategySet
from library.families.registry import record_of
from library.generation.control_pictures import control_of_picture
from library.generation.picture_files import write_picture
from library.strategy_base import TextEncodingStrategy, TokenizeStrategy
from library.training.hooks.sample import encode_sample_prompts
from library.training.option_groups import SamplingOptions, SavingOptions
from library.training.run import Models
from library.training.sampling_prompts import SamplePrompt, is_sample_due, sample_file_name
from library.training.sampling_prompts import load_prompts as read_prompts
from library.training.sampling_prompts import parse_line
from library.training.trainables.control_net import PART

logger = logging.getLogger(__name__)

Replacement = tuple[str, str]


def line_to_prompt_dict(line: str) -> dict[str, Any]:
    """The settings of one prompt line by name. Raises ConfigError for options that do not exist."""
    return parse_line(line).to_dict()


def load_prompts(prompt_file: str) -> list[dict[str, Any]]:
    """The settings of every prompt of a file by name, `enum` being its place."""
    return [prompt.to_dict() for prompt in read_prompts(prompt_file)]


def sample_images_sd(
    accelerator: Any, args: Any, epoch: int | None, steps: int, device: Any, vae: Any, tokenizer: Any,
    text_encoder: Any, unet_wrapped: Any,
    prompt_replacement: Replacement | None = None, controlnet: Any = None,
) -> None:
    """The samples of Stable Diffusion 1 and 2 where they are due: step 0 with --sample_at_first, else by step, or by
    epoch where one is given. `controlnet` follows the --cn of a prompt. `tokenizer`
    may be a TokenizeStrategy; else that of set_strategy or of the options
    counts."""
    sample_family(
        "sd", accelerator, args, epoch, steps, vae, unet_wrapped, text_encoder, tokenizer, None, prompt_replacement,
        controlnet,
    )


def sample_images_sdxl(
    accelerator: Any, args: Any, epoch: int | None, steps: int, device: Any, vae: Any, tokenizer: Any,
    text_encoder: Any, unet_wrapped: Any,
    prompt_replacement: Replacement | None = None, controlnet: Any = None,
) -> None:
    """The samples of SDXL, as those of Stable Diffusion; `text_encoder` is the list of both."""
    sample_family(
        "sdxl", accelerator, args, epoch, steps, vae, unet_wrapped, text_encoder, tokenizer, None, prompt_replacement,
        controlnet,
    )


def sample_images_flux(
    accelerator: Any, args: Any, epoch: int | None, steps: int, flux: Any, ae: Any, text_encoders: Any,
    sample_prompts_te_outputs: Mapping[str, Sequence[Any]] | None, prompt_replacement: Replacement | None = None,
    controlnet: Any = None,
) -> None:
    """The samples of FLUX.1; `sample_prompts_te_outputs` (text -> list of outputs) spares the text encoders."""
    sample_family(
        "flux",
        accelerator,
        args,
        epoch,
        steps,
        ae,
        flux,
        text_encoders,
        None,
        sample_prompts_te_outputs,
        prompt_replacement,
        controlnet,
    )


def refuse_control_net(controlnet: Any) -> None:
    if controlnet is not None:
        raise UnsupportedCombination("sample_images: samples with a ControlNet are not there; leave controlnet out")


@torch.no_grad()
def sample_family(
    family_name: str, accelerator: Any, args: Any, epoch: int | None, steps: int, vae: Any, denoiser: Any,
    text_encoders: Any, tokenize: Any,
    outputs: Mapping[str, Sequence[Any]] | None, replacement: Replacement | None, controlnet: Any = None,
) -> None:
    """The samples of a family where they are due; see `sample_images_sd`."""
    at = "first" if steps == 0 else "step" if epoch is None else "epoch"
    path = getattr(args, "sample_prompts", None)
    config = config_of(args, family_name, "network") if path else None
    if (
        config is None
        or not is_sample_due(config[SamplingOptions], at, steps, epoch or 0)
        or not accelerator.is_main_process
    ):
        return
    family = import_target(record_of(family_name).family)(config)
    strategies = _strategies(family, tokenize)
    prompts = [_replaced(prompt, replacement) for prompt in read_prompts(path)]
    encoders = [*text_encoders] if isinstance(text_encoders, (list, tuple)) else [text_encoders]
    models = Models(
        vae,
        [accelerator.unwrap_model(e) if e is not None else None for e in encoders],
        accelerator.unwrap_model(denoiser),
        {} if controlnet is None else {PART: accelerator.unwrap_model(controlnet)},
    )
    seed, mode = getattr(args, "seed", None) or 0, models.denoiser.training
    models.denoiser.eval()
    try:
        with isolated_rng(seed), accelerator.autocast():
            texts = {text: strategies.layout.named(tensors) for text, tensors in (outputs or {}).items()}
            texts |= encode_sample_prompts(family, strategies, models.text_encoders, prompts) if not texts else {}
            for number, given in enumerate(prompts):
                when = epoch if at == "epoch" else steps
                _write(config[SavingOptions], family, strategies, models, given, texts, at, number, when, seed)
    finally:
        models.denoiser.train(mode)


def _write(
    saving: SavingOptions, family: Any, strategies: StrategySet, models: Models, given: SamplePrompt,
    texts: Mapping[Any, Any], at: str, number: int, when: int, seed: int,
) -> None:
    prompt = family.sample_defaults(given)
    if prompt.seed is None:
        prompt = dataclasses.replace(prompt, seed=key_seed(seed, "sample without a seed", when, number) % 2**32)
    negative = None
    if family.needs_negative(prompt):
        text = prompt.negative_prompt or ""
        negative = texts.get(strategies.negative_key(text)) or texts[text]  # outputs that callers give have texts alone
    pipeline = family.pipeline(models)
    if PART in models.extra and prompt.controlnet_image:
        size, values = (prompt.width, prompt.height), control_nets_of(family.name).picture_range
        control = control_of_picture(models.extra[PART], prompt.controlnet_image, size, values)
        pipeline = dataclasses.replace(pipeline, control=control)
    image = pipeline.sample(prompt, texts[prompt.prompt], negative)
    name = sample_file_name(
        saving.output_name, at, when, enum=number if given.enum is None else given.enum, seed=given.seed,
        timestamp=time.strftime("%Y%m%d%H%M%S")
    )
    logger.info("wrote %s", write_picture(image, Path(saving.output_dir or ".") / name, {}))


def _strategies(family: Any, tokenize: Any) -> StrategySet:
    """Those that the caller gave or set, the others of the family's options."""
    tokenize = tokenize if isinstance(tokenize, TokenizeStrategy) else TokenizeStrategy.get_strategy()
    encoding = TextEncodingStrategy.get_strategy()
    own = family.strategies()
    return dataclasses.replace(own, tokenize=tokenize or own.tokenize, text_encoding=encoding or own.text_encoding)


def _replaced(prompt: SamplePrompt, replacement: Replacement | None) -> SamplePrompt:
    if replacement is None:
        return prompt
    texts = {name: getattr(prompt, name) for name in ("prompt", "negative_prompt")}
    return dataclasses.replace(
        prompt, **{name: text.replace(*replacement) for name, text in texts.items() if text is not None}
    )
