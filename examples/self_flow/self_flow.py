"""Self-Flow (arXiv 2603.06507) as a hook: the model learns from its own moving average, which sees a cleaner picture.

    --hook examples.self_flow.self_flow:SelfFlow
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from library.core.errors import ConfigError, Problems
from library.core.keyed_random import StepDraws, isolated_rng, key_seed
from library.core.options import option
from library.safetensors_utils import save_file_atomic
from library.training.averaging import WeightAverage
from library.training.hooks.base import Hook
from library.training.option_groups import EmaOptions, SavingOptions
from library.training.run import StepOutput, evaluation_mode
from library.training.timesteps import NUM_TIMESTEPS

if TYPE_CHECKING:
    from library.core.options import Config
    from library.dataset.batch import Batch
    from library.dataset.strategies import Conditioning
    from library.training.objective import NoisyLatents
    from library.training.protocols import Plain, StateValue
    from library.training.run import Run
    from library.training.step import TrainStep
    from library.training.trainables.base import Trainable
    from library.training.wiring.base import ModelFamily


DECAYS: Mapping[str, Callable[[float], float]] = {
    "constant": lambda place: 1.0,
    "cosine": lambda place: (1 + math.cos(math.pi * place)) / 2,
    "linear": lambda place: 1 - place,
    "rex": lambda place: (1 - place) / (0.1 + 0.9 * (1 - place)),
}
"""factor of the share of steps with a wrong time, at the place 0 to 1 of its steps"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelfFlowOptions:
    """Self-Flow"""

    self_flow_gamma: float = option(0.8, help="weight of the loss on features; 0 = none")
    self_flow_gamma_warmup_steps: int = option(0, help="steps over which the weight grows from 0")
    mask_ratio: float = option(0.25, help="share of the tokens that get the second noise level, 0 to 0.5")
    self_flow_ema_decay: float = option(
        0.999, help="share of the teacher, the moving average, that an optimizer step leaves"
    )
    student_feature_layer: int | None = option(
        None, help="block whose tokens the student projects, from 0; 0.3 of the depth when not given"
    )
    teacher_feature_layer: int | None = option(
        None, help="later block whose tokens the teacher shows; 0.7 of the depth when not given"
    )

    self_flow_teacher_coupling_prob: float = option(
        0.0, help="share of the steps in which the teacher is told a wrong time for some tokens"
    )
    self_flow_teacher_mismatch_ratio: float = option(
        1.0, help="in those steps: share of the tokens at the cleaner level that it is told the noisier one for"
    )
    self_flow_teacher_coupling_decay: str = option(
        "constant", choices=tuple(DECAYS), help="how the share of such steps falls to 0"
    )
    self_flow_teacher_coupling_decay_steps: int | None = option(
        None, help="steps until it is 0; all of the run when not given"
    )

    def __post_init__(self) -> None:
        problems = Problems()
        for name in ("self_flow_teacher_coupling_prob", "self_flow_teacher_mismatch_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                problems.add(f"--{name} is {getattr(self, name)}; needed: a number from 0 to 1")
        if (self.self_flow_teacher_coupling_decay_steps or 1) < 1:
            problems.add("--self_flow_teacher_coupling_decay_steps is below 1; needed: 1 or more")
        if not 0 <= self.mask_ratio <= 0.5:
            problems.add(f"--mask_ratio is {self.mask_ratio}; needed: a number from 0 to 0.5")
        if not 0 <= self.self_flow_ema_decay < 1:
            problems.add(f"--self_flow_ema_decay is {self.self_flow_ema_decay}; needed: a number from 0, below 1")
        for name in (
            "self_flow_gamma",
            "self_flow_gamma_warmup_steps",
            "student_feature_layer",
            "teacher_feature_layer",
        ):
            if (getattr(self, name) or 0) < 0:
                problems.add(f"--{name} is {getattr(self, name)}; needed: 0 or more")
        problems.raise_if_any()


class SelfFlow(Hook):
    """Every token of the student has one of two noise levels, the teacher sees all of them at the cleaner one. Besides
    the usual loss a head learns to tell the teacher's later features from the student's earlier ones. The head and the
    teacher are written beside every file and are part of states; samples and validation use the teacher."""

    options = SelfFlowOptions
    companions = ("-ema", "-proj")

    def __init__(self, options: SelfFlowOptions) -> None:
        self.options = options
        self.layers = (0, 0)
        self.decay_steps = 1

    def check(self, config: Config, family: ModelFamily, trainable: Trainable) -> None:
        problems = Problems()
        if not family.gives_features:
            problems.add(
                f"Self-Flow needs a flow model that gives features and takes a time per token; {family.name} does not"
            )
        if config[EmaOptions].ema:
            problems.add(
                "--ema is set; Self-Flow keeps an average of its own (--self_flow_ema_decay) and writes it as "
                "<name>-ema: leave --ema out"
            )
        if config[SavingOptions].save_model_as not in (None, "safetensors"):
            problems.add(
                f"--save_model_as is {config[SavingOptions].save_model_as}; Self-Flow writes its head as safetensors"
            )
        problems.raise_if_any()
        self.teacher = WeightAverage(trainable.modules, what="the teacher of Self-Flow")

    def on_transformer_loaded(self, denoiser: torch.nn.Module) -> None:
        depth, width = len(denoiser.repeated_blocks()), denoiser.feature_width
        student, teacher = self.options.student_feature_layer, self.options.teacher_feature_layer
        student = int(0.3 * depth) if student is None else student
        teacher = min(depth - 1, int(0.7 * depth)) if teacher is None else teacher
        if not student < teacher < depth:
            raise ConfigError(
                f"--student_feature_layer is {student} and --teacher_feature_layer {teacher} of {depth} blocks (0 to "
                f"{depth - 1});"
                " the teacher's must be the later one"
            )
        self.layers = student, teacher
        with isolated_rng(key_seed(0, "self flow head")):  # alike on all ranks
            self.head = torch.nn.Sequential(
                torch.nn.Linear(width, width), torch.nn.GELU(), torch.nn.Linear(width, width)
            )

    def modules(self) -> dict[str, torch.nn.Module]:
        return {"head": self.head}

    def on_train_start(self, run: Run) -> None:
        self.decay_steps = self.options.self_flow_teacher_coupling_decay_steps or run.progress.max_train_steps
        if not self.teacher.tensors:
            self.teacher.begin()

    def process_batch(self, step: TrainStep, batch: Batch, times: torch.Tensor | None) -> StepOutput:
        gamma = self.gamma(batch.request.step)
        if not batch.request.is_training or not self.options.self_flow_gamma:
            return step.process_batch(batch, times)
        draws, batch = step.begin(batch), step.with_latents(batch)
        student, teacher = self.views(step, step.latents_of(batch), draws)
        conditioning = step.conditioning_of(batch)
        wanted = self.features_of_teacher(step, teacher, conditioning, batch)  # [B, L, D]
        step.trainable.on_sample(student)
        output = step.predict(student, conditioning, batch, feature_layer=self.layers[0])
        with step.runtime.autocast():
            told = self.head(output.extra["features"].to(wanted.dtype))  # [B, L, D]
        likeness = F.cosine_similarity(told.float(), wanted.float(), dim=-1).mean(dim=1)  # [B]
        output = step.with_preserved_targets(output, student, batch, conditioning)
        per_sample, logs = step.loss_of(output, student, batch)
        own = {"loss/gen": per_sample.detach().mean(), "loss/rep": -likeness.detach().mean(), "self_flow/gamma": gamma}
        return step.result(per_sample - gamma * likeness, {**logs, **own}, batch)

    def gamma(self, step: int) -> float:
        warmup = self.options.self_flow_gamma_warmup_steps
        return self.options.self_flow_gamma * min(1.0, step / warmup if warmup else 1.0)

    def views(self, step: TrainStep, latents: torch.Tensor, draws: StepDraws) -> tuple[NoisyLatents, NoisyLatents]:
        """The same noise twice: for the student at one of two levels for each token, for the teacher at the lower of
        them, of which it may be told another time."""
        patch = step.family.record.latents.patch
        num_tokens = latents[0, 0].numel() // patch**2
        noise = step.noise_of(latents, draws)
        first, second = step.times_of(latents, draws), step.times_of(latents, draws.apart("self flow"))  # [B] each
        is_masked = draws.uniform("self flow mask", (num_tokens,)).to(first.device) < self.options.mask_ratio  # [B, L]
        mixed = torch.where(is_masked, second[:, None], first[:, None])  # [B, L]
        cleaner = torch.minimum(first, second)
        teacher = step.objective.corrupt(latents, noise, cleaner, draws)
        if draws.batch_uniform("self flow coupling") < self.coupling(draws.step):
            is_told = draws.uniform("self flow mismatch", (num_tokens,)).to(first.device)
            is_told = (is_told < self.options.self_flow_teacher_mismatch_ratio) & (mixed == cleaner[:, None])
            told = torch.where(is_told, torch.maximum(first, second)[:, None], cleaner[:, None])  # [B, L]
            teacher = dataclasses.replace(teacher, timesteps=told * NUM_TIMESTEPS, sigmas=told)
        return step.objective.corrupt(latents, noise, mixed, draws), teacher

    def coupling(self, step: int) -> float:
        """Share of steps like this one in which the teacher is told a wrong time."""
        options = self.options
        place = min(1.0, step / self.decay_steps)
        return options.self_flow_teacher_coupling_prob * DECAYS[options.self_flow_teacher_coupling_decay](place)

    @torch.no_grad()
    def features_of_teacher(
        self, step: TrainStep, sample: NoisyLatents, conditioning: Conditioning, batch: Batch
    ) -> torch.Tensor:
        """With the average in the place of the weights and without dropouts."""
        step.trainable.on_sample(sample)
        with evaluation_mode(step.trainable.modules().values()), self.teacher.applied():
            return step.predict(sample, conditioning, batch, feature_layer=self.layers[1]).extra["features"].float()

    def on_post_optimizer_step(self, run: Run) -> None:
        self.teacher.follow(1 - self.options.self_flow_ema_decay)

    def weights_for_eval(self, run: Run) -> AbstractContextManager[None]:
        return self.teacher.applied()

    def save_companion(
        self, run: Run, ending: str, path: str, dtype: torch.dtype | None, metadata: dict[str, str]
    ) -> None:
        if ending == "-proj":
            save_file_atomic(
                {name: tensor.detach().cpu().contiguous() for name, tensor in self.head.state_dict().items()},
                path,
                metadata,
            )
            return
        with run.weights_for_eval():
            run.trainable.save(path, dtype, metadata)

    def extra_metadata(self, run: Run) -> dict[str, Plain]:
        options = self.options
        return {
            "ss_self_flow": True,
            "ss_self_flow_gamma": options.self_flow_gamma,
            "ss_self_flow_gamma_warmup_steps": options.self_flow_gamma_warmup_steps,
            "ss_self_flow_mask_ratio": options.mask_ratio,
            "ss_self_flow_ema_decay": options.self_flow_ema_decay,
            "ss_self_flow_teacher_coupling_prob": options.self_flow_teacher_coupling_prob,
            "ss_self_flow_teacher_coupling_decay": options.self_flow_teacher_coupling_decay,
            "ss_self_flow_teacher_mismatch_ratio": options.self_flow_teacher_mismatch_ratio,
            "ss_self_flow_student_layer": self.layers[0],
            "ss_self_flow_teacher_layer": self.layers[1],
        }

    def state_dict(self) -> dict[str, StateValue]:
        return {"teacher": self.teacher.state_dict()}

    def load_state_dict(self, state: dict[str, StateValue]) -> None:
        self.teacher.load_state_dict(state["teacher"])
