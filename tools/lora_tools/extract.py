"""The extraction tool: its options, its checks, and the order of things. The formulas are in
networks/operations/extraction.py."""

from __future__ import annotations

import argparse
import logging
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from library.core.errors import CheckpointError, ConfigError, Problems
from library.core.options import LARGEST_RANK, Config, option
from library.families.record import ModelKind
from library.families.registry import FAMILIES, adapter_family_of, records
from library.scripts.command_line import read_command, script_parser
from library.scripts.tool_script import DTYPES, OutputOptions, dtype_problem, output_problems, tool_exit_code
from library.training.option_groups import ConsoleOptions, OverflowOptions
from tools.lora_tools.adapter_input import ending_problem
from tools.lora_tools.encoder_files import encoder_options, with_encoder_files

if TYPE_CHECKING:
    from networks.files.model_layers import Source
    from networks.operations.extraction import Extracted, ExtractionPlan

logger = logging.getLogger("atelier")

METHODS = ("sv_ratio", "sv_fro", "sv_cumulative", "sv_quantile", "sv_threshold")
ENCODERS = encoder_options()


def versions() -> dict[str, ModelKind]:
    """Kinds of model whose adapters are named after it in metadata."""
    return {kind.name: kind for record in records().values() for kind in record.model_kinds if kind.base_version}


@with_encoder_files({"org": "original {} text encoder", "tuned": "tuned {} text encoder"})
@dataclass(frozen=True, kw_only=True)
class ExtractModelOptions:
    """Models"""

    model_org: str | None = option(None, help="the original model: a file, or a folder in the layout of diffusers")
    model_tuned: str | None = option(None, help="the tuned model, in any layout")
    family: str | None = option(None, help="model family, where the files do not tell it", metavar="NAME")
    v_parameterization: bool = option(
        False, help="the base predicts velocity (Stable Diffusion 2.x 768); said in the metadata"
    )

    @property
    def variant(self) -> str | None:
        """Which of a family's models --family says it is, where it says so."""
        name = (self.family or "").lower()
        return name if name in versions() else None


@dataclass(frozen=True, kw_only=True)
class ExtractOptions:
    """The adapter"""

    save_to: str | None = option(None, help="the adapter file")
    kind: str = option(
        "lora",
        choices=("lora", "lokr", "full", "norm"),
        help="lora: the best LoRA of each layer; lokr: the nearest Kronecker product; full: the differences as they are; norm: those of norms alone",
    )
    dim: int = option(
        4, least=1, most=LARGEST_RANK, help="rank of the LoRA; with --dynamic_method the largest rank of a layer"
    )
    conv_dim: int | None = option(
        None, least=1, most=LARGEST_RANK,
        help="the same for convolutions larger than 1x1, which are left out when not given",
    )
    dynamic_method: str | None = option(
        None, choices=(None, *METHODS), help="choose the rank of each layer by its singular values"
    )
    dynamic_param: float | None = option(None, help="number of --dynamic_method, as in tools/resize_lora.py")
    factor: int = option(-1, help="size of the smaller half with --kind lokr; -1 = near the square root")
    with_norms: bool = option(False, help="keep the differences of norm layers too")
    include: str | None = option(None, help="regular expression; take only layers in whose name it is found")
    exclude: str | None = option(None, help="regular expression; leave layers out in whose name it is found")
    min_diff: float = option(
        0.0, least=0, help="leave a part (denoiser, text encoder) out whose weights all differ by no more than this"
    )
    clamp_quantile: float | None = option(
        None, help="bound the numbers of the LoRA to this quantile of their size; distorts, not done when not given"
    )
    save_precision: str | None = option(None, help="number format of the result; float32 when not given")
    device: str = option("cpu", help="where the decompositions are computed, e.g. cuda")
    no_metadata: bool = option(False, help="leave modelspec.* out of the result's metadata")


CLASSES = (ExtractModelOptions, ExtractOptions, OutputOptions, OverflowOptions, ConsoleOptions)


def build_parser() -> argparse.ArgumentParser:
    return script_parser("Make an adapter of the difference between two models", CLASSES)


