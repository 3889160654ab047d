"""A run whose parts are the overridden methods of a NetworkTrainer: a family, a hook and a Trainer that call them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from library.compat.namespace import config_of
from library.core.errors import ConfigError
from library.core.registry import import_target
from library.families.registry import record_of
from library.training import checks, cli, parser_common
from library.training.hooks.base import Hook
from library.training.hooks.sample import SampleHook
from library.training.objective import NoisyLatents
from library.training.option_groups import ConsoleOptions
from library.training.run import DiTOutput, Models, StepOutput
from library.training.trainer_base import Trainer

if TYPE_CHECKING:
    from library.compat.trainers import NetworkTrainer

PARTS = {"load_vae": 2, "load_text_encoders": 1, "load_denoiser": 3}
"""method of a family -> place of what it loads in load_target_model"""
STRATEGIES = {
    "get_tokenize_strategy": "tokenize", "get_text_encoding_strategy": "text_encoding",
    "get_text_encoder_outputs_caching_strategy": "text_encoder_outputs_caching",
}  # fmt: skip


def train(owner: NetworkTrainer, args: Any) -> None:
    config = config_of(args, owner.family, owner.trainable)
    cli.set_up_logging(config[ConsoleOptions])
    for line in checks.warnings(config):
        cli.logger.warning(line)
    family = called_family(import_target(record_of(owner.family).family))(config)
    trainable = parser_common.TRAINABLES.resolve(owner.trainable)(config)
    owner.run = family.calls = Calls(owner, args, family, trainable)
    CalledTrainer(config, family, trainable, [CallingHook(owner.run)]).run()


class Calls:
    """What the methods of a NetworkTrainer need of the run: its objects, and our own way of doing what they may
    override."""

    def __init__(self, owner: NetworkTrainer, args: Any, family: Any, trainable: Any) -> None:
        self.owner, self.args, self.family, self.trainable = owner, args, family, trainable
        self.strategies: Any = None
        self.runtime: Any = None
        self.run: Any = None
        """the Run, once it is complete"""
        self.step: Any = None
        """the step that computes now, with its batch's times and sample"""
        self.times: Tensor | None = None
        self.sample: NoisyLatents | None = None
        self.batch: Any = None
        self.logs: dict[str, Any] = {}
        self.denoiser: Any = None
        self.sample_images: Callable[[Any, str], None] | None = None

    def overrides(self, name: str) -> bool:
        return self.owner._overrides(name)

    @property
    def accelerator(self) -> Any:
        return self.runtime.accelerator

    @property
    def network(self) -> Any:
        return next(iter(self.trainable.modules().values()))

    # -- our own ways, for super() -----------------------------------------------------------------------------------

    def own_loss(self, batch: Any) -> Tensor:
        output = self.step.process_batch(batch, self.times)
        self.logs = dict(output.logs)
        return output.loss * (batch.request.group_size / len(batch))

    def own_prediction(
        self, unet: Any, noisy_latents: Tensor, timesteps: Tensor, text_conds: Any, batch: Any, inputs: Any
    ) -> Tensor:
        sigmas = timesteps / 1000 if self.step.objective.is_flow else self.sample.sigmas
        sample = dataclasses.replace(self.sample, noisy_latents=noisy_latents, timesteps=timesteps, sigmas=sigmas)
        models = dataclasses.replace(self.step.models, denoiser=unet)
        return self.family.own("predict")(
            models, sample, self.step.strategies.layout.named(text_conds, "call_unet"), batch, **inputs
        ).pred

    def own_losses(self, output: DiTOutput) -> tuple[Tensor, dict[str, Any]]:
        return type(self.step).compute_loss(self.step, output, self.sample, self.batch)

    def own_samples(self, at: str) -> None:
        if self.sample_images is not None:
            self.sample_images(self.run, at)


