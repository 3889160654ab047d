"""Training of an adapter through a network module: ours, lycoris.kohya or a user's own, all called in the same way."""

from __future__ import annotations

import importlib
import inspect
import json
import logging
import math
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch

from library.core.atomic_file import atomic_path, scratch_path
from library.core.errors import CheckpointError, ConfigError, TrainingError
from library.core.keyed_random import StepDraws, isolated_rng, key_seed
from library.core.options import Config
from library.dataset import CachingOptions
from library.safetensors_utils import load_pickled_tensors, load_safetensors
from library.training.hooks.base import Hook
from library.training.optimizers import OptimizerOptions
from library.training.option_groups import ModelOptions
from library.training.timesteps import NUM_TIMESTEPS
from library.training.trainables.base import mask_notice
from library.training.trainables.base_weights import BaseWeights
from library.training.trainables.fresh_network import changed_layer
from library.training.trainables.kept_layers import KeptLayers, kept_layers
from library.training.trainables.network_choice import DEFAULT_DIM, NO_RATE, NetworkChoice
from library.training.trainables.network_hook import NetworkHook
from library.training.trainables.network_pair import NetworkPair
from library.training.trainables.weight_norm import WeightNormHook
from networks.files.network_files import by_module, match_names, read_adapter_file, write_adapter_file
from networks.kinds.description import describe_network, is_scaled_by_rank
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


class NetworkTrainable(NetworkChoice):
    """An adapter. `network` is the object that the network module made; it exists after attach()."""

    name = "network"
    spec_kind = "lora"
    keeps_text_still = "add --network_train_unet_only"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._base_weights = BaseWeights(self.opts)
        self.kept: KeptLayers = KeptLayers()
        self._changed_at_start: tuple[str, float] | None = None

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
                if network is not None and family.second_adapter:
                    second = self._make_network(module, models, text_encoders, pairs)
                    network = self._paired(network, second, family.second_adapter)
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

    def _paired(self, first: AdapterNetwork, second: AdapterNetwork, ending: str) -> NetworkPair:
        """Both, of which that one works whose weights the denoiser holds."""
        if not self._is_own:
            raise ConfigError(
                f"{self.opts.network_module} has no adapter for each expert; needed: one of the project's own kinds, or one"
                " adapter for both"
            )
        pair = NetworkPair(first, second, ending)
        self._models.denoiser.experts.listeners.append(lambda high_noise: pair.use(second=high_noise))
        return pair

    def side_files(self, family: ModelFamily) -> list[str]:
        return [family.second_adapter] if family.second_adapter else []

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
        groups = self.adapter_groups()
        if not groups:
            raise ConfigError(NO_RATE)
        return groups

    def adapter_groups(self) -> list[ParamGroup]:
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
        lines = [*self._alpha_notice(), *self._start_notice(), *([] if kept is None else [kept])]
        drops = self._is_own and any(module.dropout or module.rank_dropout for module in self.network.loras)
        return [*lines, *(mask_notice(next(self.network.parameters()).device) if drops else [])]

    def _start_notice(self) -> list[str]:
        if self._changed_at_start is None:
            return []
        layer, share = self._changed_at_start
        return [
            f"a new adapter of {self.opts.network_module} changes the model before it has learned (the output of"
            f" {layer} by {share:.0%}): the first losses and samples are not those of the base model"
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
