"""SD3 and SD3.5: options and wiring. Numerics are in sd3_train_utils, loading in sd3_utils, text in strategy_sd3."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from library.core.courses import course
from library.core.errors import CheckpointError, ConfigError, Problems
from library.core.options import LARGEST_TOKENS, Ignored, ignored_option, option, without_effect
from library.families.sd3 import FAMILY
from library.training import timestep_samplers
from library.training.adapters import NetworkOptions
from library.training.option_groups import ModelOptions, NoiseOptions
from library.training.timestep_samplers import TimestepOptions
from library.training.whole_models import WholeModelOptions
from library.training.wiring.base import DENOISER, tokenizer_problems
from library.training.wiring.flow import FlowFamily, ignored_by_flow

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from library.checkpoints.embeddings import Widths
    from library.core.keyed_random import StepDraws
    from library.dataset.batch import Batch
    from library.dataset.latent_cache import LatentCache
    from library.dataset.strategies import Conditioning, StrategySet
    from library.families.latents import SideLimit
    from library.sd3_utils import Sd3Info
    from library.training.accelerator_setup import Runtime
    from library.training.objective import NoisyLatents, Objective
    from library.training.protocols import Plain
    from library.training.run import DiTOutput, Models

logger = logging.getLogger(__name__)

TOKEN_LENGTH = 256
_SD_MODELS = "it belongs to Stable Diffusion 1 and 2; SD3 has no such variant"
_TIMES = "SD3 draws whole timesteps by --weighting_scheme and --training_shift"
_OF_SHARED_FILES = frozenset({"sigma", "uniform", "sigmoid", "shift", "flux_shift", "nextdit_shift"})
"""laws that front ends write into the files of all families alike; the known script of SD3 reads none of them"""
LAWS = tuple(mode for mode in timestep_samplers.MODES if mode not in _OF_SHARED_FILES)


@dataclass(frozen=True, kw_only=True)
class Sd3Options:
    """SD3"""

    clip_l: str | None = option(None, help="file of the CLIP-L text encoder; the model's own when not given")
    clip_g: str | None = option(None, help="file of the CLIP-G text encoder; the model's own when not given")
    t5xxl: str | None = option(
        None, help="file of the T5-XXL text encoder; the model's own when not given, and none where it has none"
    )
    clip_l_tokenizer: str | None = option(
        None, help="folder of the CLIP-L tokenizer, for models with a vocabulary of their own"
    )
    clip_g_tokenizer: str | None = option(None, help="folder of the CLIP-G tokenizer; that of CLIP-L when not given")
    t5xxl_tokenizer: str | None = option(None, help="folder or spiece.model file of the T5 tokenizer")
    t5xxl_max_token_length: int = option(TOKEN_LENGTH, help="longest caption in T5 tokens", most=LARGEST_TOKENS)
    apply_lg_attn_mask: bool = option(False, help="keep both CLIPs from attending to padding")
    apply_t5_attn_mask: bool = option(False, help="keep T5 from attending to padding")
    clip_l_dropout_rate: float = option(0.0, help="share of the samples that learn without what CLIP-L says, 0 to 1")
    clip_g_dropout_rate: float = option(0.0, help="share of the samples that learn without what CLIP-G says, 0 to 1")
    t5_dropout_rate: float = option(0.0, help="share of the samples that learn without what T5 says, 0 to 1")
    pos_emb_random_crop_rate: float = option(
        0.0, help="share of the samples whose positions are cut out anywhere in the table, in place of its middle"
    )
    enable_scaled_pos_embed: bool = option(
        False, help="positions that count a picture of any size as the trained one (for SD3.5 medium)"
    )
    training_shift: float = option(1.0, help="shift of the timesteps; above 1 for noisier samples")
    save_clip: bool = option(False, help="write both CLIPs into model files; an adapter file holds none")
    save_t5xxl: bool = option(False, help="write T5 into model files; an adapter file holds none")
    t5xxl_device: str | None = ignored_option(
        None,
        help="where T5 computes",
        reason="T5 is in memory only while captions are encoded, and computes on the GPU",
    )
    t5xxl_dtype: str | None = ignored_option(
        None, help="number format of T5",
        reason="all text encoders run in the format of --mixed_precision, or in 8 bits with --fp8_base",
    )  # fmt: skip

    def __post_init__(self) -> None:
        problems = Problems()
        for name in ("clip_l_dropout_rate", "clip_g_dropout_rate", "t5_dropout_rate", "pos_emb_random_crop_rate"):
            if not 0 <= getattr(self, name) <= 1:
                problems.add(f"--{name} is {getattr(self, name)}; needed: a share from 0 to 1, e.g. 0.1")
        if not 0 < self.training_shift < float("inf"):
            problems.add(f"--training_shift is {self.training_shift}; needed: a number above 0, e.g. 1.0 or 3.0")
        if self.t5xxl_max_token_length < 1:
            problems.add(f"--t5xxl_max_token_length is {self.t5xxl_max_token_length}; needed: 1 or more, usually 256")
        problems.raise_if_any()

    @property
    def dropout_rates(self) -> dict[str, float]:
        return {
            "clip_l": self.clip_l_dropout_rate, "clip_g": self.clip_g_dropout_rate, "t5": self.t5_dropout_rate,
        }  # fmt: skip


class Sd3Family(FlowFamily):
    """The wiring of SD3 medium, SD3.5 medium and large."""

    record = FAMILY
    timestep_modes = LAWS
    denoiser_kinds = FAMILY.kinds
    options = Sd3Options
    defaults = {"timestep_sampling": "whole", "discrete_flow_shift": 1.0}
    stands_for = {"training_shift": {"discrete_flow_shift": float}}
    part_options = {
        "vae": frozenset(),
        "text_encoders": frozenset(
            {
                "clip_l", "clip_g", "t5xxl", "clip_l_tokenizer", "clip_g_tokenizer", "t5xxl_tokenizer",
                "t5xxl_max_token_length", "apply_lg_attn_mask", "apply_t5_attn_mask", "t5xxl_device", "t5xxl_dtype",
            }
        ),
    }  # fmt: skip
    refused = {"weighted_captions": "SD3 has no way to weigh words"}
    foreign = {
        "timestep_sampling": f"{_TIMES}; beside that it has {', '.join(LAWS)}, and a sampler of your own by its path",
        "sigmoid_scale": _TIMES,
        "discrete_flow_shift": "SD3 has --training_shift",
    }
    read_values = {"timestep_sampling": lambda value: value in LAWS or timestep_samplers.is_own(value)}
    ignored = {
        **ignored_by_flow("SD3"),
        "v2": _SD_MODELS,
        "v_parameterization": "SD3 predicts the velocity of its flow in any case",
        "clip_skip": "SD3 takes the last but one layer of both CLIPs, which is 2",
        "max_token_length": "it counts CLIP tokens; SD3 reads long captions through T5: see --t5xxl_max_token_length",
    }
    neutral = {"clip_skip": (2,)}

    # -- files ---------------------------------------------------------------------------------------------------------

    @property
    def _denoiser_path(self) -> str | None:
        return self.config[ModelOptions].pretrained_model_name_or_path

    def _given(self, *parts: str) -> dict[str, str | None]:
        """What options name for some parts, all when none is named."""
        opts = self.opts
        named = {
            "clip_l": opts.clip_l, "clip_g": opts.clip_g, "t5xxl": opts.t5xxl, "vae": self.config[ModelOptions].vae,
        }  # fmt: skip
        return {part: named[part] for part in parts or named}

    @cached_property
    def _paths(self) -> dict[str, str]:
        """Where each part lies; without T5 where there is none."""
        from library.sd3_utils import part_paths

        return part_paths(self._denoiser_path, self._given())

    @property
    def has_t5(self) -> bool:
        return "t5xxl" in self._paths

    @property
    def num_blocks(self) -> int:
        return self.info.params.depth

    @cached_property
    def info(self) -> Sd3Info:
        from library.sd3_utils import inspect_sd3

        return inspect_sd3(self._denoiser_path)

    def _file_problems(self) -> list[str]:
        from library.custom_offloading_utils import row_swap_problem
        from library.sd3_utils import file_problems

        found = file_problems("pretrained_model_name_or_path", self._denoiser_path, self._given())
        if found:
            return found
        swap = row_swap_problem(self.blocks_to_swap, self.info.params.depth)
        asked = self._t5_learns()
        if asked and not self.has_t5:
            found.append(f"{asked} is given, and there is no T5: {self._denoiser_path} has none; give it with --t5xxl")
        return [*found, *self._tokenizer_problems(), *([swap] if swap else [])]

    def _t5_learns(self) -> str | None:
        """The option that lets T5 learn, where it is given."""
        if WholeModelOptions in self.config and self.config[WholeModelOptions].train_t5xxl:
            return "--train_t5xxl"
        if NetworkOptions in self.config and not self.config[NetworkOptions].network_train_unet_only:
            return "--network_args train_t5xxl=True" if self.config[NetworkOptions].is_on("train_t5xxl") else None
        return None

    def _slot_problems(self, part: str) -> list[str]:
        from library.sd3_utils import ENCODER_SLOTS, file_problems

        given = self._given("vae") if part == "vae" else self._given(*ENCODER_SLOTS)
        return file_problems("pretrained_model_name_or_path", self._denoiser_path, given)

    def _size_problems(self) -> list[str]:
        from library.sd3_utils import size_problems

        return size_problems(self._denoiser_path, self._given())

    def _tokenizer_problems(self) -> list[str]:
        """Tokenizers that cannot be found or read, or whose ids the text encoders do not have."""
        from library.sd3_utils import inspect_encoder

        found: list[str] = []
        for slot, title, rows in (
            ("clip_l", "CLIP-L", "vocab"),
            ("clip_g", "CLIP-G", "vocab"),
            ("t5xxl", "T5", "vocab_size"),
        ):
            if slot in self._paths:
                found += tokenizer_problems(
                    lambda slot=slot: self._tokenizer(slot),
                    lambda slot=slot, rows=rows: inspect_encoder(slot, self._paths[slot])[rows],
                    title, f"--{slot}_tokenizer", f"--{slot} {self._paths[slot]}",
                )  # fmt: skip
        return found

    def _tokenizer(self, slot: str) -> PreTrainedTokenizerBase:
        return self._tokenizers[slot]()

    @cached_property
    def _tokenizers(self) -> dict[str, PreTrainedTokenizerBase]:
        """Slot -> function that gives the tokenizer, which is loaded once."""
        import functools

        from library.components.tokenizers import load_clip_tokenizer, load_t5_tokenizer
        from library.strategy_sd3 import CLIP_G_PAD

        opts, cache = self.opts, self.config[ModelOptions].tokenizer_cache_dir
        second = opts.clip_g_tokenizer or opts.clip_l_tokenizer
        loaders = {
            "clip_l": lambda: load_clip_tokenizer(opts.clip_l_tokenizer, cache),
            "clip_g": lambda: load_clip_tokenizer(second, cache, pad_token=CLIP_G_PAD, option="--clip_g_tokenizer"),
            "t5xxl": lambda: load_t5_tokenizer(opts.t5xxl_tokenizer, cache, self._paths.get("t5xxl")),
        }
        return {slot: functools.cache(load) for slot, load in loaders.items()}

    def _notices(self) -> list[str]:
        lines: list[str] = []
        frozen = self.config[WholeModelOptions].num_last_block_to_freeze if WholeModelOptions in self.config else None
        if frozen:
            lines.append(
                f"--num_last_block_to_freeze {frozen} freezes the last {frozen} blocks (known trainers: as many"
                " tensors)"
            )
        if any(self._flags.values()):
            lines.append("attention masks act in captions, caches and samples alike (known trainers: in caches alone)")
        if not self.has_t5:
            lines.append(
                f"there is no T5: --t5xxl is not given and {self._denoiser_path} has none; both CLIPs alone read captions,"
                " 77 tokens, and zeros stand for T5"
            )
        if self.info.version == "5-medium":
            lines.append(
                "the second attention of SD3.5 medium has heads of the size of its weights (known trainers: others)"
            )
        return lines

    def side_limit(self) -> SideLimit | None:
        if self._denoiser_path is None or self.opts.enable_scaled_pos_embed:
            return None  # a model that is not given is told by the check
        return self.architecture.latents.side_limit(self.info.params.pos_embed_max_size, "enable_scaled_pos_embed")

    def idle(self) -> list[Ignored]:
        opts, found = self.opts, []
        if NetworkOptions in self.config:
            given = [name for name in ("save_clip", "save_t5xxl") if getattr(opts, name)]
            found += without_effect(given, "an adapter file holds what was learned, and no text encoders of the model")
        try:
            without_t5 = self._denoiser_path is not None and not self.has_t5
        except (CheckpointError, OSError):
            return found  # reported by the check
        if without_t5:
            given = [
                name for name in ("t5_dropout_rate", "apply_t5_attn_mask", "t5xxl_tokenizer") if getattr(opts, name)
            ]
            found += without_effect(given, "there is no T5")
        return found

    # -- captions and latents ------------------------------------------------------------------------------------------

    @property
    def _flags(self) -> dict[str, bool]:
        return {"apply_lg_attn_mask": self.opts.apply_lg_attn_mask, "apply_t5_attn_mask": self.opts.apply_t5_attn_mask}

    def strategies(self, trained: Sequence[bool] = ()) -> StrategySet:
        from library import strategy_sd3
        from library.dataset.strategies import StrategySet
        from library.dataset.text_cache_io import TEXT_LAYOUTS
        from library.sd3_utils import ENCODER_SLOTS

        tokenize = strategy_sd3.Sd3TokenizeStrategy(
            self.opts.t5xxl_max_token_length, clip_l_tokenizer=self._tokenizer("clip_l"),
            clip_g_tokenizer=self._tokenizer("clip_g"), has_t5=self.has_t5,
            t5xxl_tokenizer=self._tokenizer("t5xxl") if self.has_t5 else None,
        )  # fmt: skip
        files = [self._paths[slot] for slot in ENCODER_SLOTS if slot in self._paths]
        text = self.text_cache(trained, files, max_token_length=tokenize.t5xxl_max_length, flags=self._flags)
        width = None if self.has_t5 else self.info.params.context_in
        encoding = strategy_sd3.Sd3TextEncodingStrategy(**self._flags, t5_width=width)
        return StrategySet(tokenize, encoding, self.latents_caching(), text, TEXT_LAYOUTS["sd3"])

    def latents_caching(self) -> LatentCache:
        from library.strategy_sd3 import Sd3LatentEncoder

        return self.latent_cache(Sd3LatentEncoder(), self._paths["vae"])

    def scale_latents(self, latents: torch.Tensor) -> torch.Tensor:
        scale, shift = self._scaling
        return (latents - shift) * scale

    @cached_property
    def _scaling(self) -> tuple[float, float]:
        from library.sd3_utils import inspect_vae_sd3

        params = inspect_vae_sd3(self._paths["vae"]).params
        return params.scaling_factor, params.shift_factor

    # -- models --------------------------------------------------------------------------------------------------------

    @property
    def _disable_mmap(self) -> bool:
        return self.config[ModelOptions].disable_mmap_load_safetensors

    def load_vae(self, runtime: Runtime) -> torch.nn.Module:
        from library.sd3_utils import load_vae_sd3

        return load_vae_sd3(self._paths["vae"], runtime.vae_dtype, runtime.device, self._disable_mmap)

    def embedding_widths(self) -> Widths:
        from library.sd3_utils import ENCODER_SLOTS, embedding_widths

        return embedding_widths(self._denoiser_path, self._given(*ENCODER_SLOTS))

    def load_text_encoders(self, runtime: Runtime) -> list[torch.nn.Module | None]:
        """[CLIP-L, CLIP-G, T5 or None]."""
        from library.sd3_utils import ENCODER_LOADERS

        paths = {slot: self._paths.get(slot) for slot in ENCODER_LOADERS}
        return [
            None if path is None else self.stored_encoder(ENCODER_LOADERS[slot], path, runtime)
            for slot, path in paths.items()
        ]

    def load_denoiser(self, runtime: Runtime) -> torch.nn.Module:
        """On the device, or with block swap spread over device and main memory."""
        from library.sd3_utils import load_sd3

        denoiser = load_sd3(
            self._denoiser_path, runtime.denoiser_dtype, self.loading_place(runtime), self._disable_mmap,
            transform=self.transform, form=runtime.denoiser_form,
        )  # fmt: skip
        if self.opts.enable_scaled_pos_embed:
            denoiser.enable_scaled_pos_embed()
        return self.placed(denoiser, runtime)

    # -- the step ------------------------------------------------------------------------------------------------------

    def objective(self) -> Objective:
        """The clean latents, compared with the clean estimate, weighted by `--weighting_scheme`."""
        from library.training.objective import FlowMatchingObjective

        return FlowMatchingObjective(
            self.config[TimestepOptions], self.config[NoiseOptions], target="latents", weigh=True
        )

    def varied(self, conditioning: Conditioning, draws: StepDraws) -> Conditioning:
        from library.sd3_train_utils import without_dropped_parts

        rates = self.opts.dropout_rates
        return (
            without_dropped_parts(conditioning, rates, self._clip_l_width, draws)
            if any(rates.values())
            else conditioning
        )

    @cached_property
    def _clip_l_width(self) -> int:
        from library.sd3_utils import inspect_encoder

        return inspect_encoder("clip_l", self._paths["clip_l"])["width"]

    def training_inputs(self, models: Models, sample: NoisyLatents, draws: StepDraws) -> Mapping[str, object]:
        from library.sd3_train_utils import random_corners

        rate, size = self.opts.pos_emb_random_crop_rate, tuple(sample.noisy_latents.shape[-2:])
        return {"crop_corners": random_corners(models.denoiser, size, rate, draws)} if rate else {}

    @course
    def predict(
        self, models: Models, sample: NoisyLatents, conditioning: Conditioning, batch: Batch, **inputs: object
    ) -> DiTOutput:
        from library.sd3_train_utils import predict_velocity
        from library.training.objective import clean_estimate
        from library.training.run import DiTOutput

        given = (models.denoiser, sample.noisy_latents, sample.timesteps, conditioning)
        velocity = yield from predict_velocity.course(*given, **inputs)
        velocity, extra = self.with_side_outputs(velocity)
        return DiTOutput(clean_estimate(velocity.float(), sample.noisy_latents, sample.sigmas), sample.target, extra)

    # -- files of the run ----------------------------------------------------------------------------------------------

    def save_model(
        self,
        models: Models,
        path: str,
        dtype: torch.dtype | None,
        metadata: dict[str, str],
        parts: Collection[str] = DENOISER,
    ) -> None:
        """The denoiser with the autoencoder of the base in one file; with --save_clip and --save_t5xxl the text
        encoders too. What has not learned is read again: in memory it may be rounded, or gone."""
        from library.sd3_utils import ENCODER_SLOTS, load_sd3, save_whole_sd3

        self.check_parts(parts, (*DENOISER, "text_encoders"))
        bundled = {"vae", *(slot for slot in ENCODER_SLOTS if self._is_bundled(slot))}
        beside = {part: file for part, file in self._paths.items() if part in bundled}
        encoders = dict(zip(ENCODER_SLOTS, models.text_encoders))
        learned = {slot: encoders[slot] for slot in self._learned_slots(parts) if slot in bundled}
        denoiser = models.denoiser if set(DENOISER) <= set(parts) else load_sd3(self._denoiser_path, None, "cpu")
        save_whole_sd3(denoiser, path, beside, dtype, metadata, learned)

    def _is_bundled(self, slot: str) -> bool:
        """Whether a text encoder is written into the model's file."""
        return self.opts.save_t5xxl if slot == "t5xxl" else self.opts.save_clip

    @staticmethod
    def _learned_slots(parts: Collection[str]) -> list[str]:
        from library.sd3_utils import ENCODER_SLOTS

        given = set(parts)
        return [slot for i, slot in enumerate(ENCODER_SLOTS) if {"text_encoders", f"text_encoders.{i}"} & given]

    def side_files(self, parts: Collection[str]) -> Mapping[str, str]:
        """Text encoders that have learned, unless the model's file holds them."""
        from library.sd3_utils import ENCODER_SLOTS

        endings = FAMILY.scripts["full"].text_files
        numbers = {slot: number for number, slot in enumerate(ENCODER_SLOTS)}
        return {
            f"text_encoders.{numbers[slot]}": endings[numbers[slot]]
            for slot in self._learned_slots(parts) if not self._is_bundled(slot)
        }  # fmt: skip

    def save_side_file(self, models: Models, part: str, path: str, dtype: torch.dtype | None) -> None:
        from library.sd3_utils import ENCODER_SLOTS, save_encoder

        number = int(part.rpartition(".")[2])
        slot = ENCODER_SLOTS[number]
        save_encoder(models.text_encoders[number], slot, self._paths[slot], path, dtype)

    def layer_rates(self) -> Mapping[str, float]:
        """The last blocks stay as they are, with --num_last_block_to_freeze."""
        count = self.config[WholeModelOptions].num_last_block_to_freeze if WholeModelOptions in self.config else None
        if not count or self._denoiser_path is None:
            return {}
        try:
            depth = self.info.params.depth
        except CheckpointError:
            return {}  # told by the check of the files
        if count > depth:
            raise ConfigError(f"--num_last_block_to_freeze is {count}; the model has {depth} blocks")
        return {rf"joint_blocks\.({'|'.join(map(str, range(depth - count, depth)))})\.": 0.0}

    def metadata(self) -> dict[str, Plain]:
        times = self.config[TimestepOptions]
        return {
            "ss_base_model_version": self.info.version,
            "ss_apply_lg_attn_mask": self.opts.apply_lg_attn_mask,
            "ss_apply_t5_attn_mask": self.opts.apply_t5_attn_mask,
            "ss_weighting_scheme": times.weighting_scheme,
            "ss_logit_mean": times.logit_mean,
            "ss_logit_std": times.logit_std,
            "ss_mode_scale": times.mode_scale,
            "ss_training_shift": self.opts.training_shift,
        }

    def modelspec(self) -> dict[str, str | None]:
        """No prediction_type: readers know flow models by their architecture."""
        return {
            "architecture": f"stable-diffusion-3-{self.info.version}",
            "implementation": "https://github.com/Stability-AI/generative-models",
        }
