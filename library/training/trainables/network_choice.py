"""What the options choose of an adapter, and whether it can be had: checks before models, rates, arguments."""

from __future__ import annotations

import importlib
import os
import re
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import TYPE_CHECKING

import torch

from library.core.errors import CheckpointError, ConfigError, Problems, foreign_errors
from library.core.learning_rates import rate
from library.core.options import Ignored, without_effect
from library.core.patterns import pattern_values
from library.families.registry import record_of
from library.safetensors_utils import read_header
from library.training.adapters import DENOISER_ONLY, NetworkOptions, check_network_module
from library.training.computing_options import PrecisionOptions
from library.training.optimizers import OptimizerOptions, check_rates
from library.training.option_groups import ModelOptions
from library.training.trainables.base import Trainable
from library.training.trainables.foreign_network import try_arguments
from networks.kinds.network_args import selected_blocks, selection, shapes_nothing
from networks.kinds.targets import targets_of_family

if TYPE_CHECKING:
    from library.training.protocols import Plain
    from library.training.wiring.base import ModelFamily

DEFAULT_DIM = 4
NO_RATE = (
    "every learning rate is 0: there is nothing to train; look at --learning_rate, --unet_lr and --text_encoder_lr"
)
JOINED_PARTS = (1, 3, 4)
"""how many adapters files hold as one: query, key and value of a layer, these and the first linear layer"""


