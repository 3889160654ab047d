"""What the methods of a NetworkTrainer need of its run: the objects, and our own ways of what they may override."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from library.compat.schedulers import NoiseScheduler
from library.core.errors import ConfigError
from library.dataset.fill_caches import fill_text_cache
from library.training.objective import NoisyLatents, Objective, expand_like
from library.training.run import DiTOutput

if TYPE_CHECKING:
    from library.compat.trainer_step import CalledStep
    from library.compat.trainers import NetworkTrainer

SPEC = "modelspec."
CASTS = {
    "load_vae": ("cast_vae", ("vae_dtype",)), "load_denoiser": ("cast_unet", ("denoiser_dtype",)),
    "load_text_encoders": ("cast_text_encoder", ("weight_dtype", "text_encoder_dtype")),
}
"""method of a family -> the one that is asked whether it casts, and the number formats that it reads"""


class Calls:
    """One for each run; `start` makes it ready for a batch."""

    def __init__(self, owner: NetworkTrainer, args: Any, family: Any, trainable: Any) -> None:
        self.owner, self.args, self.family, self.trainable = owner, args, family, trainable
        self.strategies: Any = None
        self.runtime: Any = None
        self.run: Any = None
        """the Run, once it is complete"""
        self.denoiser: Any = None
        self.text_encoders: list[Any] | None = None
        """those that are kept for the step, once captions are encoded"""
        self.scheduler: Any = None
        self.sample_images: Callable[[Any, str], None] | None = None
        self.metadata: Callable[[Any], dict[str, str]] | None = None
        self.log: Callable[..., None] | None = None
        self.axis = "step"
        self.step_values: Mapping[str, float] = {}
        self.start(None, None, None)

    def start(self, step: CalledStep | None, batch: Any, times: Tensor | None) -> None:
        """`step` computes the loss of `batch` now, at the noise levels `times` or at drawn ones."""
        self.step, self.batch, self.times = step, batch, times
        self.draws: Any = None
        self.sample: NoisyLatents | None = None
        self.conditioning: Any = None
        self.weights: Tensor | None = None
        """of the element-wise loss, where get_noise_pred_and_target gave some; see `is_weighted`"""
        self.is_weighted = False
        self.logs: dict[str, Any] = {}

    def overrides(self, *names: str) -> bool:
        """Whether the owner has one of these methods."""
        return any(self.owner._overrides(name) for name in names if name)

    def wrong(self, method: str, result: Any, needed: str) -> ConfigError:
        """What to raise when a method gave something else than it has to."""
        return ConfigError(f"{type(self.owner).__name__}.{method} gave {told(result)}; needed: {needed}")

    @property
    def accelerator(self) -> Any:
        return self.runtime.accelerator

    @property
    def network(self) -> Any:
        return next(iter(self.trainable.modules().values()))

    @property
    def learns_denoiser(self) -> bool:
        return not getattr(self.args, "network_train_text_encoder_only", False)

    # -- before the step -----------------------------------------------------------------------------------------------

    def own_load(self, method: str, runtime: Any) -> Any:
        """A model of the family, in the number format of its file where the owner does not want it cast."""
        asked, formats = CASTS[method]
        if self.overrides(asked) and not getattr(self.owner, asked)(self.args):
            runtime = dataclasses.replace(runtime, **dict.fromkeys(formats))
        return self.family.own(method)(runtime)

    def own_train_flags(self) -> list[bool]:
        return self.trainable.own("trains_text_encoders")(self.family)

    def own_text_cache(self, text_encoders: list[Any], dataset: Any) -> None:
        if self.strategies.text_encoder_outputs_caching is not None:
            fill_text_cache([dataset], self.strategies, lambda: text_encoders, self.runtime)

    def own_scheduler(self) -> NoiseScheduler:
        return NoiseScheduler(self.family.own("objective")())

    def noise_scheduler(self) -> Any:
        """What methods get: the owner's, or ours."""
        if self.scheduler is None:
            device = None if self.runtime is None else self.runtime.device
            self.scheduler = self.owner.get_noise_scheduler(self.args, device)
        return self.scheduler

    # -- the step ------------------------------------------------------------------------------------------------------

    def own_loss(self, batch: Any) -> Tensor:
        output = self.step.process_batch(batch, self.times)
        self.logs = dict(output.logs)
        return output.loss * (batch.request.group_size / len(batch))

    def own_latents(self, vae: Any, images: Tensor) -> Tensor:
        return self.step.strategies.latents_caching.encode_images(vae, images, self.batch.latent_seeds)

    def noised(self, latents: Tensor, noise: Tensor | None = None, times: Tensor | None = None) -> NoisyLatents:
        """The batch's sample, made once for the same latents; noise and its levels are drawn unless they are given."""
        if self.sample is not None and self.sample.latents is latents and noise is None and times is None:
            return self.sample
        step = self.step
        draws = step.begin(self.batch, self.times)
        noise = step.noise_of(latents, draws) if noise is None else noise
        times = self.times if times is None else times
        times = step.times_of(latents, draws) if times is None else times
        self.sample = step.objective.corrupt(latents, noise, times, draws)
        if self.batch.request.is_training:
            step.trainable.on_sample(self.sample)
        return self.sample

    def sample_at(self, timesteps: Tensor, **tensors: Tensor) -> NoisyLatents:
        """The batch's sample at these noise levels, timesteps [B] on the 0..1000 scale, and with other `tensors`."""
        sample = self.noised(self.step.latents_of(self.batch)) if self.sample is None else self.sample
        if timesteps is sample.timesteps:
            return dataclasses.replace(sample, **tensors)
        timesteps = timesteps.to(sample.timesteps)
        sigmas = levels(self.step.objective, timesteps)
        return dataclasses.replace(sample, timesteps=timesteps, sigmas=sigmas, **tensors)

    def own_prediction_and_target(
        self, latents: Tensor, batch: Any, text_conds: Sequence[Tensor | None], unet: Any
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        sample, step = self.noised(latents), self.step_with(unet)
        conditioning = step.strategies.layout.named(text_conds, "get_noise_pred_and_target")
        output = step.predict(sample, conditioning, batch)
        output = step.with_preserved_targets(output, sample, batch, conditioning)
        weights = step.objective.loss_weight(sample)
        return output.pred, output.target, sample.timesteps, None if weights is None else expand_like(weights, latents)

    def own_prediction(
        self, unet: Any, noisy_latents: Tensor, timesteps: Tensor, text_conds: Sequence[Tensor | None], batch: Any,
        inputs: Mapping[str, Any],
    ) -> Tensor:
        sample = self.sample_at(timesteps, noisy_latents=noisy_latents)
        models = dataclasses.replace(self.step.models, denoiser=unet)
        conditioning = self.step.strategies.layout.named(text_conds, "call_unet")
        with self.runtime.autocast():
            return self.family.own("predict")(models, sample, conditioning, batch, **inputs).pred

    def own_losses(self, output: DiTOutput, timesteps: Tensor) -> tuple[Tensor, dict[str, Any]]:
        return self.step.compute_loss(output, self.sample_at(timesteps), self.batch)

    def own_weighted(self, loss: Tensor, timesteps: Tensor) -> Tensor:
        factors = self.step.loss.factors
        if factors is None:
            return loss
        if timesteps.ndim > 1:
            raise ConfigError(
                "post_process_loss has one noise level for each sample, and this run has several; leave the weights by"
                " it out"
            )
        return loss * factors(timesteps.float(), self.step.objective).to(loss)

    def step_with(self, denoiser: Any) -> Any:
        """The step with another denoiser."""
        if denoiser is self.step.models.denoiser:
            return self.step
        step = copy.copy(self.step)
        step.models = dataclasses.replace(step.models, denoiser=denoiser)
        return step

    def own_reduce(self, network: Any) -> None:
        """Sums, divided by the number of processes."""
        parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
        self.runtime.reduce_gradients(parameters)
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.div_(self.runtime.num_processes)

    # -- the step of trainers of video models --------------------------------------------------------------------------

    def own_noisy_latents(
        self, latents: Tensor, noise: Tensor, timesteps: Tensor | None, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        sample = self.noised(latents, noise, timesteps)
        return sample.noisy_latents.to(dtype), sample.timesteps

    def own_output(
        self, denoiser: Any, latents: Tensor, noise: Tensor, noisy_latents: Tensor, timesteps: Tensor, batch: Any,
        inputs: Mapping[str, Any],
    ) -> DiTOutput:
        if self.sample is None or self.sample.latents is not latents or self.sample.noise is not noise:
            self.noised(latents, noise)
        sample, step = self.sample_at(timesteps, noisy_latents=noisy_latents), self.step_with(denoiser)
        if self.conditioning is None:
            self.conditioning = step.conditioning_of(batch)
        output = step.predict(sample, self.conditioning, batch, **inputs)
        return step.with_preserved_targets(output, sample, batch, self.conditioning)

    # -- samples, files, logs ------------------------------------------------------------------------------------------

    def own_samples(self, at: str) -> None:
        if self.sample_images is not None:
            self.sample_images(self.run, at)

    def own_model_spec(self) -> dict[str, str]:
        return {key: text for key, text in self.metadata(self.run).items() if key.startswith(SPEC)}

    def own_step_logs(self) -> dict[str, float]:
        return dict(self.step_values)

    def own_log(self, logs: Mapping[str, float], axis: str, step: int, epoch: int) -> None:
        self.log(logs, axis=axis, step=step, epoch=epoch)


def levels(objective: Objective, timesteps: Tensor) -> Tensor:
    """Noise levels of timesteps on the 0..1000 scale: the share of the noise."""
    zeros = torch.zeros(timesteps.shape, device=timesteps.device)
    return (timesteps / 1000) if objective.is_flow else objective.corrupt(zeros, zeros, timesteps, None).sigmas


def told(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {list(value.shape)}"
    if isinstance(value, tuple):
        return f"{len(value)} values"
    return f"a {type(value).__name__}"


def descriptions(optimizer: Any) -> list[str]:
    return [str(group.get("name", number)) for number, group in enumerate(optimizer.param_groups)]


def of_network(values: Mapping[str, float]) -> SimpleNamespace:
    """Values of the log under the names that generate_step_logs has for them."""
    names = {"keys_scaled": "keys_scaled", "mean_norm": "average_key_norm", "maximum_norm": "max_key_norm"}
    return SimpleNamespace(**{name: values.get(f"max_norm/{key}") for name, key in names.items()})
