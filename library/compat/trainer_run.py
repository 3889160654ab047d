"""A run whose parts are the overridden methods of a NetworkTrainer: a family, a trainable, a Trainer that call them."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from library.compat.namespace import config_of
from library.compat.schedulers import objective_of
from library.compat.trainer_calls import Calls, descriptions, of_network
from library.compat.trainer_hook import CallingHook
from library.compat.trainer_step import CalledStep
from library.core.errors import AtelierError, ConfigError, Problems
from library.core.registry import import_target
from library.dataset.fill_caches import fill_text_cache
from library.families.registry import record_of
from library.training import checks, cli, parser_common
from library.training.computing_options import MemoryOptions
from library.training.hooks.checkpoint import CheckpointHook
from library.training.hooks.logging import LoggingHook
from library.training.hooks.sample import SampleHook
from library.training.objective import NoisyLatents
from library.training.option_groups import ConsoleOptions
from library.training.run import DiTOutput, Models
from library.training.trainer_base import Trainer
from library.training.updaters.ordinary import OrdinaryUpdater

if TYPE_CHECKING:
    from library.compat.trainers import NetworkTrainer
    from library.core.options import Config
    from library.training.run import Run

PARTS = {"load_vae": 2, "load_text_encoders": 1, "load_denoiser": 3}
"""method of a family -> place of what it loads in load_target_model"""
VIDEO_PARTS = {"load_vae": "load_vae", "load_denoiser": "load_transformer"}
"""method of a family -> that of a trainer of video models"""
STRATEGIES = {
    "get_tokenize_strategy": "tokenize", "get_text_encoding_strategy": "text_encoding",
    "get_text_encoder_outputs_caching_strategy": "text_encoder_outputs_caching",
}  # fmt: skip


def train(owner: NetworkTrainer, args: Any) -> None:
    check_parameters(owner)
    if owner.is_video:
        owner.handle_model_specific_args(args)
    config = config_of(args, owner.family, owner.trainable)
    cli.set_up_logging(config[ConsoleOptions])
    for line in checks.warnings(config):
        cli.logger.warning(line)
    family = called_family(import_target(record_of(owner.family).family))(config)
    trainable = called_trainable(parser_common.TRAINABLES.resolve(owner.trainable))(config)
    owner.run = family.calls = trainable.calls = Calls(owner, args, family, trainable)
    CalledTrainer(config, family, trainable, [CallingHook(owner.run)]).run()


def check_parameters(owner: NetworkTrainer) -> None:
    """ConfigError with every method that cannot be called as it will be: with the parameters of ours, those that have
    defaults by name."""
    problems = Problems()
    for name, instead in owner.never_called.items():
        if hasattr(owner, name):
            problems.add(f"{type(owner).__name__}.{name} is never called here: {instead}")
    for name, method in owner._overridden().items():
        parameters = [p for p in inspect.signature(method).parameters.values() if p.name != "self"]
        given = [p.name for p in parameters if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
        named = {p.name: None for p in parameters if p.default is not p.empty}
        try:
            inspect.signature(getattr(owner, name)).bind(*given, **named)
        except TypeError as error:
            words = [*given, *(f"{word}=..." for word in named)]
            problems.add(
                f"{type(owner).__name__}.{name} is called with ({', '.join(words)}), which it does not take:"
                f" {error}{_hint(owner, name)}"
            )
    problems.raise_if_any()


def _hint(owner: NetworkTrainer, name: str) -> str:
    first = next(iter(inspect.signature(getattr(owner, name)).parameters), None)
    if name != "process_batch" or owner.is_video or first != "args":
        return ""
    return "; those of trainers of video models need `train_network.VideoDialect` as the first base class"


def called_family(base: type) -> type:
    """The class of a family whose loading, strategies and forward are those of its NetworkTrainer where it overrides
    them."""
    return _under_its_name(base, CalledFamily, CalledLoading)


def called_trainable(base: type) -> type:
    """The class of a trainable for which the NetworkTrainer says which text encoders learn, where it does."""
    return _under_its_name(base, CalledTrainable)


def _under_its_name(base: type, *called: type) -> type:
    """`base` with the methods of `called` before its own, under its own name."""
    names = {"__qualname__": base.__qualname__, "__module__": __name__}
    return type(base.__name__, (*called, OwnMethods, base), names)


class OwnMethods:
    """The last before a family or a trainable, past whom `own` gets at what is theirs."""

    def own(self, name: str) -> Callable[..., Any]:
        return getattr(super(), name)


class CalledFamily:
    """Strategies, objective and forward: before those of a family, which `super()` is."""

    calls: Calls

    def metadata(self) -> dict[str, Any]:
        values = super().metadata()
        if self.calls.overrides("get_model_version"):
            values["ss_base_model_version"] = self.calls.owner.get_model_version(self.calls.args)
        return values

    def strategies(self, trained: Any = ()) -> Any:
        calls = self.calls
        calls.strategies = super().strategies(trained)
        changed = {
            field: getattr(calls.owner, name)(calls.args)
            for name, field in STRATEGIES.items()
            if calls.overrides(name)
        }
        if own := changed.get("text_encoder_outputs_caching"):
            own.trained = trained
        calls.strategies = dataclasses.replace(calls.strategies, **changed) if changed else calls.strategies
        return calls.strategies

    def latents_caching(self) -> Any:
        if not self.calls.overrides("get_latents_caching_strategy"):
            return super().latents_caching()
        strategy = self.calls.owner.get_latents_caching_strategy(self.calls.args)
        strategy.model_identity = strategy.model_identity or super().latents_caching().model_identity
        return strategy

    def objective(self) -> Any:
        own, calls = super().objective(), self.calls
        return objective_of(calls.noise_scheduler(), own) if calls.overrides("get_noise_scheduler") else own

    def scale_latents(self, latents: Tensor) -> Tensor:
        calls = self.calls
        if calls.owner.is_video and calls.overrides("scale_shift_latents"):
            return calls.owner.scale_shift_latents(latents)
        if calls.overrides("shift_scale_latents"):
            return calls.owner.shift_scale_latents(calls.args, latents)
        return super().scale_latents(latents)

    def predict(
        self, models: Models, sample: NoisyLatents, conditioning: Any, batch: Any, **inputs: Any
    ) -> DiTOutput:
        calls = self.calls
        if not calls.overrides("call_unet"):
            return super().predict(models, sample, conditioning, batch, **inputs)
        calls.sample = sample
        prediction = calls.owner.call_unet(
            calls.args, calls.accelerator, models.denoiser, sample.noisy_latents, sample.timesteps,
            calls.step.strategies.layout.listed(conditioning), batch, calls.runtime.weight_dtype, **inputs,
        )
        return DiTOutput(prediction, sample.target)


class CalledLoading:
    """Loading: before that of a family. `load_target_model` hands each model out once, so that it can be released."""

    calls: Calls

    def load_vae(self, runtime: Any) -> Any:
        return self._loaded("load_vae", runtime)

    def load_text_encoders(self, runtime: Any) -> Any:
        loaded = self._loaded("load_text_encoders", runtime)
        encoders = list(loaded) if isinstance(loaded, (list, tuple)) else [loaded]
        calls = self.calls
        stored, computed = runtime.text_encoder_dtype, runtime.weight_dtype
        if stored != computed and calls.overrides("prepare_text_encoder_fp8"):
            for index, encoder in enumerate(encoders):
                calls.owner.prepare_text_encoder_fp8(index, encoder, stored, computed)
        return encoders

    def load_denoiser(self, runtime: Any) -> Any:
        return self._loaded("load_denoiser", runtime)

    def _loaded(self, method: str, runtime: Any) -> Any:
        """A model: of load_target_model, which hands each out once, so that it can be released; of
        load_unet_lazily; or our own."""
        calls, is_lazy = self.calls, False
        if calls.owner.is_video and calls.overrides(VIDEO_PARTS.get(method, "")):
            return self._loaded_of_video(method, runtime)
        if calls.overrides("load_target_model"):
            parts = self.__dict__.setdefault("_parts", {})
            if method not in parts:
                found = calls.owner.load_target_model(calls.args, runtime.weight_dtype, runtime.accelerator)
                parts.update({name: found[place] for name, place in PARTS.items()})
            model = parts.pop(method)
            is_lazy = method == "load_denoiser" and model is None
            if not is_lazy:
                return model
        if method == "load_denoiser" and (is_lazy or calls.overrides("load_unet_lazily")):
            encoders, dtype = list(calls.text_encoders or []), calls.runtime.weight_dtype
            return calls.owner.load_unet_lazily(calls.args, dtype, runtime.accelerator, encoders)[0]
        return calls.own_load(method, runtime)


    def _loaded_of_video(self, method: str, runtime: Any) -> Any:
        calls, options = self.calls, self.calls.family.config
        if method == "load_vae":
            return calls.owner.load_vae(calls.args, runtime.vae_dtype, options.value("vae"))
        return calls.owner.load_transformer(
            calls.accelerator, calls.args, options.value("pretrained_model_name_or_path"), "torch", False,
            runtime.device, runtime.denoiser_dtype,
        )


class CalledTrainable:
    """Which text encoders learn: before what a trainable says."""

    calls: Calls

    def trains_text_encoders(self, family: Any) -> list[bool]:
        own, calls = super().trains_text_encoders(family), self.calls
        if not calls.overrides("is_train_text_encoder", "get_text_encoders_train_flags"):
            return own
        flags = list(calls.owner.get_text_encoders_train_flags(calls.args, [None] * len(own)))
        if len(flags) != len(own) or any(flag and not is_own for flag, is_own in zip(flags, own)):
            raise ConfigError(
                f"{type(calls.owner).__name__}.get_text_encoders_train_flags gave {flags}; the options train {own},"
                " and a method may only leave some of these out. Look at --network_train_unet_only and"
                " --network_args"
            )
        return flags


class CalledUpdater(OrdinaryUpdater):
    """Gradients of the network are averaged over the processes by its NetworkTrainer."""

    def __init__(self, calls: Calls) -> None:
        self.calls = calls

    def reduce(self, run: Run, parameters: list[Any]) -> None:
        """The loss of a process is a share of that of all, so that its gradients are summed; for the method it is a
        whole one."""
        calls, count = self.calls, run.runtime.num_processes
        of_network = {id(parameter) for parameter in calls.network.parameters()}
        for parameter in parameters if count > 1 else ():
            if id(parameter) in of_network and parameter.requires_grad:
                grad = parameter.grad
                parameter.grad = parameter.new_zeros(parameter.shape) if grad is None else grad * count
        calls.owner.all_reduce_network(calls.accelerator, calls.network)
        super().reduce(run, [parameter for parameter in parameters if id(parameter) not in of_network])


class CalledTrainer(Trainer):
    """The Trainer that tells a NetworkTrainer's methods what they need when they need it."""

    step_class = CalledStep

    def twin(self, config: Config) -> Trainer:
        """For a plan of memory: none where methods are overridden. They may do anything, and each is called as often as
        the run itself wants."""
        owner = self.family.calls.owner
        if own := owner._overridden():
            raise AtelierError(
                f"{type(owner).__name__} has methods of its own ({', '.join(own)}), whose memory is not known before they"
                " run; --vram_budget and --blocks_to_swap auto need it: give the options that save memory themselves"
            )
        return super().twin(config)

    def check_length(self, data: Any, runtime: Any, *rest: Any) -> None:
        calls = self.family.calls
        calls.runtime = runtime
        calls.owner.assert_extra_args(calls.args, data.train, data.validation)
        super().check_length(data, runtime, *rest)

    def fill_text(self, groups: list[Any], strategies: Any, encoders: Any, runtime: Any, **more: Any) -> None:
        calls = self.family.calls
        if not calls.overrides("cache_text_encoder_outputs_if_needed"):
            fill_text_cache(groups, strategies, encoders, runtime, **more)
            return
        for group in groups:
            calls.owner.cache_text_encoder_outputs_if_needed(
                calls.args, calls.accelerator, None, None, encoders(), group, runtime.weight_dtype
            )

    def text_phase(self, data: Any, strategies: Any, runtime: Any, prompts: Any) -> Any:
        calls, phase = self.family.calls, super().text_phase(data, strategies, runtime, prompts)
        name = "is_text_encoder_not_needed_for_training"
        if calls.overrides(name) and getattr(calls.owner, name)(calls.args):
            if any(self.trainable.follows_text_encoders(self.family)):
                raise ConfigError(
                    f"{type(calls.owner).__name__}.{name} says yes, and a text encoder learns; add"
                    " --network_train_unet_only"
                )
            phase.text_encoders = [None] * len(phase.text_encoders)
        calls.text_encoders = phase.text_encoders
        return phase

    def arm(self, models: Models, trained: list[bool]) -> None:
        calls, owner = self.family.calls, self.family.calls.owner
        calls.denoiser = models.denoiser
        owner.post_process_network(
            calls.args, calls.accelerator, calls.network, models.text_encoders, models.denoiser
        )
        super().arm(models, trained)
        if self.config[MemoryOptions].gradient_checkpointing:
            for index, (encoder, learns) in enumerate(zip(models.text_encoders, trained)):
                if encoder is not None and learns:
                    owner.prepare_text_encoder_grad_ckpt_workaround(index, encoder)
        models.denoiser = owner.prepare_unet_with_accelerator(calls.args, calls.accelerator, models.denoiser)
        calls.denoiser = models.denoiser

    def new_step(self, *parts: Any) -> CalledStep:
        step = super().new_step(*parts)
        step.calls = self.family.calls
        return step

    def assemble(self, *parts: Any) -> Run:
        calls, run = self.family.calls, super().assemble(*parts)
        samples, files, log = (run.hooks.find(kind) for kind in (SampleHook, CheckpointHook, LoggingHook))
        if calls.overrides("sample_images"):  # asked at every occasion, it says itself whether one is due
            calls.sample_images, samples._sample_if_due = samples._sample_if_due, lambda run, at: None
        if calls.overrides("get_sai_model_spec"):
            calls.metadata, files._metadata = files._metadata, lambda run: with_spec(calls, run)
        if calls.overrides("generate_step_logs", "step_logging", "epoch_logging", "val_logging"):
            calls.log, log.log = log.log, lambda values, **about: send(calls, log, run, values, **about)
        return dataclasses.replace(run, updater=CalledUpdater(calls)) if calls.overrides("all_reduce_network") else run


