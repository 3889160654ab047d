"""The step of a NetworkTrainer: ours, with the overridden pieces in their places."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from torch import Tensor

from library.dataset.latent_cache import bucket_of
from library.training.objective import NoisyLatents
from library.training.run import DiTOutput, StepOutput
from library.training.step import TrainStep

if TYPE_CHECKING:
    from library.compat.trainer_calls import Calls
    from library.core.keyed_random import StepDraws


class CalledStep(TrainStep):
    """`calls` is set by the trainer that makes the step."""

    calls: Calls

    def __call__(self, batch: Any, times: Tensor | None = None) -> StepOutput:
        calls, is_validation = self.calls, not batch.request.is_training
        calls.start(self, batch, times)
        if is_validation and len(batch) and calls.overrides("on_step_start"):
            calls.owner.on_step_start(*self._about(batch), is_train=False)
        output = super().__call__(batch, times)
        if is_validation and len(batch) and calls.overrides("on_validation_step_end"):
            calls.owner.on_validation_step_end(*self._about(batch))
        return output

    def _about(self, batch: Any) -> tuple[Any, ...]:
        calls, models = self.calls, self.models
        return (
            calls.args, calls.accelerator, calls.network, models.text_encoders, models.denoiser, batch,
            self.runtime.weight_dtype,
        )

    def begin(self, batch: Any, times: Tensor | None = None) -> StepDraws:
        """Once for each batch, whoever asks first."""
        if self.calls.draws is None:
            self.calls.draws = super().begin(batch, times)
        return self.calls.draws

    def process_batch(self, batch: Any, times: Tensor | None = None) -> StepOutput:
        calls = self.calls
        if not calls.overrides("get_noise_pred_and_target"):
            return super().process_batch(batch, times)
        self.begin(batch, times)
        batch = self.with_latents(batch)
        latents = self.latents_of(batch)
        calls.noised(latents)
        text_conds = self.strategies.layout.listed(self.conditioning_of(batch))
        found = calls.owner.get_noise_pred_and_target(
            calls.args, calls.accelerator, calls.noise_scheduler(), latents, batch, text_conds, self.models.denoiser,
            calls.network, self.runtime.weight_dtype, calls.learns_denoiser, is_train=batch.request.is_training,
        )
        output, sample = self._read(found, latents)
        return self.result(*self.loss_of(output, sample, batch), batch)

    def _read(self, found: Any, latents: Tensor) -> tuple[DiTOutput, NoisyLatents]:
        """The result of get_noise_pred_and_target; ConfigError for anything else."""
        calls, needed = self.calls, "(prediction, target, timesteps, weights or None)"
        if not isinstance(found, tuple) or len(found) != 4 or not all(isinstance(part, Tensor) for part in found[:3]):
            raise calls.wrong("get_noise_pred_and_target", found, needed)
        prediction, target, timesteps, weights = found
        if prediction.shape != target.shape:
            needed = f"a prediction of the shape of the target, {list(target.shape)}"
            raise calls.wrong("get_noise_pred_and_target", prediction, needed)
        if timesteps.ndim == 0 or len(timesteps) != len(latents):
            raise calls.wrong("get_noise_pred_and_target", timesteps, f"timesteps of {len(latents)} samples")
        calls.weights, calls.is_weighted = weights, True
        return DiTOutput(prediction, target), calls.sample_at(timesteps, target=target)

    def with_latents(self, batch: Any) -> Any:
        calls = self.calls
        if batch.latents is not None or not calls.overrides("encode_images_to_latents"):
            return super().with_latents(batch)
        latents = calls.owner.encode_images_to_latents(calls.args, self.models.vae, batch.images)
        if not isinstance(latents, Tensor) or len(latents) != len(batch):
            raise calls.wrong("encode_images_to_latents", latents, f"latents of {len(batch)} images")
        conditions = dict(batch.conditions)
        if self.strategies.latents_caching.encoder.condition_shapes(bucket_of(batch.images, batch.facts[0].kind)):
            conditions = super().with_latents(batch).conditions
        return dataclasses.replace(batch, latents=latents, conditions=conditions)

    def text_models(self) -> list[Any]:
        calls, models = self.calls, self.models.text_encoders
        if not calls.overrides("get_models_for_text_encoding"):
            return models
        found = calls.owner.get_models_for_text_encoding(calls.args, calls.accelerator, list(models))
        return [None] * len(models) if found is None else list(found)

    def compute_loss(self, output: DiTOutput, sample: NoisyLatents, batch: Any) -> tuple[Tensor, dict[str, Any]]:
        calls, is_post_processed = self.calls, self.calls.overrides("post_process_loss")
        if not calls.is_weighted and not is_post_processed:
            return super().compute_loss(output, sample, batch)
        weights = calls.weights if calls.is_weighted else self.objective.loss_weight(sample)
        loss = dataclasses.replace(self.loss, factors=None) if is_post_processed else self.loss
        losses = loss.weighed(output, sample.timesteps, weights, batch)
        if is_post_processed:
            losses = calls.owner.post_process_loss(losses, calls.args, sample.timesteps, calls.noise_scheduler())
            if not isinstance(losses, Tensor) or losses.numel() not in (1, len(batch)):
                raise calls.wrong("post_process_loss", losses, f"one number for each of {len(batch)} samples")
            losses = losses.reshape(-1).expand(len(batch))
        return losses, {}
