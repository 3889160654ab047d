"""Models between one file in the original layout and a folder in that of diffusers: options, checks and the order of
things."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from library.core.errors import CheckpointError, ConfigError, Problems
from library.core.options import Config, option
from library.scripts.command_line import read_command, script_parser
from library.scripts.tool_script import DTYPES, OutputOptions, dtype_problem, output_problems, tool_exit_code
from library.training.option_groups import ConsoleOptions, OverflowOptions

if TYPE_CHECKING:
    from library.checkpoints.layout_rules import DenoiserLayouts

logger = logging.getLogger("atelier")


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """What is rewritten. Before the options: the model, then the file or folder to write"""

    to: str | None = option(
        None, choices=("single", "diffusers"), help="single: one file in the original layout; diffusers: a folder"
    )
    save_precision: str | None = option(None, help="number format of the result; as in the model when not given")
    tokenizer: str | None = option(
        None,
        help="folder of the CLIP tokenizer (vocab.json, merges.txt) that goes into a diffusers folder",
        metavar="FOLDER",
    )
    tokenizer_cache_dir: str | None = option(
        None, help="folder with tokenizers by their names on the hub", metavar="FOLDER"
    )
    prediction_type: str | None = option(
        None, choices=("epsilon", "v"),
        help="what the model predicts, for the scheduler of a diffusers folder, where the file does not tell it"
    )
    variant: str | None = option(None, help="with --to diffusers: word in the names of the weight files, e.g. fp16")


CLASSES = (ModelOptions, OutputOptions, OverflowOptions, ConsoleOptions)


def build_parser() -> argparse.ArgumentParser:
    parser = script_parser("Rewrite a model between one file and a diffusers folder", CLASSES)
    parser.usage = "%(prog)s SRC DST --to single|diffusers [options]"
    parser.add_argument("files", nargs="*", metavar="PATH", help="the model, then what to write")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return tool_exit_code(run, argv)


def run(argv: Sequence[str] | None = None) -> None:
    """AtelierError with one message for whatever is wrong; nothing is written then."""
    parser = build_parser()
    words = parser.parse_args(argv).files
    config = read_command(argv, parser, CLASSES)
    if len(words) != 2:
        raise ConfigError(
            f"{len(words)} paths are given ({', '.join(words)}); needed are two: the model, then what to write"
        )
    from library.checkpoints.number_formats import clamping

    source, target = words
    check(config, source, target)
    kind = kind_of_model(source)
    logger.info("%s: %s -> %s", source, kind.name, target)
    problems = Problems()
    for name in foreign_options(kind):
        if getattr(config[ModelOptions], name):
            problems.add(f"--{name} is not for {source}, which is {kind.name}; leave it out")
    problems.raise_if_any()
    with clamping(config[OverflowOptions].clamp_overflow):
        (_to_single if config[ModelOptions].to == "single" else _to_folder)(config, kind, source, target)


def check(config: Config, source: str, target: str) -> None:
    options, problems = config[ModelOptions], Problems()
    if not os.path.exists(source):
        problems.add(f"{source} does not exist")
    if not options.to:
        problems.add("--to is missing; give single (one file) or diffusers (a folder)")
    found = dtype_problem("save_precision", options.save_precision)
    if found:
        problems.add(found)
    if options.to == "single":
        if not target.endswith(".safetensors"):
            problems.add(f"the output {target} does not end in .safetensors")
        for name in ("tokenizer", "tokenizer_cache_dir", "prediction_type", "variant"):
            if getattr(options, name):
                problems.add(f"--{name} is for --to diffusers; leave it out")
        for found in output_problems([target], [source], config):
            problems.add(found)
    elif os.path.exists(target) and (not os.path.isdir(target) or os.listdir(target)):
        problems.add(f"the output {target} exists and is no empty folder; give another name")
    problems.raise_if_any()


PAGE = "docs/convert_model.md"
"""names all that is rewritten"""


@dataclass(frozen=True)
class Kind:
    """`name`: sd1, sd2, sdxl, or the title of a family with `layouts`, whose denoiser is rewritten, alone or with the
    other parts of its pipeline, or what one part of it is called that is rewritten alone."""

    name: str
    layouts: DenoiserLayouts | None = None


def foreign_options(kind: Kind) -> tuple[str, ...]:
    """Options that mean nothing for a model of this kind."""
    if kind.layouts is None:
        return ()
    return ("prediction_type", *(() if kind.layouts.pipeline else ("tokenizer", "tokenizer_cache_dir")))


def kind_of_model(source: str) -> Kind:
    """What is to be rewritten. CheckpointError for models of other kinds."""
    from library.checkpoints.loading import open_checkpoint
    from library.checkpoints.recognition import denoiser_kinds, recognise
    from library.components.unet_utils import inspect_unet
    from library.core.registry import import_target
    from library.families.registry import records

    parts = ("transformer", "unet", "vae", "controlnet")
    part = next((name for name in parts if (Path(source) / name).is_dir()), "unet")
    files = open_checkpoint(source, part)
    found = recognise({key: tuple(tensor.shape) for key, tensor in files.shapes.items()})
    for record in records().values():
        if found is not None and record.layouts and found.kind in record.kinds:
            return Kind(record.title, import_target(record.layouts))
        for kind in record.model_kinds:
            if found is not None and kind.layouts and found.kind == kind.name:
                return Kind(f"the {kind.subfolder} of {record.title}", import_target(kind.layouts))
    if found is not None and found.kind not in denoiser_kinds():
        raise CheckpointError(f"{source} is {found.title}; needed: a model, or a part of one, that is named in {PAGE}")
    info = inspect_unet(source)  # its errors name what the file is
    return Kind("sdxl" if info.is_sdxl else "sd2" if info.is_v2 else "sd1")


def _dtype(config: Config):
    import torch

    word = config[ModelOptions].save_precision
    return getattr(torch, DTYPES[word.lower()]) if word else None


def _to_single(config: Config, kind: Kind, source: str, target: str) -> None:
    from library.components import ldm_folder_files
    from tools.model_tools import denoiser_folder

    dtype = _dtype(config)
    if kind.layouts is not None:
        plan = denoiser_folder.single_plan(source, kind.layouts, dtype)
    else:
        plan = ldm_folder_files.single_plan(source, kind.name, dtype)
    if config[OutputOptions].dry_run:
        return
    plan.write(target)
    logger.info("wrote %s, %d tensors", target, len(plan.infos))


def _to_folder(config: Config, kind: Kind, source: str, target: str) -> None:
    from library.components import ldm_folder_files
    from tools.model_tools import denoiser_folder

    options, dtype = config[ModelOptions], _dtype(config)
    if os.path.isdir(source):
        raise CheckpointError(f"{source} is a folder; --to diffusers takes one file in the original layout")
    if kind.layouts is not None:
        tokenizers = options.tokenizer, options.tokenizer_cache_dir
        plan = denoiser_folder.folder_plan(source, kind.layouts, dtype, *tokenizers)
        if not config[OutputOptions].dry_run:
            plan.write(target, options.variant)
            logger.info("wrote %s", target)
        return
    folder = ldm_folder_files.read_single(source, kind.name, options.prediction_type)
    tokenizer = ldm_folder_files.tokenizer_of(options.tokenizer, options.tokenizer_cache_dir)
    if config[OutputOptions].dry_run:
        return
    ldm_folder_files.write_folder(folder, tokenizer, target, dtype, options.variant)
    logger.info("wrote %s", target)
