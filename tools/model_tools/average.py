"""The weighted sum of models: its options, its checks, and the sum itself, one tensor at a time."""

from __future__ import annotations

import argparse
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from library.core.errors import CheckpointError, Problems
from library.core.options import Config, option
from library.scripts.command_line import read_command, script_parser
from library.scripts.tool_script import DTYPES, OutputOptions, dtype_problem, output_problems, tool_exit_code
from library.training.option_groups import ConsoleOptions, OverflowOptions

if TYPE_CHECKING:
    import torch

    from library.checkpoints.loading import CheckpointFiles

logger = logging.getLogger("atelier")

OTHER_PARTS = ("first_stage_model.", "cond_stage_model.", "conditioner.")
"""prefixes of the VAE and the text encoders"""
SUFFIX = ".safetensors"


@dataclass(frozen=True, kw_only=True)
class AverageOptions:
    """What is merged"""

    models: list[str] | None = option(None, nargs="+", help="model files; the first one says which tensors there are")
    ratios: list[float] | None = option(
        None, nargs="+", help="share of each model; they must add up to 1; equal shares when not given"
    )
    output: str | None = option(None, help="the file to write; .safetensors is appended when it is not there")
    unet_only: bool = option(False, help="merge the U-Net alone; VAE and text encoders are those of the first model")
    show_skipped: bool = option(False, help="list the tensors that the first model does not have")
    allow_partial: bool = option(
        False,
        help="take the first model's value where another lacks a tensor, and leave out what the first lacks, instead of an error",
    )


@dataclass(frozen=True, kw_only=True)
class NumberOptions:
    """Numbers"""

    device: str = option("cpu", help="where the sums are computed, e.g. cuda")
    precision: str = option(
        "float", help="number format of the sums; float is the only one without rounding on the way"
    )
    saving_precision: str | None = option(
        None, help="number format of the result; that of the first model when not given"
    )


CLASSES = (AverageOptions, NumberOptions, OutputOptions, OverflowOptions, ConsoleOptions)


def build_parser() -> argparse.ArgumentParser:
    return script_parser("Weighted sum of models", CLASSES)


def main(argv: Sequence[str] | None = None) -> int:
    return tool_exit_code(run, argv)


def run(argv: Sequence[str] | None = None) -> None:
    """AtelierError with one message for whatever is wrong; nothing is written then."""
    config = read_command(argv, build_parser(), CLASSES)
    _merge(config, check(config))


def _merge(config: Config, output: str) -> None:
    from library.checkpoints.loading import open_checkpoint

    options = config[AverageOptions]
    models = [Model(open_checkpoint(path)) for path in options.models]
    ratios = options.ratios or [1 / len(models)] * len(models)
    for model, ratio in zip(models, ratios, strict=True):
        logger.info("%s: ratio %g, %d tensors", model.files.path, ratio, len(model.keys))
    _compare(options, models)
    if config[OutputOptions].dry_run:
        return
    write(config, models, ratios, output)
    logger.info("wrote %s", output)


def check(config: Config) -> str:
    """The path to write; ConfigError with every problem that shows before the files are read."""
    from library.device_utils import device_problem

    options = config[AverageOptions]
    problems = Problems()
    if not options.models:
        problems.add("--models is missing; name the model files to merge")
    if not options.output:
        problems.add("--output is missing; name the file to write")
    ratios, count = options.ratios, len(options.models or ())
    if ratios and len(ratios) != count:
        problems.add(f"--ratios has {len(ratios)} values for {count} --models; give one for each")
    elif ratios and not (all(map(math.isfinite, ratios)) and abs(sum(ratios) - 1) <= 1e-4):
        problems.add(
            f"--ratios add up to {sum(ratios):g}; needed: 1, or the weights of the result would be larger or smaller "
            "than those of the models"
        )
    for name in ("precision", "saving_precision"):
        found = dtype_problem(name, getattr(config[NumberOptions], name))
        if found:
            problems.add(found)
    found = device_problem("device", config[NumberOptions].device)
    if found:
        problems.add(found)
    output = options.output or ""
    output = output if output.endswith(SUFFIX) else output + SUFFIX
    for found in output_problems([output] if options.output else [], options.models or (), config):
        problems.add(found)
    problems.raise_if_any()
    return output


class Model:
    """A model file. `keys`: names as other models have them -> names in the file; old files of Stable Diffusion 1 lack
    a level in the names of their text encoder."""

    def __init__(self, files: CheckpointFiles) -> None:
        from library.checkpoints.open_clip_convert import with_text_model
        from library.checkpoints.scaled_weights import is_blob

        self.files = files
        self.keys = {with_text_model(key): key for key in files.shapes}
        scaled = next((key for key in files.shapes if is_blob(key) and "scale" in key), None)
        if scaled is not None:
            raise CheckpointError(
                f"{files.path} is stored in scaled 8-bit numbers ({scaled}), which cannot be averaged; take the bf16 "
                "or fp16 file"
            )

    def info(self, key: str) -> torch.Tensor:
        return self.files.shapes[self.keys[key]]


