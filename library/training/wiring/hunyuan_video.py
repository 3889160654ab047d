"""HunyuanVideo and SkyReels V1: options and wiring. Numerics are in hunyuan_video_train_utils, loading in
hunyuan_video_utils and components/hunyuan_vae_utils, text in strategy_hunyuan_video."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from library.core.errors import ConfigError, Problems
from library.core.options import Ignored, option, without_effect
from library.families.hunyuan_video import FAMILY
from library.training.option_groups import MemoryOptions, ModelOptions
from library.training.wiring.base import part_of, tokenizer_problems
from library.training.wiring.video import VideoFamily
from library.training.wiring.video_options import VideoOptions, dtype_name

if TYPE_CHECKING:
    import torch

    from library.components.hunyuan_stream_utils import StreamInfo
    from library.dataset.batch import Batch
    from library.dataset.latent_cache import LatentCache
    from library.dataset.strategies import Conditioning, StrategySet
    from library.strategy_hunyuan_video import HunyuanVideoTokenizeStrategy
    from library.training.accelerator_setup import Runtime
    from library.training.objective import NoisyLatents
    from library.training.protocols import Plain
    from library.training.run import DiTOutput, Models
    from library.training.sampling_prompts import SamplePrompt

logger = logging.getLogger(__name__)

_NO_PICTURES = "the denoiser is a model from text to video, which is shown none"
_FILES = {"text_encoder1": "llama", "text_encoder2": "clip_l"}


@dataclass(frozen=True, kw_only=True)
class HunyuanVideoOptions(VideoOptions):
    """HunyuanVideo"""

    text_encoder1: str | None = option(None, help="file or folder of LLaMA 3, the language part of llava-llama-3-8b")
    text_encoder2: str | None = option(None, help="file or folder of the CLIP-L text encoder")
    text_encoder1_tokenizer: str | None = option(None, help="folder of the LLaMA tokenizer")
    text_encoder2_tokenizer: str | None = option(None, help="folder of the CLIP tokenizer")
    text_encoder_dtype: str | None = option(
        None, help="number format of the text encoders: fp32, fp16 or bf16; that of --mixed_precision when not given",
        convert=dtype_name,
    )
    fp8_llm: bool = option(False, help="keep the matrices of LLaMA in 8 bits")
    dit_in_channels: int | None = option(
        None, help="input channels that the denoiser must have: 16 from text to video, 32 from image to video; those of"
        " its file when not given"
    )  # fmt: skip
    guidance_unscaled: bool = option(
        False, help="give --guidance_scale to the model without the factor 1000 of sampling, as musubi-tuner does"
    )
    vae_chunk_size: int | None = option(
        None, help="frames that convolutions of the VAE compute at once: less memory, equal results; all when not given"
    )
    vae_tiling: bool = option(
        False, help="let the VAE compute frames larger than 256 pixels in tiles: little memory, close results"
    )
    vae_spatial_tile_sample_min_size: int | None = option(
        None, help="pixels of a side of these tiles, a multiple of 8; asks for tiles too"
    )
    img_in_txt_in_offloading: bool = option(
        False, help="keep the layers that read latents and text in main memory between the forwards"
    )

    def __post_init__(self) -> None:
        problems = Problems()
        problems.attempt(super().__post_init__)
        if self.vae_chunk_size is not None and self.vae_chunk_size < 1:
            problems.add(f"--vae_chunk_size is {self.vae_chunk_size}; needed: 1 or more, e.g. 32")
        size = self.vae_spatial_tile_sample_min_size
        if size is not None and (size < 32 or size % 8):
            problems.add(
                f"--vae_spatial_tile_sample_min_size is {size}; needed: a multiple of 8 and at least 32, e.g. 256"
            )
        if self.text_encoder_dtype == "fp8":
            problems.add("--text_encoder_dtype is fp8; needed: fp32, fp16 or bf16 (--fp8_llm keeps LLaMA in 8 bits)")
        problems.raise_if_any()

    @property
    def tile_size(self) -> int | None:
        """Pixels of a side of the tiles in which the VAE computes; None = it does not."""
        return self.vae_spatial_tile_sample_min_size or (256 if self.vae_tiling else None)


class HunyuanVideoFamily(VideoFamily):
    """The wiring of HunyuanVideo."""

    record = FAMILY
    denoiser_kinds = ("hunyuan_video",)
    denoiser_writer = "library.hunyuan_video_utils:save_hunyuan_video"
    options = HunyuanVideoOptions
    part_options = {
        "vae": frozenset({"vae_dtype", "vae_chunk_size", "vae_tiling", "vae_spatial_tile_sample_min_size"}),
        "text_encoders": frozenset(
            {
                "text_encoder1", "text_encoder2", "text_encoder1_tokenizer", "text_encoder2_tokenizer",
                "text_encoder_dtype", "fp8_llm",
            }
        ),
    }

    tool_defaults = {"latents": {"vae_dtype": "fp16"}, "text": {"text_encoder_dtype": "fp16"}}

    def part_files(self, part: str) -> Mapping[str, str | None]:
        if part == "vae":
            return {"vae": self._vae_path}
        clip = self.opts.text_encoder2
        return {
            "text_encoder1": self.opts.text_encoder1,
            "text_encoder2": None if clip is None else str(part_of(clip, "text_encoder_2")),
        }

    def _slot_problems(self, part: str) -> list[str]:
        from library.checkpoints.kinds import check_slot

        kinds = {"vae": "vae_hunyuan_video"} if part == "vae" else _FILES
        files = self.part_files(part)
        found = [check_slot(files[name], name, {kind}, with_pickles=True) for name, kind in kinds.items()]
        return [problem for problem in found if problem]

    def _tokenizer_problems(self) -> list[str]:
        """Tokenizers that cannot be found or read, or whose ids the models do not have."""
        from library.components.llm_encoder_utils import inspect_llama
        from library.components.text_encoder_utils import inspect_clip_l

        first, second = self.part_files("text_encoders").values()
        return [
            *tokenizer_problems(
                lambda: self._tokenize.llama, lambda: inspect_llama(first)["vocab_size"], "LLaMA",
                "--text_encoder1_tokenizer", f"--text_encoder1 {first}",
            ),
            *tokenizer_problems(
                lambda: self._tokenize.clip_l, lambda: inspect_clip_l(second)["vocab"], "CLIP",
                "--text_encoder2_tokenizer", f"--text_encoder2 {second}",
            ),
        ]  # fmt: skip

    @cached_property
    def _tokenize(self) -> HunyuanVideoTokenizeStrategy:
        from library.strategy_hunyuan_video import HunyuanVideoTokenizeStrategy

        return HunyuanVideoTokenizeStrategy(
            self.config[ModelOptions].tokenizer_cache_dir, self.opts.text_encoder1_tokenizer,
            self.opts.text_encoder2_tokenizer, self.opts.text_encoder1,
        )  # fmt: skip

    def _size_problems(self) -> list[str]:
        """Sizes of the files against each other and against --dit_in_channels; headers only."""
        from library.hunyuan_video_utils import fitting_problems

        text = {} if self.lacks("text_encoders") else self.part_files("text_encoders")
        return fitting_problems(
            lambda: self._denoiser_info.params, **text, vae=None if self.lacks("vae") else self._vae_path,
            model=self._denoiser_path, in_channels=self.opts.dit_in_channels,
            blocks_to_swap=self.config[MemoryOptions].blocks_to_swap or 0,
        )  # fmt: skip

    def _notices(self) -> list[str]:
        lines, params = super()._notices(), self._denoiser_info.params
        if params.guidance_embed and not self.opts.guidance_unscaled:
            lines.append(
                "the guidance reaches the network times 1000, as when sampling (musubi-tuner trains without the factor:"
                " --guidance_unscaled)"
            )
        if params.shown_channels:
            lines.append("a model from image to video: it is shown the latents of the first frame of each clip")
        return lines

    def idle(self) -> list[Ignored]:
        given = [name for name in ("guidance_scale", "guidance_unscaled") if name in self.config.explicit]
        unread = [] if self._denoiser_info.params.guidance_embed else given
        return without_effect(unread, "only distilled models have embedded guidance, and this file is none")

    @cached_property
    def _denoiser_info(self) -> StreamInfo:
        from library.hunyuan_video_utils import inspect_hunyuan_video

        return inspect_hunyuan_video(self._denoiser_path)

    def strategies(self, trained: Sequence[bool] = ()) -> StrategySet:
        from library import strategy_hunyuan_video
        from library.dataset.strategies import StrategySet
        from library.dataset.text_cache_io import TEXT_LAYOUTS

        files = [] if self.lacks("text_encoders") else list(self.part_files("text_encoders").values())
        text = self.text_cache(trained, files)
        tokenize = None if self.lacks("text_encoders") else self._tokenize
        encoding = strategy_hunyuan_video.HunyuanVideoTextEncodingStrategy()
        return StrategySet(tokenize, encoding, self.latents_caching(), text, TEXT_LAYOUTS[self.name])

    def latents_caching(self) -> LatentCache:
        from library.strategy_hunyuan_video import HunyuanVideoLatentEncoder

        encoder = HunyuanVideoLatentEncoder()
        encoder.tile_size = self.opts.tile_size
        return self.latent_cache(encoder, self._vae_path)

    @property
    def _disable_mmap(self) -> bool:
        return self.config[ModelOptions].disable_mmap_load_safetensors

    def load_vae(self, runtime: Runtime) -> torch.nn.Module:
        from library.components.hunyuan_vae_utils import load_hunyuan_vae

        return load_hunyuan_vae(
            self._vae_path, self.vae_dtype(runtime), runtime.device, self._disable_mmap,
            chunk_frames=self.opts.vae_chunk_size, tile_size=self.opts.tile_size,
        )  # fmt: skip

    def load_text_encoders(self, runtime: Runtime) -> list[torch.nn.Module | None]:
        """[LLaMA, CLIP-L]. In 8 bits are the linear layers of the first, which is read in the compute type."""
        from library.hunyuan_video_utils import load_encoders
        from library.training.accelerator_setup import DTYPES

        wanted = self.opts.text_encoder_dtype
        dtype = runtime.weight_dtype if wanted is None else DTYPES["no" if wanted == "fp32" else wanted]
        return load_encoders(
            *self.part_files("text_encoders").values(), dtype, runtime.device, self._disable_mmap,
            fp8_llm=self.opts.fp8_llm,
        )  # fmt: skip

    def load_denoiser(self, runtime: Runtime) -> torch.nn.Module:
        """On the device, or with block swap spread over device and main memory."""
        from library.hunyuan_video_utils import load_hunyuan_video

        swap = self.config[MemoryOptions].blocks_to_swap or 0
        device = "cpu" if swap else runtime.device
        scaled = self.opts.fp8_scaled
        denoiser = load_hunyuan_video(
            self._denoiser_path, runtime.weight_dtype if scaled else runtime.denoiser_dtype, device, self._disable_mmap,
            fp8_scaled=scaled, transform=self.transform,
        )  # fmt: skip
        denoiser.embedders_wait = self.opts.img_in_txt_in_offloading
        if swap:
            denoiser.enable_block_swap(swap, runtime.device)
            denoiser.move_to_device_except_swap_blocks(runtime.device)
        return denoiser

    def scale_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """A picture is a clip of one frame."""
        from library.components.hunyuan_vae_models import scaled_latents

        return scaled_latents(latents)

    def predict(
        self, models: Models, sample: NoisyLatents, conditioning: Conditioning, batch: Batch, **inputs: object
    ) -> DiTOutput:
        from library.hunyuan_video_train_utils import predict_velocity
        from library.training.run import DiTOutput

        if self.opts.guidance_unscaled:
            inputs = {**inputs, "times_guidance": 1.0}
        prediction = predict_velocity(
            models.denoiser, sample.noisy_latents, sample.timesteps, conditioning, guidance=self.opts.guidance_scale,
            first_frame=sample.latents[:, :, :1], **inputs,
        )  # fmt: skip
        prediction, extra = self.with_side_outputs(prediction)
        return DiTOutput(prediction, sample.target, extra)

    def sample_defaults(self, prompt: SamplePrompt) -> SamplePrompt:
        is_shown = bool(self._denoiser_info.params.shown_channels)
        if is_shown and not prompt.image_path:
            raise ConfigError(
                f"the sample prompt '{prompt.prompt}' has no picture (--i), and the denoiser is a model from image to"
                " video; needed: the picture of the first frame"
            )
        if prompt.image_path and not is_shown:
            logger.warning("the picture of the sample prompt '%s' is not used: %s", prompt.prompt, _NO_PICTURES)
        return super().sample_defaults(prompt)

    def metadata(self) -> dict[str, Plain]:
        return {"ss_base_model_version": "hunyuan_video", **self.timestep_metadata()}

    def modelspec(self) -> dict[str, str | None]:
        """No prediction_type: readers know flow models by their architecture."""
        return {
            "architecture": "hunyuan-video",
            "implementation": "https://github.com/Tencent-Hunyuan/HunyuanVideo",
        }
