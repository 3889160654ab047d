"""TrainStep: from a batch to its loss. One body for every family and everything that is learned."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from library.components.block_calls import denoise_together
from library.core.courses import run_together
from library.core.errors import ConfigError, TrainingError
from library.core.keyed_random import NOISE, StepDraws, key_seed
from library.dataset.batch import PRESERVED, Batch, conditioning_rows
from library.dataset.latent_cache import bucket_of
from library.dataset.packed_batch import PackedBatch
from library.dataset.strategies import Conditioning, StrategySet
from library.dataset.text_padding import without_padding
from library.device_utils import to_device
from library.training.hooks.base import is_empty
from library.training.objective import NoisyLatents, Objective
from library.training.run import DiTOutput, Models, StepOutput

if TYPE_CHECKING:
    from library.training.accelerator_setup import Runtime
    from library.training.hooks.base import Hook
    from library.training.protocols import Logs, LossBody, SampleLoss, StepBody
    from library.training.timestep_samplers import TimestepSampler
    from library.training.trainables.base import Trainable
    from library.training.wiring.base import ModelFamily


@dataclass
class TrainStep:
    """Computes the loss of one micro-batch.

    Random draws are keyed by (seed, purpose, optimizer step, position in the global batch); the loss of every sample is
    divided by the number of samples of the whole optimizer step. Both together make N processes, or N accumulated
    micro-batches, equal to one process with N times the batch.
    """

    runtime: Runtime
    family: ModelFamily
    trainable: Trainable
    models: Models
    strategies: StrategySet
    objective: Objective
    timestep_sampler: TimestepSampler
    loss: SampleLoss
    seed: int
    validation_seed: int
    trained_text_encoders: list[bool] = field(default_factory=list)
    hooks: list[Hook] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._process_batch = replacement_of(self.hooks, "process_batch")
        self._compute_loss = replacement_of(self.hooks, "compute_loss")
        self._watchers = [hook for hook in self.hooks if not is_empty(hook, "on_prediction")]

    def __call__(self, batch: Batch | PackedBatch, times: torch.Tensor | None = None) -> StepOutput:
        """Loss of one batch. `times` ([B], or one per frame or token) fixes the noise level in the objective's unit
        (validation); None draws it."""
        if len(batch) == 0:  # a rank without samples only joins the reduction
            zero = torch.zeros((), device=self.runtime.device)
            return StepOutput(zero, zero, 0)
        if self._process_batch is not None:
            result = self._process_batch(self, batch, times)
            if not isinstance(result, StepOutput):
                raise TrainingError(
                    f"process_batch of a hook gave a {type(result).__name__}; needed: a StepOutput, as step.result makes it"
                )
            return result
        return self.process_batch(batch, times)

    def process_batch(self, batch: Batch | PackedBatch, times: torch.Tensor | None = None) -> StepOutput:
        """The body of the step, which one hook may replace."""
        if isinstance(batch, PackedBatch):
            return self.process_pack(batch)
        output, sample, batch = self.forward(batch, times)
        return self.result(*self.loss_of(output, sample, batch), batch)

    def forward(
        self, batch: Batch, times: torch.Tensor | None = None, **inputs: object
    ) -> tuple[DiTOutput, NoisyLatents, Batch]:
        """One forward as in every step: the output, what was noised, and the batch with latents. `inputs` go to
        `predict`."""
        sample, conditioning, batch = self.noised(batch, self.begin(batch, times), times)
        output = self.predict(sample, conditioning, batch, **inputs)
        return self.with_preserved_targets(output, sample, batch, conditioning), sample, batch

    def noised(
        self, batch: Batch, draws: StepDraws, times: torch.Tensor | None = None
    ) -> tuple[NoisyLatents, Conditioning, Batch]:
        """What the denoiser is given of a batch: noised latents and conditioning; and the batch with latents."""
        batch = self.with_latents(batch)
        latents = self.latents_of(batch)  # [B, C, H, W] or [B, C, F, H, W]
        noise = self.noise_of(latents, draws) if batch.noise is None else batch.noise.view_as(latents)
        if times is None:
            times = self.drawn_times(latents, draws)
        sample = self.objective.corrupt(latents, noise, times, draws)
        if batch.request.is_training:
            self.trainable.on_sample(sample)
        return sample, self.conditioning_of(batch), batch

    def process_pack(self, pack: PackedBatch) -> StepOutput:
        """The body of the step for samples of several sizes: every sample is what it would be in a batch of its own
        size, and the denoiser runs on the tokens of all of them at once."""
        self.begin(pack)
        parts = [self._noised_part(part) for part in pack.parts]
        with self.runtime.autocast():
            courses = [
                self.family.predict.course(self.family, self.models, *part, **self.inputs_of(*part)) for part in parts
            ]
            predicted = run_together(courses, denoise_together)
        outputs = []
        for output, (sample, conditioning, batch) in zip(predicted, parts, strict=True):
            output = self.with_preserved_targets(output, sample, batch, conditioning)
            outputs.append(self.result(*self.loss_of(output, sample, batch), batch))
        return dataclasses.replace(merge_outputs(outputs), loss=sum(output.loss for output in outputs))

    def _noised_part(self, part: Batch) -> tuple[NoisyLatents, Conditioning, Batch]:
        sample, conditioning, batch = self.noised(part, self.draws_of(part, None))
        made_here = [text for text in self.family.texts_to_cut() if not text.is_in(part.conditioning or {})]
        return sample, without_padding(conditioning, made_here), batch  # cached texts were cut when they were read

    # -- the pieces of the body, which hooks put together in their own ways --------------------------------------------

    def begin(self, batch: Batch | PackedBatch, times: torch.Tensor | None = None) -> StepDraws:
        """The random draws of the batch, after what is learned has heard of them."""
        draws = self.draws_of(batch, times)
        if batch.request.is_training:
            self.runtime.seed_foreign_code(key_seed(self.seed, "foreign code", draws.step, draws.positions[0]))
            self.trainable.on_step_start(draws)
        return draws

    def noise_of(self, latents: torch.Tensor, draws: StepDraws) -> torch.Tensor:
        return to_device(draws.normal(NOISE, latents.shape[1:]), self.runtime.device)

    def drawn_times(self, latents: torch.Tensor, draws: StepDraws) -> torch.Tensor:
        """Noise levels [B], [B, F] or [B, tokens] from the run's timestep sampler, in the objective's unit; on the CPU,
        where they can be read without waiting. `Objective.corrupt` brings them to the latents."""
        return self.timestep_sampler.sample(tuple(latents.shape), draws)

    def times_of(self, latents: torch.Tensor, draws: StepDraws) -> torch.Tensor:
        """The drawn times on the device."""
        return to_device(self.drawn_times(latents, draws), self.runtime.device)

    def predict(
        self, sample: NoisyLatents, conditioning: Conditioning, batch: Batch, *, untouched: bool = False,
        **inputs: object,
    ) -> DiTOutput:
        """One forward of the denoiser in the run's precision, with what the trainable adds to its inputs. `untouched`:
        as if nothing had been learned. `inputs` go to the family's `predict`."""
        with self.trainable.disabled() if untouched else nullcontext(), self.runtime.autocast():
            own = self.inputs_of(sample, conditioning, batch, untouched=untouched)
            return self.family.predict(self.models, sample, conditioning, batch, **{**own, **inputs})

    def inputs_of(
        self, sample: NoisyLatents, conditioning: Conditioning, batch: Batch, *, untouched: bool = False
    ) -> Mapping[str, object]:
        """What `predict` is given beside its usual inputs: by what is learned, and in training by the family."""
        own = {} if untouched else self.trainable.inputs(batch, sample, conditioning)
        if batch.request.is_training:
            own = {**self.family.training_inputs(self.models, sample, self.draws_of(batch, None)), **own}
        return own

    def loss_of(self, output: DiTOutput, sample: NoisyLatents, batch: Batch) -> tuple[torch.Tensor, Logs]:
        """Losses per sample [B], and values for the log; by the hook that replaces `compute_loss`, where there is
        one."""
        for hook in self._watchers if batch.request.is_training else ():
            hook.on_prediction(self, output, sample, batch)
        if self._compute_loss is None:
            return self.compute_loss(output, sample, batch)
        found = self._compute_loss(self, output, sample, batch)
        losses = found[0] if isinstance(found, tuple) and len(found) == 2 else None
        if not isinstance(losses, torch.Tensor) or losses.shape != (len(batch),):
            given = f"a tensor {list(found.shape)}" if isinstance(found, torch.Tensor) else f"a {type(found).__name__}"
            given = given if losses is None else f"losses of the shape {list(getattr(losses, 'shape', ()))}"
            raise TrainingError(
                f"compute_loss of a hook gave {given}; needed: (losses, values for the log), one loss for each of the"
                f" {len(batch)} samples"
            )
        return found

    @staticmethod
    def result(per_sample: torch.Tensor, logs: Logs, batch: Batch) -> StepOutput:
        """The output of the step from losses per sample [B]."""
        total = per_sample.sum()
        return StepOutput(
            loss=total / batch.request.group_size,
            loss_sum=total.detach(),
            count=len(batch),
            logs=logs,
        )

    def compute_loss(
        self, output: DiTOutput, sample: NoisyLatents, batch: Batch
    ) -> tuple[torch.Tensor, Logs]:
        """From the prediction to one weighted loss per sample [B]; one hook may replace it."""
        return self.loss(output, sample, batch), {}

    def draws_of(self, batch: Batch | PackedBatch, times: torch.Tensor | None) -> StepDraws:
        """Training draws are keyed by the step, validation draws by the image and the noise level alone."""
        request = batch.request
        if request.is_training:
            return StepDraws(self.seed, request.step, request.positions)
        level = 0 if times is None else round(float(times.flatten()[0]) * 1e6)
        return StepDraws(self.validation_seed, level, request.positions)

    def with_latents(self, batch: Batch) -> Batch:
        """The batch with latents and the conditions beside them; what is not cached is encoded, by models in their own
        dtype."""
        if batch.latents is not None:
            return batch
        caching = self.strategies.latents_caching
        latents, made = caching.encode_samples(
            self.models.vae, self.models.extra, batch.images, batch.latent_seeds, batch.conditions, batch.facts
        )
        read = caching.encoder.pictures_for(bucket_of(batch.images, batch.facts[0].kind))
        kept = {name: condition for name, condition in batch.conditions.items() if name not in read}
        return dataclasses.replace(batch, latents=latents, conditions={**kept, **made})

    def latents_of(self, batch: Batch) -> torch.Tensor:
        """Scaled latents."""
        return self.family.scale_latents(self.with_latents(batch).latents.to(self.runtime.device, torch.float32))

    def text_models(self) -> Sequence[torch.nn.Module | None]:
        """What encodes captions in the step."""
        return self.models.text_encoders

    def conditioning_of(self, batch: Batch) -> Conditioning:
        """Cached outputs, and those of the text encoders in memory (the ones that learn, or all) in the place of
        theirs."""
        conditioning = dict(batch.conditioning or {})
        if batch.input_ids_list is not None:
            learns = any(self.trained_text_encoders) and batch.request.is_training
            with torch.set_grad_enabled(learns and torch.is_grad_enabled()), self.runtime.autocast():
                conditioning |= self.strategies.encode(
                    self.text_models(), batch.input_ids_list, batch.token_weights_list
                )
        self.strategies.layout.check_complete(
            conditioning, "the cache" if batch.input_ids_list is None else "cache and text encoders"
        )
        if batch.request.is_training:
            conditioning = self.family.varied(conditioning, self.draws_of(batch, None))
        return conditioning

    def with_preserved_targets(
        self, output: DiTOutput, sample: NoisyLatents, batch: Batch, conditioning: Conditioning
    ) -> DiTOutput:
        """Samples marked `diff_output_preservation` learn to keep what the untouched model predicts: denoiser and text
        encoders without what was learned. Only these samples go through it."""
        marked = [i for i, attributes in enumerate(batch.custom_attributes) if attributes.get(PRESERVED)]
        if not marked:
            return output
        rows = torch.tensor(marked)
        part = batch.rows(marked)
        with torch.no_grad(), self.trainable.disabled():
            if any(self.trained_text_encoders):
                untouched = self.conditioning_of(part)
            else:
                untouched = conditioning_rows(conditioning, marked)
            prior = self.predict(sample.rows(rows), untouched, part, untouched=True)
        target = output.target.clone()  # [B, C, ...]
        target[rows.to(target.device)] = prior.pred.to(target.dtype)
        return dataclasses.replace(output, target=target)