def called_family(base: type) -> type:
    """The class of a family whose loading, strategies and forward are those of its NetworkTrainer where it overrides
    them."""

    class CalledFamily(base):  # type: ignore[misc, valid-type]
        calls: Calls

        def own(self, name: str) -> Callable[..., Any]:
            """The family's own method."""
            return getattr(super(), name)

        def metadata(self) -> dict[str, Any]:
            values = super().metadata()
            if self.calls.overrides("get_model_version"):
                values["ss_base_model_version"] = self.calls.owner.get_model_version(self.calls.args)
            return values

        def strategies(self, trained: Any = ()) -> Any:
            calls = self.calls
            calls.strategies = super().strategies(trained)
            changed = {
                field: getattr(calls.owner, name)(calls.args) for name,
                field in STRATEGIES.items() if calls.overrides(name)
            }
            if own := changed.get("text_encoder_outputs_caching"):
                own.trained = trained
            return dataclasses.replace(calls.strategies, **changed) if changed else calls.strategies

        def latents_caching(self) -> Any:
            if not self.calls.overrides("get_latents_caching_strategy"):
                return super().latents_caching()
            strategy = self.calls.owner.get_latents_caching_strategy(self.calls.args)
            strategy.model_identity = strategy.model_identity or super().latents_caching().model_identity
            return strategy

        def predict(
            self, models: Models, sample: NoisyLatents, conditioning: Any, batch: Any, **inputs: Any
        ) -> DiTOutput:
            calls = self.calls
            if not calls.overrides("call_unet"):
                return super().predict(models, sample, conditioning, batch, **inputs)
            calls.sample = sample
            prediction = calls.owner.call_unet(
                calls.args, calls.accelerator, models.denoiser, sample.noisy_latents, sample.timesteps,
                calls.step.strategies.layout.listed(conditioning), batch,
                calls.runtime.weight_dtype, **inputs,
            )
            return DiTOutput(prediction, sample.target)

        def load_vae(self, runtime: Any) -> Any:
            return self._loaded("load_vae", runtime)

        def load_text_encoders(self, runtime: Any) -> Any:
            loaded = self._loaded("load_text_encoders", runtime)
            return list(loaded) if isinstance(loaded, (list, tuple)) else [loaded]

        def load_denoiser(self, runtime: Any) -> Any:
            return self._loaded("load_denoiser", runtime)

        def _loaded(self, method: str, runtime: Any) -> Any:
            """One of the models that load_target_model gave; each is handed out once, so that it can be released."""
            calls = self.calls
            if not calls.overrides("load_target_model"):
                return self.own(method)(runtime)
            parts = self.__dict__.setdefault("_parts", {})
            if method not in parts:
                found = calls.owner.load_target_model(calls.args, runtime.weight_dtype, runtime.accelerator)
                parts.update({name: found[place] for name, place in PARTS.items()})
            return parts.pop(method)

    CalledFamily.__name__, CalledFamily.__qualname__ = base.__name__, base.__qualname__
    return CalledFamily


