"""Self-Flow (arXiv 2603.06507) as a hook: the model learns from its own moving average, which sees a cleaner sample."""

from __future__ import annotations

import dataclasses
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from library.core.errors import CheckpointError, ConfigError, Problems
from library.core.keyed_random import StepDraws, isolated_rng, key_seed
from library.device_utils import to_device
from library.safetensors_utils import load_safetensors, save_file_atomic
from library.training.alignment import depth_of
from library.training.alignment.options import DECAYS, SelfFlowOptions
from library.training.alignment.self_flow_files import file_problems
from library.training.averaging import WeightAverage
from library.training.hooks.base import Hook
from library.training.objective import expand_like
from library.training.option_groups import EmaOptions, SavingOptions
from library.training.run import StepOutput, evaluation_mode
from library.training.timestep_samplers import TimestepOptions
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


DEFAULT_DECAY = 0.999


def head_of(kind: str, width: int) -> torch.nn.Sequential:
    """What projects tokens [B, L, width] to tokens of the same width."""
    middle = width if kind == "gelu" else 2 * width
    between = torch.nn.GELU() if kind == "gelu" else torch.nn.SiLU()
    return torch.nn.Sequential(torch.nn.Linear(width, middle), between, torch.nn.Linear(middle, width))


def of_rows(times: torch.Tensor) -> torch.Tensor:
    """Times [B] or [B, L] as they stand beside tokens [B, L]."""
    return times if times.ndim > 1 else times[:, None]


def times_of_tokens(times: torch.Tensor, latents: torch.Tensor, side: int) -> torch.Tensor:
    """Times [B] as they are; those of frames or tokens of latents [B, C, ..., h, w] for each square of this side:
    [B, L]."""
    if times.ndim == 1:
        return times
    everywhere = expand_like(times, latents).expand(len(times), 1, *latents.shape[2:])
    return everywhere[..., ::side, ::side].flatten(1)


def times_of(student: NoisyLatents, teacher: NoisyLatents) -> dict[str, torch.Tensor]:
    """Values for the log: mean timesteps of both views [0..1000], the share of tokens at the cleaner level, and of
    those for which the teacher is told another one."""
    told = of_rows(teacher.timesteps)  # [B, 1 or L]
    return {
        "self_flow/timestep_student_mean": student.timesteps.mean(), "self_flow/timestep_teacher_mean": told.mean(),
        "self_flow/timestep_diff": (student.timesteps - told).mean(),
        "self_flow/cleaner_fraction_mean": (student.timesteps <= told).float().mean(),
        "self_flow/mismatch_patch_frac": (told > student.timesteps).float().mean(),
    }  # fmt: skip


def read_teacher(teacher: WeightAverage, path: str, trainable: Trainable) -> None:
    """Put the weights of an adapter's file into the average, by the way that the trainable reads files."""
    current = {name: parameter.detach().clone() for name, parameter in teacher.parameters().items()}
    missing = trainable.network.load_weights(path).get("missing", [])
    if missing:
        raise CheckpointError(
            f"--network_weights_ema is {path}, which lacks {missing[0]} and {len(missing) - 1} others"
        )
    teacher.begin()
    with torch.no_grad():
        for name, parameter in teacher.parameters().items():
            parameter.copy_(current[name])