def main(argv: Sequence[str] | None = None) -> int:
    return tool_exit_code(run, argv)


def run(argv: Sequence[str] | None = None) -> None:
    """AtelierError with one message for whatever is wrong; nothing is written then."""
    config = read_command(argv, build_parser(), CLASSES)

    from networks.files.model_layers import ModelLayers, kind_of_model
    from networks.kinds.targets import targets_of_family
    from networks.operations.extraction import extract, told

    plan = check(config)
    original, tuned = sources(config[ExtractModelOptions], "org"), sources(config[ExtractModelOptions], "tuned")
    kind, other = kind_of_model(original), kind_of_model(tuned)
    if kind != other and None not in (kind, other):
        raise CheckpointError(f"the original is {kind} and the tuned model is {other}; both must be of one kind")
    family = family_of(config[ExtractModelOptions], kind or other)
    targets = targets_of_family(family)
    with (
        ModelLayers(targets, original, "the original model") as first,
        ModelLayers(targets, tuned, "the tuned model") as second,
    ):
        found = extract(targets, first, second, plan)
    for line in told(found):
        logger.info(line)
    if not config[OutputOptions].dry_run:
        write(config, found, config[ExtractModelOptions].variant or kind or other)


# -- checks ------------------------------------------------------------------------------------------------------------


def check(config: Config) -> ExtractionPlan:
    """What is extracted; ConfigError with every problem."""
    import torch

    from library.device_utils import device_problem
    from networks.operations.extraction import ExtractionPlan
    from networks.operations.rank_rules import RankRule

    models, options, problems = config[ExtractModelOptions], config[ExtractOptions], Problems()
    for found in (*_model_problems(models), *_kind_problems(options)):
        problems.add(found)
    rules = [
        problems.attempt(lambda rank=rank: RankRule(rank, options.dynamic_method, options.dynamic_param))
        if rank is not None
        else None
        for rank in (options.dim, options.conv_dim)
    ]
    patterns = [
        problems.attempt(lambda name=name: _pattern(name, getattr(options, name))) for name in ("include", "exclude")
    ]
    inputs = [getattr(models, name) for name in vars(models) if name.endswith(("_org", "_tuned"))]
    messages = (
        ending_problem(options.save_to, "save_to"), dtype_problem("save_precision", options.save_precision),
        device_problem("device", options.device),
        *output_problems([options.save_to], inputs, config),
    )  # fmt: skip
    for message in messages:
        if message:
            problems.add(message)
    problems.raise_if_any()
    return ExtractionPlan(
        kind=options.kind, linear=rules[0], conv=rules[1], factor=options.factor, norms=options.with_norms,
        include=patterns[0],
        exclude=patterns[1], min_diff=options.min_diff, clamp_quantile=options.clamp_quantile, device=options.device,
    )  # fmt: skip


def _model_problems(models: ExtractModelOptions) -> Iterator[str]:
    given = 0
    for name in ("model", *ENCODERS):
        pair = [getattr(models, f"{name}_{side}") for side in ("org", "tuned")]
        given += all(pair)
        for side, path in zip(("org", "tuned"), pair, strict=True):
            if not path and any(pair):
                yield f"--{name}_{side} is missing; an original and a tuned file belong together"
            if path and not os.path.exists(path):
                yield f"--{name}_{side} is {path}, which does not exist"
        if all(pair) and all(map(os.path.exists, pair)) and os.path.samefile(*pair):
            yield f"--{name}_org and --{name}_tuned are the same: {pair[0]}; name two models that differ"
    if not given and not any(getattr(models, name) for name in vars(models) if name.endswith(("_org", "_tuned"))):
        yield "--model_org and --model_tuned are missing; name the two models"


