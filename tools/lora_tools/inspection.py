"""The inspection tool: its options and its output. What is measured is in networks/files/adapter_report.py."""

from __future__ import annotations

import argparse
import csv
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from library.core.errors import CheckpointError, ConfigError, Problems
from library.core.options import option
from library.core.plugins import PluginOptions
from library.scripts.command_line import script_parser
from library.scripts.tool_script import OutputOptions, output_problems, tool_exit_code
from library.training.option_groups import ConsoleOptions
from tools.lora_tools.adapter_input import add_files, read_with_files

if TYPE_CHECKING:
    import torch

    from networks.files.adapter_report import FileReport

logger = logging.getLogger("atelier")


@dataclass(frozen=True, kw_only=True)
class InspectionOptions:
    """What is told"""

    model: str | None = option(None, help="adapter file; it can be given without the name of the option too")
    family: str | None = option(None, help="model family, where the file does not tell it", metavar="NAME")
    weights: bool = option(False, help="a line for every matrix: name, shape, mean and least size of its numbers")
    show_all_keys: bool = option(False, help="the same for every tensor of the file", flags=("-s", "--all"))
    metadata: bool = option(False, help="the metadata too")
    plot: str | None = option(None, help="draw the norms by block into this PNG file", metavar="FILE")


CLASSES = (InspectionOptions, OutputOptions, PluginOptions, ConsoleOptions)


def build_parser() -> argparse.ArgumentParser:
    return add_files(script_parser("Tell what is in an adapter file", CLASSES), "model", "adapter file")


def main(argv: Sequence[str] | None = None) -> int:
    return tool_exit_code(run, argv)


def run(argv: Sequence[str] | None = None) -> None:
    """Print what the file holds. CheckpointError, after that, when something is wrong with it."""
    config = read_with_files(argv, build_parser(), CLASSES, "model")
    options = config[InspectionOptions]
    if not options.model:
        raise ConfigError("--model is missing; name the adapter file")
    problems = Problems()
    for found in output_problems([options.plot], [options.model], config):
        problems.add(found)
    if options.plot and not options.plot.lower().endswith(".png"):
        problems.add(f"--plot is {options.plot}; needed: a name that ends in .png")
    problems.raise_if_any()

    from networks.files.adapter_report import report
    from networks.files.peft_config import configs_of, with_alphas

    tensors, metadata = _read(options.model)
    family = _family(options, tensors, metadata)
    found = report(with_alphas(tensors, configs_of(options.model, metadata)), family)
    _print(options, found, metadata, family)
    if options.weights or options.show_all_keys:
        _print_weights(tensors, options.show_all_keys)
    if options.plot and not config[OutputOptions].dry_run:
        plot_norms(options.plot, found, options.model)
        logger.info("wrote %s", options.plot)
    if found.problems:
        more = f" and {len(found.problems) - 5} more" if len(found.problems) > 5 else ""
        raise CheckpointError(f"{options.model}: {'; '.join(found.problems[:5])}{more}")


def _read(path: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    from library.checkpoints.adapter_tensors import no_adapter
    from library.safetensors_utils import is_pickled, load_pickled_tensors, load_safetensors, read_header
    from library.components.lllite_utils import is_lllite
    from networks.files.network_files import is_adapter_key

    pickled = is_pickled(path)
    metadata = {} if pickled else dict(read_header(path)[1])
    tensors = load_pickled_tensors(path) if pickled else load_safetensors(path, device="cpu")
    if not any(is_adapter_key(key) for key in tensors) and not is_lllite(tensors):
        raise CheckpointError(no_adapter(path, tensors, metadata))
    return tensors, metadata


def _family(options: InspectionOptions, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> str | None:
    from networks.kinds.adapter_family import family_by_name, family_of_adapter

    if options.family:
        return family_by_name(options.family)
    try:
        return family_of_adapter({key: tuple(tensor.shape) for key, tensor in tensors.items()}, metadata, options.model)
    except CheckpointError as error:
        logger.warning("%s", error)
        return None


def _print(options: InspectionOptions, found: FileReport, metadata: Mapping[str, str], family: str | None) -> None:
    import json

    from networks.files.adapter_report import table

    print(f"{options.model}: {len(found.layers)} layers for {family or 'an unknown family'}, {found.naming} names")
    told = {
        "base model": "ss_base_model_version",
        "network": "ss_network_module",
        "rank": "ss_network_dim",
        "alpha": "ss_network_alpha",
        "cond_emb_dim": "ss_cond_emb_dim",
    }
    print(
        "metadata: "
        + (", ".join(f"{name} {metadata[key]}" for name, key in told.items() if key in metadata) or "nothing of it")
    )
    for attribute in ("part", "block"):
        print()
        print("\n".join(table(found, attribute)))
    if found.notes:
        print()
    for note in found.notes:
        print(f"note: {note}")
    if options.metadata:
        print(json.dumps(dict(metadata), indent=4, sort_keys=True, ensure_ascii=False))


def _print_weights(tensors: Mapping[str, torch.Tensor], every: bool) -> None:
    """Lines `key,(shape),mean size,least size`, each tensor once."""
    from library.checkpoints.adapter_tensors import OUTSIDE

    marks = ("lora_up", "lora_down", "lora_A", "lora_B", "lora.up", "lora.down", "oft_", "hada_", "lokr_", *OUTSIDE)
    writer = csv.writer(sys.stdout, lineterminator="\n")
    chosen = {key: tensor for key, tensor in tensors.items() if every or any(mark in key for mark in marks)}
    print(f"\nnumber of tensors: {len(chosen)}")
    for key, tensor in chosen.items():
        sizes = tensor.float().abs()
        shape = f"({'-'.join(map(str, tensor.shape))})"
        writer.writerow(
            [key, shape, float(sizes.mean()) if tensor.numel() else 0.0, float(sizes.min()) if tensor.numel() else 0.0]
        )


def plot_norms(path: str, found: FileReport, title: str) -> None:
    """Bars of the norms by block as a PNG file."""
    import os

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from library.core.atomic_file import atomic_path
    from networks.files.adapter_report import total_norm

    norms = {key: total_norm(layers) for key, layers in found.by("block").items()}
    known = {key: norm for key, norm in norms.items() if norm is not None}
    if not known:
        raise CheckpointError(f"{title}: no norm is known without the model's weights; there is nothing to draw")
    figure = Figure(figsize=(max(6.0, 0.28 * len(known) + 2), 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.bar(range(len(known)), list(known.values()), color="#4c72b0")
    axes.set_xticks(range(len(known)), list(known), rotation=90, fontsize=7)
    axes.set_ylabel("norm of the change")
    axes.set_title(os.path.basename(title), fontsize=9)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})
