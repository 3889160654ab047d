"""The networks that options of gen_img.py name: what is wrong with them, and loading."""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from library.checkpoints.embeddings import WordVectors, bundled_rows
from library.core.errors import ConfigError, Problems
from library.families.registry import record_of
from library.generation import pipeline_class
from library.generation.adapter_files import AdapterFile, file_problem
from library.generation.adapters import LoadedAdapters
from library.generation.gen_img.options import GenerationModelOptions, GenerationNetworkOptions
from library.generation.words import read_layered_words, read_words
from library.training.adapters import check_owner, importable_name
from library.training.keyword_args import parse_keyword_args

if TYPE_CHECKING:
    from torch import nn


def network_problems(options: GenerationNetworkOptions, family: str) -> list[str]:
    """What is wrong with modules, files and arguments for a model of this family, from headers."""
    problems = Problems()
    for name in options.network_module or []:
        problems.attempt(lambda: check_owner(importable_name(name), record_of(family).network_module))
        problems.attempt(lambda: _module(name))
    for path in options.network_weights or []:
        problem = file_problem(path, "network_weights", family)
        if problem:
            problems.add(problem)
    for text in options.network_args or []:
        problems.attempt(lambda: _arguments(text))
    return problems.messages


def words_of(model: GenerationModelOptions, options: GenerationNetworkOptions) -> list[WordVectors]:
    """The words of --textual_inversion_embeddings and those in the files of networks. ConfigError."""
    files, networks = options.textual_inversion_embeddings or [], options.network_weights or []
    if not files and not any(map(bundled_rows, networks)):
        return []
    widths = pipeline_class(model.family).embedding_widths(model)
    return read_words(files, [("network_weights", path) for path in networks], widths, "textual_inversion_embeddings")


def layered_words_of(model: GenerationModelOptions, options: GenerationNetworkOptions) -> list[WordVectors]:
    """The words of --XTI_embeddings. ConfigError."""
    if not options.XTI_embeddings:
        return []
    family = pipeline_class(model.family)
    layers = family.text_layers(model)
    if not layers:
        raise ConfigError(
            "--XTI_embeddings: words have vectors for each layer in Stable Diffusion 1 and 2 alone; leave it out, or "
            "give --textual_inversion_embeddings"
        )
    (width,) = family.embedding_widths(model).values()
    return read_layered_words(options.XTI_embeddings, layers, width, "XTI_embeddings")


def _module(name: str) -> Any:
    try:
        module = importlib.import_module(importable_name(name))
    except ImportError as error:
        raise ConfigError(
            f"--network_module is {name}, which cannot be imported: {error}; e.g. networks.lora"
        ) from error
    if not hasattr(module, "create_network_from_weights"):
        raise ConfigError(
            f"--network_module is {name}; it has no function create_network_from_weights; name a module that reads "
            "adapters, e.g. networks.lora"
        )
    return module


def _arguments(text: str) -> dict[str, Any]:
    """`a=1;b=2` as keyword arguments."""
    return parse_keyword_args([part for part in text.split(";") if part.strip()], "network_args")


def show_metadata(path: str) -> None:
    """The metadata of a network file on the console."""
    from library.safetensors_utils import read_header

    metadata = read_header(path)[1] if path.endswith(".safetensors") else {}
    print(f"{path}:\n{json.dumps(metadata, indent=2, ensure_ascii=False, sort_keys=True)}")


def load_networks(
    options: GenerationNetworkOptions, denoiser: nn.Module, encoders: Sequence[nn.Module]
) -> LoadedAdapters:
    """The networks of the options in their order, merged ones first. CheckpointError when one has no layer of these
    models; ConfigError when its module cannot be used as asked."""
    adapters = LoadedAdapters(denoiser, encoders, pre_calc=options.network_pre_calc)
    for place, path in enumerate(options.network_weights or []):
        if options.network_show_meta:
            show_metadata(path)
        file = AdapterFile(
            path, options.network_mul[place] if options.network_mul else 1.0,
            importable_name(options.network_module[place]),
            _arguments(options.network_args[place]) if options.network_args else {},
        )  # fmt: skip
        (adapters.merge if place < options.num_merged else adapters.add)(file)
    return adapters
