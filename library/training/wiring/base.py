"""ModelFamily: everything a run needs to know of an architecture, and nothing of what is learned."""

from __future__ import annotations

import dataclasses
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from library.core.attention_modes import Place
from library.core.errors import CheckpointError, ConfigError, Problems, UnsupportedCombination
from library.core.lazy_names import homes, lazy_names
from library.core.options import AUTO, Config, Ignored, without_effect
from library.dataset import CachingOptions
from library.dataset.text_padding import PaddedText
from library.training import timestep_samplers
from library.training.attention_options import (
    ATTENTION_SWITCHES,
    AttentionSettings,
    attention_settings,
)
from library.training.computing_options import MemoryOptions, PrecisionOptions
from library.training.inference_samplers import (
    SamplerOptions,
    check_sigma_table,
)
from library.training.option_groups import ModelOptions
from library.training.packing_options import trims_text
from library.training.sampling_prompts import (
    IMAGE_LINE_OPTIONS,
    VIDEO_LINE_OPTIONS,
    LineOption,
    SamplePrompt,
    with_defaults,
)
from library.training.timestep_samplers import info_noise_options

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from library.checkpoints.embeddings import Widths
    from library.checkpoints.loading import Transform
    from library.core.keyed_random import StepDraws
    from library.dataset.batch import Batch
    from library.dataset.items import ImageItem
    from library.dataset.latent_cache import LatentCache, LatentEncoder
    from library.dataset.strategies import Conditioning, StrategySet
    from library.dataset.text_cache import TextCache
    from library.families.latents import SideLimit
    from library.families.record import DataArchitecture, FamilyRecord, SampleDefaults
    from library.generation.pipeline import PicturePipeline
    from library.training.accelerator_setup import Runtime
    from library.training.objective import NoisyLatents, Objective
    from library.training.protocols import BaseInfo, Plain
    from library.training.run import DiTOutput, Models
    from library.training.timestep_samplers import TimestepSampler

__getattr__, __dir__ = lazy_names(__name__, homes("library.training.wiring.flow", "FlowFamily", "ignored_by_flow"))
logger = logging.getLogger(__name__)

DENOISER = ("denoiser",)
NO_TABLE = "-"
"""in the place of a table's name"""


def foreign_to_ddpm(model: str) -> dict[str, str]:
    """Options that scripts of families with a table of noise levels do not have: their timesteps are whole and uniform.
    For `foreign`."""
    reason = f"{model} is trained at whole timesteps, all equally likely; --min_timestep and --max_timestep bound them"
    names = (
        "sigmoid_scale",
        "weighting_scheme",
        "logit_mean",
        "logit_std",
        "mode_scale",
        "discrete_flow_shift",
        "sigma_table",
        "preserve_distribution_shape",
        "num_timestep_buckets",
    )
    own = f"{reason}; a sampler of your own can be given by its path"
    return {"timestep_sampling": own, **dict.fromkeys(names, reason)}


def tokenizer_problems(
    load: Callable[[], PreTrainedTokenizerBase], rows: Callable[[], int] | None, name: str, option: str,
    place: str | None = None,
) -> list[str]:
    """A tokenizer that cannot be found or read, or whose ids the model does not have. `load` gives the tokenizer,
    `rows` the number of embeddings of `place` (None: not compared), `option` names another tokenizer."""
    from library.components.tokenizers import vocabulary_problem

    try:
        tokenizer = load()
        problem = vocabulary_problem(tokenizer, rows(), name, place or f"the {name} text encoder") if rows else None
    except ConfigError as error:
        return list(error.problems)
    except CheckpointError as error:
        return [str(error)]
    return [f"{problem}; name the right one with {option}"] if problem else []


def part_of(path: str | Path, subfolder: str) -> Path:
    """`path`, or the sub-folder of a pipeline folder that holds a part."""
    folder = Path(path) / subfolder
    return folder if folder.is_dir() else Path(path)


