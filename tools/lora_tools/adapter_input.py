"""What the tools that read one adapter file, or several, share: the tensors with their strengths, checked."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from library.core.errors import CheckpointError, ConfigError
from library.core.options import Config, option_fields
from library.training import cli
from library.training.option_groups import ConsoleOptions

if TYPE_CHECKING:
    import torch

    from networks.files.adapter_layout import FileLayer

logger = logging.getLogger("atelier")

ENDINGS = (".safetensors", ".ckpt", ".pt", ".pth")
"""of adapter files that are written"""


@dataclass(frozen=True)
class AdapterFile:
    """A file as it is: `layers` and `others` under its own names; `configs` holds what PEFT says beside or in it."""

    path: str
    layers: dict[str, FileLayer]
    others: dict[str, torch.Tensor]
    metadata: dict[str, str]
    has_config_beside: bool = False


def read_file(path: str) -> AdapterFile:
    """An adapter file under its own names, with the alphas that PEFT keeps apart. CheckpointError when it is no
    adapter, is damaged or holds values that are not finite."""
    from library.checkpoints.adapter_tensors import no_adapter
    from library.safetensors_utils import is_pickled, load_pickled_tensors, load_safetensors, read_header
    from networks.files.adapter_layout import file_layers
    from networks.files.network_files import is_adapter_key
    from networks.files.peft_config import METADATA_KEY, configs_of

    is_pickle = is_pickled(path)
    metadata = {} if is_pickle else dict(read_header(path)[1])
    tensors = load_pickled_tensors(path) if is_pickle else load_safetensors(path, device="cpu")
    if not any(is_adapter_key(key) for key in tensors):
        raise CheckpointError(no_adapter(path, tensors, metadata))
    _refuse_not_finite(path, tensors)
    layers, others = file_layers(tensors, path)
    configs = configs_of(path, metadata)
    _give_alphas(layers, configs)
    return AdapterFile(path, layers, others, metadata, bool(configs) and METADATA_KEY not in metadata)


def _give_alphas(layers: dict[str, FileLayer], configs: dict) -> None:
    """The alphas of PEFT's configuration, without a key: they are not in the file."""
    from networks.files.peft_config import with_alphas

    if not configs:
        return
    downs = {
        key: layer.tensors["lora_down.weight"]
        for layer in layers.values()
        if (key := layer.keys.get("lora_down.weight"))
    }
    for key, alpha in with_alphas(downs, configs).items():
        if key.endswith(".alpha") and key not in downs:
            layers[key.removesuffix(".alpha")].tensors.setdefault("alpha", alpha)


def _refuse_not_finite(path: str, tensors: dict[str, torch.Tensor]) -> None:
    import torch

    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor.float()).all():
            raise CheckpointError(
                f"{path}: {key} has values that are not finite (NaN or infinite); the training of this file failed"
            )


def refuse_shared_config(source: AdapterFile, save_to: str) -> None:
    """CheckpointError when the result would need another adapter_config.json in the folder of `source`, which has its
    own."""
    if source.has_config_beside and _folder(save_to) == _folder(source.path):
        raise CheckpointError(
            f"{source.path} has its rank in the adapter_config.json beside it, which the result needs too; give "
            "--save_to in another folder"
        )


def _folder(path: str) -> str:
    return os.path.dirname(os.path.realpath(path))


def write_config_beside(path: str, source: AdapterFile, tensors: Mapping[str, torch.Tensor]) -> None:
    """Where PEFT reads ranks and alpha of `source` from adapter_config.json beside it, write one beside the result,
    whose scale is 1: that of `source` is in its matrices."""
    import json
    from pathlib import Path

    from library.core.atomic_file import write_text_atomically
    from library.core.text_files import read_json
    from networks.files.adapter_layout import peft_settings
    from networks.files.peft_config import CONFIG_FILE

    if not source.has_config_beside:
        return
    ranks = {
        name.removeprefix("base_model.model."): tensors[layer.keys["lora_down.weight"]].shape[0]
        for name, layer in source.layers.items() if layer.is_peft
    }  # fmt: skip
    old = read_json(Path(source.path).with_name(CONFIG_FILE), error=CheckpointError, needed=dict)
    target = Path(path).with_name(CONFIG_FILE)
    settings = {key: value for key, value in peft_settings(ranks, None).items() if key != "target_modules"}
    write_text_atomically(target, json.dumps({**old, **settings}, indent=2, sort_keys=True))
    logger.info("wrote %s", target)


def adapter_slot_problem(path: str | None, name: str) -> str | None:
    """A message when a safetensors file that --{name} names is there and is no adapter."""
    from library.checkpoints.kinds import check_slot

    return check_slot(path, name, {"adapter"}) if path and str(path).endswith(".safetensors") else None


def ending_problem(path: str | None, name: str, endings: tuple[str, ...] = ENDINGS) -> str | None:
    """A message when an output has no known ending."""
    if not path:
        return f"--{name} is missing; name the file to write"
    return None if path.endswith(endings) else f"--{name} is {path}; needed: a name that ends in {', '.join(endings)}"


FILES = "files"


def add_files(parser: argparse.ArgumentParser, name: str, what: str) -> argparse.ArgumentParser:
    """Let the values of --{name} be given without its name."""
    parser.add_argument(FILES, nargs="*", help=f"{what}; the same as --{name}", default=argparse.SUPPRESS)
    return parser


def read_with_files(
    argv: Sequence[str] | None, parser: argparse.ArgumentParser, classes: Sequence[type], name: str
) -> Config:
    """As read_command, for a parser of add_files. ConfigError when files are given in both ways."""
    values = vars(parser.parse_args(argv))
    files = values.pop(FILES, [])
    if files and values.get(name):
        raise ConfigError(f"{files[0]} stands alone and --{name} is given too; give all files in one way")
    if files:
        owner = next(group for group in classes if name in option_fields(group))
        values[name] = files if option_fields(owner)[name][1].nargs else files[0]
        if len(files) > 1 and values[name] is files[0]:
            raise ConfigError(f"{len(files)} files are given; this tool takes one")
    config = Config.read(values, classes)
    cli.set_up_logging(config[ConsoleOptions])
    return config