def with_spec(calls: Calls, run: Run) -> dict[str, str]:
    """The metadata of a file with the modelspec.* entries of get_sai_model_spec."""
    calls.run = run
    own = calls.metadata(run)
    spec = {key: str(value) for key, value in calls.owner.get_sai_model_spec(calls.args).items()}
    return {**{key: text for key, text in own.items() if not key.startswith("modelspec.")}, **spec}


def send(
    calls: Calls, log: LoggingHook, run: Run, values: Mapping[str, float | None], *, axis: str = "step",
    step: int | None = None, epoch: int | None = None,
) -> None:
    """Values for the log by the methods that trainers have for it: of a step, of an epoch, of a validation."""
    step = run.progress.global_step if step is None else step
    epoch = run.progress.finished_epochs if epoch is None else epoch
    values = {name: float(value) for name, value in values.items() if value is not None}
    calls.axis, owner = axis, calls.owner
    if "loss/current" in values and calls.overrides("generate_step_logs"):
        calls.step_values, norms = values, of_network(values)
        values = owner.generate_step_logs(
            calls.args, values["loss/current"], values["loss/average"], run.lr_scheduler, descriptions(run.optimizer),
            optimizer=run.optimizer, keys_scaled=norms.keys_scaled, mean_norm=norms.mean_norm,
            maximum_norm=norms.maximum_norm, mean_grad_norm=None, mean_combined_norm=None,
        )
    if any(name.startswith("loss/validation/") for name in values):
        owner.val_logging(calls.accelerator, values, step, epoch, step)
    elif axis == "epoch":
        owner.epoch_logging(calls.accelerator, values, step, epoch)
    else:
        owner.step_logging(calls.accelerator, values, step, epoch)
