"""Training of an adapter through a network module: ours, lycoris.kohya or a user's own, all called in the same way."""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import logging
import math
import os
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING

import torch

from library.core.atomic_file import atomic_path, scratch_path
from library.core.errors import CheckpointError, ConfigError, Problems, TrainingError, foreign_errors
from library.core.keyed_random import StepDraws, isolated_rng, key_seed
from library.core.learning_rates import rate
from library.core.options import Config, Ignored, parse_bool, without_effect
from library.core.patterns import pattern_values
from library.dataset import CachingOptions
from library.families.registry import record_of
from library.safetensors_utils import load_pickled_tensors, load_safetensors, read_header
from library.training.adapters import DENOISER_ONLY, NetworkOptions, check_network_module
from library.training.hooks.base import Hook
from library.training.optimizers import OptimizerOptions, check_rates
from library.training.option_groups import ModelOptions, PrecisionOptions
from library.training.timesteps import NUM_TIMESTEPS
from library.training.trainables.base import Trainable
from library.training.trainables.base_weights import BaseWeights
from library.training.trainables.foreign_network import try_arguments
from library.training.trainables.fresh_network import changed_layer
from library.training.trainables.kept_layers import KeptLayers, kept_layers
from library.training.trainables.network_hook import NetworkHook
from library.training.trainables.weight_norm import WeightNormHook
from networks.files.network_files import by_module, match_names, read_adapter_file, write_adapter_file
from networks.kinds.description import describe_network, is_scaled_by_rank
from networks.kinds.network_args import selected_blocks, selection, shapes_nothing
from networks.kinds.targets import targets_of_family

if TYPE_CHECKING:
    from library.checkpoints.loading import Transform
    from library.dataset.batch import Batch
    from library.dataset.strategies import Conditioning
    from library.training.accelerator_setup import Runtime
    from library.training.objective import NoisyLatents
    from library.training.protocols import AdapterNetwork, NetworkModule, ParamGroup, Plain, TextEncoders
    from library.training.run import Models
    from library.training.wiring.base import ModelFamily
    from networks.kinds.additional_network import AdditionalNetwork

logger = logging.getLogger(__name__)

DEFAULT_DIM = 4
NO_RATE = (
    "every learning rate is 0: there is nothing to train; look at --learning_rate, --unet_lr and --text_encoder_lr"
)
JOINED_PARTS = (1, 3, 4)
"""how many adapters files hold as one: query, key and value of a layer, these and the first linear layer"""


