"""The resize tool: its options, its checks, and the order of things. The formulas are in
networks/operations/lora_resize.py."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from library.core.errors import CheckpointError, Problems
from library.core.options import LARGEST_RANK, Config, option
from library.core.plugins import PluginOptions
from library.core.text_files import parse_json
from library.scripts.command_line import read_command, script_parser
from library.scripts.tool_script import DTYPES, OutputOptions, dtype_problem, output_problems, tool_exit_code
from library.training.option_groups import ConsoleOptions, OverflowOptions
from tools.lora_tools.adapter_input import (
    AdapterFile,
    adapter_slot_problem,
    ending_problem,
    read_file,
    refuse_shared_config,
    write_config_beside,
)

if TYPE_CHECKING:
    import torch

    from networks.operations.lora_resize import Resized
    from networks.operations.rank_rules import RankRule

logger = logging.getLogger("atelier")

METHODS = ("sv_ratio", "sv_fro", "sv_cumulative", "sv_quantile", "sv_threshold")


@dataclass(frozen=True, kw_only=True)
class ResizeOptions:
    """What is resized"""

    model: str | None = option(None, help="adapter file of any family and naming; the result keeps its names")
    save_to: str | None = option(None, help="the resized file; with --split_unit the rank is added to its name")
    new_rank: int = option(
        4, least=1, help="rank of the result; with --dynamic_method the largest rank of a layer", most=LARGEST_RANK
    )
    new_conv_rank: int | None = option(
        None, least=1, help="the same for convolutions larger than 1x1; --new_rank when not given", most=LARGEST_RANK
    )
    dynamic_method: str | None = option(
        None, choices=(None, *METHODS), help="choose the rank of each layer by its singular values"
    )
    dynamic_param: float | None = option(
        None,
        help="sv_ratio: keep values above the largest divided by this; sv_fro: this share of the Frobenius norm; sv_cumulative, sv_quantile: this"
        " share of the sum of the values; sv_threshold: values above this",
    )
    split_unit: int | None = option(
        None, help="split a DyLoRA file into files of rank n, 2n, 3n, ... up to its own, at the strength of training"
    )
    save_precision: str | None = option(None, help="number format of the result; float32 when not given")
    device: str = option("cpu", help="where the decompositions are computed, e.g. cuda")
    verbose: bool = option(False, help="print a line for every layer: rank, kept shares, spread of the singular values")


CLASSES = (ResizeOptions, OutputOptions, OverflowOptions, PluginOptions, ConsoleOptions)


def build_parser() -> argparse.ArgumentParser:
    return script_parser("Change the rank of an adapter file, or split a DyLoRA file into its ranks", CLASSES)


def main(argv: Sequence[str] | None = None) -> int:
    return tool_exit_code(run, argv)


def run(argv: Sequence[str] | None = None) -> None:
    """AtelierError with one message for whatever is wrong; nothing is written then."""
    config = read_command(argv, build_parser(), CLASSES)
    rules = check(config)
    source = read_file(config[ResizeOptions].model)
    if config[ResizeOptions].split_unit is not None:
        split(config, source)
    else:
        resize(config, source, *rules)


def check(config: Config) -> tuple[RankRule, RankRule]:
    """(rule for linear layers and 1x1 convolutions, rule for larger kernels); ConfigError with every problem."""
    from library.device_utils import device_problem
    from networks.operations.rank_rules import RankRule

    options, problems = config[ResizeOptions], Problems()
    if not options.model:
        problems.add("--model is missing; name the adapter file")
    conv_rank = options.new_rank if options.new_conv_rank is None else options.new_conv_rank
    rules = [
        problems.attempt(lambda rank=rank: RankRule(rank, options.dynamic_method, options.dynamic_param))
        for rank in (options.new_rank, conv_rank)
    ]
    if options.split_unit is not None:
        if options.split_unit < 1:
            problems.add(f"--split_unit is {options.split_unit}; needed: 1 or more")
        given = [
            name for name in ("new_conv_rank", "dynamic_method", "dynamic_param") if getattr(options, name) is not None
        ]
        given += ["new_rank"] if options.new_rank != 4 else []
        if given:
            problems.add(
                f"--split_unit cuts a file into its ranks; --{given[0]} has no meaning beside it, leave it out"
            )
    found = (
        ending_problem(options.save_to, "save_to"), dtype_problem("save_precision", options.save_precision),
        device_problem("device", options.device),
        adapter_slot_problem(options.model, "model"), *output_problems([options.save_to], [options.model], config),
    )  # fmt: skip
    for message in found:
        if message:
            problems.add(message)
    problems.raise_if_any()
    return rules[0], rules[1]


# -- another rank ------------------------------------------------------------------------------------------------------


def resize(config: Config, source: AdapterFile, linear: RankRule, conv: RankRule) -> None:
    """Every layer at its new rank, in one file."""
    from networks.operations.lora_resize import lines, resized_layer

    options = config[ResizeOptions]
    refuse_shared_config(source, options.save_to)
    tensors, reports = dict(source.others), []
    for layer in source.layers.values():
        own, report = resized_layer(layer, linear, conv, options.device)
        tensors |= own
        if report is not None:
            reports.append(report)
    if not reports:
        raise CheckpointError(f"{source.path} has no layer with a rank: norms and biases alone cannot be resized")
    if options.verbose:
        print("\n".join(lines(reports)))
    _tell(reports)
    if not config[OutputOptions].dry_run:
        _write(options.save_to, tensors, _metadata(options, source, reports), config, source)


def _tell(reports: list[Resized]) -> None:
    kept = [report.kept for report in reports]
    mean = sum(kept) / len(kept)
    deviation = (sum((value - mean) ** 2 for value in kept) / len(kept)) ** 0.5
    ranks = sorted({report.rank for report in reports})
    told = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    logger.info(
        "%d layers, rank %s; kept share of the norm: mean %.4f, deviation %.4f", len(reports), told, mean, deviation
    )


def _metadata(options: ResizeOptions, source: AdapterFile, reports: list[Resized]) -> dict[str, str]:
    from networks.files.adapter_layout import with_peft_settings
    from networks.operations.lora_resize import writes_alpha

    old, conv_rank = source.metadata, options.new_rank if options.new_conv_rank is None else options.new_conv_rank
    before, comment = _old_rank(source), old.get("ss_training_comment", "")
    if options.dynamic_method:
        told = f"Dynamic resize with {options.dynamic_method}: {options.dynamic_param:g} from {before}"
    else:
        has_conv = any(report.is_kxk for report in reports)
        told = f"dimension is resized from {before} to {options.new_rank}{f' (conv: {conv_rank})' if has_conv else ''}"
    ranked = {report.name for report in reports}
    others = [name for name, layer in source.layers.items() if name in ranked and "lora_down.weight" not in layer.keys]
    told += f"; {len(others)} layers of other kinds rewritten as LoRA" if others else ""
    metadata = {**old, "ss_training_comment": f"{told}; {comment}"}
    if others:
        metadata["ss_network_module"] = "networks.lora"
    usual = [report for report in reports if not report.is_kxk] or reports
    for key, values in (
        ("ss_network_dim", {report.rank for report in usual}),
        ("ss_network_alpha", {report.alpha for report in usual}),
    ):
        dynamic = options.dynamic_method or len(values) > 1
        metadata[key] = (
            "Dynamic" if dynamic else f"{next(iter(values)):g}" if key.endswith("alpha") else str(next(iter(values)))
        )
    _renew_conv_args(metadata, [report for report in reports if report.is_kxk])
    peft = {
        report.name: report.rank
        for report in reports
        if source.layers[report.name].is_peft and not writes_alpha(source.layers[report.name])
    }
    return with_peft_settings(metadata, peft)


def _renew_conv_args(metadata: dict[str, str], convs: list[Resized]) -> None:
    """conv_dim and conv_alpha in ss_network_args are those of the result."""
    import json

    try:
        pairs = json.loads(metadata.get("ss_network_args", "null"))
    except (ValueError, RecursionError):
        return
    if not isinstance(pairs, dict) or "conv_dim" not in pairs or not convs:
        return
    for key, values in (
        ("conv_dim", {report.rank for report in convs}),
        ("conv_alpha", {report.alpha for report in convs}),
    ):
        pairs[key] = f"{next(iter(values)):g}" if len(values) == 1 else "Dynamic"
    metadata["ss_network_args"] = json.dumps(pairs)


def _old_rank(source: AdapterFile) -> str:
    if source.metadata.get("ss_network_dim"):
        return source.metadata["ss_network_dim"]
    ranks = sorted(
        {
            layer.tensors["lora_up.weight"].shape[1]
            for layer in source.layers.values()
            if "lora_up.weight" in layer.tensors
        }
    )
    return "unknown" if not ranks else str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"


def _write(
    path: str, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str], config: Config, source: AdapterFile
) -> None:
    import torch

    from library.checkpoints.number_formats import clamping
    from networks.files.network_files import write_adapter_file

    word = config[ResizeOptions].save_precision
    dtype = getattr(torch, DTYPES[word.lower()] if word else "float32")
    with clamping(config[OverflowOptions].clamp_overflow):
        write_adapter_file(path, tensors, dtype, metadata)
    logger.info("wrote %s", path)
    write_config_beside(path, source, tensors)


# -- DyLoRA ------------------------------------------------------------------------------------------------------------


def split(config: Config, source: AdapterFile) -> None:
    """One file for every rank that DyLoRA trained, at the strength that it had in training."""
    import json

    from networks.files.adapter_metadata import one_or_dynamic
    from networks.operations.lora_resize import dylora_part, dylora_ranks

    options = config[ResizeOptions]
    full, ranks = dylora_ranks(source.layers, options.split_unit)
    stem, ending = os.path.splitext(options.save_to)
    paths = {rank: f"{stem}-{rank:04d}{ending}" for rank in ranks}
    problems = Problems()
    for message in output_problems(paths.values(), [source.path], config):
        problems.add(message)
    problems.raise_if_any()
    for rank, path in paths.items():
        parts = [dylora_part(layer, rank) for layer in source.layers.values()]
        tensors = {key: tensor for part in parts for key, tensor in part.items()}
        alphas = [float(tensor) for key, tensor in tensors.items() if key.endswith(".alpha")]
        comment = f"split from DyLoRA, rank {full} to {rank}; {source.metadata.get('ss_training_comment', '')}"
        metadata = {
            **source.metadata,
            "ss_training_comment": comment,
            "ss_network_dim": str(rank),
            "ss_network_module": "networks.lora",
        }
        if alphas:
            metadata["ss_network_alpha"] = one_or_dynamic(alphas)
        if "ss_network_args" in metadata:
            pairs = parse_json(
                metadata["ss_network_args"], f"{source.path}: ss_network_args in its metadata", CheckpointError
            )
            pairs = pairs if isinstance(pairs, dict) else {}
            metadata["ss_network_args"] = json.dumps({key: value for key, value in pairs.items() if key != "unit"})
        logger.info("rank %d of %d: %s", rank, full, path)
        if not config[OutputOptions].dry_run:
            _write(path, {**source.others, **tensors}, metadata, config, source)