class ModelFamily(ABC):
    """Options and wiring of one architecture; holds no weights. Heavy imports happen inside methods."""

    record: ClassVar[FamilyRecord]
    """its facts: library/families/<name>.py; the three below are read from it"""
    name: ClassVar[str]
    architecture: ClassVar[DataArchitecture]
    """latents, bucket step and cache files"""
    sampling: ClassVar[SampleDefaults]
    """what sample prompts leave open, and which of their settings are read"""
    options: ClassVar[type]
    refused: ClassVar[Mapping[str, str]] = {}
    """shared options that the known script refuses too, or without which the result would be another: name -> reason"""
    ignored: ClassVar[Mapping[str, str]] = {}
    """shared options that the known script of the family takes and does nothing with: name -> reason"""
    foreign: ClassVar[Mapping[str, str]] = {}
    """shared options that the known script of the family does not have: name -> reason"""
    read_values: ClassVar[Mapping[str, Callable[[Any], bool]]] = {}
    """options of `foreign` of which some values are read all the same: name -> whether a value is one"""
    idle_values: ClassVar[Mapping[str, Callable[[Any], str | None]]] = {}
    """options that work, of which some values have no meaning here: name -> (value -> why, None for the others)"""
    neutral: ClassVar[Mapping[str, tuple[object, ...]]] = {}
    """values of such options that ask for what happens anyway, where they differ from those of
    known_options.ALSO_NEUTRAL"""
    stands_for: ClassVar[Mapping[str, Mapping[str, object]]] = {}
    """own options that are another spelling of shared ones: name -> those with their values, or functions of its own
    value"""
    defaults: ClassVar[Mapping[str, object]] = {}
    """shared options whose default differs here: name -> default"""
    @classmethod
    def following_defaults(cls, values: Mapping[str, object]) -> Mapping[str, object]:
        """Shared options whose default follows from the values that were given, by name -> default."""
        return {}

    small_text_option: ClassVar[str | None] = None
    """its own option by which text encoders are kept in 8 bits"""

    attention_switches: ClassVar[Mapping[str, str]] = ATTENTION_SWITCHES
    """options that choose how the attention of the denoiser is computed, beside --attn_mode -> the mode; the first that
    is set counts"""
    part_options: ClassVar[Mapping[str, frozenset[str]]] = {}
    """own options that a part needs, for tools that load one part alone: "vae" and "text_encoders" -> names"""

    tool_defaults: ClassVar[Mapping[str, Mapping[str, object]]] = {}
    """what is cached, "latents" or "text" -> defaults that differ in the tool for it: those of the known one"""

    def __init_subclass__(cls, **settings: object) -> None:
        super().__init_subclass__(**settings)
        if "record" in vars(cls):
            cls.name, cls.architecture, cls.sampling = cls.record.name, cls.record.architecture, cls.record.samples

    gives_features: ClassVar[bool] = False
    """whether `predict` takes `feature_layer` and gives the image tokens [B, L, hidden] after that block of
    `repeated_blocks` as DiTOutput.extra["features"]; the denoiser has a `feature_width` then"""
    takes_token_times: ClassVar[bool] = False
    """whether `predict` takes times per token"""

    @classmethod
    def packs(cls) -> bool:
        """Whether samples of several sizes can go through the denoiser together: `predict` is a course then, as the
        forward of the denoiser is."""
        return hasattr(cls.predict, "course")

    padding_masked_by: ClassVar[str] = ""
    """the option that keeps the denoiser from attending to padding, where there is one"""

    ends_texts_together: ClassVar[bool] = False
    """whether texts of a batch are never longer than its longest caption"""

    @property
    def padded_texts(self) -> Sequence[PaddedText]:
        """The texts of its conditioning whose padding makes no difference, as the denoiser does not attend to it."""
        return ()

    def texts_to_cut(self) -> Sequence[PaddedText]:
        """Those of `padded_texts` that are cut in packs: with --navit_text_trim_padding."""
        return self.padded_texts if trims_text(self.config) else ()

    @property
    def splits_levels(self) -> bool:
        """Whether weights change places at a noise level, so that a backward pass must not go through forwards on both
        sides of it."""
        return False

    def __init__(self, config: Config) -> None:
        self.config = config
        self.opts = config[self.options]
        self.transform: Transform | None = None
        """what is done to the tensors of text encoders and denoiser while their files are read: base adapters merged,
        say"""

    @abstractmethod
    def check(self) -> None:
        """Look at options and files (headers only) and raise one ConfigError with every problem."""

    def check_timesteps(self) -> None:
        """Raise ConfigError when the family has not the chosen way of drawing noise levels."""
        timestep_samplers.check_table(self.config[timestep_samplers.TimestepOptions])
        self._check_noise_levels()

    def _check_noise_levels(self) -> None:
        problems, options = Problems(), self.config[timestep_samplers.TimestepOptions]
        weighs = getattr(self.objective(), "weighs", False)
        problems.attempt(lambda: info_noise_options.check(self.config, weighs=weighs))
        needed = {
            "--infonoise_enabled, which counts the loss of a sample at its noise level":
                info_noise_options.is_enabled(self.config),
            "two experts (--dit_high_noise), of which the noise level of a sample chooses one": self.splits_levels,
        }  # fmt: skip
        reasons = [reason for reason, counts in needed.items() if counts]
        problems.attempt(lambda: timestep_samplers.check_one_time(options, self.architecture.latents, reasons))
        problems.raise_if_any()


    @abstractmethod
    def strategies(self, trained: Sequence[bool] = ()) -> StrategySet:
        """Tokenizers are built here; no weights are loaded. `trained` tells per text encoder whether it learns: the
        outputs of such a one are not cached."""

    @abstractmethod
    def latents_caching(self) -> LatentCache:
        """The one of `strategies()`, made without the text side: `latent_cache` of the family's encoder."""

    def latent_cache(self, encoder: LatentEncoder, vae_file: str | Path) -> LatentCache:
        """The latent cache of this run; of a pipeline folder its `vae` alone counts."""
        from library.checkpoints.identity import model_identity
        from library.dataset.latent_cache import LatentCache

        caching = self.config[CachingOptions]
        return LatentCache(
            self.architecture, encoder, to_disk=caching.cache_latents_to_disk, batch_size=caching.vae_batch_size,
            skip_check=caching.skip_cache_check, model_identity=model_identity(vae_file and part_of(vae_file, "vae")),
        )

    def text_cache(
        self, trained: Sequence[bool], files: Sequence[str | Path], more: Sequence[str] = (),
        settings: Mapping[str, object] = {}, **facts: object,
    ) -> TextCache | None:
        """The text cache of this run, None without one. `files`: those of the text encoders; `more`: what else their
        outputs hang on, in words, and `settings`: the options that tell it; `facts`: see TextCache. Without files what
        lies in the cache is taken, whatever made it."""
        from library.checkpoints.identity import combined_identity, model_identity
        from library.dataset.text_cache import TextCache

        caching = self.config[CachingOptions]
        if not caching.caches_text:
            return None
        form = self.config[PrecisionOptions].quantize_text_encoder
        more = (*more, f"text encoders in {form}") if form else more
        if not files:
            more, settings = (), {}
        return TextCache(
            self.architecture, to_disk=caching.cache_text_encoder_outputs_to_disk,
            batch_size=caching.text_encoder_batch_size,
            skip_check=caching.skip_cache_check, trained=trained,
            model_identity=combined_identity([*(model_identity(file) for file in files), *more]) if files else "",
            settings={name: str(value) for name, value in settings.items()}, **facts,
        )

    def see_items(self, items: Sequence[ImageItem]) -> None:
        """The samples that a cache tool found, before it looks at the files of a part: for families without the file of
        the denoiser, which says what is cached beside latents."""

    def lacks(self, part: str) -> bool:
        """Whether no file of a part, "vae" or "text_encoders", is given, so that a run depends on complete caches."""
        return False

    def part_files(self, part: str) -> Mapping[str, str | None]:
        """The options that name the files of a part that may be lacking -> what they say."""
        return {}

    @abstractmethod
    def part_problems(self, part: str) -> list[str]:
        """What is wrong with the files and options of one part alone, "vae" or "text_encoders" (headers only)."""

    @abstractmethod
    def load_vae(self, runtime: Runtime) -> torch.nn.Module: ...

    @abstractmethod
    def load_text_encoders(self, runtime: Runtime) -> list[torch.nn.Module | None]:
        """In the order in which the text strategy expects them. One that can learn has `get_input_embeddings` and
        `gradient_checkpointing_enable` as models of transformers have, and no dropout."""

    def text_form(self, runtime: Runtime) -> str | None:
        """How the matrices of text encoders are stored, one of weight_forms.FORMS; None: as they are computed with."""
        return runtime.text_form or ("fp8" if self._is_text_small else None)

    @property
    def _is_text_small(self) -> bool:
        return bool(self.small_text_option and getattr(self.opts, self.small_text_option))

    def idle_text_form(self) -> list[Ignored]:
        """Its own option for text encoders in 8 bits, where the shared one says how they are stored."""
        form = self.config[PrecisionOptions].quantize_text_encoder
        given = [self.small_text_option] if form and self._is_text_small else []
        return without_effect(given, f"--quantize_text_encoder {form} says how text encoders are stored")

    def stored_encoder(
        self, load: Callable[..., torch.nn.Module], path: str | Path, runtime: Runtime
    ) -> torch.nn.Module:
        """A text encoder by its loader, (path, dtype, place, disable_mmap, transform=...), with its matrices in the
        form of the run."""
        from library.components.stored_parts import stored_model

        disable_mmap = self.config[ModelOptions].disable_mmap_load_safetensors
        return stored_model(
            lambda place: load(path, runtime.weight_dtype, place, disable_mmap, transform=self.transform),
            self.text_form(runtime), runtime.device,
        )  # fmt: skip

    @abstractmethod
    def load_denoiser(self, runtime: Runtime) -> torch.nn.Module:
        """A module with `device`, `enable_gradient_checkpointing(cpu_offload)` and `repeated_blocks()` (--torch_compile
        compiles those), which has no dropout."""

    def load_parts(self, runtime: Runtime, beside: str) -> dict[str, torch.nn.Module]:
        """Further parts by name. `beside` "vae": those that encode images while latents are cached or in the step, and
        live as long as the VAE (a vision encoder); "denoiser": those that run in the step (a second expert, a
        ControlNet). A part with `enable_gradient_checkpointing` or `repeated_blocks`, as the denoiser has them, is
        checkpointed and compiled like it."""
        return {}

    def base_info(self) -> BaseInfo:
        """What the header of the denoiser's file tells, for nets that are made of it. CheckpointError when it is
        something else."""
        raise UnsupportedCombination(f"{self.name} has no nets that are made of its denoiser")

    @abstractmethod
    def objective(self) -> Objective: ...

    def timestep_sampler(self, objective: Objective) -> TimestepSampler:
        """What draws the noise levels of training, in the unit of the objective."""
        options = self.config[timestep_samplers.TimestepOptions]
        law = timestep_samplers.build(options, is_flow=objective.is_flow)
        if not info_noise_options.is_enabled(self.config):
            return law
        from library.training.timestep_samplers.info_noise import InfoNoise, InfoNoiseSampler

        return InfoNoiseSampler(law, InfoNoise(self.config[info_noise_options.InfoNoiseOptions]), options, objective)

    def scale_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """From what the cache stores, [B, C, h, w] or [B, C, F, h, w], to what the denoiser sees; of any rank, [B, C,
        1, h, w] say."""
        return latents

    def varied(self, conditioning: Conditioning, draws: StepDraws) -> Conditioning:
        """What training makes of the conditioning of its samples, cached and live alike: parts left out at random,
        say."""
        return conditioning

    def training_inputs(self, models: Models, sample: NoisyLatents, draws: StepDraws) -> Mapping[str, object]:
        """What `predict` is given in training beside its usual inputs, by name: what is random about a forward."""
        return {}

    @abstractmethod
    def predict(
        self, models: Models, sample: NoisyLatents, conditioning: Conditioning, batch: Batch, **inputs: object
    ) -> DiTOutput:
        """One forward of the denoiser; `pred` and `target` have the shape of the latents."""

    def pipeline(self, models: Models) -> PicturePipeline:
        """What makes the samples, from the models of the run: the pipeline of the family's record, as in its image
        scripts."""
        from library.generation import pipeline_class

        return pipeline_class(self.name)(models.denoiser, models.vae, **self.pipeline_settings())

    def pipeline_settings(self) -> Mapping[str, object]:
        """Fields of the pipeline beside the models: what the options say of them."""
        return {}

    def side_limit(self) -> SideLimit | None:
        """How large pictures may be, from the header of the denoiser's file; None: as large as one likes."""
        return None

    def sample_defaults(self, prompt: SamplePrompt) -> SamplePrompt:
        """Fill the settings that a SamplePrompt leaves open (size, steps, scales, noise levels) and round size and
        number of frames. ConfigError for a table of noise levels that there is not."""
        complete = dataclasses.replace(with_defaults(prompt, self.sampling), sigma_table=self.sigma_table_of(prompt))
        check_sigma_table(complete.sigma_table, "a sample prompt's table of noise levels")
        if complete.frame_count is None:
            return complete
        return dataclasses.replace(complete, frame_count=self.architecture.latents.usable_frames(complete.frame_count))

    @property
    def sampler_options(self) -> SamplerOptions:
        """Those of the run, or their defaults where a script has none."""
        return self.config[SamplerOptions] if SamplerOptions in self.config else SamplerOptions()

    def sigma_table_of(self, prompt: SamplePrompt) -> str | None:
        """The table of noise levels of a sample: that of the prompt, where `-` is none, or of --sample_sigma_table."""
        asked = prompt.sigma_table
        if asked is None:
            return self.sampler_options.sample_sigma_table
        return None if asked == NO_TABLE else asked

    def sample_notices(self, prompts: Sequence[SamplePrompt]) -> list[str]:
        """Lines for the log where sample prompts ask for what the family has no use for, beside settings that it does
        not read."""
        return []

    def first_frames(self, text: str) -> list[str]:
        """The picture files that the --i of a sample prompt names."""
        return [text]

    def idle(self) -> list[Ignored]:
        """Options of the family, or read by it, that have no effect in this run."""
        return []

    further_options: ClassVar[tuple[type, ...]] = ()
    """groups of options that its scripts take beside `options`, unless what is trained declares one of them"""

    def layer_rates(self) -> Mapping[str, float]:
        """Pattern of layer paths of the denoiser -> learning rate, where the family has options for parts of its
        model."""
        return {}

    def unused_text_layers(self, number: int, encoder: torch.nn.Module) -> Sequence[str]:
        """Beginnings of the names of those parameters of a text encoder whose results nothing reads."""
        return ()

    def prompt_rows(self, text: str) -> Sequence[str]:
        """The texts of which a sample prompt consists: one, but where parts of a clip have texts of their own."""
        return [text]

    def needs_negative(self, prompt: SamplePrompt) -> bool:
        """Whether a complete prompt is made with CFG, which takes a second conditioning."""
        scale = prompt.cfg_scale if self.architecture.latents.clips else prompt.scale
        return scale not in (None, 1.0)

    @property
    def sample_batch_size(self) -> int:
        """How many samples with equal settings are made as one batch."""
        return 1

    @classmethod
    def prompt_options(cls) -> Mapping[str, LineOption]:
        """Options of a line of --sample_prompts: those of pictures, or of videos."""
        return VIDEO_LINE_OPTIONS if cls.architecture.latents.clips else IMAGE_LINE_OPTIONS

    @abstractmethod
    def metadata(self) -> dict[str, Plain]:
        """ss_* keys of this family, `ss_base_model_version` among them; plain values."""

    @abstractmethod
    def modelspec(self) -> dict[str, str | None]:
        """architecture, implementation (and prediction_type where it applies) for modelspec.* metadata."""

    def save_model(
        self, models: Models, path: str, dtype: torch.dtype | None, metadata: dict[str, str],
        parts: Collection[str] = DENOISER,
    ) -> None:
        """Write the base model as it is now, in the layout that its files have; safely. Families without it cannot be
        fine-tuned whole.

        `parts`: what has learned, "denoiser", "text_encoders" (or some of them by their number, "text_encoders.0") or names
        of `Models.extra`. Where one file holds all parts,
        the others are those of the base, as they were; UnsupportedCombination for parts that the family does not write.
        """
        raise UnsupportedCombination(f"{self.name} models cannot be written whole")

    @cached_property
    def attention(self) -> AttentionSettings:
        """How the attention of the denoiser is computed in training."""
        from library.device_utils import get_preferred_device

        place = Place(
            get_preferred_device().type, self.config[PrecisionOptions].mixed_precision != "no", training=True
        )
        return attention_settings(self.attention_switches, self.config.values(), place)

    @property
    def second_adapter(self) -> str:
        """Where the denoiser holds one of two sets of weights at a time (`denoiser.experts`, which calls its `listeners`
        at every change), and each has an adapter of its own: what stands behind the name of the file of the second; ""
        = one adapter for all."""
        return ""

    @property
    def asked_swap(self) -> int | str:
        """--blocks_to_swap: a number, or AUTO until the run has chosen one (`Trainer.settle_memory`)."""
        return self.config[MemoryOptions].blocks_to_swap or 0

    @property
    def blocks_to_swap(self) -> int:
        """How many blocks wait in main memory; none of AUTO."""
        return 0 if self.asked_swap == AUTO else self.asked_swap

    @property
    def swaps_blocks(self) -> bool:
        """Whether blocks of the denoiser may wait in main memory."""
        return bool(self.asked_swap)

    def loading_place(self, runtime: Runtime) -> torch.device | str:
        """Where the denoiser is loaded, for `placed`."""
        return "cpu" if self.swaps_blocks else runtime.device

    def placed(self, denoiser: torch.nn.Module, runtime: Runtime) -> torch.nn.Module:
        """A denoiser that was loaded to `loading_place`, on the device, or with block swap spread over device and main
        memory."""
        if not self.swaps_blocks:
            return denoiser
        ring_size = self.config[MemoryOptions].block_swap_ring_size
        denoiser.enable_block_swap(self.blocks_to_swap, runtime.device, ring_size)
        denoiser.move_to_device_except_swap_blocks(runtime.device)
        return denoiser

    writes_folders: ClassVar[bool] = False
    """whether `save_folder` writes models in the layout of diffusers"""

    def save_folder(
        self, models: Models, path: str, dtype: torch.dtype | None, metadata: dict[str, str],
        parts: Collection[str] = DENOISER, *, pickled: bool = False,
    ) -> None:
        """`save_model` as a folder in the layout of diffusers. `pickled`: with .bin files."""
        raise UnsupportedCombination(f"{self.name} models are not written as folders in the layout of diffusers")

    def side_files(self, parts: Collection[str]) -> Mapping[str, str]:
        """Of these parts, those that get a file of their own beside that of `save_model` when they have learned -> what
        stands behind the name of the model there."""
        return {}

    def save_side_file(self, models: Models, part: str, path: str, dtype: torch.dtype | None) -> None:
        """Write one of `side_files`."""
        raise UnsupportedCombination(f"{part} of {self.name} models has no file of its own")

    def check_parts(self, parts: Collection[str], known: Collection[str] = DENOISER) -> None:
        """For `save_model`: UnsupportedCombination for parts that are not `known`."""
        others = sorted({part for part in parts if part not in known and part.partition(".")[0] not in known})
        if others:
            raise UnsupportedCombination(
                f"of {self.name} models {', '.join(known)} can be written; {', '.join(others)} cannot"
            )

    def embedding_widths(self) -> Widths:
        """Widths of the vectors that its text encoders take, from headers, for the `embedding_keys` of its record."""
        raise UnsupportedCombination(f"{self.name} has no textual inversion: no words can be added to its text")

    def text_layers(self) -> Sequence[str]:
        """The layers for each of which a word can have vectors of its own, in the order in which they run, from
        headers; none where it cannot."""
        return ()
