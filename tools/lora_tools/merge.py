"""The merge tool: its options, its checks, and the order of things. The formulas are in networks, the streaming in
lora_utils."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from library.core.errors import CheckpointError, ConfigError, Problems
from library.core.options import LARGEST_RANK, LARGEST_SEED, Config, equivalent_option, option
from library.core.plugins import PluginOptions
from library.scripts.command_line import read_command, script_parser
from library.scripts.tool_script import DTYPES, OutputOptions, dtype_problem, output_problems, tool_exit_code
from library.training.option_groups import ConsoleOptions, OverflowOptions
from tools.lora_tools.ema import AveragingOptions, average_files
from tools.lora_tools.encoder_files import encoder_options, with_encoder_files

if TYPE_CHECKING:
    import torch

    from library.checkpoints.loading import CheckpointFiles
    from library.lora_utils import Adapter, CheckpointMerge
    from networks.kinds.targets import NetworkTargets
    from networks.operations.rank_rules import RankRule

logger = logging.getLogger("atelier")

METHODS = ("sv_ratio", "sv_fro", "sv_cumulative", "sv_quantile", "sv_threshold")
DEFAULT_RANK = 4
MODES = ("concat", "svd", "full", "ema")
ENCODERS = encoder_options()


@dataclass(frozen=True, kw_only=True)
class MergeOptions:
    """What is merged"""

    models: list[str] | None = option(
        None, nargs="+", help="adapter files: LoRA, LoHa, LoKr, OFT, ... in any naming", flags=("--lora_weight",)
    )
    ratios: list[float] | None = option(
        None, nargs="+", help="strength of each adapter; 1 for each when not given", flags=("--lora_multiplier",)
    )
    lbws: list[str] | None = option(
        None, nargs="+", help="strengths by U-Net block, one JSON list of 12, 17, 20 or 26 numbers per adapter"
    )
    family: str | None = option(None, help="model family of the adapters, where files do not tell it", metavar="NAME")
    allow_partial: bool = option(
        False, help="leave out layers of an adapter that the model does not have, instead of an error"
    )
    save_to: str | None = option(
        None, help="the merged model, or the merged adapter when no model is given", flags=("--save_merged_model",)
    )


@with_encoder_files({"": "file of the {} text encoder", "save_to": "the merged {} file"})
@dataclass(frozen=True, kw_only=True)
class ModelFileOptions:
    """Into a model"""

    model: str | None = option(
        None, help="checkpoint into which the adapters are merged", flags=("--sd_model", "--flux_model", "--dit")
    )
    dit_in_channels: int | None = equivalent_option(
        None, help="channels that the denoiser takes in, as known from musubi-tuner",
        reason="--dit_in_channels: the file of the model tells it",
    )

    @property
    def is_given(self) -> bool:
        """Whether adapters go into models."""
        return bool(self.model or any(getattr(self, name) for name in ENCODERS))


@dataclass(frozen=True, kw_only=True)
class SumOptions:
    """Into one adapter"""

    mode: str = option(
        "concat",
        choices=MODES,
        help="concat: LoRAs side by side, exact, the rank is the sum of the ranks; svd: the best LoRA of --new_rank, of any kinds; full: whole weights, exact;"
        " ema: the moving average of the files of one run",
    )
    concat: bool = option(False, help="the same as --mode concat")
    new_rank: int | None = option(None, help=f"rank with --mode svd; {DEFAULT_RANK} when not given", most=LARGEST_RANK)
    new_conv_rank: int | None = option(
        None, help="rank of convolutions larger than 1x1 with --mode svd; --new_rank when not given", most=LARGEST_RANK
    )
    dynamic_method: str | None = option(
        None, choices=(None, *METHODS),
        help="choose the rank of each layer by its singular values with --mode svd; --new_rank is the largest then"
    )
    dynamic_param: float | None = option(None, help="number of --dynamic_method, as in tools/resize_lora.py")
    shuffle: bool = option(False, help="mix the order of the ranks with --mode concat")
    seed: int | None = option(
        None, help="number that fixes the order of --shuffle; 0 when not given", most=LARGEST_SEED
    )

    @property
    def rank(self) -> int:
        return DEFAULT_RANK if self.new_rank is None else self.new_rank


@dataclass(frozen=True, kw_only=True)
class PrecisionToolOptions:
    """Numbers"""

    precision: str | None = option(
        None, help="number format of the result when --save_precision is not given; sums are always float32"
    )
    save_precision: str | None = option(
        None, help="number format of the result; that of the model's file when not given (adapters: float32)"
    )
    device: str = option("cpu", help="where the changes are computed, e.g. cuda")
    low_memory: bool = equivalent_option(
        False, help="deprecated", reason="--low_memory: files are always read and written a few tensors at a time",
        flags=("--mem_eff_load_save",)
    )
    no_metadata: bool = option(False, help="leave modelspec.* out of the result's metadata")

    @property
    def save_dtype(self) -> str | None:
        """Name in torch, None = as in the files."""
        word = self.save_precision or self.precision
        return DTYPES[word.lower()] if word else None


CLASSES = (
    MergeOptions,
    ModelFileOptions,
    SumOptions,
    AveragingOptions,
    PrecisionToolOptions,
    OutputOptions,
    OverflowOptions,
    PluginOptions,
    ConsoleOptions,
)


def build_parser() -> argparse.ArgumentParser:
    return script_parser("Merge adapters into a model, or several adapters into one", CLASSES)


def main(argv: Sequence[str] | None = None) -> int:
    return tool_exit_code(run, argv)


def run(argv: Sequence[str] | None = None) -> None:
    """AtelierError with one message for whatever is wrong; nothing is written then."""
    config = read_command(argv, build_parser(), CLASSES)
    check(config)
    if config[SumOptions].mode == "ema":
        options, numbers = config[MergeOptions], config[PrecisionToolOptions]
        average_files(config, options.models, options.save_to, numbers.save_precision or numbers.precision, "save_to")
        return
    with _one_thread():
        targets, adapters = read_adapters(config)
    pairs = list(model_files(config[ModelFileOptions], config[MergeOptions].save_to))
    if pairs:
        merge_into_models(config, targets, adapters, pairs)
    else:
        merge_adapters(config, targets, adapters)


# -- checks ------------------------------------------------------------------------------------------------------------


def check(config: Config) -> None:
    """Options and files against each other, before anything is read. ConfigError with every problem."""
    from library.checkpoints.kinds import check_slot
    from library.device_utils import device_problem

    options, files, sums = config[MergeOptions], config[ModelFileOptions], config[SumOptions]
    problems = Problems()
    averaging = _averaging_problems(config[AveragingOptions], options, files, sums)
    for found in (
        *_count_problems(options),
        *_file_problems(files, options.save_to),
        *_sum_problems(sums, files),
        *averaging,
    ):
        problems.add(found)
    for name in ("precision", "save_precision"):
        found = dtype_problem(name, getattr(config[PrecisionToolOptions], name))
        if found:
            problems.add(found)
    found = device_problem("device", config[PrecisionToolOptions].device)
    if found:
        problems.add(found)
    for path in options.models or ():
        found = (
            check_slot(path, "models", {"adapter"})
            if str(path).endswith(".safetensors") or not os.path.exists(path)
            else None
        )
        if found:
            problems.add(found)
    inputs = [*(options.models or ()), files.model, *(getattr(files, name) for name in ENCODERS)]
    outputs = [options.save_to, *(getattr(files, f"{name}_save_to") for name in ENCODERS)]
    for found in output_problems(outputs, inputs, config):
        problems.add(found)
    problems.raise_if_any()


def _count_problems(options: MergeOptions) -> Iterator[str]:
    if not options.models:
        yield "--models is missing; name the adapter files to merge"
        return
    for name, values in (("ratios", options.ratios), ("lbws", options.lbws)):
        if values and len(values) != len(options.models):
            yield f"--{name} has {len(values)} values for {len(options.models)} --models; give one for each"


def _file_problems(files: ModelFileOptions, save_to: str | None) -> Iterator[str]:
    given = [name for name in ENCODERS if getattr(files, name)]
    if not save_to and (files.model or not given):
        yield "--save_to is missing; name the file to write"
    outputs = [save_to if files.model else None, *(getattr(files, f"{name}_save_to") for name in ENCODERS)]
    for path in outputs:
        if path and not path.endswith(".safetensors"):
            yield f"the output {path} does not end in .safetensors, the format in which models are written"
    for name in ENCODERS:
        source, target = getattr(files, name), getattr(files, f"{name}_save_to")
        if bool(source) != bool(target):
            yield f"--{name} and --{name}_save_to belong together; one of them is missing"


def _sum_problems(sums: SumOptions, files: ModelFileOptions) -> Iterator[str]:
    if sums.shuffle and (sums.mode != "concat" or files.is_given):
        yield "--shuffle mixes the ranks of adapters that are put side by side; it has no meaning here, leave it out"
    if sums.concat and sums.mode != "concat":
        yield f"--concat and --mode {sums.mode} contradict each other; leave one of them out"
    for name in ("new_rank", "new_conv_rank"):
        value = getattr(sums, name)
        if value is not None and value < 1:
            yield f"--{name} is {value}; needed: a rank of 1 or more"
        elif value is not None and (sums.mode != "svd" or files.is_given):
            yield f"--{name} is the rank with --mode svd, into one adapter; it has no meaning here, leave it out"
    if sums.mode in ("svd", "full") and files.is_given:
        yield f"--mode {sums.mode} is for merging into one adapter; leave it out, or --model"
    if sums.seed is not None and not sums.shuffle:
        yield "--seed fixes the order of --shuffle; add it, or leave --seed out"
    yield from _dynamic_problems(sums, files)


def _dynamic_problems(sums: SumOptions, files: ModelFileOptions) -> Iterator[str]:
    from networks.operations.rank_rules import RankRule

    if sums.dynamic_method is None and sums.dynamic_param is None:
        return
    if sums.mode != "svd" or files.model:
        yield f"--dynamic_method and --dynamic_param choose ranks with --mode svd, into one adapter; the mode is {sums.mode}. Leave them out"
        return
    try:
        RankRule(max(sums.rank, 1), sums.dynamic_method, sums.dynamic_param)
    except ConfigError as error:
        yield str(error)


def _averaging_problems(
    averaging: AveragingOptions, options: MergeOptions, files: ModelFileOptions, sums: SumOptions
) -> Iterator[str]:
    if sums.mode != "ema":
        usual = AveragingOptions()
        for name in vars(usual):
            if getattr(averaging, name) != getattr(usual, name):
                yield f"--{name} belongs to --mode ema; leave it out"
        return
    if files.model or any(getattr(files, name) for name in ENCODERS):
        yield "--mode ema makes one adapter of several; merge the result into a model in a second step, without --mode"
    for name in ("ratios", "lbws"):
        if getattr(options, name):
            yield f"--{name} has no meaning with --mode ema, where --beta or --sigma_rel say what counts; leave it out"


# -- reading -----------------------------------------------------------------------------------------------------------


def headers(paths: Iterable[str]) -> list[tuple[str, dict[str, tuple[int, ...]], dict[str, str]]]:
    """(path, shapes, metadata) of adapter files; a pickle has no metadata."""
    from library.checkpoints.loading import open_checkpoint
    from library.safetensors_utils import is_pickled, read_header

    found = []
    for path in paths:
        shapes = {key: tuple(tensor.shape) for key, tensor in open_checkpoint(path).shapes.items()}
        found.append((path, shapes, {} if is_pickled(path) else read_header(path)[1]))
    return found


def read_adapters(config: Config) -> tuple[NetworkTargets, list[Adapter]]:
    """The adapters with their strengths, and the family that they all belong to. CheckpointError when they differ in
    it."""
    from library.lora_utils import read_adapter
    from networks.kinds.adapter_family import family_of_adapter
    from networks.kinds.block_weights import multiplier_by_block, parse_block_weights
    from networks.kinds.targets import targets_of_family

    options = config[MergeOptions]
    families = {
        path: family_of_adapter(shapes, metadata, path, options.family)
        for path, shapes, metadata in headers(options.models)
    }
    if len(set(families.values())) > 1:
        told = ", ".join(f"{path} ({family})" for path, family in families.items())
        raise CheckpointError(f"the adapters are made for different families: {told}; merge those of one family")
    family = next(iter(families.values()))
    targets = targets_of_family(family)
    ratios = options.ratios or [1.0] * len(options.models)
    weights = [parse_block_weights(text, family) for text in options.lbws] if options.lbws else [None] * len(ratios)
    adapters = [
        read_adapter(path, targets, multiplier_by_block(family, ratio, blocks))
        for path, ratio, blocks in zip(options.models, ratios, weights, strict=True)
    ]
    for path, ratio, adapter in zip(options.models, ratios, adapters, strict=True):
        logger.info("%s: %d layers for %s, ratio %g", path, len(adapter.layers), family, ratio)
    return targets, adapters


# -- into a model ------------------------------------------------------------------------------------------------------


def model_files(files: ModelFileOptions, save_to: str | None) -> Iterator[tuple[str, str, str]]:
    """(model file, where its merged form goes, which text encoder it is)."""
    if files.model:
        yield files.model, save_to, ""
    for name in ENCODERS:
        if getattr(files, name):
            yield getattr(files, name), getattr(files, f"{name}_save_to"), name


def merge_into_models(
    config: Config, targets: NetworkTargets, adapters: list[Adapter], given: list[tuple[str, str, str]]
) -> None:
    """Every file read and written a few tensors at a time. CheckpointError when adapters do not fit; nothing is written
    then."""
    from library.checkpoints.loading import open_checkpoint
    from library.lora_utils import CheckpointMerge

    plans = []
    for source, target, part in given:
        files = open_checkpoint(source)
        _refuse_scaled(files)
        shapes = {key: tuple(tensor.shape) for key, tensor in files.shapes.items()}
        plans.append((files, target, CheckpointMerge(targets, shapes, adapters, part=part)))
    _check_fit([plan for _, _, plan in plans], config[MergeOptions].allow_partial)
    for files, target, plan in plans:
        logger.info("%s: %d layers change", files.path, len(plan.matched))
        if not config[OutputOptions].dry_run:
            _write_model(config, files, target, plan)
            logger.info("wrote %s", target)


def _refuse_scaled(files: CheckpointFiles) -> None:
    from library.checkpoints.scaled_weights import is_blob

    scaled = next((key for key in files.shapes if is_blob(key) and "scale" in key), None)
    if scaled is not None:
        raise CheckpointError(
            f"{files.path} is stored in scaled 8-bit numbers ({scaled}), into which nothing can be merged without "
            "loss; take the"
            " bf16 or fp16 file"
        )


def _check_fit(plans: list[CheckpointMerge], allow_partial: bool) -> None:
    """Layers of parts for which no file is given are told; others must be found, unless that is allowed."""
    if not any(plan.matched for plan in plans):
        plans[0].check()
    for plan in plans:
        if plan.unmatched and not allow_partial:
            plan.check()
    for label in plans[0].absent if plans else ():
        missing = set.intersection(*(set(plan.absent.get(label, ())) for plan in plans))
        if missing:
            logger.warning(
                "%s: %d layers belong to a part for which no file is given; left out (first: %s)",
                label,
                len(missing),
                min(missing),
            )
    for plan in plans:
        for label, names in plan.unmatched.items():
            logger.warning("%s: %d layers are not in the model; left out (first: %s)", label, len(names), names[0])


def _write_model(config: Config, files: CheckpointFiles, target: str, plan: CheckpointMerge) -> None:
    from library.checkpoints.number_formats import clamping
    from library.safetensors_utils import stream_file_atomic

    infos = {key: (_saved_dtype(config, tensor.dtype), tuple(tensor.shape)) for key, tensor in files.shapes.items()}
    items = plan.stream(
        files.stream(None, True, files.shapes), config[PrecisionToolOptions].device, lambda key: infos[key][0]
    )
    metadata = _model_metadata(config, files)
    with _one_thread(), clamping(config[OverflowOptions].clamp_overflow):
        stream_file_atomic(infos, items, target, metadata)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Adapter tensors and blocks of rows are small: one thread is as fast as the disk, several would wait for each
    other."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _saved_dtype(config: Config, stored: torch.dtype) -> torch.dtype:
    import torch

    name = config[PrecisionToolOptions].save_dtype
    return getattr(torch, name) if name and stored.is_floating_point else stored


def _model_metadata(config: Config, files: CheckpointFiles) -> dict[str, str] | None:
    from library.safetensors_utils import is_pickled, read_header
    from networks.files.adapter_metadata import merged_model_spec

    own = {} if is_pickled(files.files[0]) else dict(read_header(files.files[0])[1])
    spec = {key: value for key, value in own.items() if key.startswith("modelspec.")}
    rest = {key: value for key, value in own.items() if key not in spec}
    if config[PrecisionToolOptions].no_metadata:
        return rest or None
    sources = [(files.path, own), *((path, metadata) for path, _, metadata in headers(config[MergeOptions].models))]
    save_to = config[MergeOptions].save_to or files.path
    return {**rest, **(merged_model_spec(sources, save_to) if spec else {})} or None


# -- into one adapter --------------------------------------------------------------------------------------------------


def merge_adapters(config: Config, targets: NetworkTargets, adapters: list[Adapter]) -> None:
    """One adapter whose change is the sum of the others' changes."""
    from library.checkpoints.number_formats import clamping
    from networks.files.network_files import write_adapter_file
    from networks.operations import lora_merge

    sums, device = config[SumOptions], config[PrecisionToolOptions].device
    layers = lora_merge.by_layer(adapters, targets)
    if sums.mode == "concat":
        tensors = lora_merge.concatenated(layers, (sums.seed or 0) if sums.shuffle else None)
    elif sums.mode == "full":
        tensors = lora_merge.full_changes(layers, device)
    else:
        tensors = lora_merge.low_rank_sum(layers, lambda shape: _rule(sums, shape), device)
    logger.info("%d layers, %s", len(layers), sums.mode)
    words = words_of(config[MergeOptions].models)
    if config[OutputOptions].dry_run:
        return
    path = config[MergeOptions].save_to
    with clamping(config[OverflowOptions].clamp_overflow):
        write_adapter_file(path, {**tensors, **words}, _adapter_dtype(config), _adapter_metadata(config, tensors))
    logger.info("wrote %s", path)


