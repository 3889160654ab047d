"""FlowFamily: what families of flow models have alike beside ModelFamily."""

from __future__ import annotations

import dataclasses
import logging
from abc import abstractmethod
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, ClassVar

from library.core.errors import CheckpointError, Problems, UnsupportedCombination
from library.core.registry import import_target
from library.training import timestep_samplers
from library.training.inference_samplers import DEFAULT_SAMPLER, check_flow_sampler, sd_sampler_reason
from library.training.wiring.base import DENOISER, ModelFamily

if TYPE_CHECKING:
    import torch

    from library.training.run import Models
    from library.training.sampling_prompts import SamplePrompt

logger = logging.getLogger(__name__)


def ignored_by_flow(model: str) -> dict[str, str]:
    """What means nothing to a family that learns by flow matching, though its known script takes it: name -> reason,
    for its `ignored`. `model` is its name in messages."""
    table = f"{model} learns by flow matching, which has no table of signal-to-noise ratios"
    noise = f"{model} learns by flow matching from plain noise; of the noise options it has --ip_noise_gamma"
    return {
        "noise_offset": noise,
        "noise_offset_random_strength": noise,
        "adaptive_noise_scale": noise,
        "multires_noise_iterations": noise,
        "multires_noise_discount": noise,
        "zero_terminal_snr": table,
        "min_snr_gamma": f"{table}; --loss_weighting min_snr weighs as it does",
        "scale_v_pred_loss_like_noise_pred": table,
        "v_pred_like_loss": table,
        "debiased_estimation_loss": table,
    }


class FlowFamily(ModelFamily):
    """What families of flow models with a denoiser, text encoders and a VAE in files of their own check alike. Their
    `predict` takes times per token and `feature_layer`, unless they say otherwise."""

    gives_features = takes_token_times = True

    timestep_modes: ClassVar[Sequence[str]] = timestep_samplers.MODES
    """the modes of --timestep_sampling that the family has"""
    denoiser_kinds: ClassVar[Sequence[str]]
    """kinds of file (checkpoint_kinds) that --pretrained_model_name_or_path may be"""
    denoiser_option: ClassVar[str] = "pretrained_model_name_or_path"
    """what messages call the option of the denoiser's file"""
    reads_pickles: ClassVar[bool] = False
    """whether that file may be one of PyTorch"""
    denoiser_writer: ClassVar[str] = ""
    """module:function that writes a file of the denoiser alone, from (model, path, dtype, metadata)"""

    idle_values = {"sample_sampler": sd_sampler_reason}
    own_sampler: ClassVar[str | None] = None
    """the name of the sampler by which samples are made where none is chosen; None = that of the pipeline, of which
    their files tell nothing"""

    def check(self) -> None:
        problems = Problems()
        for problem in self._file_problems():
            problems.add(problem)
        problems.attempt(self.check_timesteps)
        problems.attempt(lambda: check_flow_sampler(self.sampler_options.sample_sampler, "--sample_sampler"))
        problems.raise_if_any()
        for line in self._notices():
            logger.info(line)

    def check_timesteps(self) -> None:
        timestep_samplers.check(self.config[timestep_samplers.TimestepOptions], self.timestep_modes)
        self._check_noise_levels()

    def sample_defaults(self, prompt: SamplePrompt) -> SamplePrompt:
        """With the sampler of the prompt or of --sample_sampler. ConfigError for one that flow models do not have."""
        complete = super().sample_defaults(prompt)
        asked = complete.sample_sampler
        if asked is None or sd_sampler_reason(asked):
            asked = self.sampler_options.sample_sampler
        if asked.lower() == DEFAULT_SAMPLER:
            return dataclasses.replace(complete, sample_sampler=self.own_sampler)
        check_flow_sampler(asked, "a sample prompt's sampler")
        return dataclasses.replace(complete, sample_sampler=asked)

    def sample_notices(self, prompts: Sequence[SamplePrompt]) -> list[str]:
        asked = {prompt.sample_sampler for prompt in prompts if prompt.sample_sampler}
        reasons = {name: sd_sampler_reason(name) for name in sorted(asked)}
        return [f"--ss {name} of sample prompts is ignored: {reason}" for name, reason in reasons.items() if reason]

    def part_problems(self, part: str) -> list[str]:
        found = self._slot_problems(part)
        return found + (self._tokenizer_problems() if part == "text_encoders" and not found else [])

    def _file_problems(self) -> list[str]:
        """Missing, wrong and unfitting files, and a block swap that the depth of the file does not allow."""
        from library.checkpoints.kinds import check_slot

        denoiser = check_slot(
            self._denoiser_path, self.denoiser_option, set(self.denoiser_kinds), with_pickles=self.reads_pickles
        )
        text, vae = ([] if self.lacks(part) else self._slot_problems(part) for part in ("text_encoders", "vae"))
        tokenizers = [] if text or self.lacks("text_encoders") else self._tokenizer_problems()
        found = [*([denoiser] if denoiser else []), *text, *vae, *tokenizers]
        if denoiser or text or vae:
            return found
        try:
            return [*found, *self._size_problems()]
        except CheckpointError as error:
            return [*found, str(error)]

    @property
    def num_blocks(self) -> int:
        """Blocks that `feature_layer` counts, from the header of the denoiser's file. CheckpointError."""
        raise UnsupportedCombination(f"{self.name} does not tell how many blocks its file has")

    def save_model(
        self, models: Models, path: str, dtype: torch.dtype | None, metadata: dict[str, str],
        parts: Collection[str] = DENOISER,
    ) -> None:
        """The denoiser, which has a file of its own."""
        if not self.denoiser_writer:
            return super().save_model(models, path, dtype, metadata, parts)
        self.check_parts(parts)
        import_target(self.denoiser_writer)(models.denoiser, path, dtype, metadata)

    @staticmethod
    def with_side_outputs(
        output: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """What a denoiser gave as prediction and side outputs for DiTOutput."""
        return (output[0], {"features": output[1]}) if isinstance(output, tuple) else (output, {})

    @property
    @abstractmethod
    def _denoiser_path(self) -> str | None: ...

    @abstractmethod
    def _slot_problems(self, part: str) -> list[str]:
        """Files of a part ("vae", "text_encoders") that are missing or something else."""

    @abstractmethod
    def _tokenizer_problems(self) -> list[str]:
        """Tokenizers that cannot be found or read, or whose ids the models do not have."""

    @abstractmethod
    def _size_problems(self) -> list[str]:
        """Sizes of the files against each other; headers only."""

    @abstractmethod
    def _notices(self) -> list[str]:
        """Lines for the log where a setting has no effect or numbers differ from what people know."""