def _kind_problems(options: ExtractOptions) -> Iterator[str]:
    ranks = [name for name in ("conv_dim", "dynamic_method", "clamp_quantile") if getattr(options, name) is not None]
    if options.kind != "lora" and (ranks or options.dim != 4):
        yield f"--{(ranks or ['dim'])[0]} belongs to --kind lora; --kind {options.kind} has no rank, leave it out"
    if options.factor != -1 and options.kind != "lokr":
        yield f"--factor is {options.factor}, which belongs to --kind lokr; leave it out"
    if options.factor == 0 or options.factor < -1:
        yield f"--factor is {options.factor}; needed: 1 or more, or -1"
    if options.with_norms and options.kind in ("full", "norm"):
        yield f"--with_norms: --kind {options.kind} takes norms anyway; leave it out"
    if options.min_diff < 0:
        yield f"--min_diff is {options.min_diff:g}; needed: 0 or more"
    if options.clamp_quantile is not None and not 0 < options.clamp_quantile <= 1:
        yield f"--clamp_quantile is {options.clamp_quantile:g}; needed: a number above 0, up to 1"


def _pattern(name: str, text: str | None) -> re.Pattern[str] | None:
    try:
        return None if text is None else re.compile(text)
    except re.error as error:
        raise ConfigError(f"--{name} is {text}, which is no regular expression: {error}") from error


# -- models ------------------------------------------------------------------------------------------------------------


def sources(models: ExtractModelOptions, side: str) -> list[Source]:
    """The parts of the original (`org`) or of the tuned model."""
    from library.checkpoints.loading import open_checkpoint
    from networks.files.model_layers import Source, sources_of

    path = getattr(models, f"model_{side}")
    found = sources_of(path) if path else []
    for name in ENCODERS:
        file = getattr(models, f"{name}_{side}")
        if file:
            found.append(Source(open_checkpoint(file), name))
    return found


def family_of(models: ExtractModelOptions, kind: str | None) -> str:
    """The model family: what --family says, that of the denoiser, that which has the text encoders. CheckpointError."""
    from networks.kinds.adapter_family import family_by_name

    told = next((adapter_family_of(record).name for record in records().values() if kind in record.kinds), None)
    if models.family:
        given = family_by_name(models.family)
        if told not in (None, given):
            raise CheckpointError(
                f"--family is {models.family} and the models are {kind}; leave --family out, or name the models that "
                "you mean"
            )
        return given
    if told is not None:
        return told
    if models.model_org is None:
        return next(
            name for name,
            record in FAMILIES.items() if any(getattr(models, f"{file.option}_org") for file in record.encoder_files)
        )
    raise CheckpointError(f"{models.model_org}: its names do not tell the model family; name it with --family")


# -- the file ----------------------------------------------------------------------------------------------------------


def write(config: Config, found: Extracted, kind: str | None) -> None:
    import torch

    from library.checkpoints.number_formats import clamping
    from networks.files.network_files import write_adapter_file

    options = config[ExtractOptions]
    dtype = getattr(torch, DTYPES[options.save_precision.lower()] if options.save_precision else "float32")
    with clamping(config[OverflowOptions].clamp_overflow):
        write_adapter_file(options.save_to, found.tensors, dtype, _metadata(config, found, kind))
    logger.info("wrote %s", options.save_to)


def _metadata(config: Config, found: Extracted, kind: str | None) -> dict[str, str]:
    from pathlib import Path

    from networks.files.adapter_metadata import minimum_metadata

    options, models = config[ExtractOptions], config[ExtractModelOptions]
    made = versions().get(kind or "")
    base = {}
    if made is not None:
        base = {
            "ss_base_model_version": made.base_version + ("_v" if models.v_parameterization else ""),
            **made.metadata,
        }
    is_lora = options.kind == "lora"
    pairs = (
        {"conv_dim": options.conv_dim, "conv_alpha": float(options.conv_dim)} if is_lora and options.conv_dim else None
    )
    ranks = [options.dim] if is_lora and not options.dynamic_method else [float(rank) for rank in found.ranks.values()]
    metadata = minimum_metadata([base], f"networks.{options.kind}", ranks, ranks, pairs)
    if options.no_metadata or made is None:
        return metadata
    return {
        **metadata, "modelspec.sai_model_spec": "1.0.1", "modelspec.architecture": f"{made.modelspec}/lora",
        "modelspec.title": Path(options.save_to).stem,
    }  # fmt: skip
