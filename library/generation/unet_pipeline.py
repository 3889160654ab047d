"""What Stable Diffusion 1, 2 and SDXL have in common in making pictures: the schedule of their training, guidance,
loading."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor

from library.generation.guidance import combine, scheduled
from library.generation.pipeline import PicturePipeline
from library.generation.requests import Request, SampledRequest
from library.generation.sampling_utils import Conditioning, on_device
from library.generation.unet_sampling import SamplingRun
from library.training.inference_samplers.discrete import Predict

if TYPE_CHECKING:
    from library.checkpoints.embeddings import Widths
    from library.components.control_models import Control
    from library.components.ldm_utils import AutoEncoderInfo
    from library.components.unet_utils import UNetInfo
    from library.generation.gen_img.options import GenerationModelOptions
    from library.generation.prompt_encoder import PromptEncoder


class ControlledPredict(Protocol):
    """The prediction of a batch, with what ControlNets add where there are some."""

    def __call__(self, latents: Tensor, timestep: Tensor, control: Control | None = None) -> Tensor: ...


@dataclass
class UNetPipeline(PicturePipeline[Request]):
    """A U-Net, which predicts noise ("epsilon") or velocity ("v"), sampled along the schedule that it was trained
    with."""

    request_class: ClassVar = SampledRequest
    prediction_type: str = "epsilon"
    zero_terminal_snr: bool = False

    @abstractmethod
    def predictor(
        self, conditioning: Conditioning, sizes: Sequence[Sequence[int]], target_hw: tuple[int, int]
    ) -> ControlledPredict:
        """(latents [R, 4, h, w], timestep []) -> prediction, for conditioning of R rows. `sizes`: original height and
        width, crop top and left of each row."""

    def latents(self, request: Request, conditioning: Conditioning, negative: Conditioning | None) -> Tensor:
        size = self.latent_shape(request)[-2:]
        run = SamplingRun(
            request.sampler, request.steps, [request.seed], self.prediction_type, self.zero_terminal_snr, size,
            sigma_table=request.sigma_table, observe=self.observe,
        )
        times = torch.tensor([*run.timesteps(), -1.0])
        predict = scheduled(request, times, lambda asked: self._guided(asked, conditioning, negative))
        return run.sample(predict, self.denoiser.device)

    def _guided(self, request: Request, conditioning: Conditioning, negative: Conditioning | None) -> Predict:
        with_cfg = negative is not None and request.cfg_scale != 1.0
        neutral = self.further.get("neutral") if with_cfg and request.perp_neg is not None else None
        texts = [text for text in (negative if with_cfg else None, conditioning, neutral) if text is not None]
        size, passes = (request.height, request.width), sampling_passes(texts)
        passes = [on_device(states, self.denoiser.device) for states in passes]
        rows = [len(next(iter(states.values()))) for states in passes]
        predictors = [self.predictor(states, [(*size, 0, 0)] * count, size) for states, count in zip(passes, rows)]

        def predict(latents: Tensor, timestep: Tensor) -> Tensor:
            parts = latents.split(rows)
            made = [predictor(part, timestep, self.control) for predictor, part in zip(predictors, parts, strict=True)]
            return torch.cat(made)

        def guided_prediction(latents: Tensor, timestep: Tensor) -> Tensor:
            made = predict(torch.cat([latents] * len(texts)), timestep).chunk(len(texts))
            return made[0] if len(made) == 1 else combine(request, *made)

        return guided_prediction

    # -- for scripts that load a whole model from one file -------------------------------------------------------------

    @staticmethod
    @abstractmethod
    def inspect(options: GenerationModelOptions) -> tuple[UNetInfo, list[str]]:
        """What the header of the checkpoint tells, and what the options have against it. CheckpointError for another
        model."""

    @staticmethod
    @abstractmethod
    def inspect_vae(path: str) -> AutoEncoderInfo: ...

    @staticmethod
    @abstractmethod
    def text_problems(options: GenerationModelOptions) -> list[str]:
        """What is wrong with text encoders and tokenizers."""

    @staticmethod
    @abstractmethod
    def embedding_widths(options: GenerationModelOptions) -> Widths:
        """Widths of the vectors that text encoders take, from headers. CheckpointError."""

    @staticmethod
    def text_layers(options: GenerationModelOptions) -> list[str]:
        """The layers for each of which a word can have vectors of its own; none where it cannot."""
        return []

    @staticmethod
    @abstractmethod
    def load_prompt_encoder(options: GenerationModelOptions, dtype: torch.dtype, device: torch.device) -> PromptEncoder:
        """Text encoders and their tokenizers."""

    @staticmethod
    @abstractmethod
    def load_denoiser(path: str, dtype: torch.dtype, device: torch.device) -> Any: ...

    @staticmethod
    @abstractmethod
    def load_vae(path: str, dtype: torch.dtype, device: torch.device) -> Any: ...


def sampling_passes(texts: list[Conditioning]) -> list[Conditioning]:
    """What the network is run with at each step: all texts as one batch, in their order, or one after the other where
    they take different numbers of tokens."""
    if any(text[name].shape != tensor.shape for text in texts for name, tensor in texts[0].items()):
        return texts
    if len(texts) == 1:
        return texts
    return [{name: torch.cat([text[name] for text in texts]) for name in texts[0]}]
