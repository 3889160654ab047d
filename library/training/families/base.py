"""ModelFamily: everything a run needs to know of an architecture, and nothing of what is learned."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from library.errors import UnsupportedCombination
from library.options import Config

if TYPE_CHECKING:
    import torch

    from library.dataset.architectures import LatentSpec
    from library.strategy_base import LatentsCachingStrategy, StrategySet
    from library.training.accelerator_setup import Runtime
    from library.training.objective import NoisyLatents, Objective
    from library.training.run import DiTOutput, Models


@dataclass(frozen=True)
class NamedPart:
    """A trainable part of a model: `module` under `prefix` (of adapter keys) and the name of its rate in the log."""

    name: str
    module: Any


class ModelFamily(ABC):
    """Options and wiring of one architecture; holds no weights. Heavy imports happen inside methods."""

    name: ClassVar[str]
    latents: ClassVar[LatentSpec]
    options: ClassVar[type]
    refused: ClassVar[Mapping[str, str]] = {}
    """shared options that have no meaning here: name -> reason"""
    defaults: ClassVar[Mapping[str, Any]] = {}
    """shared options whose default differs here: name -> default"""
    part_options: ClassVar[Mapping[str, frozenset[str]]] = {}
    """own options that a part needs, for tools that load one part alone: "vae" and "text_encoders" -> names"""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.opts = config[self.options]

    @abstractmethod
    def check(self) -> None:
        """Look at options and files (headers only) and raise one ConfigError with every problem."""

    @abstractmethod
    def strategies(self) -> StrategySet:
        """Tokenizers are built here; no weights are loaded."""

    @abstractmethod
    def latents_caching(self) -> LatentsCachingStrategy:
        """The one of `strategies()`, made without the text side."""

    @abstractmethod
    def part_problems(self, part: str) -> list[str]:
        """What is wrong with the files and options of one part alone, "vae" or "text_encoders" (headers only)."""

    @abstractmethod
    def load_vae(self, runtime: Runtime) -> torch.nn.Module: ...

    @abstractmethod
    def load_text_encoders(self, runtime: Runtime) -> list[torch.nn.Module | None]:
        """In the order in which the text strategy expects them."""

    @abstractmethod
    def load_denoiser(self, runtime: Runtime) -> torch.nn.Module: ...

    @abstractmethod
    def objective(self) -> Objective: ...

    def scale_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """From what the cache stores to what the denoiser sees."""
        return latents

    @abstractmethod
    def predict(self, models: Models, sample: NoisyLatents, conditioning: list[Any], batch: Any, **inputs: Any) -> DiTOutput:
        """One forward of the denoiser; `pred` and `target` have the shape of the latents."""

    @abstractmethod
    def generate(self, models: Models, prompt: Any, conditioning: list[Any], negative: list[Any] | None) -> Any:
        """Make one image for a SamplePrompt from encoded conditioning; returns a PIL image. The VAE is in `models`."""

    @abstractmethod
    def sample_defaults(self, prompt: Any) -> Any:
        """Fill the settings that a SamplePrompt leaves open (size, steps, scales) and round the size."""

    def layer_rates(self) -> Mapping[str, float]:
        """Pattern of layer paths of the denoiser -> learning rate, where the family has options for parts of its model."""
        return {}

    def text_encoder_embeddings(self, encoder: torch.nn.Module) -> torch.nn.Module | None:
        """The input embedding that must require grad when this encoder is trained with gradient checkpointing."""
        return encoder.get_input_embeddings()

    def text_encoders_in_step(self, training: list[bool], cached: bool) -> bool:
        """Whether the text encoders run in the step: they learn, or their outputs are not cached."""
        return any(training) or not cached

    @abstractmethod
    def metadata(self) -> dict[str, Any]:
        """ss_* keys of this family, `ss_base_model_version` among them; plain values."""

    @abstractmethod
    def modelspec(self) -> dict[str, str | None]:
        """architecture, implementation (and prediction_type where it applies) for modelspec.* metadata."""

    def new_control_net(self, models: Models) -> torch.nn.Module:
        raise UnsupportedCombination(f"{self.name} has no ControlNet training")

    def embedding_tables(self, models: Models) -> list[torch.nn.Embedding]:
        raise UnsupportedCombination(f"{self.name} has no textual inversion")
