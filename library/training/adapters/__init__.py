"""What adapter is trained: its options, and short names for the network modules."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from library.core.errors import ConfigError, Problems, did_you_mean
from library.core.options import LARGEST_RANK, number_or_none, option, parse_bool
from library.core.registry import Registry
from library.families.record import FamilyRecord
from library.families.registry import FAMILIES
from library.training.keyword_args import split_items

NETWORKS: Registry = Registry("network module", option="network_module", group="adapters")
KINDS = (
    "lora", "loha", "lokr", "glora", "oft", "diag_oft", "boft", "dylora", "lora_fa", "tlora", "ia3", "full", "norm",
)  # fmt: skip
"""files in networks/ that make adapters of one kind, for every family; the short names are theirs"""

for _kind in KINDS:
    NETWORKS.add(_kind, f"networks.{_kind}")
for _record in FAMILIES.values():  # the names under which known scripts have the LoRA of one family
    if (
        _record.network_module.startswith("networks.")
        and _record.network_module.removeprefix("networks.") not in NETWORKS
    ):
        NETWORKS.add(_record.network_module.removeprefix("networks."), _record.network_module)
NETWORKS.add("lycoris", "lycoris.kohya", package="lycoris-lora")

OWN_MODULES = tuple(NETWORKS.entry(name).target for name in NETWORKS.names() if name != "lycoris")

DENOISER_ONLY = ("networks.oft", "networks.oft_flux", "networks.diag_oft", "networks.boft")
"""network modules that never train text encoders"""


@dataclass(frozen=True, kw_only=True)
class NetworkOptions:
    """Adapter (network module)"""

    network_module: str | None = option(
        None, help=f"kind of adapter: {', '.join(KINDS)}, lycoris; or an importable module with create_network"
    )
    network_dim: int | None = option(None, help="rank of the adapter; 4 when not given", most=LARGEST_RANK)
    network_alpha: float = option(1.0, help="the change is scaled by alpha / rank")
    network_dropout: float | None = option(
        None, help="share of the adapter's inner values that is zeroed in training, 0 to below 1"
    )
    network_args: list[str] | None = option(
        None, help="further arguments of the network module, as key=value", nargs="*"
    )
    network_weights: str | None = option(None, help="adapter file to start from")
    drop_untrained: bool = option(
        False,
        help="leave layers of --network_weights out that belong to parts that are not trained; they act and are written again otherwise",
    )
    dim_from_weights: bool = option(False, help="take layers, ranks and alphas from --network_weights")
    network_train_unet_only: bool = option(False, help="train the denoiser alone")
    network_train_text_encoder_only: bool = option(False, help="train the text encoders alone")
    unet_lr: float | None = option(
        None, help="learning rate of the denoiser; --learning_rate when not given; 0 = not trained"
    )
    text_encoder_lr: list[float] | None = option(
        None,
        help="learning rate of the text encoders, one for all or one for each; --learning_rate when not given; 0 = not trained",
        nargs="*",
    )
    scale_weight_norms: float | None = option(
        None, help="largest norm of a layer's change; larger ones are scaled down; 0 = not given",
        convert=number_or_none
    )
    base_weights: list[str] | None = option(None, help="adapter files merged into the model before training", nargs="*")
    base_weights_multiplier: list[float] | None = option(
        None, help="strength of each of the --base_weights; 1 when not given", nargs="*"
    )

    def __post_init__(self) -> None:
        problems = Problems()
        self._check_numbers(problems)
        if self.network_train_unet_only and self.network_train_text_encoder_only:
            problems.add(
                "--network_train_unet_only and --network_train_text_encoder_only together leave nothing to train; use "
                "one of them"
            )
        if self.drop_untrained and not self.network_weights:
            problems.add(
                "--drop_untrained is set without --network_weights, whose layers it drops; add it, or leave "
                "--drop_untrained out"
            )
        if self.dim_from_weights and not self.network_weights:
            problems.add("--dim_from_weights is set without --network_weights, the file to take the ranks from; add it")
        if self.base_weights_multiplier and len(self.base_weights_multiplier) > len(self.base_weights or ()):
            problems.add(
                f"--base_weights_multiplier has {len(self.base_weights_multiplier)} values for "
                f"{len(self.base_weights or ())} --base_weights;"
                " give at most one for each file"
            )
        try:
            parse_pairs(self.network_args)
        except ConfigError as error:
            problems.absorb(error)
        problems.raise_if_any()

    def _check_numbers(self, problems: Problems) -> None:
        if self.network_dim is not None and self.network_dim < 1:
            problems.add(f"--network_dim is {self.network_dim}; needed: a rank of 1 or more")
        if self.network_alpha < 0:
            problems.add(f"--network_alpha is {self.network_alpha}; needed: 0 (the rank) or more")
        if self.network_dropout is not None and not 0 <= self.network_dropout < 1:
            problems.add(f"--network_dropout is {self.network_dropout}; needed: 0 or more and below 1")
        if self.scale_weight_norms is not None and self.scale_weight_norms <= 0:
            problems.add(f"--scale_weight_norms is {self.scale_weight_norms}; needed: a norm above 0")
        for name, rates in (("unet_lr", [self.unet_lr]), ("text_encoder_lr", self.text_encoder_lr or [])):
            for rate in rates:
                if rate is not None and rate < 0:
                    problems.add(f"--{name} is {rate}; needed: 0 (not trained) or more")

    @property
    def pairs(self) -> dict[str, str]:
        """--network_args as key -> text."""
        return parse_pairs(self.network_args)

    def is_on(self, name: str | None) -> bool:
        """Whether a network argument is a switch that is set. A bad value is reported by the check of the arguments."""
        try:
            return parse_bool(self.pairs.get(name or "", False))
        except argparse.ArgumentTypeError:
            return False

    @property
    def module_path(self) -> str:
        """The importable name of --network_module."""
        return importable_name(self.network_module or "")


def importable_name(name: str) -> str:
    """The module that a short name stands for; other names are modules already."""
    return NETWORKS.entry(name).target if name in NETWORKS else name


def parse_pairs(items: Sequence[str] | None) -> dict[str, str]:
    """`key=value` texts -> dict; several in one text are split, each at its first `=`, and the last of equal keys wins.
    ConfigError with every bad item."""
    problems, pairs = Problems(), {}
    for item in split_items(items):
        key, separator, value = item.partition("=")
        value = value.strip()
        if not separator or not key.strip() or value.startswith("="):
            problems.add(f"--network_args has '{item}'; needed: key=value")
        pairs[key.strip()] = (
            value[1:-1] if len(value) > 1 and value[0] in "'\"" and value.find(value[0], 1) == len(value) - 1 else value
        )
    problems.raise_if_any()
    return pairs


def check_owner(path: str, usual: str) -> None:
    """ConfigError when a network module is made for another family than the one whose LoRAs `usual` makes."""
    owner = next((record for record in FAMILIES.values() if record.network_module == path), None)
    if owner is not None and path != usual:
        raise ConfigError(
            f"--network_module is {path}, which is for {owner.adapters.title}; use {usual} or networks.lora, which "
            "serves every family"
        )


def check_network_module(options: NetworkOptions, usual: str | None = None) -> None:
    """Raise ConfigError unless --network_module is given and can be imported; nothing of it is executed. `usual`: the
    module of the family's LoRAs; that of another family is refused, and messages name it as an example."""
    if not options.network_module:
        raise ConfigError(
            f"--network_module is missing; name the adapter to train, e.g. --network_module {usual or 'networks.lora'}"
        )
    path = options.module_path
    if usual is not None:
        check_owner(path, usual)
    try:
        found = importlib.util.find_spec(path) is not None
    except (ModuleNotFoundError, ValueError):
        found = False
    except Exception:  # of a package that it stands in; told when the module is imported
        found = True
    if found:
        return
    if path.split(".")[0] == "lycoris":
        raise ConfigError(
            f"--network_module is {options.network_module}, which needs the package lycoris-lora: pip install "
            "lycoris-lora"
        )
    known = [*NETWORKS.names(), *OWN_MODULES, "lycoris.kohya"]
    raise ConfigError(
        f"--network_module is {options.network_module}; there is no such "
        f"module{did_you_mean(options.network_module, known) or '.'}"
        f" Known: {', '.join(known)}, or any importable module with create_network"
    )


_UPDATED_AT_ONCE = {
    "fused_backward_pass": "gradients of a network are few, are averaged over processes and clipped by their common norm, which"
    " needs all of them at once; the option saves memory in full fine-tuning only",
}


def ignored_options(record: FamilyRecord, trainable: str) -> Mapping[str, str]:
    """Options that the family's script takes and that mean nothing: name -> reason."""
    return {} if _is_of_clips(record) else _UPDATED_AT_ONCE


def foreign_options(record: FamilyRecord, trainable: str) -> Mapping[str, str]:
    """Options that the family's script does not have: name -> reason."""
    return _UPDATED_AT_ONCE if _is_of_clips(record) else {}


def _is_of_clips(record: FamilyRecord) -> bool:
    """Whether the known script of a family is that of a trainer of videos."""
    return record.latents is not None and record.latents.clips