class NetworkTrainable(Trainable):
    """An adapter. `network` is the object that the network module made; it exists after attach()."""

    name = "network"
    options = NetworkOptions
    spec_kind = "lora"
    keeps_text_still = "add --network_train_unet_only"
    opts: NetworkOptions

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._base_weights = BaseWeights(self.opts)
        self.kept: KeptLayers = KeptLayers()
        self._changed_at_start: tuple[str, float] | None = None

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
        if self.opts.module_path.split(".")[0] == "lycoris" and (precision.fp8_base or precision.fp8_base_unet):
            problems.add(
                f"--network_module is {self.opts.network_module}, which computes in the number format of the base's "
                "weights; that is 8 bits"
                " with --fp8_base, in which nothing can be computed. Leave --fp8_base out, or use one of the networks "
                "here, e.g. networks.loha"
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
        """What a module that is not ours says of its arguments, and that it can have the rates of the family's options."""
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
        from library.checkpoints.kinds import check_adapter, check_slot

        maker = record_of(family.name).adapters.title
        problems = Problems()
        files = [("network_weights", self.opts.network_weights)] if self.opts.network_weights else []
        files += [("base_weights", path) for path in self.opts.base_weights or ()]
        for slot, path in files:
            if str(path).endswith(".safetensors") or not os.path.isfile(path):
                message = check_slot(path, slot, {"adapter"}) or check_adapter(path, slot, maker)
                if message:
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
            encoder.switch is None or _is_on(self.opts.pairs.get(encoder.switch))
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

    # -- attaching -------------------------------------------------------------------------------------------------

    def transform(self, family: ModelFamily) -> Transform | None:
        kept = self._read_kept(family).adapter()
        return self._base_weights.transform(
            family, self.config[ModelOptions].pretrained_model_name_or_path, self.config[CachingOptions].caches_text,
            [] if kept is None else [kept],
        )

    def transform_identity(self, family: ModelFamily) -> str:
        parts = [self._base_weights.identity(targets_of_family(family.name)), self._read_kept(family).identity()]
        return " and ".join(part for part in parts if part)

    def _read_kept(self, family: ModelFamily) -> KeptLayers:
        if not self.kept.path:
            self.kept = kept_layers(self.opts, targets_of_family(family.name), self.trains_text_encoders(family))
        return self.kept

    def attach(self, family: ModelFamily, models: Models, runtime: Runtime) -> None:
        """Make the network, hook it into the models and load its start weights."""
        self._targets = targets_of_family(family.name)
        self._models = models
        kept = self._read_kept(family).message()
        if kept is not None:
            logger.warning(kept)
        for part in (models.denoiser, *models.text_encoders):
            if part is not None:
                part.requires_grad_(False)
        module = importlib.import_module(self.opts.module_path)
        self._is_own = hasattr(module, "check_network_args")
        text_encoders, pairs = self._text_encoders(models), self._pairs(family)
        with self._told():
            self._base_weights.finish(module, models, runtime, self._targets)
            with isolated_rng(key_seed(runtime.seed, "network init")):
                network = self._make_network(module, models, text_encoders, pairs)
        if network is None:
            raise ConfigError(f"--network_module {self.opts.network_module} made no network; see its messages above")
        self.network = network
        with self._told():
            if hasattr(network, "initialize"):
                network.initialize(runtime.seed)
            if hasattr(network, "prepare_network"):
                network.prepare_network(SimpleNamespace(**self.config.values()))
            trains_text = any(self.trains_text_encoders(family))
            network.apply_to(text_encoders, models.denoiser, trains_text, not self.opts.network_train_text_encoder_only)
            self._refuse_empty(models)
            if self.opts.network_weights:
                self._load_start_weights(network)
                _own_memory(network)
            self._finish(network, text_encoders, models, runtime)

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

    def _finish(
        self, network: AdapterNetwork, text_encoders: TextEncoders, models: Models, runtime: Runtime
    ) -> None:
        if self.opts.scale_weight_norms and not hasattr(network, "apply_max_norm_regularization"):
            raise ConfigError(
                f"--scale_weight_norms is set; {self.opts.network_module} has no apply_max_norm_regularization. Leave "
                "it out"
            )
        network.to(runtime.device, runtime.trained_dtype)
        network.enable_gradient_checkpointing()
        network.prepare_grad_etc(text_encoders, models.denoiser)
        if not self.opts.network_weights:
            half = runtime.weight_dtype != torch.float32
            with torch.autocast(runtime.device.type, runtime.weight_dtype if half else None, enabled=half):
                self._changed_at_start = changed_layer(network, (models.denoiser, *models.text_encoders))
        network.train()

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

    def _make_network(
        self, module: NetworkModule, models: Models, text_encoders: TextEncoders, pairs: dict[str, object]
    ) -> AdapterNetwork | None:
        """The contract call."""
        options = self.opts
        if options.dim_from_weights:
            rest = {"weights_sd": self.kept.rest()} if self._is_own and self.kept.layers else {}
            network, _ = module.create_network_from_weights(
                1, options.network_weights, models.vae, text_encoders, models.denoiser,
                neuron_dropout=options.network_dropout, **rest, **pairs,
            )
            return network
        return module.create_network(
            1.0, options.network_dim, options.network_alpha, models.vae, text_encoders, models.denoiser,
            neuron_dropout=options.network_dropout, **pairs,
        )

    def _text_encoders(self, models: Models) -> TextEncoders:
        """As the family's convention wants them: a bare model where files say `lora_te_`, else a list. Other packages'
        modules cannot take None for an encoder that is not loaded."""
        encoders = list(models.text_encoders)
        if self._is_own:
            return encoders
        loaded = [encoder for encoder in encoders if encoder is not None]
        if [encoder.prefix for encoder in self._targets.text_encoders] == ["lora_te"]:
            return loaded[0] if loaded else []
        return loaded

    def _refuse_empty(self, models: Models) -> None:
        if any(parameter.numel() for parameter in self.network.parameters()):
            return
        wanted = sorted(
            {*self._targets.classes, *(name for encoder in self._targets.text_encoders for name in encoder.classes)}
        )
        blocks = sorted(
            {type(module).__name__ for module in models.denoiser.modules() if "Block" in type(module).__name__}
        )
        raise ConfigError(
            f"the network of {self.opts.network_module} has no layer to train. Denoiser "
            f"{type(models.denoiser).__name__} has blocks"
            f" {', '.join(blocks) or 'of no known class'}; {self._targets.family} adapters train layers in "
            f"{', '.join(wanted)}."
            " Look at --network_args, --network_train_unet_only and --network_train_text_encoder_only"
        )

    # -- files to start from -----------------------------------------------------------------------------------------

    def _load_start_weights(self, network: AdapterNetwork) -> None:
        path = self.opts.network_weights
        if self._is_own:
            self._refuse_other_alphas(network, path)
        report = (
            network.load_tensors(self.kept.rest(), path)
            if self._is_own and self.kept.layers
            else network.load_weights(path)
        )
        is_incomplete = self._is_own and bool(report["unexpected"])
        logger.log(
            logging.WARNING if is_incomplete else logging.INFO,
            "weights of the network loaded from %s: %s%s",
            path,
            _summary(report),
            f"; those that this network does not train (first: {report['unexpected'][0]}) are left out of the output"
            if is_incomplete
            else "",
        )
        if self._is_own and len(report["missing"]) == len(network.loras):
            raise CheckpointError(
                f"--network_weights is {path}; none of its modules belongs to a layer that this network trains"
            )

    def _refuse_other_alphas(self, network: AdditionalNetwork, path: str) -> None:
        """An alpha that the user wrote must be the file's; otherwise the file's alphas count."""
        if "network_alpha" not in self.config.explicit or self.opts.dim_from_weights:
            return
        modules = {module.lora_name: module for module in network.loras}
        parts = by_module(read_adapter_file(path, self._targets))
        found, _ = match_names(parts, modules, self._targets)
        for name, own in found.items():
            split = len(getattr(modules[own], "split", None) or (1,))
            alpha = float(parts[name].get("alpha", torch.tensor(float(modules[own].lora_dim * split)))) / split
            if abs(alpha - float(modules[own].alpha)) > 1e-6 * max(1.0, abs(alpha)):
                raise ConfigError(
                    f"--network_alpha is {self.opts.network_alpha}; {own} of --network_weights {path} has alpha "
                    f"{alpha:g}."
                    " Leave --network_alpha out, or add --dim_from_weights, to go on with the file's"
                )

    # -- training ----------------------------------------------------------------------------------------------------

    def param_groups(self) -> list[ParamGroup]:
        """Groups with `params`, `lr` and `name`. Parameters of groups without rate are frozen: they would collect
        gradients that nobody uses."""
        default = self.config[OptimizerOptions].learning_rate
        groups = []
        for number, (group, name) in enumerate(self._described_groups(default)):
            params, rate = list(group["params"]), group.get("lr", default)
            if params and rate:
                extra = {key: value for key, value in group.items() if key not in ("params", "lr", "name")}
                groups.append(
                    {**extra, "params": params, "lr": rate, "name": name or group.get("name") or f"group {number}"}
                )
        chosen = {id(parameter) for group in groups for parameter in group["params"]}
        for parameter in self.network.parameters():
            parameter.requires_grad_(id(parameter) in chosen)
        if not groups:
            raise ConfigError(NO_RATE)
        return groups

    def _described_groups(self, default: float | None) -> list[tuple[ParamGroup, str | None]]:
        rates = list(self.opts.text_encoder_lr or [])[: len(self._targets.text_encoders)]
        several = getattr(self.network, "prepare_optimizer_params_with_multiple_te_lrs", None)
        if several is not None:
            result = several(rates or None, self.opts.unet_lr, default)
        else:
            if len(set(rates)) > 1:
                logger.warning(
                    "--text_encoder_lr: %s knows one rate for all text encoders, the first, %s",
                    self.opts.network_module,
                    rates[0],
                )
            values = [rates[0] if rates else None, self.opts.unet_lr, default]
            method = self.network.prepare_optimizer_params
            count = _positional_count(method)
            if count == 2:  # older modules take no default rate
                values = [default if value is None else value for value in values[:2]]
            result = method(*values)
        groups, names = result if isinstance(result, tuple) else (result, None)
        groups = list(groups)
        return list(zip(groups, names or [None] * len(groups), strict=True))

    def modules(self) -> dict[str, torch.nn.Module]:
        return {"network": self.network}

    def inputs(self, batch: Batch, sample: NoisyLatents, conditioning: Conditioning) -> dict[str, object]:
        self.use_multipliers(batch)
        return {}

    def use_multipliers(self, batch: Batch) -> None:
        """`network_multiplier` of the dataset: the strength of the network for this batch (all of one dataset)."""
        values = {float(value) for value in batch.network_multipliers.tolist()}
        if len(values) > 1:
            raise ValueError("samples of one batch have different network multipliers")
        if values and not (
            math.isfinite(min(values)) and min(values)
        ):  # of a dataset class; configurations are checked at start
            raise TrainingError(
                f"the network multiplier of a batch is {min(values)}; needed: a finite number other than 0, which "
                "leaves nothing to learn"
            )
        if values and self.network.multiplier != min(values):
            self.network.set_multiplier(min(values))

    def on_step_start(self, draws: StepDraws) -> None:
        if hasattr(self.network, "set_step_draws"):
            self.network.set_step_draws(draws)
        if hasattr(self.network, "on_step_start"):
            self.network.on_step_start(self._models.text_encoders, self._models.denoiser)

    def on_sample(self, sample: NoisyLatents) -> None:
        if hasattr(self.network, "set_step_times"):
            self.network.set_step_times(sample.noisiest_timesteps / NUM_TIMESTEPS)

    @contextmanager
    def disabled(self):
        multiplier = self.network.multiplier
        self.network.set_multiplier(0.0)
        try:
            yield
        finally:
            self.network.set_multiplier(multiplier)

    def hooks(self) -> list[Hook]:
        return [NetworkHook(self), WeightNormHook(self, self.opts.scale_weight_norms)]

    def description(self) -> str:
        if self._is_own:
            return f"{describe_network(self.network)} ({self.opts.module_path})"
        rank, alpha = self.opts.network_dim or DEFAULT_DIM, self.opts.network_alpha
        return f"{self.opts.module_path}, rank {rank}, alpha {alpha:g}, as the module reads them"

    def notices(self) -> list[str]:
        kept = self.kept.message()
        return [*self._alpha_notice(), *self._start_notice(), *([] if kept is None else [kept])]

    def _start_notice(self) -> list[str]:
        if self._changed_at_start is None:
            return []
        layer, share = self._changed_at_start
        return [
            f"a new adapter of {self.opts.network_module} changes the model before it has learned (the output of {layer}"
            f" by {share:.0%}): the first losses and samples are not those of the base model"
        ]

    def _alpha_notice(self) -> list[str]:
        """A missing --network_alpha is 1, as the known scripts have it: people who do not know train at a fraction of
        the strength."""
        if "network_alpha" in self.config.explicit or self.opts.dim_from_weights:
            return []
        rank = self.opts.network_dim or DEFAULT_DIM
        if self._is_own and not any(map(is_scaled_by_rank, self.network.loras)) or rank == 1:
            return []
        return [
            f"--network_alpha is not given and counts as {self.opts.network_alpha:g}: the change is scaled by alpha / "
            "rank ="
            f" {self.opts.network_alpha:g}/{rank}; --network_alpha {rank} trains at full strength"
        ]

    # -- files -------------------------------------------------------------------------------------------------------

    def save(self, path: str, dtype: torch.dtype | None, metadata: dict[str, str]) -> None:
        beside = self.beside()
        if self._is_own:
            if beside:
                write_adapter_file(path, {**self.network.file_state_dict(), **beside}, dtype, metadata)
            else:
                self.network.save_weights(path, dtype, metadata)
            return
        is_safetensors = path.endswith(".safetensors")
        if not is_safetensors and not beside:
            with atomic_path(path) as temporary:
                self.network.save_weights(str(temporary), dtype, dict(metadata))
            return
        # written again with our hashes, a fixed order of the keys, and numbers that are checked
        with scratch_path(path) as temporary:
            self.network.save_weights(str(temporary), None, dict(metadata))
            if is_safetensors:
                own = load_safetensors(temporary, device="cpu", disable_mmap=True)
            else:
                own = load_pickled_tensors(temporary)
            write_adapter_file(path, {**own, **beside}, dtype, metadata)

    def beside(self) -> dict[str, torch.Tensor]:
        """What the file holds beside the network's own tensors."""
        return self.kept.tensors()

    def load(self, path: str) -> None:
        self.network.load_weights(path)

    def metadata(self) -> dict[str, Plain]:
        """ss_network_* keys, plain values; the pair `dropout` that is added for LyCORIS is not the user's."""
        options = self.opts
        values = {
            "ss_network_module": options.module_path,
            "ss_network_dim": options.network_dim,
            "ss_network_alpha": options.network_alpha,
            "ss_network_dropout": options.network_dropout,
            "ss_scale_weight_norms": options.scale_weight_norms,
        }
        if options.network_args:
            values["ss_network_args"] = json.dumps(options.pairs)
        return values


def _own_memory(network: torch.nn.Module) -> None:
    """Let go of a file that a module mapped and keeps as `weights_sd`: Windows replaces no mapped file, and the output
    may have its name."""
    held = getattr(network, "weights_sd", None)
    if isinstance(held, dict):
        network.weights_sd = {
            key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in held.items()
        }
        for tensor in (*network.parameters(), *network.buffers()):
            tensor.data = tensor.data.clone()


def _is_on(text: str | None) -> bool:
    try:
        return text is not None and parse_bool(text)
    except argparse.ArgumentTypeError:  # a bad value is reported by the check of the arguments
        return False


def _positional_count(method: Callable) -> int:
    """How many arguments a bound method takes by position, 3 at most."""
    parameters = inspect.signature(method).parameters.values()
    if any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters):
        return 3
    return min(
        3,
        sum(parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD) for parameter in parameters),
    )


def _summary(report: object) -> str:
    if isinstance(report, dict):
        return (
            ", ".join(f"{len(value)} {key}" for key, value in report.items() if isinstance(value, Sequence)) or "done"
        )
    return str(report)
