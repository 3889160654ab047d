"""The conversion tool: its options, its checks, and the order of things. Names and formulas are in networks."""

from __future__ import annotations

import argparse
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from library.core.errors import CheckpointError, ConfigError, Problems
from library.core.options import Config, option
from library.core.plugins import PluginOptions
from library.scripts.command_line import read_command, script_parser
from library.scripts.tool_script import OutputOptions, output_problems, tool_exit_code
from library.training.option_groups import ConsoleOptions, OverflowOptions

if TYPE_CHECKING:
    import torch

    from networks.files.lora_layouts import AdapterFile

logger = logging.getLogger("atelier")

TARGETS = ("kohya", "peft", "diffusers", "comfy", "ai-toolkit", "xlabs", "lycoris")
MUSUBI_TARGETS = {"default": "kohya", "other": "other"}


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """What is rewritten. Before the options: the adapter file, then the file to write"""

    input: str | None = option(None, help="the adapter file, instead of the first word of the command")
    output: str | None = option(None, help="the file to write, instead of the second word of the command")
    to: str | None = option(None, choices=TARGETS, help="the layout to write; docs/convert_lora.md has them in a table")
    target: str | None = option(
        None, choices=tuple(MUSUBI_TARGETS),
        help="as known from musubi-tuner: default = --to kohya; other = original paths with dots, no alpha"
    )
    diffusers_prefix: str | None = option(
        None,
        help="with --target: what stands before the paths, in the result of other, in the file for default",
        metavar="TEXT",
    )
    family: str | None = option(
        None, help="model family of the adapter, where the file does not tell it", metavar="NAME"
    )

    @property
    def layout(self) -> str | None:
        return self.to or MUSUBI_TARGETS.get(self.target or "")


CLASSES = (ConvertOptions, OutputOptions, OverflowOptions, PluginOptions, ConsoleOptions)


def build_parser() -> argparse.ArgumentParser:
    parser = script_parser("Rewrite an adapter file for another program", CLASSES)
    parser.usage = "%(prog)s SRC DST --to LAYOUT [options]"
    parser.add_argument("files", nargs="*", metavar="FILE", help="the adapter file, then the file to write")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return tool_exit_code(run, argv)


def run(argv: Sequence[str] | None = None) -> None:
    """AtelierError with one message for whatever is wrong; nothing is written then."""
    parser = build_parser()
    words = parser.parse_args(argv).files
    from library.checkpoints.number_formats import clamping  # --help has been answered

    config = read_command(argv, parser, CLASSES)
    source, target = _paths(config[ConvertOptions], words)
    check(config, source, target)
    family, file = read_file(source, config[ConvertOptions].family)
    with clamping(config[OverflowOptions].clamp_overflow):
        result = convert(config[ConvertOptions], family, file, target)
    logger.info(
        "%s: %s, %d tensors -> %d tensors, --to %s",
        source,
        family,
        len(file.tensors),
        len(result.tensors),
        config[ConvertOptions].layout,
    )
    if not config[OutputOptions].dry_run:
        write(target, result)
        logger.info("wrote %s", target)


def _paths(options: ConvertOptions, words: Sequence[str]) -> tuple[str, str]:
    given = [path for path in (options.input, *words, options.output) if path]
    if len(given) != 2:
        raise ConfigError(
            f"{len(given)} file names are given ({', '.join(given)}); needed are two: the adapter file, then the file "
            "to write"
        )
    return given[0], given[1]


def check(config: Config, source: str, target: str) -> None:
    """ConfigError with every problem that shows before the tensors are read."""
    from library.checkpoints.kinds import check_slot

    options = config[ConvertOptions]
    problems = Problems()
    if bool(options.to) == bool(options.target):
        problems.add(
            f"--to is {'missing' if not options.to else 'given with --target; leave one of them out'}; the layouts are "
            f"{', '.join(TARGETS)}"
        )
    if options.diffusers_prefix is not None and not options.target:
        problems.add("--diffusers_prefix belongs to --target; leave it out")
    if not target.endswith(".safetensors"):
        problems.add(f"the output {target} does not end in .safetensors")
    if not os.path.exists(source):
        problems.add(f"{source} does not exist")
    elif source.endswith(".safetensors"):
        found = check_slot(source, "input", {"adapter"})
        if found:
            problems.add(found)
    outputs = [target, *([str(Path(target).with_name("adapter_config.json"))] if _is_wrapped(options, target) else [])]
    for found in output_problems(outputs, [source], config):
        problems.add(found)
    problems.raise_if_any()


