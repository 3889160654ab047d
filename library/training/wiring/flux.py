"""FLUX.1 dev and schnell: options and wiring. Numerics are in flux_train_utils, loading in flux_utils, text in
strategy_flux."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

from library.core.courses import Course, course
from library.core.errors import Problems
from library.core.options import LARGEST_TOKENS, Ignored, ignored_option, option, without_effect
from library.dataset.text_padding import PaddedText
from library.families.flux import FAMILY
from library.training.option_groups import ModelOptions, NoiseOptions
from library.training.timestep_samplers import TimestepOptions
from library.training.wiring.base import tokenizer_problems
from library.training.wiring.flow import FlowFamily, ignored_by_flow

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from library.checkpoints.embeddings import Widths
    from library.dataset.batch import Batch
    from library.dataset.latent_cache import LatentCache
    from library.dataset.strategies import Conditioning, StrategySet
    from library.flux_models import StreamTransformer
    from library.flux_utils import FlowModelInfo
    from library.strategy_base import TextEncodingStrategy, TokenizeStrategy
    from library.training.accelerator_setup import Runtime
    from library.training.objective import NoisyLatents, Objective
    from library.training.protocols import Plain
    from library.training.run import DiTOutput, Models

logger = logging.getLogger(__name__)

MODEL_TYPES = ("flux", "chroma")
"""what --model_type chooses: this family or a variant"""
PREDICTION_TYPES = ("raw", "additive", "sigma_scaled")
SPLIT_MODE_BLOCKS = 18
"""what the old --split_mode amounts to"""
TOKEN_LENGTH_DEV, TOKEN_LENGTH_SCHNELL = 512, 256


def ignored_options(model: str, clip_skip: str) -> dict[str, str]:
    """Shared options that this script takes and does nothing with: name -> reason; `model` is the name in messages."""
    return {
        **ignored_by_flow(model),
        "v2": f"it belongs to Stable Diffusion; {model} has no such variant",
        "v_parameterization": f"{model} predicts the velocity of its flow in any case",
        "clip_skip": clip_skip,
        "max_token_length": f"it counts CLIP tokens; {model} reads captions through T5: see --t5xxl_max_token_length",
        "vae": f"the autoencoder of {model} is given with --ae",
    }


@dataclass(frozen=True, kw_only=True)
class FluxOptions:
    """FLUX.1"""

    clip_l: str | None = option(None, help="file of the CLIP-L text encoder")
    t5xxl: str | None = option(None, help="file of the T5-XXL text encoder")
    ae: str | None = option(None, help="file of the autoencoder (ae.safetensors)")
    clip_l_tokenizer: str | None = option(
        None, help="folder of the CLIP-L tokenizer, for models with a vocabulary of their own"
    )
    t5xxl_tokenizer: str | None = option(None, help="folder or spiece.model file of the T5 tokenizer")
    t5xxl_max_token_length: int | None = option(
        None, help="longest caption in T5 tokens; 512 for dev, 256 for schnell when not given", most=LARGEST_TOKENS
    )
    apply_t5_attn_mask: bool = option(False, help="keep T5 and the denoiser from attending to padding")
    guidance_scale: float = option(
        3.5, help="embedded guidance while training; 1.0 is advised for dev, schnell has none"
    )
    model_prediction_type: str = option(
        "raw", choices=PREDICTION_TYPES,
        help="raw: compare velocities; sigma_scaled: compare the clean estimate, weighted by --weighting_scheme",
    )
    model_type: str = option("flux", help="flux, or chroma, a variant with options of its own", choices=MODEL_TYPES)
    split_mode: bool = option(False, help=f"deprecated: --blocks_to_swap {SPLIT_MODE_BLOCKS}, where that is not given")

    def __post_init__(self) -> None:
        problems = Problems()
        if self.model_prediction_type == "additive":
            problems.add(
                "--model_prediction_type is additive, which compares a sum of velocity and noisy latents with a "
                "velocity;"
                " use raw (the same model output, compared with what it stands for)"
            )
        if self.t5xxl_max_token_length is not None and self.t5xxl_max_token_length < 1:
            problems.add(
                f"--t5xxl_max_token_length is {self.t5xxl_max_token_length}; needed: 1 or more, usually 512 or 256"
            )
        if not (math.isfinite(self.guidance_scale) and self.guidance_scale >= 0):
            problems.add(f"--guidance_scale is {self.guidance_scale}; needed: 0 or more, e.g. 1.0 or 3.5")
        problems.raise_if_any()


@dataclass(frozen=True, kw_only=True)
class FluxControlOptions:
    """ControlNet of FLUX.1"""

    controlnet_model_name_or_path: str | None = ignored_option(
        None, help="ControlNet to train with", reason="a ControlNet takes no part in the training of a network"
    )


class FluxFamily(FlowFamily):
    """The wiring of FLUX.1."""

    further_options = (FluxControlOptions,)

    record = FAMILY
    denoiser_kinds = ("flux",)
    denoiser_writer = "library.flux_utils:save_flow_model"
    options = FluxOptions
    padding_masked_by = "apply_t5_attn_mask"
    part_options = {
        "vae": frozenset({"ae"}),
        "text_encoders": frozenset(
            {"clip_l", "t5xxl", "clip_l_tokenizer", "t5xxl_tokenizer", "t5xxl_max_token_length", "apply_t5_attn_mask"}
        ),
    }
    refused = {"weighted_captions": "FLUX.1 has no way to weigh words"}
    ignored = ignored_options("FLUX.1", "FLUX.1 takes the last layer of both text encoders")
    text_slots: ClassVar[Mapping[str, str]] = {"clip_l": "clip_l", "t5xxl": "t5"}
    """options of text encoders, in the order of the encoders -> kinds of files"""
    length_hangs_on_denoiser: ClassVar[bool] = True
    """whether the number of tokens of a caption is told by the denoiser"""

    def part_problems(self, part: str) -> list[str]:
        found = self._slot_problems(part)
        if part != "text_encoders":
            return found
        if not found:
            found += self._tokenizer_problems()
        is_told = self._denoiser_path or self.opts.t5xxl_max_token_length is not None
        if self.length_hangs_on_denoiser and not is_told:
            found.append(
                "neither --pretrained_model_name_or_path nor --t5xxl_max_token_length is given; needed: one of them, "
                "to know how"
                f" many tokens captions have ({TOKEN_LENGTH_DEV} for dev, {TOKEN_LENGTH_SCHNELL} for schnell)"
            )
        return found

    def _slot_problems(self, part: str) -> list[str]:
        """Files of a part that are missing or something else."""
        from library.checkpoints.kinds import check_slot

        slots = {"vae": {"ae": "vae_flux"}, "text_encoders": self.text_slots}[part]
        found = [check_slot(getattr(self.opts, slot), slot, {kind}) for slot, kind in slots.items()]
        return [problem for problem in found if problem]

    def _tokenizer_problems(self) -> list[str]:
        """Tokenizers that cannot be found or read, or whose ids the text encoders do not have."""
        from library.components.text_encoder_utils import inspect_clip_l

        clip_l = self.opts.clip_l
        found = tokenizer_problems(
            lambda: self._clip_l_tokenizer, lambda: inspect_clip_l(clip_l)["vocab"], "CLIP-L", "--clip_l_tokenizer",
            f"--clip_l {clip_l}",
        )
        return [*found, *self._t5_tokenizer_problems()]

    def _t5_tokenizer_problems(self) -> list[str]:
        from library.components.text_encoder_utils import inspect_t5xxl

        t5xxl = self.opts.t5xxl
        return tokenizer_problems(
            lambda: self._t5xxl_tokenizer, lambda: inspect_t5xxl(t5xxl)["vocab_size"], "T5", "--t5xxl_tokenizer",
            f"--t5xxl {t5xxl}",
        )

    @cached_property
    def _clip_l_tokenizer(self) -> PreTrainedTokenizerBase:
        from library.components.tokenizers import load_clip_tokenizer

        return load_clip_tokenizer(self.opts.clip_l_tokenizer, self.config[ModelOptions].tokenizer_cache_dir)

    @cached_property
    def _t5xxl_tokenizer(self) -> PreTrainedTokenizerBase:
        from library.components.tokenizers import load_t5_tokenizer

        return load_t5_tokenizer(
            self.opts.t5xxl_tokenizer, self.config[ModelOptions].tokenizer_cache_dir, self.opts.t5xxl
        )

    def _size_problems(self) -> list[str]:
        """Sizes of the files against each other; headers only."""
        from library.flux_models import block_swap_problem

        params = self._denoiser_info.params
        problems = [
            f"--{slot} is {getattr(self.opts, slot)}: {what} is {size}, the denoiser {self._denoiser_path} takes "
            f"{needed};"
            " use the files that belong together"
            for slot, what, size, needed in self._sizes()
            if size != needed
        ]
        swap = block_swap_problem(self.blocks_to_swap, params.depth, params.depth_single_blocks)
        return [*problems, swap] if swap else problems

    def _sizes(self) -> list[tuple[str, str, int, int]]:
        """(option, what is compared, its size, what the denoiser takes)."""
        from library.components.text_encoder_utils import inspect_clip_l

        width = inspect_clip_l(self.opts.clip_l)["width"]
        return [("clip_l", "its width", width, self._denoiser_info.params.vec_in_dim), *self._sizes_beside_clip()]

    def _sizes_beside_clip(self) -> list[tuple[str, str, int, int]]:
        from library.components.text_encoder_utils import inspect_t5xxl
        from library.flux_utils import inspect_ae

        params, channels = self._denoiser_info.params, inspect_ae(self.opts.ae).params.z_channels
        return [
            ("t5xxl", "its width", inspect_t5xxl(self.opts.t5xxl)["d_model"], params.context_in_dim),
            ("ae", "4 x its latent channels", 4 * channels, params.in_channels),
        ]

    def _notices(self) -> list[str]:
        """Lines for the log where a setting has no effect or numbers differ from what people know."""
        lines = []
        if self.opts.model_prediction_type == "sigma_scaled":
            lines.append(
                "--model_prediction_type sigma_scaled compares the clean estimate with the clean latents (known "
                "trainers compare"
                " it with the velocity): with --weighting_scheme sigma_sqrt this is the raw loss"
            )
        elif "model_prediction_type" not in self.config.explicit:
            lines.append("--model_prediction_type is raw by default here (sigma_scaled in known trainers)")
        if self.opts.split_mode:
            given = "blocks_to_swap" in self.config.explicit
            how = "has no effect beside" if given else f"stands for --blocks_to_swap {SPLIT_MODE_BLOCKS}"
            lines.append(f"--split_mode is deprecated; it {how}{' --blocks_to_swap' if given else ''}")
        if "clip_l" in self.text_slots:
            lines.append(
                "CLIP-L computes with quick_gelu, as it was trained (known trainers compute with gelu here: other "
                "pooled"
                " captions and caches)"
            )
        return lines

    def idle(self) -> list[Ignored]:
        given = ["guidance_scale"] if self.is_schnell and "guidance_scale" in self.config.explicit else []
        return without_effect(given, "FLUX.1 schnell has no embedded guidance")

    @property
    def _denoiser_path(self) -> str | None:
        return self.config[ModelOptions].pretrained_model_name_or_path

    @property
    def num_blocks(self) -> int:
        params = self._denoiser_info.params
        return params.depth + params.depth_single_blocks

    @cached_property
    def _denoiser_info(self) -> FlowModelInfo:
        from library.flux_utils import inspect_flow_model

        return inspect_flow_model(self._denoiser_path)

    @property
    def is_schnell(self) -> bool:
        """By the file: schnell has no guidance embedding."""
        return self._denoiser_info.is_schnell

    @classmethod
    def following_defaults(cls, values: Mapping[str, object]) -> Mapping[str, object]:
        return {"blocks_to_swap": SPLIT_MODE_BLOCKS} if values.get("split_mode") else {}

    @property
    def max_token_length(self) -> int:
        """T5 tokens of a caption."""
        return self.opts.t5xxl_max_token_length or (TOKEN_LENGTH_SCHNELL if self.is_schnell else TOKEN_LENGTH_DEV)

    def strategies(self, trained: Sequence[bool] = ()) -> StrategySet:
        from library.dataset.strategies import StrategySet
        from library.dataset.text_cache_io import TEXT_LAYOUTS

        text = self.text_cache(
            trained, [getattr(self.opts, slot) for slot in self.text_slots], max_token_length=self.max_token_length,
            flags={"apply_t5_attn_mask": self.masks_text},
        )
        return StrategySet(*self._text_strategies(), self.latents_caching(), text, TEXT_LAYOUTS[self.name])

    @property
    def masks_text(self) -> bool:
        """Whether T5 and the denoiser leave padding out."""
        return self.opts.apply_t5_attn_mask

    @property
    def padded_texts(self) -> Sequence[PaddedText]:
        return (PaddedText("t5_attn_mask", ("t5_out", "txt_ids")),) if self.masks_text else ()

    def _text_strategies(self) -> tuple[TokenizeStrategy, TextEncodingStrategy]:
        from library.strategy_flux import FluxTextEncodingStrategy, FluxTokenizeStrategy

        tokenize = FluxTokenizeStrategy(
            self.max_token_length, clip_l_tokenizer=self._clip_l_tokenizer, t5xxl_tokenizer=self._t5xxl_tokenizer
        )
        return tokenize, FluxTextEncodingStrategy(self.masks_text)

    def latents_caching(self) -> LatentCache:
        from library.strategy_flux import FluxLatentEncoder

        return self.latent_cache(FluxLatentEncoder(), self.opts.ae)

    @property
    def _disable_mmap(self) -> bool:
        return self.config[ModelOptions].disable_mmap_load_safetensors

    def load_vae(self, runtime: Runtime) -> torch.nn.Module:
        from library.flux_utils import load_ae

        return load_ae(self.opts.ae, runtime.vae_dtype, runtime.device, self._disable_mmap)

    def embedding_widths(self) -> Widths:
        from library.flux_utils import embedding_widths

        return embedding_widths(self.opts.clip_l, self.opts.t5xxl)

    def load_text_encoders(self, runtime: Runtime) -> list[torch.nn.Module | None]:
        """Those of `text_slots`."""
        from library.flux_utils import load_clip_l, load_t5xxl

        loaders = {"clip_l": load_clip_l, "t5xxl": load_t5xxl}
        return [self.stored_encoder(loaders[slot], getattr(self.opts, slot), runtime) for slot in self.text_slots]

    def base_info(self) -> FlowModelInfo:
        return self._denoiser_info

    def load_denoiser(self, runtime: Runtime) -> torch.nn.Module:
        """On the device, or with block swap spread over device and main memory."""
        denoiser = self._loader(
            self._denoiser_path, runtime.denoiser_dtype, self.loading_place(runtime), self._disable_mmap,
            transform=self.transform, form=runtime.denoiser_form,
        )  # fmt: skip
        return self.placed(denoiser, runtime)

    @property
    def _loader(self) -> Callable[..., StreamTransformer]:
        from library.flux_utils import load_flux

        return load_flux

    def objective(self) -> Objective:
        """Velocity; with sigma_scaled the clean latents, weighted by `--weighting_scheme`."""
        from library.training.objective import FlowMatchingObjective

        is_scaled = self.opts.model_prediction_type == "sigma_scaled"
        return FlowMatchingObjective(
            self.config[TimestepOptions], self.config[NoiseOptions], target="latents" if is_scaled else "velocity",
            weigh=is_scaled
        )

    @course
    def predict(
        self, models: Models, sample: NoisyLatents, conditioning: Conditioning, batch: Batch, **inputs: object
    ) -> DiTOutput:
        from library.training.objective import clean_estimate
        from library.training.run import DiTOutput

        velocity = yield from self._velocity(models.denoiser, sample, conditioning, **inputs)
        prediction, extra = self.with_side_outputs(velocity)
        if self.opts.model_prediction_type == "sigma_scaled":
            prediction = clean_estimate(prediction.float(), sample.noisy_latents, sample.sigmas)
        return DiTOutput(prediction, sample.target, extra)

    def _velocity(
        self, denoiser: torch.nn.Module, sample: NoisyLatents, conditioning: Conditioning, **inputs: object
    ) -> Course:
        """What the denoiser predicts, with its side outputs where `inputs` ask for them."""
        from library.flux_train_utils import predict_velocity

        return predict_velocity.course(
            denoiser, sample.noisy_latents, sample.timesteps, conditioning,
            guidance=self.opts.guidance_scale, use_t5_mask=self.masks_text, **inputs,
        )

    def pipeline_settings(self) -> Mapping[str, object]:
        return {"use_t5_mask": self.masks_text}

    def metadata(self) -> dict[str, Plain]:
        times = self.config[TimestepOptions]
        return {
            "ss_base_model_version": "flux1",
            "ss_model_type": self.opts.model_type,
            "ss_apply_t5_attn_mask": self.masks_text,
            "ss_weighting_scheme": times.weighting_scheme,
            "ss_logit_mean": times.logit_mean,
            "ss_logit_std": times.logit_std,
            "ss_mode_scale": times.mode_scale,
            "ss_guidance_scale": self.opts.guidance_scale,
            "ss_timestep_sampling": times.timestep_sampling,
            "ss_sigmoid_scale": times.sigmoid_scale,
            "ss_model_prediction_type": self.opts.model_prediction_type,
            "ss_discrete_flow_shift": times.discrete_flow_shift,
        }

    def modelspec(self) -> dict[str, str | None]:
        """No prediction_type: readers know flow models by their architecture."""
        return {
            "architecture": "flux-1-schnell" if self.is_schnell else "flux-1-dev",
            "implementation": "https://github.com/black-forest-labs/flux",
        }