class NetworkChoice(Trainable):
    """The network module and its arguments, the files to start from, which parts learn and how fast."""

    options = NetworkOptions
    opts: NetworkOptions
    _is_own = True
    """whether the module is one of ours, which checks its arguments itself"""

    def check(self, family: ModelFamily) -> None:
        """Module, network arguments and files, as far as they can be judged without models."""
        problems = Problems()
        steps = (
            lambda: check_network_module(self.opts, self._usual_module(family)), lambda: self._check_arguments(family),
            lambda: self._check_blocks(family),
            lambda: self._check_files(family), self._check_ranks,
        )  # fmt: skip
        for step in steps:
            problems.attempt(step)
        problems.attempt(lambda: check_rates(self.config[OptimizerOptions], self._rates(family)))
        precision = self.config[PrecisionOptions]
        form = precision.denoiser_form or precision.text_form
        if self.opts.module_path.split(".")[0] == "lycoris" and form:
            problems.add(
                f"--network_module is {self.opts.network_module}, which computes in the number format of the base's "
                f"weights; that is {form}, in which nothing can be computed. Leave {_asking(precision)} out, or use "
                "one of the networks here, e.g. networks.loha"
            )
        if not self._has_a_rate(family):
            problems.add(NO_RATE)
        if self.opts.network_train_text_encoder_only and not any(self.trains_text_encoders(family)):
            problems.add(
                f"--network_train_text_encoder_only leaves nothing to train: no text encoder of {family.name} is "
                "trained"
            )
        problems.raise_if_any()

    @staticmethod
    def _usual_module(family: ModelFamily) -> str:
        return record_of(family.name).network_module

    def _check_arguments(self, family: ModelFamily) -> None:
        """The module has the functions that make a network; its own look at --network_args, where it has one."""
        path = self.opts.module_path
        try:
            check_network_module(self.opts)
        except ConfigError:
            return  # reported already
        try:
            module = importlib.import_module(path)
        except Exception as error:  # whatever a module of the user's raises
            raise ConfigError(f"--network_module is {path}, which cannot be imported: {error}") from error
        needed = "create_network_from_weights" if self.opts.dim_from_weights else "create_network"
        if not hasattr(module, needed):
            usual = self._usual_module(family)
            raise ConfigError(
                f"--network_module is {path}, which has no function {needed}; name a module that makes adapters, e.g. "
                f"{usual}"
            )
        check = getattr(module, "check_network_args", None)
        if check is not None:
            explicit = {
                name: getattr(self.opts, name)
                for name in ("network_dim", "network_alpha")
                if name in self.config.explicit
            }
            check({"dropout": self.opts.network_dropout, **self.opts.pairs}, family.name, explicit)
        else:
            self._try_arguments(module, family)

    def _try_arguments(self, module: ModuleType, family: ModelFamily) -> None:
        """What a module that is not ours says of its arguments, and that it can have the rates of the family's
        options."""
        self._is_own, options = False, self.opts
        pairs = self._pairs(family)
        if not options.pairs or options.dim_from_weights:
            return

        def make(model: torch.nn.Module, with_arguments: bool) -> None:
            module.create_network(
                1.0, options.network_dim, options.network_alpha, None, [], model,
                neuron_dropout=options.network_dropout, **(pairs if with_arguments else {}),
            )

        try_arguments(make, targets_of_family(family.name).classes, self._told)

    def _check_blocks(self, family: ModelFamily) -> None:
        """Selected blocks exist in the model file, as far as its names tell."""
        rules = [rule for rule in targets_of_family(family.name).indices if rule.arg in self.opts.pairs]
        path = self.config[ModelOptions].pretrained_model_name_or_path
        if not rules or not path or not os.path.isfile(path) or not self.opts.module_path.startswith("networks."):
            return
        try:
            keys = read_header(path)[0]
        except CheckpointError:
            return  # reported by the family
        problems = Problems()
        for rule in rules:
            numbers = [int(match[1]) for key in keys if (match := re.search(rule.pattern, key))]
            try:
                if numbers:
                    selected_blocks(selection(self.opts.pairs[rule.arg]), max(numbers) + 1, rule.arg)
            except ConfigError as error:
                problems.absorb(error)
            except ValueError:
                continue  # reported by the check of the arguments
        problems.raise_if_any()

    def _check_files(self, family: ModelFamily) -> None:
        from library.generation.adapter_files import file_problem

        problems = Problems()
        files = [("network_weights", self.opts.network_weights)] if self.opts.network_weights else []
        files += [("base_weights", path) for path in self.opts.base_weights or ()]
        for slot, path in files:
            if str(path).endswith(".safetensors") or not os.path.isfile(path):
                if message := file_problem(path, slot, family.name):
                    problems.add(message)
        problems.raise_if_any()

    def _check_ranks(self) -> None:
        """The rank of the file to start from is that of the network, where one number says it for all layers."""
        path, pairs = self.opts.network_weights or "", self.opts.pairs
        if self.opts.dim_from_weights or not path.endswith(".safetensors") or any("dim" in key for key in pairs):
            return
        try:
            infos, _ = read_header(path)
        except (CheckpointError, OSError):
            return  # reported by _check_files
        downs = (info.shape for key, info in infos.items() if key.endswith(("lora_down.weight", "lora_A.weight")))
        ranks = {shape[0] for shape in downs if len(shape) == 2}
        dim = DEFAULT_DIM if self.opts.network_dim is None else self.opts.network_dim
        if ranks and not any(rank % dim == 0 and rank // dim in JOINED_PARTS for rank in ranks):
            raise ConfigError(
                f"--network_dim is {dim}; --network_weights {path} has rank {', '.join(map(str, sorted(ranks)))};"
                " give the same number, or add --dim_from_weights"
            )

    def fixed_settings(self, family: ModelFamily) -> dict[str, Plain]:
        options = self.opts
        return {
            "network_module": options.module_path,
            "network_dim": DEFAULT_DIM if options.network_dim is None else options.network_dim,
            "network_alpha": options.network_alpha,
            "network_args": {key: text for key, text in options.pairs.items() if not shapes_nothing(key)},
            "dim_from_weights": options.dim_from_weights,
            "network_train_unet_only": options.network_train_unet_only,
            "network_train_text_encoder_only": options.network_train_text_encoder_only,
        }

    def trains_text_encoders(self, family: ModelFamily) -> list[bool]:
        if self.opts.network_train_unet_only or self.opts.module_path in DENOISER_ONLY:
            return [False] * len(targets_of_family(family.name).text_encoders)
        return [
            encoder.switch is None or self.opts.is_on(encoder.switch)
            for encoder in targets_of_family(family.name).text_encoders
        ]

    def _rates(self, family: ModelFamily) -> list[float]:
        """The learning rates of the parts that are trained."""
        default, given = self.config[OptimizerOptions].learning_rate, self.opts.text_encoder_lr or []
        rates = (
            []
            if self.opts.network_train_text_encoder_only
            else [default if self.opts.unet_lr is None else self.opts.unet_lr]
        )
        for position, learns in enumerate(self.trains_text_encoders(family)):
            if learns:
                rates.append(given[min(position, len(given) - 1)] if given else default)
        return rates

    def _has_a_rate(self, family: ModelFamily) -> bool:
        """Whether some part can learn, as far as the options tell: rates by layer in arguments are a matter of the
        network."""
        if any("lr" in name for name in self.opts.pairs) or any(family.layer_rates().values()):
            return True
        default = self.config[OptimizerOptions].learning_rate
        unet = default if self.opts.unet_lr is None else self.opts.unet_lr
        rates = [] if self.opts.network_train_text_encoder_only else [unet]
        if any(self.trains_text_encoders(family)):
            rates += self.opts.text_encoder_lr or [default]
        return any(rate is None or rate for rate in rates) or not rates

    def idle(self, family: ModelFamily) -> list[Ignored]:
        """Learning rates that were given for parts that are not trained."""
        trained, encoders = self.trains_text_encoders(family), targets_of_family(family.name).text_encoders
        found: list[Ignored] = []
        if self.opts.unet_lr and self.opts.network_train_text_encoder_only:
            found += without_effect(["unet_lr"], "--network_train_text_encoder_only is set")
        rates = self.opts.text_encoder_lr or ()
        if any(rates) and self.opts.module_path in DENOISER_ONLY:
            found += without_effect(["text_encoder_lr"], f"{self.opts.network_module} trains the denoiser alone")
        elif any(rates) and not encoders:
            found += without_effect(["text_encoder_lr"], f"{family.name} trains no text encoder")
        elif any(rates) and self.opts.network_train_unet_only:
            found += without_effect(["text_encoder_lr"], "--network_train_unet_only is set")
        elif len(rates) > 1:
            for encoder, rate, learns in zip(encoders, rates, trained, strict=False):
                if rate and not learns:
                    reason = f"has no effect: its text encoder learns only with --network_args {encoder.switch}=True"
                    found.append(Ignored(f"--text_encoder_lr {rate}", reason))
        surplus = [rate for rate in rates[len(encoders) :] if rate != rates[0]] if encoders else []
        if surplus:
            number = f"{len(encoders)} text encoder{'s' if len(encoders) > 1 else ''}"
            found.append(
                Ignored(
                    f"--text_encoder_lr {' '.join(map(str, surplus))}", f"has no effect: {family.name} has {number}"
                )
            )
        return found

    # -- arguments -------------------------------------------------------------------------------------------------

    def _pairs(self, family: ModelFamily) -> dict[str, object]:
        """--network_args as the module gets them. Rates of the family's options stand behind those of network_reg_lrs.

        `dropout` is passed as well because LyCORIS reads no neuron_dropout. ConfigError when rates of parts are given
        to a module that does not know any.
        """
        pairs, rates = dict(self.opts.pairs), family.layer_rates()
        pairs.setdefault("dropout", self.opts.network_dropout)
        if rates and not self._is_own:
            raise ConfigError(
                f"learning rates for parts of the model are set; {self.opts.network_module} has no network_reg_lrs. "
                "Leave them out"
            )
        if rates:
            written = {
                pattern.pattern: value for pattern, value in pattern_values(pairs.get("network_reg_lrs") or {}, rate)
            }
            others = {pattern: value for pattern, value in rates.items() if pattern not in written}
            pairs["network_reg_lrs"] = {**written, **others}  # the first pattern that fits a layer counts
        return pairs

    def _told(self) -> AbstractContextManager[None]:
        """Inside, whatever another package's module raises is one message with its name, its arguments and the
        reason."""
        if self._is_own:
            return nullcontext()
        given = {
            "network_dim": self.opts.network_dim,
            "network_alpha": self.opts.network_alpha,
            "network_weights": self.opts.network_weights,
        }
        words = [f"--{name} {value}" for name, value in given.items() if value is not None]
        pairs = " ".join(f"{key}={value}" for key, value in self.opts.pairs.items())
        words += [f"--network_args {pairs}"] if pairs else []
        return foreign_errors(
            ConfigError,
            f"look at --network_args: the network of --network_module {self.opts.network_module} cannot be made with "
            f"{' '.join(words) or 'no arguments'}",
        )


def _asking(precision: PrecisionOptions) -> str:
    """The options by which the base is stored in fewer bits."""
    names = ("fp8_base", "fp8_base_unet", "fp8_scaled", "quantize_base", "quantize_text_encoder")
    return " and ".join(f"--{name}" for name in names if getattr(precision, name))
