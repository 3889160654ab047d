"""Trainable: what is learned, with its parameters, its inputs to the step and its file."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, ClassVar

from library.core.options import Config, Ignored
from library.families.registry import script_name

if TYPE_CHECKING:
    import torch

    from library.checkpoints.loading import Transform
    from library.config_util import ScriptRules
    from library.core.keyed_random import StepDraws
    from library.dataset.batch import Batch
    from library.dataset.strategies import Conditioning, StrategySet
    from library.training.accelerator_setup import Runtime
    from library.training.data_phase import DataGroups
    from library.training.hooks.base import Hook
    from library.training.objective import NoisyLatents
    from library.training.protocols import ParamGroup, Plain, TextEncoders
    from library.training.run import Models
    from library.training.sampling_prompts import SamplePrompt
    from library.training.updaters.base import Updater
    from library.training.wiring.base import ModelFamily


class Trainable(ABC):
    """Owns the trained parameters. Made before any model is loaded; `attach` binds it to the loaded models."""

    without_untouched: ClassVar[str] = ""
    """why there is no prediction of the untouched model to keep (`diff_output_preservation`); empty where there is"""

    name: ClassVar[str]
    options: ClassVar[type]
    ignored: ClassVar[Mapping[str, str]] = {}
    """shared options without meaning for a trainable from outside: name -> reason; those of built-in ones are in
    TRAINABLES"""
    script: ClassVar[str] = "train_network"
    """name of its scripts without .py and without what a family puts before it"""
    keeps_text_still: ClassVar[str] = ""
    """what to do to keep text encoders from learning, for messages: "add --network_train_unet_only", say"""
    begins_with: ClassVar[str] = "--network_weights"
    """the option that names a file of it with which a new run begins"""
    writes_folders: ClassVar[bool] = False
    """whether it can be saved as a folder in the layout of diffusers, where the family has one"""
    has_own_folder: ClassVar[bool] = False
    """whether that folder is one of its own, which hangs on no other part of the family"""
    state_kind: ClassVar[str] = ""
    """what a state holds, where trainables of several names write the same; its name when not given"""
    spec_kind: ClassVar[str] = ""
    """what modelspec.architecture ends in: lora, textual-inversion, controlnet; "" for a full model"""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.opts = config[self.options]

    @abstractmethod
    def check(self, family: ModelFamily) -> None:
        """Options and files (headers only); raises one ConfigError with every problem."""

    def idle(self, family: ModelFamily) -> list[Ignored]:
        """Options about what is learned that have no effect in this run."""
        return []

    def fixed_settings(self, family: ModelFamily) -> dict[str, Plain]:
        """Options on which the shape of what is learned hangs, by name: a run that resumes must have the same."""
        return {}

    def trains_text_encoders(self, family: ModelFamily) -> list[bool]:
        """Per text encoder, whether it learns."""
        return []

    def follows_text_encoders(self, family: ModelFamily) -> list[bool]:
        """Per text encoder, whether gradients go through it in the step: where it learns, and where it reads what
        learns. Its outputs are not cached."""
        return self.trains_text_encoders(family)

    @classmethod
    def dataset_rules(cls, family: ModelFamily | type[ModelFamily]) -> str | ScriptRules:
        """What datasets it takes and which folders they need: `ScriptRules(frozenset({"CN"}), masks=False)` wants
        conditioning_data_dir in each, say. A name of a script stands for the rules of that."""
        return script_name(family.name, cls.script)

    def prepare_tokenizers(self, family: ModelFamily, strategies: StrategySet) -> None:
        """Before captions are encoded and text encoders loaded: new tokens join the tokenizers here."""

    def text_strategies(self, strategies: StrategySet) -> StrategySet:
        """How texts of the run are encoded, once the tokenizers know their tokens."""
        return strategies

    def updater(self) -> Updater:
        """How gradients become changed weights."""
        from library.training.updaters.ordinary import OrdinaryUpdater

        return OrdinaryUpdater()

    def text_encoder_dtype(self, family: ModelFamily, runtime: Runtime) -> torch.dtype | None:
        """In what the text encoders' weights are held; None: as frozen ones are."""
        return None

    def prepare_data(self, data: DataGroups) -> None:
        """Images are in their buckets, and nothing is encoded yet: what captions say besides is set here."""

    sample_reads: ClassVar[frozenset[str]] = frozenset()
    """settings of sample prompts that it reads, beside those of the family"""

    def sample_prompt(self, prompt: SamplePrompt) -> SamplePrompt:
        """A sample prompt as it is encoded; ConfigError leaves it out."""
        return prompt

    @contextmanager
    def at_sample(self, prompt: SamplePrompt) -> Iterator[Mapping[str, object]]:
        """Around the making of samples of a complete prompt. Gives fields of the pipeline that makes them."""
        yield {}

    def prepare_text_encoders(self, family: ModelFamily, encoders: TextEncoders, runtime: Runtime) -> None:
        """Text encoders are loaded and frozen, and have encoded nothing yet: new tokens join them here."""

    def denoiser_dtype(self, runtime: Runtime) -> torch.dtype:
        """In what the denoiser's weights are held: that of frozen ones, unless they are what is learned."""
        return runtime.denoiser_dtype

    def transform(self, family: ModelFamily) -> Transform | None:
        """What is done to the models' tensors while their files are read; None = nothing."""
        return None

    def transform_identity(self, family: ModelFamily) -> str:
        """Stands for what `transform` does, so that cached outputs of changed text encoders are known from others; "" =
        nothing."""
        return ""

    @abstractmethod
    def attach(self, family: ModelFamily, models: Models, runtime: Runtime) -> None: ...

    @abstractmethod
    def param_groups(self) -> list[ParamGroup]:
        """Optimizer groups with `params` (list), `lr` and `name` (for the log)."""

    @abstractmethod
    def modules(self) -> dict[str, torch.nn.Module]:
        """Name -> trained module."""

    def inputs(self, batch: Batch, sample: NoisyLatents, conditioning: Conditioning) -> dict[str, object]:
        """Further arguments of the family's `predict`."""
        return {}

    def on_step_start(self, draws: StepDraws) -> None:
        """Before each micro-batch; `draws` keys the dropouts of the adapter."""

    def on_sample(self, sample: NoisyLatents) -> None:
        """The micro-batch is noised; nothing of it went through the text encoders or the denoiser yet."""

    @contextmanager
    def disabled(self):
        """Inside, the model predicts as if nothing had been learned."""
        yield

    def side_files(self, family: ModelFamily) -> list[str]:
        """What stands behind the name of the model in those of the files that `save` writes beside it; see
        checkpoint.side_name."""
        return []

    def hooks(self) -> list[Hook]:
        """Called once, before models are loaded."""
        return []

    def description(self) -> str:
        """What is learned, for the page at start; after attach()."""
        return self.name

    def notices(self) -> list[str]:
        """Lines for the page at start about settings whose meaning is easily overlooked; after attach()."""
        return []

    @abstractmethod
    def save(self, path: str, dtype: torch.dtype | None, metadata: dict[str, str]) -> None:
        """Write the file (temporary name, flush, rename). What library.safetensors_utils writes may be there later."""

    @abstractmethod
    def load(self, path: str) -> None: ...

    @abstractmethod
    def metadata(self) -> dict[str, Plain]: ...


def mask_notice(device: torch.device) -> list[str]:
    """A line for the start of a run with dropouts, where its numbers are not those that the CPU draws."""
    if device.type == "cpu":
        return []
    return [
        f"masks of dropouts are drawn on the device ({device.type}): the same in every run on it, other ones than on"
        " the CPU"
    ]
