"""HunyuanImage 2.1: options and wiring. Numerics are in hunyuan_image_train_utils, loading in hunyuan_image_utils, text
in strategy_hunyuan_image."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from library.core.courses import course
from library.core.errors import Problems
from library.core.options import Ignored, option, without_effect
from library.families.hunyuan_image import FAMILY
from library.training.computing_options import PrecisionOptions
from library.training.option_groups import ModelOptions, NoiseOptions
from library.training.timestep_samplers import TimestepOptions
from library.training.wiring.base import tokenizer_problems
from library.training.wiring.flow import FlowFamily, ignored_by_flow

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from library.checkpoints.denoisers import DenoiserInfo
    from library.dataset.batch import Batch
    from library.dataset.latent_cache import LatentCache
    from library.dataset.strategies import Conditioning, StrategySet
    from library.training.accelerator_setup import Runtime
    from library.training.objective import NoisyLatents, Objective
    from library.training.protocols import Plain
    from library.training.run import DiTOutput, Models
    from library.training.sampling_prompts import SamplePrompt

logger = logging.getLogger(__name__)

PREDICTION_TYPES = ("raw", "additive", "sigma_scaled")

_SD_MODELS = "it belongs to Stable Diffusion; HunyuanImage has no such variant"
_STILL = "the text encoders of HunyuanImage are never trained"


@dataclass(frozen=True, kw_only=True)
class HunyuanImageOptions:
    """HunyuanImage 2.1"""

    text_encoder: str | None = option(None, help="file or folder of the Qwen2.5-VL-7B text encoder")
    byt5: str | None = option(None, help="file of the ByT5 glyph encoder (byt5_small_glyphxl_fp16.safetensors)")
    text_encoder_tokenizer: str | None = option(None, help="folder of the Qwen2.5-VL tokenizer")
    guidance_scale: float = option(
        3.5, help="embedded guidance while training, of distilled models; the others have none"
    )
    model_prediction_type: str = option(
        "raw",
        choices=PREDICTION_TYPES,
        help="raw: compare velocities; sigma_scaled: compare the clean estimate, weighted by --weighting_scheme",
    )
    fp8_vl: bool = option(False, help="keep the matrices of the Qwen2.5-VL text encoder in 8 bits")
    text_encoder_cpu: bool = option(False, help="let the text encoders compute on the CPU")
    vae_chunk_size: int | None = option(
        None, help="rows that the VAE computes at once: less memory, equal results; all when not given"
    )
    vae_tiling: bool = option(
        False, help="let the VAE compute pictures larger than 384 pixels in tiles: little memory, close results"
    )

    def __post_init__(self) -> None:
        problems = Problems()
        if self.model_prediction_type == "additive":
            problems.add(
                "--model_prediction_type is additive,"
                " which compares a sum of velocity and noisy latents with a velocity;"
                " use raw (the same model output, compared with what it stands for)"
            )
        if not (math.isfinite(self.guidance_scale) and self.guidance_scale >= 0):
            problems.add(f"--guidance_scale is {self.guidance_scale}; needed: 0 or more, e.g. 3.5")
        if self.vae_chunk_size is not None and self.vae_chunk_size < 1:
            problems.add(f"--vae_chunk_size is {self.vae_chunk_size}; needed: 1 or more, e.g. 64")
        problems.raise_if_any()


class HunyuanImageFamily(FlowFamily):
    """The wiring of HunyuanImage 2.1."""

    record = FAMILY
    denoiser_kinds = ("hunyuan_image",)
    denoiser_writer = "library.hunyuan_image_utils:save_hunyuan_image"
    options = HunyuanImageOptions
    small_text_option = "fp8_vl"
    defaults = {"discrete_flow_shift": 5.0}
    ends_texts_together = True
    part_options = {
        "vae": frozenset({"vae_chunk_size", "vae_tiling"}),
        "text_encoders": frozenset({"text_encoder", "byt5", "text_encoder_tokenizer", "fp8_vl", "text_encoder_cpu"}),
    }
    refused = {"weighted_captions": "HunyuanImage has no way to weigh words"}
    ignored = {
        **ignored_by_flow("HunyuanImage"),
        "v2": _SD_MODELS,
        "v_parameterization": "HunyuanImage predicts the velocity of its flow in any case",
        "clip_skip": "HunyuanImage takes a fixed layer of its text encoder",
        "max_token_length": "it counts CLIP tokens; HunyuanImage reads 1024 tokens of a caption",
    }

    def _slot_problems(self, part: str) -> list[str]:
        """Files of a part that are missing or something else."""
        from library.checkpoints.kinds import check_slot

        if part == "vae":
            found = [check_slot(self._vae_path, "vae", {"vae_hunyuan_image"})]
        else:
            slots = {"text_encoder": "qwen25_vl", "byt5": "byt5"}
            found = [check_slot(getattr(self.opts, slot), slot, {kind}) for slot, kind in slots.items()]
        return [problem for problem in found if problem]

    def _tokenizer_problems(self) -> list[str]:
        """A tokenizer that cannot be found or read, or whose ids the model does not have."""
        from library.components.llm_encoder_utils import inspect_qwen25_vl

        path = self.opts.text_encoder
        return tokenizer_problems(
            lambda: self._tokenizer, lambda: inspect_qwen25_vl(path)["vocab_size"], "Qwen2.5-VL",
            "--text_encoder_tokenizer", f"--text_encoder {path}",
        )  # fmt: skip

    @cached_property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        from library.components.tokenizers import load_qwen25_vl_tokenizer

        cache_dir = self.config[ModelOptions].tokenizer_cache_dir
        return load_qwen25_vl_tokenizer(self.opts.text_encoder_tokenizer, cache_dir, self.opts.text_encoder)

    def _size_problems(self) -> list[str]:
        """Sizes of the files against each other; headers only."""
        from library.hunyuan_image_utils import fitting_problems

        return fitting_problems(
            lambda: self._denoiser_info.params, text_encoder=("text_encoder", self.opts.text_encoder),
            byt5=("byt5", self.opts.byt5), vae=("vae", self._vae_path), model=self._denoiser_path,
            blocks_to_swap=self.blocks_to_swap,
        )  # fmt: skip

    def _notices(self) -> list[str]:
        """Lines for the log where a setting has no effect or numbers differ from what people know."""
        lines = ["the time reaches the network in float32 (known trainers cut it to a whole number)"]
        params, precision = self._denoiser_info.params, self.config[PrecisionOptions]
        if params.mean_flow:
            lines.append(
                "a distilled model that learned average velocities: it is trained on those of a single time (r = t)"
            )
        elif params.guidance_embed:
            lines.append("a distilled model, trained with its embedded guidance (--guidance_scale)")
        if precision.denoiser_form == "fp8":
            lines.append(
                "--fp8_base stores the denoiser as --fp8_scaled does: without scales its small rows would be lost"
            )
        return lines

    def idle(self) -> list[Ignored]:
        given = ["guidance_scale"] if not self.is_distilled and "guidance_scale" in self.config.explicit else []
        return without_effect(given, "only distilled models have embedded guidance, and this file is none")

    @property
    def _denoiser_path(self) -> str | None:
        return self.config[ModelOptions].pretrained_model_name_or_path

    @property
    def _vae_path(self) -> str | None:
        return self.config[ModelOptions].vae

    @property
    def num_blocks(self) -> int:
        params = self._denoiser_info.params
        return params.depth + params.depth_single

    @cached_property
    def _denoiser_info(self) -> DenoiserInfo:
        from library.hunyuan_image_utils import inspect_hunyuan_image

        return inspect_hunyuan_image(self._denoiser_path)

    @property
    def is_distilled(self) -> bool:
        """By the file: it follows an embedded guidance."""
        return self._denoiser_info.params.guidance_embed

    def strategies(self, trained: Sequence[bool] = ()) -> StrategySet:
        from library import strategy_hunyuan_image
        from library.dataset.strategies import StrategySet
        from library.dataset.text_cache_io import TEXT_LAYOUTS

        text = self.text_cache(trained, [self.opts.text_encoder, self.opts.byt5])
        tokenize = strategy_hunyuan_image.HunyuanImageTokenizeStrategy(tokenizer=self._tokenizer)
        encoding = strategy_hunyuan_image.HunyuanImageTextEncodingStrategy()
        return StrategySet(tokenize, encoding, self.latents_caching(), text, TEXT_LAYOUTS["hunyuan_image"])

    def latents_caching(self) -> LatentCache:
        from library.strategy_hunyuan_image import HunyuanImageLatentEncoder

        encoder = HunyuanImageLatentEncoder()
        encoder.tiling = self.opts.vae_tiling
        return self.latent_cache(encoder, self._vae_path)

    @property
    def _disable_mmap(self) -> bool:
        return self.config[ModelOptions].disable_mmap_load_safetensors

    def load_vae(self, runtime: Runtime) -> torch.nn.Module:
        from library.hunyuan_image_utils import load_vae

        return load_vae(
            self._vae_path, runtime.vae_dtype, runtime.device, self._disable_mmap,
            chunk_size=self.opts.vae_chunk_size, tiling=self.opts.vae_tiling,
        )  # fmt: skip

    def load_text_encoders(self, runtime: Runtime) -> list[torch.nn.Module | None]:
        """[Qwen2.5-VL, ByT5]. In fewer bits are the linear layers of the first."""
        from library.hunyuan_image_utils import load_encoders

        device = "cpu" if self.opts.text_encoder_cpu else runtime.device
        return load_encoders(
            self.opts.text_encoder, self.opts.byt5, runtime.weight_dtype, device, self._disable_mmap,
            form=self.text_form(runtime),
        )  # fmt: skip

    def load_denoiser(self, runtime: Runtime) -> torch.nn.Module:
        """On the device, or with block swap spread over device and main memory."""
        from library.hunyuan_image_utils import load_hunyuan_image

        form = "fp8_scaled" if runtime.denoiser_form == "fp8" else runtime.denoiser_form
        denoiser = load_hunyuan_image(
            self._denoiser_path, runtime.weight_dtype if form else runtime.denoiser_dtype, self.loading_place(runtime),
            self._disable_mmap, form=form, by_rows=self.config[PrecisionOptions].multiplies_fp8,
            transform=self.transform,
        )  # fmt: skip
        return self.placed(denoiser, runtime)

    def scale_latents(self, latents: torch.Tensor) -> torch.Tensor:
        from library.hunyuan_image_vae import LATENT_SCALING_FACTOR

        return latents * LATENT_SCALING_FACTOR

    def objective(self) -> Objective:
        """Velocity; with sigma_scaled the clean latents, weighted by `--weighting_scheme`."""
        from library.training.objective import FlowMatchingObjective

        is_scaled = self.opts.model_prediction_type == "sigma_scaled"
        target = "latents" if is_scaled else "velocity"
        return FlowMatchingObjective(
            self.config[TimestepOptions], self.config[NoiseOptions], target=target, weigh=is_scaled
        )

    @course
    def predict(
        self, models: Models, sample: NoisyLatents, conditioning: Conditioning, batch: Batch, **inputs: object
    ) -> DiTOutput:
        from library.hunyuan_image_train_utils import predict_velocity
        from library.training.objective import clean_estimate
        from library.training.run import DiTOutput

        prediction = yield from predict_velocity.course(
            models.denoiser, sample.noisy_latents, sample.timesteps, conditioning, guidance=self.opts.guidance_scale,
            **inputs,
        )  # fmt: skip
        prediction, extra = self.with_side_outputs(prediction)
        if self.opts.model_prediction_type == "sigma_scaled":
            prediction = clean_estimate(prediction.float(), sample.noisy_latents, sample.sigmas)
        return DiTOutput(prediction, sample.target, extra)

    def needs_negative(self, prompt: SamplePrompt) -> bool:
        """Distilled models follow their embedded guidance alone."""
        return not self.is_distilled and super().needs_negative(prompt)

    def metadata(self) -> dict[str, Plain]:
        times = self.config[TimestepOptions]
        more = {"ss_guidance_scale": self.opts.guidance_scale} if self.is_distilled else {}
        return {
            "ss_base_model_version": "hunyuan-image-2.1",
            "ss_logit_mean": times.logit_mean,
            "ss_logit_std": times.logit_std,
            "ss_mode_scale": times.mode_scale,
            "ss_timestep_sampling": times.timestep_sampling,
            "ss_sigmoid_scale": times.sigmoid_scale,
            "ss_model_prediction_type": self.opts.model_prediction_type,
            "ss_discrete_flow_shift": times.discrete_flow_shift,
            **more,
        }

    def modelspec(self) -> dict[str, str | None]:
        """No prediction_type: readers know flow models by their architecture."""
        return {
            "architecture": "hunyuan-image-2.1",
            "implementation": "https://github.com/Tencent-Hunyuan/HunyuanImage-2.1",
        }