def check_replacements(hooks: Iterable[Hook]) -> None:
    """ConfigError when two hooks replace one part of the step, or write companions of one name."""
    hooks = list(hooks)
    for name in ("process_batch", "compute_loss"):
        replacement_of(hooks, name)
    for ending in {ending for hook in hooks for ending in hook.companions}:
        writers = [type(hook).__name__ for hook in hooks if ending in hook.companions]
        if len(writers) > 1:
            raise ConfigError(f"{', '.join(writers)} all write files that end in {ending}; only one hook may")


def replacement_of(hooks: list[Hook], name: str) -> StepBody | LossBody | None:
    """The one hook method that replaces a part of the step; a second one is a start-up error."""
    found = [hook for hook in hooks if getattr(hook, name) is not None]
    if len(found) > 1:
        names = ", ".join(hook.told_as or type(hook).__name__ for hook in found)
        raise ConfigError(f"{names} all replace {name}; only one hook may: leave the others out")
    return getattr(found[0], name) if found else None


def merge_outputs(outputs: list[StepOutput]) -> StepOutput:
    """The micro-batches of one optimizer step as one output, for the log: further values are means over their
    samples."""
    if len(outputs) == 1:
        return outputs[0]
    return StepOutput(
        loss=sum(output.loss.detach() for output in outputs),
        loss_sum=sum(output.loss_sum for output in outputs),
        count=sum(output.count for output in outputs),
        logs={
            key: _mean_of_samples(key, outputs)
            for key in dict.fromkeys(key for output in outputs for key in output.logs)
        },
    )


def _mean_of_samples(key: str, outputs: list[StepOutput]) -> torch.Tensor | float:
    having = [output for output in outputs if key in output.logs]
    count = sum(output.count for output in having)
    return sum(output.logs[key] * output.count for output in having) / count if count else having[-1].logs[key]