def words_of(paths: Iterable[str]) -> dict[str, torch.Tensor]:
    """The vectors of words in adapter files, for one file: strengths are those of layers, so vectors stay as they are.
    Where several files have one word, the first one's stay."""
    from library.checkpoints.embeddings import BUNDLED, bundled_tensors

    kept: dict[str, torch.Tensor] = {}
    owners: dict[str, str] = {}
    for path in paths:
        others: set[str] = set()
        for key, tensor in bundled_tensors(path).items():
            word = key.removeprefix(BUNDLED).partition(".")[0]
            if owners.setdefault(word, path) == path:
                kept[key] = tensor
            elif key not in kept or not kept[key].equal(tensor):
                others.add(word)
        for word in sorted(others):
            first = owners[word]
            logger.warning("the word '%s' is in %s and %s; its vectors are those of the first", word, first, path)
    if owners:
        logger.info("words in the result, with their vectors as they are: %s", ", ".join(owners))
    return kept


def _rule(sums: SumOptions, shape: Sequence[int]) -> RankRule:
    from networks.operations.rank_rules import RankRule

    is_kxk = len(shape) > 2 and any(size > 1 for size in shape[2:])
    return RankRule((sums.new_conv_rank or sums.rank) if is_kxk else sums.rank, sums.dynamic_method, sums.dynamic_param)


def _adapter_dtype(config: Config) -> torch.dtype:
    import torch

    return getattr(torch, config[PrecisionToolOptions].save_dtype or "float32")


def _adapter_metadata(config: Config, tensors: Mapping[str, Any]) -> dict[str, str]:
    from networks.files.adapter_metadata import merged_model_spec, minimum_metadata, ranks_and_alphas

    found = headers(config[MergeOptions].models)
    module = "networks.full" if config[SumOptions].mode == "full" else "networks.lora"
    metadata = minimum_metadata([metadata for _, _, metadata in found], module, *ranks_and_alphas(tensors))
    if config[PrecisionToolOptions].no_metadata:
        return metadata
    return {**metadata, **merged_model_spec([(path, own) for path, _, own in found], config[MergeOptions].save_to)}