def _compare(options: AverageOptions, models: Sequence[Model]) -> None:
    """CheckpointError when the models are not of one kind: shapes that differ, or tensors that only some have."""
    first = models[0]
    for model in models[1:]:
        path = model.files.path
        common = first.keys.keys() & model.keys.keys()
        if not common:
            raise CheckpointError(
                f"{path} has no tensor in common with {first.files.path}; they are models of different families"
            )
        wrong = sorted(key for key in common if first.info(key).shape != model.info(key).shape)
        if wrong:
            key = wrong[0]
            raise CheckpointError(
                f"{path}: {len(wrong)} tensors have other shapes than in {first.files.path}; {key} is "
                f"{list(model.info(key).shape)} and"
                f" {list(first.info(key).shape)} there. Merge models of one architecture"
            )
        lacks, more = sorted(first.keys.keys() - common), sorted(model.keys.keys() - common)
        if options.unet_only:
            lacks = [key for key in lacks if not key.startswith(OTHER_PARTS)]
            more = [key for key in more if not key.startswith(OTHER_PARTS)]
        lacks, more = ([key for key in keys if not key.endswith("position_ids")] for keys in (lacks, more))
        if (lacks or more) and not options.allow_partial:
            some = ", ".join((lacks or more)[:3])
            raise CheckpointError(
                f"{path} lacks {len(lacks)} tensors of {first.files.path} and has {len(more)} others ({some}); use "
                "models of one kind,"
                " --unet_only, or --allow_partial"
            )
        if lacks:
            logger.warning(
                "%s lacks %d tensors; the values of the first model stand in (first: %s)", path, len(lacks), lacks[0]
            )
        for key in more if options.show_skipped else ():
            logger.info("left out: %s of %s", key, path)
        if more:
            logger.warning("%s: %d tensors are not in the first model and are left out", path, len(more))


def write(config: Config, models: Sequence[Model], ratios: Sequence[float], output: str) -> None:
    """The result under the names and with the metadata of the first model."""
    from library.checkpoints.number_formats import clamping
    from library.safetensors_utils import is_pickled, read_header, stream_file_atomic
    from networks.files.adapter_metadata import merged_model_spec

    name = config[NumberOptions].saving_precision
    infos = {}
    for key, own in models[0].keys.items():
        meta = models[0].files.shapes[own]
        infos[key] = (_dtype(name) if name and meta.is_floating_point() else meta.dtype, tuple(meta.shape))
    headers = [(m.files.path, {} if is_pickled(m.files.files[0]) else read_header(m.files.files[0])[1]) for m in models]
    metadata = dict(headers[0][1])
    if any("modelspec.architecture" in own for _, own in headers):
        metadata = {
            key: value for key, value in metadata.items() if not key.startswith("modelspec.")
        } | merged_model_spec(headers, output)
    with clamping(config[OverflowOptions].clamp_overflow):
        stream_file_atomic(infos, averaged(config, models, ratios), output, metadata or None)


def _dtype(word: str) -> torch.dtype:
    import torch

    return getattr(torch, DTYPES[word.lower()])


def averaged(config: Config, models: Sequence[Model], ratios: Sequence[float]) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, sum of ratio * tensor), one at a time. Whole numbers (position ids) and parts that are not merged are
    those of the first model."""
    import torch

    options, numbers = config[AverageOptions], config[NumberOptions]
    dtype, device = _dtype(numbers.precision), numbers.device
    readers = [_Reader(model.files) for model in models]
    for key in models[0].keys:
        first = readers[0].tensor(models[0].keys[key])
        is_kept = not first.is_floating_point() or (options.unet_only and key.startswith(OTHER_PARTS))
        if is_kept or len(models) == 1:
            yield key, first
            continue
        total = first.to(device, dtype) * ratios[0]
        for model, reader, ratio in zip(models[1:], readers[1:], ratios[1:], strict=True):
            other = reader.tensor(model.keys[key]) if key in model.keys else first
            total += other.to(device, dtype) * ratio
        if not torch.isfinite(total).all():
            raise CheckpointError(
                f"{key} has values that are not finite (NaN or infinite) in a model; the result would be useless"
            )
        yield key, total


class _Reader:
    """Single tensors of a model in any order."""

    def __init__(self, files: CheckpointFiles) -> None:
        from library.safetensors_utils import MemoryEfficientSafeOpen, is_pickled, load_pickled_tensors

        self._places = {}
        self._tensors = {}
        for file in files.files:
            if is_pickled(file):
                self._tensors.update(load_pickled_tensors(file))  # mapped into memory, read when touched
            else:
                opened = MemoryEfficientSafeOpen(file)
                self._places.update(dict.fromkeys(opened.keys(), opened))

    def tensor(self, key: str) -> torch.Tensor:
        return self._tensors[key] if key in self._tensors else self._places[key].get_tensor(key)