class SelfFlow(Hook):
    """Every token of the student has one of two noise levels, the teacher sees all of them at the cleaner one. Besides
    the usual loss a head learns to tell the teacher's later features from the student's earlier ones. The head and the
    teacher are written beside every file and are part of states; samples and validation use the teacher."""

    told_as = "--self_flow"
    companions = ("-ema", "-proj")

    def __init__(self, options: SelfFlowOptions | None = None) -> None:
        """Without `options` they are those of the run."""
        super().__init__(options)
        self.ema_decay = DEFAULT_DECAY
        self.layers = (0, 0)
        self.decay_steps = 1

    def check(self, config: Config, family: ModelFamily, trainable: Trainable) -> None:
        problems = Problems()
        self.opts = self.opts or config[SelfFlowOptions]
        if not (family.gives_features and family.takes_token_times):
            problems.add(
                "--self_flow needs a flow model that gives features and takes a time per token;"
                f" {family.name} does not"
            )
        if (config[TimestepOptions].num_timestep_buckets or 0) > 1:
            problems.add(
                f"--num_timestep_buckets is {config[TimestepOptions].num_timestep_buckets}; --self_flow draws two noise"
                " levels for each sample, and would get the same one twice: leave it out"
            )
        if config[EmaOptions].ema:
            problems.add(
                "--ema is set; --self_flow keeps an average of its own (--self_flow_ema_decay) and writes it as "
                "<name>-ema: leave --ema out"
            )
        if config[SavingOptions].save_model_as not in (None, "safetensors"):
            problems.add(
                f"--save_model_as is {config[SavingOptions].save_model_as}; --self_flow writes its head as safetensors"
            )
        for problem in file_problems(self.opts, trainable):
            problems.add(problem)
        problems.raise_if_any()
        decay = self.opts.self_flow_ema_decay
        written = config[EmaOptions].ema_decay if "ema_decay" in config.explicit else DEFAULT_DECAY
        self.ema_decay = written if decay is None else decay
        self.teacher = WeightAverage(trainable.modules, what="the teacher of Self-Flow")
        depth = depth_of(family)
        if depth is not None:
            self.choose_layers(depth)

    def choose_layers(self, depth: int) -> None:
        """ConfigError when the model has no such blocks, or the teacher's is not the later one."""
        student, teacher = self.opts.student_feature_layer, self.opts.teacher_feature_layer
        student = int(0.3 * depth) if student is None else student
        teacher = min(depth - 1, int(0.7 * depth)) if teacher is None else teacher
        if not student < teacher < depth:
            raise ConfigError(
                f"--student_feature_layer is {student} and --teacher_feature_layer {teacher} of {depth} blocks (0 to "
                f"{depth - 1});"
                " the teacher's must be the later one"
            )
        self.layers = student, teacher

    def on_transformer_loaded(self, denoiser: torch.nn.Module) -> None:
        self.choose_layers(denoiser.depth)
        width = denoiser.feature_width
        with isolated_rng(key_seed(0, "self flow head")):  # alike on all ranks
            self.head = head_of(self.opts.self_flow_head, width)
        if self.opts.network_weights_proj is not None:
            self._read_head(self.opts.network_weights_proj)

    def _read_head(self, path: str) -> None:
        tensors = load_safetensors(path)
        wanted = {name: tuple(tensor.shape) for name, tensor in self.head.state_dict().items()}
        if {name: tuple(tensor.shape) for name, tensor in tensors.items()} != wanted:
            raise CheckpointError(
                f"--network_weights_proj is {path}, which is no head {self.opts.self_flow_head} of this model; needed:"
                f" {wanted}"
            )
        self.head.load_state_dict(tensors)

    def modules(self) -> dict[str, torch.nn.Module]:
        return {"head": self.head}

    def on_train_start(self, run: Run) -> None:
        self.decay_steps = self.opts.self_flow_teacher_coupling_decay_steps or run.progress.max_train_steps
        if not self.teacher.tensors:
            self.teacher.begin()
            if self.opts.network_weights_ema is not None:
                read_teacher(self.teacher, self.opts.network_weights_ema, run.trainable)

    def process_batch(self, step: TrainStep, batch: Batch, times: torch.Tensor | None) -> StepOutput:
        gamma = self.gamma(batch.request.step)
        if not batch.request.is_training or not self.opts.self_flow_gamma:
            return step.process_batch(batch, times)
        draws, batch = step.begin(batch), step.with_latents(batch)
        student, teacher = self.views(step, step.latents_of(batch), draws)
        step.trainable.on_sample(student)  # text encoders go by it
        conditioning = step.conditioning_of(batch)
        wanted = self.features_of_teacher(step, teacher, conditioning, batch)  # [B, L, D]
        step.trainable.on_sample(student)
        output = step.predict(student, conditioning, batch, feature_layer=self.layers[0])
        with step.runtime.autocast():
            told = self.head(output.extra["features"].to(wanted.dtype))  # [B, L, D]
        likeness = F.cosine_similarity(told.float(), wanted.float(), dim=-1).mean(dim=1)  # [B]
        output = step.with_preserved_targets(output, student, batch, conditioning)
        per_sample, logs = step.loss_of(output, student, batch)
        own = {
            "loss/gen": per_sample.detach().mean(), "loss/rep": -likeness.detach().mean(), "self_flow/gamma": gamma,
            "self_flow/feat_cosine_sim": likeness.detach().mean(),
            "self_flow/teacher_coupling_prob": self.coupling(draws.step), **times_of(student, teacher),
        }  # fmt: skip
        per_sample = per_sample - gamma * likeness * batch.loss_weights.to(likeness)
        return step.result(per_sample, {**logs, **own}, batch)

    def gamma(self, step: int) -> float:
        warmup = self.opts.self_flow_gamma_warmup_steps
        return self.opts.self_flow_gamma * min(1.0, step / warmup if warmup else 1.0)

    def views(self, step: TrainStep, latents: torch.Tensor, draws: StepDraws) -> tuple[NoisyLatents, NoisyLatents]:
        """The same noise twice: for the student at one of two levels for each token, for the teacher at the lower of
        them, of which it may be told another time."""
        patch = step.family.record.latents.patch
        num_tokens = latents[0, 0].numel() // patch**2
        noise = step.noise_of(latents, draws)
        # on the CPU, where they can be read without waiting; [B] each, or [B, L] of a law with times of frames
        first, second = (
            times_of_tokens(step.drawn_times(latents, own), latents, patch) for own in (draws, draws.apart("self flow"))
        )
        is_masked = draws.uniform("self flow mask", (num_tokens,)) < self.opts.mask_ratio  # [B, L]
        mixed = torch.where(is_masked, of_rows(second), of_rows(first))  # [B, L]
        cleaner = torch.minimum(first, second)
        teacher = step.objective.corrupt(latents, noise, cleaner, draws)
        if draws.batch_uniform("self flow coupling") < self.coupling(draws.step):
            is_told = draws.uniform("self flow mismatch", (num_tokens,))
            is_told = (is_told < self.opts.self_flow_teacher_mismatch_ratio) & (mixed == of_rows(cleaner))
            told = torch.where(is_told, of_rows(torch.maximum(first, second)), of_rows(cleaner))  # [B, L]
            levels = to_device(told, latents.device, torch.float32)
            teacher = dataclasses.replace(
                teacher, timesteps=levels * NUM_TIMESTEPS, sigmas=levels, known_times=told * NUM_TIMESTEPS
            )
        return step.objective.corrupt(latents, noise, mixed, draws), teacher

    def coupling(self, step: int) -> float:
        """Share of steps like this one in which the teacher is told a wrong time."""
        options = self.opts
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
        self.teacher.follow(1 - self.ema_decay)

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
        options = self.opts
        return {
            "ss_self_flow": True,
            "ss_self_flow_gamma": options.self_flow_gamma,
            "ss_self_flow_gamma_warmup_steps": options.self_flow_gamma_warmup_steps,
            "ss_self_flow_mask_ratio": options.mask_ratio,
            "ss_self_flow_ema_decay": self.ema_decay,
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
