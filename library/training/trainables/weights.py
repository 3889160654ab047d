"""What training of all weights of a module has in common: rates, updates inside the backward pass, weights in
bfloat16."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from library.core.errors import ConfigError
from library.core.options import Ignored, without_effect
from library.families.registry import record_of
from library.training.computing_options import PrecisionOptions
from library.training.optimizers import OptimizerOptions, check_rates, choose
from library.training.option_groups import LoopOptions, SavingOptions
from library.training.trainables.base import Trainable
from library.training.trained_weights import BF16_NOTICES, TrainedWeightsOptions
from library.training.updaters.base import Updater

if TYPE_CHECKING:
    from library.training.accelerator_setup import Runtime
    from library.training.run import Models
    from library.training.wiring.base import ModelFamily


class WeightsTrainable(Trainable):
    """The base of trainables whose parameters are weights of a model. `family` and `models` are there after
    attach()."""

    opts: TrainedWeightsOptions
    rate_options: str
    """the options that give rates, for messages"""

    @classmethod
    def dataset_rules(cls, family: ModelFamily | type[ModelFamily]) -> str:
        script = record_of(family.name).scripts.get(cls.name)
        return super().dataset_rules(family) if script is None else script.name

    def update_problems(self) -> list[str]:
        """What is wrong with the way in which weights are updated and written."""
        return [*self._fused_problems(), *self._format_problems()]

    def check_used_rates(self, rates: Sequence[float]) -> None:
        """ConfigError when nothing learns, or the optimizer does not take these rates, with that of the rest."""
        used = [*rates, self.rate]
        if not any(used):
            raise ConfigError(f"every learning rate is 0: there is nothing to train; look at {self.rate_options}")
        check_rates(self.config[OptimizerOptions], used, self.rate_options)

    @property
    def rate(self) -> float:
        return self.config[OptimizerOptions].learning_rate

    def idle(self, family: ModelFamily) -> list[Ignored]:
        if "bf16_update" in self.config.explicit and not self.config[PrecisionOptions].full_bf16:
            return without_effect(["bf16_update"], "weights that learn are in bfloat16 with --full_bf16 alone")
        return []

    @property
    def _is_fused(self) -> bool:
        return bool(self._fused_options)

    @property
    def _fused_options(self) -> list[str]:
        """Those that are given of the options which ask for it."""
        found = ["--fused_backward_pass"] if self.config[OptimizerOptions].fused_backward_pass else []
        groups = self.opts.fused_optimizer_groups
        found += [f"--fused_optimizer_groups {groups}"] if groups else []
        return found + (["--blockwise_fused_optimizers"] if self.opts.blockwise_fused_optimizers else [])

    def _fused_problems(self) -> Iterator[str]:
        """What an update inside the backward pass cannot be combined with."""
        if not self._is_fused:
            return
        option, *others = self._fused_options
        if others:
            yield f"{option} and {' and '.join(others)} say the same; use one of them"
        steps = self.config[LoopOptions].gradient_accumulation_steps
        if steps > 1:
            yield (
                f"{option} is set with --gradient_accumulation_steps {steps}; gradients are gone after each backward"
                " pass: use a larger --train_batch_size, or leave one of them out"
            )
        if self.config[PrecisionOptions].mixed_precision == "fp16":
            yield (
                f"{option} is set with --mixed_precision fp16, whose scaled gradients are judged all together; use"
                " --mixed_precision bf16"
            )
        if int(os.environ.get("WORLD_SIZE", "1") or 1) > 1:
            yield f"{option} is for one process: gradients of several are summed before the step; leave it out"
        choice = self._steps_singly()
        if choice:
            yield (
                f"{option}: {choice} needs the gradients of all weights at once; use AdamW or AdaFactor, or leave it"
                " out"
            )

    def _steps_singly(self) -> str | None:
        """None, or the name of an optimizer that has to see all weights together."""
        from library.training.optimizers.single_steps import steps_singly

        options = self.config[OptimizerOptions]
        try:
            return None if steps_singly(options) else f"--optimizer_type {choose(options).name}"
        except ConfigError:
            return None  # told by the check of the optimizer

    def _format_problems(self) -> Iterator[str]:
        from library.training import optimizers

        if self.config[PrecisionOptions].full_bf16:
            try:
                built = optimizers.check(self.config[OptimizerOptions])
            except ConfigError:
                return  # told by the check of the optimizer
            if built.schedule_free:
                yield (
                    f"--full_bf16 with --optimizer_type {built.choice.name}, which moves between two sets of weights"
                    " that bfloat16 cannot tell apart; leave one of them out"
                )
        if self.config[SavingOptions].save_model_as == "pt":
            yield "--save_model_as is pt, in which no program looks for a model; use safetensors or ckpt"

    # -- the models --------------------------------------------------------------------------------------------------

    def attach(self, family: ModelFamily, models: Models, runtime: Runtime) -> None:
        self.family, self.models = family, models
        self._rounds = str(runtime.trained_dtype) == "torch.bfloat16"

    def updater(self) -> Updater:
        from library.training.updaters.ordinary import OrdinaryUpdater
        from library.training.updaters.single import FusedUpdater, RoundingUpdater

        way = self.opts.bf16_update
        if self._is_fused:
            return FusedUpdater(way)
        return RoundingUpdater(self._steps_singly() is None, way) if self._rounds else OrdinaryUpdater()

    def notices(self) -> list[str]:
        lines = []
        if self._rounds:
            lines.append(BF16_NOTICES[self.opts.bf16_update])
            choice = choose(self.config[OptimizerOptions])
            if choice.one_rate_for_all_groups and self.opts.bf16_update == "stochastic":
                lines.append(
                    f"{choice.name} finds its rate by how far weights went, which chance blurs at first; --bf16_update"
                    " kahan keeps it exact"
                )
        if self._is_fused and self.config[OptimizerOptions].max_grad_norm:
            lines.append(
                f"--max_grad_norm {self.config[OptimizerOptions].max_grad_norm:g}: each tensor is clipped by its own"
                " norm, because updates inside the backward pass never see all gradients; 0 clips nothing"
            )
        return lines
