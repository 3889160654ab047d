"""The parts of Stable Diffusion 3 in one file: names are given the prefixes of such files, tensors are passed on one by
one."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from library.core.errors import CheckpointError, Problems
from library.core.options import Config, equivalent_option, option
from library.scripts.command_line import read_command, script_parser
from library.scripts.tool_script import DTYPES, OutputOptions, dtype_problem, output_problems, tool_exit_code
from library.training.option_groups import ConsoleOptions, OverflowOptions

logger = logging.getLogger("atelier")

PREFIXES = {
    "dit": "model.diffusion_model.", "vae": "first_stage_model.", "clip_l": "text_encoders.clip_l.transformer.",
    "clip_g": "text_encoders.clip_g.transformer.", "t5xxl": "text_encoders.t5xxl.transformer.",
}  # fmt: skip
ROOTS = {
    "dit": ("joint_blocks.", "x_embedder."), "vae": ("encoder.", "decoder."), "clip_l": ("text_model.",),
    "clip_g": ("text_model.",),
    "t5xxl": ("encoder.block.", "shared."),
}  # fmt: skip
"""beginnings of which names of a part has at least one, after its prefix"""
_OWN_FILE = (
    "vae.",
    "transformer.",
    "text_encoder.",
    "text_encoder_2.",
    "text_encoder_3.",
    "clip_l.transformer.",
    "clip_g.transformer.",
    "t5xxl.transformer.",
)


@dataclass(frozen=True, kw_only=True)
class PackOptions:
    """The parts"""

    dit: str | None = option(None, help="file of the denoiser (MMDiT); its metadata are those of the result")
    vae: str | None = option(None, help="file of the VAE")
    clip_l: str | None = option(None, help="file of CLIP-L")
    clip_g: str | None = option(None, help="file of CLIP-G, in the layout of transformers")
    t5xxl: str | None = option(None, help="file of T5-XXL")
    output: str = option("merged_model.safetensors", help="the file to write")
    save_precision: str | None = option(None, help="number format of the result; as in the files when not given")
    device: str = equivalent_option(
        "cpu", help="deprecated", reason="--device: tensors are passed on as they are, nothing is computed"
    )


CLASSES = (PackOptions, OutputOptions, OverflowOptions, ConsoleOptions)


def build_parser() -> argparse.ArgumentParser:
    return script_parser("Put the parts of Stable Diffusion 3 into one file", CLASSES)


def main(argv: Sequence[str] | None = None) -> int:
    return tool_exit_code(run, argv)


def run(argv: Sequence[str] | None = None) -> None:
    """AtelierError with one message for whatever is wrong; nothing is written then."""
    config = read_command(argv, build_parser(), CLASSES)
    check(config)
    _pack(config)


def _pack(config: Config) -> None:
    from library.checkpoints.loading import open_checkpoint
    from library.checkpoints.number_formats import clamping
    from library.safetensors_utils import is_pickled, read_header, stream_file_atomic

    options = config[PackOptions]
    parts = {name: open_checkpoint(getattr(options, name)) for name in PREFIXES if getattr(options, name)}
    names = {part: part_names(part, list(files.shapes), files.path) for part, files in parts.items()}
    infos = {}
    for part, files in parts.items():
        for key, name in names[part].items():
            if name in infos:
                raise CheckpointError(f"{files.path}: {name} is in another part too; give each part's own file")
            meta = files.shapes[key]
            infos[name] = (_dtype(options, meta), tuple(meta.shape))
        logger.info("%s: %s, %d tensors", part, files.path, len(names[part]))
    if config[OutputOptions].dry_run:
        return

    def items() -> Iterator[tuple[str, object]]:
        for part, files in parts.items():
            for key, tensor in files.stream(None, True, names[part]):
                yield names[part][key], tensor

    first = parts["dit"].files[0]
    with clamping(config[OverflowOptions].clamp_overflow):
        stream_file_atomic(infos, items(), options.output, None if is_pickled(first) else read_header(first)[1] or None)
    logger.info("wrote %s", options.output)


def check(config: Config) -> None:
    options, problems = config[PackOptions], Problems()
    if not options.dit:
        problems.add("--dit is missing; name the file of the denoiser")
    if not options.output.endswith(".safetensors"):
        problems.add(f"the output {options.output} does not end in .safetensors")
    found = dtype_problem("save_precision", options.save_precision)
    if found:
        problems.add(found)
    for found in output_problems([options.output], [getattr(options, name) for name in PREFIXES], config):
        problems.add(found)
    problems.raise_if_any()


def part_names(part: str, keys: Sequence[str], path: str) -> dict[str, str]:
    """key of the file -> name in the whole file. A whole file gives the part alone; a prefix is not doubled.
    CheckpointError when the file does not hold the part."""
    prefix = PREFIXES[part]
    if any(key.startswith(prefix) for key in keys):
        names = {key: key for key in keys if key.startswith(prefix)}
    else:
        starts = tuple(PREFIXES[other] for other in PREFIXES if other != part)
        own = [key for key in keys if not key.startswith(starts)]
        wrapper = next(
            (w for w in _OWN_FILE if any(key.startswith(tuple(w + root for root in ROOTS[part])) for key in own)), ""
        )
        names = {key: prefix + key.removeprefix(wrapper) for key in own}
    roots = tuple(prefix + root for root in ROOTS[part])
    if not any(name.startswith(roots) for name in names.values()):
        some = ", ".join(list(keys)[:3]) or "no tensors"
        raise CheckpointError(
            f"--{part} is {path}, which does not hold that part: no tensor begins with {' or '.join(ROOTS[part])} (it "
            f"begins with {some})"
        )
    return names


def _dtype(options: PackOptions, meta):
    import torch

    if not options.save_precision or not meta.is_floating_point():
        return meta.dtype
    return getattr(torch, DTYPES[options.save_precision.lower()])