def _is_wrapped(options: ConvertOptions, target: str) -> bool:
    return options.to == "peft" and Path(target).name == "adapter_model.safetensors"


def read_file(path: str, given: str | None) -> tuple[str, AdapterFile]:
    """(family, content) of an adapter file. CheckpointError for what cannot be rewritten as it should."""
    import torch

    from library.safetensors_utils import is_pickled, load_pickled_tensors, load_safetensors, read_header
    from networks.files.adapter_layout import file_layers
    from networks.files.lora_layouts import AdapterFile
    from networks.files.peft_config import configs_of
    from networks.files.xlabs_names import is_xlabs
    from networks.kinds.adapter_family import family_of_adapter

    pickled = is_pickled(path)
    metadata = {} if pickled else read_header(path)[1]
    tensors = load_pickled_tensors(path) if pickled else load_safetensors(path, device="cpu")
    family = family_of_adapter({key: tuple(tensor.shape) for key, tensor in tensors.items()}, metadata, path, given)
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor.float()).all():
            raise CheckpointError(
                f"{path}: {key} has values that are not finite (NaN or infinite); the training of this file failed"
            )
    if not any(map(is_xlabs, tensors)):
        file_layers(tensors, path)  # refuses what would be lost on the way
    return family, AdapterFile(tensors, metadata, configs_of(path, metadata))


def convert(options: ConvertOptions, family: str, file: AdapterFile, target: str) -> AdapterFile:
    from networks.files.conversion_record import converted, restored
    from networks.files.lora_layouts import layout_for

    prefix = None if options.diffusers_prefix is None else f"{options.diffusers_prefix.rstrip('.')}."
    if prefix and options.layout == "kohya":
        file = replace(file, prefix=prefix)
    if options.target == "default":
        file = replace(file, tensors=_of_the_denoiser(file))
    _check_names(family, restored(family, file)[0])
    return converted(family, file, layout_for(options.layout, family, prefix, _is_wrapped(options, target)))


def _of_the_denoiser(file: AdapterFile) -> dict[str, torch.Tensor]:
    """What `--target default` is known to rewrite: layers behind a denoiser's prefix. What stands behind another one is
    told and left out."""
    from networks.files.file_names import DENOISER_MODELS, DOTTED_PREFIX, KOHYA_STARTS
    from networks.files.lora_conversion import is_beside

    starts = (DOTTED_PREFIX, file.prefix, *(f"{model}." for model in DENOISER_MODELS), *KOHYA_STARTS)
    left_out = [key for key in file.tensors if not key.startswith(starts) and not is_beside(key)]
    if len(left_out) == len(file.tensors):  # none has a prefix: the names themselves decide
        return file.tensors
    if left_out:
        logger.warning(
            "--target default rewrites layers of the denoiser; %d tensors of others are left out (first: %s). --to kohya "
            "keeps or refuses them", len(left_out), left_out[0],
        )  # fmt: skip
    return {key: tensor for key, tensor in file.tensors.items() if key not in left_out}


def _check_names(family: str, file: AdapterFile) -> None:
    """CheckpointError when modules are in no table of the family: rewriting the others alone would lose them."""
    from networks.files.file_names import KOHYA_PREFIX, OFT_PREFIX, names_of_family
    from networks.files.lora_conversion import is_beside
    from networks.files.lora_layouts import kohya_tensors

    names = {key.partition(".")[0] for key in kohya_tensors(family, file) if not is_beside(key)}
    table = names_of_family(family, names)
    unknown = sorted(name for name in names if table.find(name.replace(OFT_PREFIX, KOHYA_PREFIX, 1)) is None)
    if unknown:
        more = " ..." if len(unknown) > 5 else ""
        raise CheckpointError(
            f"{len(unknown)} of {len(names)} modules are no layers of {family}: {', '.join(unknown[:5])}{more}."
            " If the file is for another family, name it with --family"
        )


def write(target: str, file: AdapterFile) -> None:
    from library.checkpoints.hashes import adapter_hashes
    from library.core.atomic_file import write_text_atomically
    from library.safetensors_utils import save_file_atomic

    metadata = dict(file.metadata)
    if any(key.startswith("ss_") for key in metadata):
        metadata.update(adapter_hashes(file.tensors, metadata))
    save_file_atomic(_contiguous(file.tensors), target, metadata or None)
    if Path(target).name == "adapter_model.safetensors" and "" in file.configs:
        text = json.dumps(file.configs[""], indent=2, sort_keys=True)
        write_text_atomically(Path(target).with_name("adapter_config.json"), f"{text}\n")


def _contiguous(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: tensor.contiguous() for key, tensor in tensors.items()}