class CallingHook(Hook):
    """The hooks of a NetworkTrainer. What replaces a part of the step is there only when it is overridden."""

    state_key = "NetworkTrainer"

    def __init__(self, calls: Calls) -> None:
        self.calls, self.owner, self.args = calls, calls.owner, calls.args
        if calls.overrides("process_batch"):
            self.process_batch = self._process_batch
        if calls.overrides("compute_loss"):
            self.compute_loss = self._compute_loss

    def _process_batch(self, step: Any, batch: Any, times: Tensor | None) -> StepOutput:
        calls, runtime = self.calls, self.calls.runtime
        calls.step, calls.times, calls.batch, calls.logs = step, times, batch, {}
        loss = self.owner.process_batch(
            batch, step.models.text_encoders, step.models.denoiser, calls.network, step.models.vae, step.objective,
            runtime.vae_dtype,
            runtime.weight_dtype, runtime.accelerator, self.args, step.strategies.text_encoding,
            step.strategies.tokenize,
            is_train=batch.request.is_training, train_text_encoder=any(step.trained_text_encoders),
        )
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise ConfigError(
                f"{type(self.owner).__name__}.process_batch gave {_shape(loss)}; needed: the loss as a tensor with one number"
            )
        loss, count = loss.reshape(()), len(batch)
        return StepOutput(loss * (count / batch.request.group_size), loss.detach() * count, count, calls.logs)

    def _compute_loss(
        self, step: Any, output: DiTOutput, sample: NoisyLatents, batch: Any
    ) -> tuple[Tensor, dict[str, Any]]:
        calls, runtime = self.calls, self.calls.runtime
        calls.step, calls.sample, calls.batch = step, sample, batch
        loss, logs = self.owner.compute_loss(
            self.args, output, sample.timesteps, step.objective, runtime.weight_dtype, runtime.trained_dtype,
            batch.request.step
        )
        if not isinstance(loss, Tensor) or loss.numel() not in (1, len(batch)):
            raise ConfigError(
                f"{type(self.owner).__name__}.compute_loss gave {_shape(loss)}; needed: one number, or one for each of {len(batch)}"
            )
        return loss.reshape(-1).expand(len(batch)), dict(logs)

    def on_transformer_loaded(self, denoiser: Any) -> None:
        self.owner.on_transformer_loaded(self.args, self.calls.accelerator, denoiser)

    def extra_trainable_params(self) -> list[dict[str, Any]]:
        calls = self.calls
        if not calls.overrides("extra_trainable_params"):
            return []
        groups = calls.trainable.param_groups()
        all_groups = self.owner.extra_trainable_params(
            self.args, calls.accelerator, calls.network, calls.denoiser, list(groups)
        )
        if any(all(group is not kept for kept in all_groups) for group in groups):
            raise ConfigError(
                f"{type(self.owner).__name__}.extra_trainable_params left out groups that it was given; it may only add some"
            )
        return [group for group in all_groups if all(group is not own for own in groups)]

    def on_train_start(self, run: Any) -> None:
        self.calls.run, self.calls.step = run, run.step
        self.owner.on_train_start(
            self.args, self.calls.accelerator, self.calls.network, run.models.denoiser, run.optimizer
        )
        self._sample_images(run, epoch=0)

    def on_step_start(self, run: Any, batch: Any) -> None:
        self.calls.step = run.step
        self.owner.on_step_start(
            self.args, self.calls.accelerator, self.calls.network, run.models.text_encoders, run.models.denoiser, batch,
            run.runtime.weight_dtype, is_train=True,
        )

    def on_post_optimizer_step(self, run: Any) -> None:
        self.owner.on_post_optimizer_step(
            self.args, self.calls.accelerator, self.calls.network, run.models.denoiser, True, run.progress.global_step
        )

    def on_step_end(self, run: Any, output: StepOutput) -> None:
        self._sample_images(run, epoch=None)

    def on_epoch_end(self, run: Any) -> None:
        self._sample_images(run, epoch=run.progress.epoch)

    def _sample_images(self, run: Any, epoch: int | None) -> None:
        if not self.calls.overrides("sample_images") or (epoch == 0 and run.progress.global_step):
            return
        encoders = run.models.text_encoders
        self.owner.sample_images(
            self.calls.accelerator, self.args, epoch, run.progress.global_step, run.runtime.device, run.models.vae,
            run.strategies.tokenize, encoders[0] if len(encoders) == 1 else encoders, run.models.denoiser,
        )

    def on_before_sample_images(self, run: Any) -> None:
        self.owner.on_before_sample_images(*self._about_samples(run))

    def on_after_sample_images(self, run: Any) -> None:
        self.owner.on_after_sample_images(*self._about_samples(run))

    def _about_samples(self, run: Any) -> tuple[Any, ...]:
        hook = run.hooks.find(SampleHook)
        return (
            self.calls.accelerator, self.args, run.progress.epoch, run.progress.global_step, run.models.vae,
            run.models.denoiser,
            self.calls.network, hook.prompts, run.runtime.weight_dtype,
        )

    def on_post_save(self, run: Any, path: str, metadata: dict[str, str]) -> None:
        is_last = run.progress.is_finished
        self.owner.on_post_save(
            self.args, self.calls.accelerator, self.calls.network, run.models.denoiser, path,
            getattr(self.args, "save_precision", None),
            metadata, is_last,
        )

    def extra_metadata(self, run: Any) -> dict[str, Any]:
        values: dict[str, Any] = {}
        self.owner.update_metadata(values, self.args)
        return {**values, **self.owner.extra_metadata(self.args)}

    def extra_step_logs(self, run: Any) -> dict[str, float]:
        return self.owner.extra_step_logs(self.args, dict(self.calls.logs))


def _shape(value: Any) -> str:
    return f"a tensor of shape {list(value.shape)}" if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"


class CalledTrainer(Trainer):
    """The Trainer that tells a NetworkTrainer's methods what they need when they need it."""

    def check_length(self, data: Any, runtime: Any, *rest: Any) -> None:
        calls = self.family.calls
        calls.runtime = runtime
        calls.owner.assert_extra_args(calls.args, data.train, data.validation)
        super().check_length(data, runtime, *rest)

    def arm(self, models: Models, *rest: Any) -> None:
        calls = self.family.calls
        calls.denoiser = models.denoiser
        calls.owner.post_process_network(
            calls.args, calls.accelerator, calls.network, models.text_encoders, models.denoiser
        )
        super().arm(models, *rest)

    def assemble(self, *parts: Any) -> Any:
        calls, run = self.family.calls, super().assemble(*parts)
        hook = run.hooks.find(SampleHook)
        if calls.overrides("sample_images"):  # asked at every occasion, it says itself whether one is due
            calls.sample_images, hook._sample_if_due = hook._sample_if_due, lambda run, at: None
        return run
