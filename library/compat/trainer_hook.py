"""The hooks of a NetworkTrainer, called as those of a run. What replaces a part of the step is there if overridden."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from library.core.errors import ConfigError
from library.training.hooks.base import Hook
from library.training.hooks.sample import SampleHook
from library.training.objective import NoisyLatents
from library.training.run import DiTOutput, StepOutput

if TYPE_CHECKING:
    from library.compat.trainer_calls import Calls

VIDEO_STEP = ("process_batch", "call_dit", "get_noisy_model_input_and_timesteps")


class CallingHook(Hook):
    state_key = "NetworkTrainer"

    def __init__(self, calls: Calls) -> None:
        self.calls, self.owner, self.args = calls, calls.owner, calls.args
        if self.owner.is_video:
            if calls.overrides(*VIDEO_STEP):
                self.process_batch = self._process_video_batch
        elif calls.overrides("process_batch"):
            self.process_batch = self._process_batch
        if calls.overrides("compute_loss"):
            self.compute_loss = self._compute_loss

    # -- the step ------------------------------------------------------------------------------------------------------

    def _process_batch(self, step: Any, batch: Any, times: Tensor | None) -> StepOutput:
        calls, runtime = self.calls, self.calls.runtime
        step.begin(batch, times)
        loss = self.owner.process_batch(
            batch, step.models.text_encoders, step.models.denoiser, calls.network, step.models.vae,
            calls.noise_scheduler(), runtime.vae_dtype, runtime.weight_dtype, runtime.accelerator, self.args,
            step.strategies.text_encoding, step.strategies.tokenize, is_train=batch.request.is_training,
            train_text_encoder=any(step.trained_text_encoders), train_unet=calls.learns_denoiser,
        )
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise calls.wrong("process_batch", loss, "the loss as a tensor with one number")
        loss, count = loss.reshape(()), len(batch)
        return StepOutput(loss * (count / batch.request.group_size), loss.detach() * count, count, calls.logs)

    def _process_video_batch(self, step: Any, batch: Any, times: Tensor | None) -> StepOutput:
        calls, runtime, models = self.calls, self.calls.runtime, step.models
        draws = step.begin(batch, times)
        calls.batch = batch = step.with_latents(batch)
        latents = step.latents_of(batch)
        found = self.owner.process_batch(
            self.args, calls.accelerator, models.denoiser, calls.network, batch, latents, step.noise_of(latents, draws),
            calls.noise_scheduler(), runtime.weight_dtype, runtime.trained_dtype, models.vae, batch.request.step,
        )
        if not isinstance(found, tuple) or len(found) != 2:
            raise calls.wrong("process_batch", found, "(loss, values for the log)")
        loss, logs = found
        if not isinstance(loss, Tensor) or loss.numel() not in (1, len(batch)):
            raise calls.wrong("process_batch", loss, f"a loss of one number, or one for each of {len(batch)}")
        return step.result(loss.reshape(-1).expand(len(batch)), dict(logs), batch)

    def _compute_loss(
        self, step: Any, output: DiTOutput, sample: NoisyLatents, batch: Any
    ) -> tuple[Tensor, dict[str, Any]]:
        calls, runtime = self.calls, self.calls.runtime
        calls.sample, calls.batch = sample, batch
        loss, logs = self.owner.compute_loss(
            self.args, output, sample.timesteps, calls.noise_scheduler(), runtime.weight_dtype, runtime.trained_dtype,
            batch.request.step,
        )
        if not isinstance(loss, Tensor) or loss.numel() not in (1, len(batch)):
            raise calls.wrong("compute_loss", loss, f"one number, or one for each of {len(batch)}")
        return loss.reshape(-1).expand(len(batch)), dict(logs)

    # -- around it -----------------------------------------------------------------------------------------------------

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
                f"{type(self.owner).__name__}.extra_trainable_params left out groups that it was given; it may only add"
                " some"
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

    # -- samples, files, logs ------------------------------------------------------------------------------------------

    def _sample_images(self, run: Any, epoch: int | None) -> None:
        if not self.calls.overrides("sample_images") or (epoch == 0 and run.progress.global_step):
            return
        encoders = run.models.text_encoders
        self.owner.sample_images(
            self.calls.accelerator, self.args, epoch, run.progress.global_step, run.runtime.device, run.models.vae,
            self.owner.get_tokenizers(run.strategies.tokenize), encoders[0] if len(encoders) == 1 else encoders,
            run.models.denoiser,
        )

    def on_before_sample_images(self, run: Any) -> None:
        self.owner.on_before_sample_images(*self._about_samples(run))

    def on_after_sample_images(self, run: Any) -> None:
        self.owner.on_after_sample_images(*self._about_samples(run))

    def _about_samples(self, run: Any) -> tuple[Any, ...]:
        hook = run.hooks.find(SampleHook)
        return (
            self.calls.accelerator, self.args, run.progress.epoch, run.progress.global_step, run.models.vae,
            run.models.denoiser, self.calls.network, hook.prompts, run.runtime.weight_dtype,
        )

    def on_post_save(self, run: Any, path: str, metadata: dict[str, str]) -> None:
        self.owner.on_post_save(
            self.args, self.calls.accelerator, self.calls.network, run.models.denoiser, path,
            getattr(self.args, "save_precision", None), metadata, run.progress.is_finished,
        )

    def extra_metadata(self, run: Any) -> dict[str, Any]:
        values: dict[str, Any] = {}
        self.owner.update_metadata(values, self.args)
        return {**values, **self.owner.extra_metadata(self.args)}

    def extra_step_logs(self, run: Any) -> dict[str, float]:
        return self.owner.extra_step_logs(self.args, dict(self.calls.logs))
