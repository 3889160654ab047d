"""Averaging of saved adapters: options, checks, and the order of things. The formulas are in
networks/operations/post_hoc_ema.py."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from library.core.errors import Problems
from library.core.options import Config, option
from library.core.plugins import PluginOptions
from library.scripts.command_line import script_parser
from library.scripts.tool_script import DTYPES, OutputOptions, dtype_problem, output_problems, tool_exit_code
from library.training.option_groups import ConsoleOptions, OverflowOptions
from tools.lora_tools.adapter_input import (
    AdapterFile,
    adapter_slot_problem,
    add_files,
    ending_problem,
    read_file,
    read_with_files,
    refuse_shared_config,
    write_config_beside,
)

if TYPE_CHECKING:
    import torch

logger = logging.getLogger("atelier")


@dataclass(frozen=True, kw_only=True)
class AveragingOptions:
    """How files are averaged"""

    no_sort: bool = option(
        False, help="take the files in the order of the command line, not from the oldest to the newest"
    )
    beta: float = option(0.95, help="share of the average that a next file leaves")
    beta2: float | None = option(None, help="the same at the last file; goes there from --beta in equal steps")
    sigma_rel: float | None = option(
        None, help="relative width of a power function, which takes the place of --beta; below 0.2887"
    )


@dataclass(frozen=True, kw_only=True)
class EmaFileOptions:
    """Files"""

    models: list[str] | None = option(
        None, nargs="+", help="the saved files; they can be given without the name of the option too"
    )
    output_file: str | None = option(None, help="the averaged file", flags=("--save_to",))
    save_precision: str | None = option(
        None, help="number format of the result; that of the newest file when not given"
    )


CLASSES = (EmaFileOptions, AveragingOptions, OutputOptions, OverflowOptions, PluginOptions, ConsoleOptions)


def build_parser() -> argparse.ArgumentParser:
    return add_files(
        script_parser("Average the saved files of one adapter training (post-hoc EMA)", CLASSES),
        "models",
        "the saved files",
    )


def main(argv: Sequence[str] | None = None) -> int:
    return tool_exit_code(run, argv)


def run(argv: Sequence[str] | None = None) -> None:
    """AtelierError with one message for whatever is wrong; nothing is written then."""
    config = read_with_files(argv, build_parser(), CLASSES, "models")
    files = config[EmaFileOptions]
    average_files(config, files.models or [], files.output_file, files.save_precision, "output_file")


def average_files(
    config: Config, paths: Sequence[str], save_to: str | None, precision: str | None, output: str
) -> None:
    """Average these files by the AveragingOptions of `config` and write the result. `output` is the name of the option
    that says where."""
    import torch

    from library.checkpoints.number_formats import clamping
    from library.core.errors import ConfigError
    from networks.files.network_files import write_adapter_file
    from networks.operations.post_hoc_ema import Averaging, averaged

    options, problems = config[AveragingOptions], Problems()
    how = problems.attempt(lambda: Averaging(options.beta, options.beta2, options.sigma_rel))
    if len(paths) < 2:
        problems.add(f"{len(paths)} files are given; an average needs two or more")
    messages = [
        ending_problem(save_to, output),
        dtype_problem("save_precision", precision),
        *output_problems([save_to], paths, config),
    ]
    for message in (*messages, *(adapter_slot_problem(path, "models") for path in paths)):
        if message:
            problems.add(message)
    problems.raise_if_any()
    try:
        ordered = list(paths) if options.no_sort else sorted(paths, key=os.path.getmtime)
    except OSError as error:
        raise ConfigError(f"{error.filename} cannot be looked at: {error.strerror}") from error
    files = [read_file(path) for path in ordered]
    for file in files:
        refuse_shared_config(file, save_to)
    tensors = averaged([(file.path, _all_tensors(file)) for file in files], how)
    newest = files[-1]
    tensors = _without_foreign_alphas(newest, tensors)
    for path, share in zip(ordered, [0.0, *how.shares(len(files) - 1)], strict=True):
        logger.info("%s: the average before it counts %.4f", path, share)
    if config[OutputOptions].dry_run:
        return
    spec = (
        {"modelspec.title": os.path.splitext(os.path.basename(save_to))[0]}
        if "modelspec.title" in newest.metadata
        else {}
    )
    dtype = getattr(torch, DTYPES[precision.lower()]) if precision else None
    with clamping(config[OverflowOptions].clamp_overflow):
        write_adapter_file(save_to, tensors, dtype, {**newest.metadata, **spec})
    logger.info("wrote %s", save_to)
    write_config_beside(save_to, newest, tensors)


def _all_tensors(file: AdapterFile) -> dict[str, torch.Tensor]:
    """All tensors by their keys. An alpha that PEFT's configuration tells stands under one too, so that those of all
    files are compared."""
    own = {layer.key_of(name): tensor for layer in file.layers.values() for name, tensor in layer.tensors.items()}
    return {**file.others, **own}


def _without_foreign_alphas(file: AdapterFile, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The averaged tensors under the keys of the file alone. A strength that stood beside the file goes into the up
    matrices; one in its metadata stays there."""
    from library.checkpoints.number_formats import narrowed
    from networks.files.layer_tensors import scale_of

    result = dict(tensors)
    for layer in file.layers.values():
        if "alpha" not in layer.tensors or "alpha" in layer.keys:
            continue
        del result[layer.key_of("alpha")]
        if file.has_config_beside:
            key = layer.keys["lora_up.weight"]
            result[key] = narrowed(key, tensors[key].float() * scale_of(layer.tensors), tensors[key].dtype)
    return result
