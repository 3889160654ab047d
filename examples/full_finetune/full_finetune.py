"""Full fine-tuning as a Trainable: the denoiser itself learns, and the file is a model like the
base."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from library.core.errors import Problems
from library.core.learning_rates import parse_block_curves, parse_rates, rate_groups
from library.core.options import option
from library.training.computing_options import MemoryOptions, PrecisionOptions
from library.training.optimizers import OptimizerOptions
from library.training.trainables.base import Trainable

if TYPE_CHECKING:
    import torch

    from library.training.accelerator_setup import Runtime
    from library.training.protocols import ParamGroup, Plain
    from library.training.run import Models
    from library.training.wiring.base import ModelFamily


@dataclass(frozen=True, kw_only=True)
class FullFinetuneOptions:
    """Full fine-tuning"""

    layer_lrs: str | None = option(
        None, help="learning rates of layers by their path, as regex=rate,regex=rate; 0 = not trained"
    )
    block_lr_curves: str | None = option(
        None, help="factors of the rate of numbered blocks, as regex=curve: the group of the regex is the number"
    )


class FullFinetune(Trainable):
    name, options, script = "full_finetune", FullFinetuneOptions, "train"

    def check(self, family: ModelFamily) -> None:
        problems, precision = Problems(), self.config[PrecisionOptions]
        problems.attempt(lambda: parse_rates(self.opts.layer_lrs, "layer_lrs"))
        problems.attempt(lambda: parse_block_curves(self.opts.block_lr_curves, "block_lr_curves"))
        if precision.fp8_base or precision.fp8_base_unet:
            problems.add("--fp8_base holds weights in 8 bits, in which nothing can be learned; leave it out")
        if self.config[MemoryOptions].blocks_to_swap:
            problems.add("--blocks_to_swap moves weights that are not trained; leave it out")
        problems.raise_if_any()

    def denoiser_dtype(self, runtime: Runtime) -> torch.dtype:
        return runtime.trained_dtype  # float32, unless --full_bf16 or --full_fp16

    def attach(self, family: ModelFamily, models: Models, runtime: Runtime) -> None:
        self.family, self.models = family, models
        for encoder in models.text_encoders:
            if encoder is not None:
                encoder.requires_grad_(False)
        models.denoiser.train()

    def param_groups(self) -> list[ParamGroup]:
        rates = parse_rates(self.opts.layer_lrs, "layer_lrs")
        curves = parse_block_curves(self.opts.block_lr_curves, "block_lr_curves")
        named, rate = self.models.denoiser.named_parameters(), self.config[OptimizerOptions].learning_rate
        return rate_groups(named, rate, rates, curves, name="denoiser")

    def modules(self) -> dict[str, torch.nn.Module]:
        return {"denoiser": self.models.denoiser}

    def save(self, path: str, dtype: torch.dtype | None, metadata: dict[str, str]) -> None:
        self.family.save_model(self.models, path, dtype, metadata)

    def load(self, path: str) -> None:
        raise NotImplementedError("a fine-tuned model is loaded as --pretrained_model_name_or_path")

    def metadata(self) -> dict[str, Plain]:
        given = {"ss_layer_lrs": self.opts.layer_lrs, "ss_block_lr_curves": self.opts.block_lr_curves}
        return {name: value for name, value in given.items() if value}
