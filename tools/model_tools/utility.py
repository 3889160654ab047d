"""Tensors of a model file by parts of their names: listed, chosen, in other number formats, under shorter names."""

from __future__ import annotations

import argparse
import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from library.core.errors import ConfigError, Problems
from library.core.options import Config, equivalent_option, option
from library.scripts.command_line import read_command, script_parser, tell_equivalent
from library.scripts.tool_script import DTYPES, OutputOptions, dtype_problem, output_problems, tool_exit_code
from library.training.option_groups import ConsoleOptions, OverflowOptions

if TYPE_CHECKING:
    import torch

logger = logging.getLogger("atelier")

Info = tuple["torch.dtype", tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class UtilityOptions:
    """Which tensors, and in which form"""

    input: str | None = option(None, help="model file, .safetensors or a PyTorch file")
    output_path: str | None = option(
        None, help="safetensors file to write; without it the tensors are listed as they would be written"
    )
    full_target_keys: list[str] | None = option(
        None, nargs="*", help="only tensors with one of these texts in their names; all when not given"
    )
    full_exclude_keys: list[str] | None = option(
        None, nargs="*", help="no tensor with one of these texts in its name"
    )
    dtype: str | None = option(None, help="number format of fractions; as they are when not given")
    dtype_target_keys: list[str] | None = option(
        None, nargs="*", help="--dtype only for tensors with one of these texts in their names"
    )
    dtype_exclude_keys: list[str] | None = option(
        None, nargs="*", help="--dtype not for tensors with one of these texts in their names"
    )
    strip_prefix: str | None = option(None, help="text that names lose where they begin with it")
    disable_weights_only: bool = equivalent_option(
        False, help="read PyTorch files with code in them",
        reason="--disable_weights_only: nothing in a file is executed in any case",
    )  # fmt: skip

    def __post_init__(self) -> None:
        problem = dtype_problem("dtype", self.dtype)
        problems = [problem] if problem else []
        for name in ("dtype_target_keys", "dtype_exclude_keys"):
            if getattr(self, name) and not self.dtype:
                problems.append(f"--{name} says which tensors become --dtype, which is not given")
        if problems:
            raise ConfigError(problems)

    def takes(self, name: str) -> bool:
        return _chosen(name, self.full_target_keys, self.full_exclude_keys)

    def casts(self, name: str) -> bool:
        return self.dtype is not None and _chosen(name, self.dtype_target_keys, self.dtype_exclude_keys)


def _chosen(name: str, target: Sequence[str] | None, exclude: Sequence[str] | None) -> bool:
    return (not target or any(text in name for text in target)) and not any(text in name for text in exclude or ())


CLASSES = (UtilityOptions, OutputOptions, OverflowOptions, ConsoleOptions)


def build_parser() -> argparse.ArgumentParser:
    title = "List tensors of a model, or write them in other number formats by parts of their names"
    return script_parser(title, CLASSES)


def main(argv: Sequence[str] | None = None) -> int:
    return tool_exit_code(run, argv)


def run(argv: Sequence[str] | None = None) -> None:
    """List, or write. ConfigError for options; AtelierError for files."""
    config = read_command(argv, build_parser(), CLASSES)
    _check(config)
    tell_equivalent(config)
    options = config[UtilityOptions]
    read = infos_of(options.input or "")
    wanted = written_infos(read, options)
    if not options.output_path or config[OutputOptions].dry_run:
        print(listing(wanted))
        return
    write(config, read, wanted)
    logger.info("%s: %d of %d tensors", options.output_path, len(wanted), len(read))


def _check(config: Config) -> None:
    options, problems = config[UtilityOptions], Problems()
    if not options.input:
        problems.add("--input is missing; name a model file")
    elif not os.path.isfile(options.input):
        problems.add(f"--input is {options.input}: there is no such file")
    if options.output_path and not options.output_path.endswith(".safetensors"):
        problems.add(f"--output_path is {options.output_path}; needed: a name that ends in .safetensors")
    for problem in output_problems([options.output_path], [options.input], config):
        problems.add(problem)
    problems.raise_if_any()


def infos_of(path: str) -> dict[str, Info]:
    """Types and shapes of the tensors of a file, in its order."""
    from library.safetensors_utils import iterate_tensors, without_values

    with without_values():
        return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in iterate_tensors(path)}


def written_infos(read: Mapping[str, Info], options: UtilityOptions) -> dict[str, tuple[str, Info]]:
    """Name in the file -> (name that is written, its type and shape). ConfigError when none is left, or two would have
    one name."""
    import torch

    dtype = getattr(torch, DTYPES[options.dtype.lower()]) if options.dtype else None
    found: dict[str, tuple[str, Info]] = {}
    for name, (own, shape) in read.items():
        if options.takes(name):
            cast = dtype if dtype is not None and own.is_floating_point and options.casts(name) else own
            found[name] = (name.removeprefix(options.strip_prefix or ""), (cast, shape))
    names = [name for name, _ in found.values()]
    if not found:
        raise ConfigError(f"{options.input}: no name fits --full_target_keys and --full_exclude_keys")
    twice = next((name for name in names if not name or names.count(name) > 1), None) if options.strip_prefix else None
    if twice is not None:
        raise ConfigError(f"--strip_prefix {options.strip_prefix} makes the name '{twice}' twice, or nothing of a name")
    return found


def listing(wanted: Mapping[str, tuple[str, Info]]) -> str:
    """A line for each tensor, and one for all."""
    lines = [f"{name}  {str(dtype).removeprefix('torch.')}  {list(shape)}" for name, (dtype, shape) in wanted.values()]
    numbers = sum(math.prod(shape) for _, (_, shape) in wanted.values())
    size = sum(math.prod(shape) * dtype.itemsize for _, (dtype, shape) in wanted.values())
    return "\n".join([*lines, f"{len(wanted)} tensors, {numbers} numbers, {size} bytes"])


def write(config: Config, read: Mapping[str, Info], wanted: Mapping[str, tuple[str, Info]]) -> None:
    """A tensor at a time; what a safetensors file tells of itself is kept."""
    from library.checkpoints.number_formats import clamping
    from library.safetensors_utils import is_pickled, iterate_tensors, read_header, stream_file_atomic

    options = config[UtilityOptions]
    source = options.input or ""
    metadata = {} if is_pickled(source) else dict(read_header(source)[1])
    items = ((wanted[name][0], tensor) for name, tensor in iterate_tensors(source, keys=list(wanted)))
    with clamping(config[OverflowOptions].clamp_overflow):
        stream_file_atomic(dict(wanted.values()), items, options.output_path or "", metadata or None)
