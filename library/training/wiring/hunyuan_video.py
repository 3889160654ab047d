"""HunyuanVideo and SkyReels V1: options and wiring. Numerics are in hunyuan_video_train_utils, loading in
hunyuan_video_utils and components/hunyuan_vae_utils, text in strategy_hunyuan_video."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from library.core.courses import course
from library.core.errors import ConfigError
from library.core.options import Ignored, option, shortened, without_effect
from library.dataset.text_padding import PaddedText
from library.families.hunyuan_video import FAMILY
from library.training.wiring.video_llama_clip import LlamaClipFamily, LlamaClipOptions

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from library.checkpoints.denoisers import DenoiserInfo
    from library.dataset.batch import Batch
    from library.dataset.latent_cache import LatentCache
    from library.dataset.strategies import Conditioning
    from library.training.accelerator_setup import Runtime
    from library.training.objective import NoisyLatents
    from library.training.protocols import Plain
    from library.training.run import DiTOutput, Models
    from library.training.sampling_prompts import SamplePrompt

logger = logging.getLogger(__name__)

_NO_PICTURES = "the denoiser is a model from text to video, which is shown none"


@dataclass(frozen=True, kw_only=True)
class HunyuanVideoOptions(LlamaClipOptions):
    """HunyuanVideo"""

    dit_in_channels: int | None = option(
        None, help="input channels that the denoiser must have: 16 from text to video, 32 from image to video; those of"
        " its file when not given"
    )  # fmt: skip
    guidance_unscaled: bool = option(
        False, help="give --guidance_scale to the model without the factor 1000 of sampling, as musubi-tuner does"
    )
    img_in_txt_in_offloading: bool = option(
        False, help="keep the layers that read latents and text in main memory between the forwards"
    )


class HunyuanVideoFamily(LlamaClipFamily):
    """The wiring of HunyuanVideo."""

    record = FAMILY
    denoiser_kinds = ("hunyuan_video",)
    reads_pickles = True
    denoiser_writer = "library.hunyuan_video_utils:save_hunyuan_video"
    options = HunyuanVideoOptions
    embedders_wait = True
    vae_kind = "vae_hunyuan_video"
    text_strategy = "library.strategy_hunyuan_video:HunyuanVideo"

    def _size_problems(self) -> list[str]:
        """Sizes of the files against each other and against --dit_in_channels; headers only."""
        from library.hunyuan_video_utils import fitting_problems

        text = {} if self.lacks("text_encoders") else self.part_files("text_encoders")
        return fitting_problems(
            lambda: self._denoiser_info.params, **text, vae=None if self.lacks("vae") else self._vae_path,
            model=self._denoiser_path, in_channels=self.opts.dit_in_channels,
            blocks_to_swap=self.blocks_to_swap,
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
        reason = "only distilled models have embedded guidance, and this file is none"
        return [*super().idle(), *without_effect(unread, reason)]

    @property
    def num_blocks(self) -> int:
        params = self._denoiser_info.params
        return params.depth + params.depth_single

    @cached_property
    def _denoiser_info(self) -> DenoiserInfo:
        from library.hunyuan_video_utils import inspect_hunyuan_video

        return inspect_hunyuan_video(self._denoiser_path)

    def latents_caching(self) -> LatentCache:
        from library.strategy_hunyuan_video import HunyuanVideoLatentEncoder

        encoder = HunyuanVideoLatentEncoder()
        encoder.tile_size = self.opts.tile_size
        return self.latent_cache(encoder, self._vae_path)

    def load_denoiser(self, runtime: Runtime) -> torch.nn.Module:
        from library.hunyuan_video_utils import load_hunyuan_video

        denoiser = self.placed_denoiser(load_hunyuan_video, self._denoiser_path, runtime)
        denoiser.embedders_wait = self.opts.img_in_txt_in_offloading
        return denoiser

    def scale_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """A picture is a clip of one frame."""
        from library.components.hunyuan_vae_models import scaled_latents

        return scaled_latents(latents)

    @property
    def padded_texts(self) -> Sequence[PaddedText]:
        return (PaddedText("llm_mask", ("llm",)),)

    @course
    def predict(
        self, models: Models, sample: NoisyLatents, conditioning: Conditioning, batch: Batch, **inputs: object
    ) -> DiTOutput:
        from library.hunyuan_video_train_utils import predict_velocity
        from library.training.run import DiTOutput

        if self.opts.guidance_unscaled:
            inputs = {**inputs, "guidance_factor": 1.0}
        prediction = yield from predict_velocity.course(
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
        if prompt.image_path and not is_shown and prompt.prompt not in self._told:
            self._told.add(prompt.prompt)
            told = shortened(prompt.prompt)
            logger.warning("the picture of the sample prompt '%s' is not used: %s", told, _NO_PICTURES)
        return super().sample_defaults(prompt)

    @cached_property
    def _told(self) -> set[str]:
        """Prompts of which it is told that their picture is not used."""
        return set()

    def metadata(self) -> dict[str, Plain]:
        return {"ss_base_model_version": "hunyuan_video", **self.timestep_metadata()}

    def modelspec(self) -> dict[str, str | None]:
        """No prediction_type: readers know flow models by their architecture."""
        return {
            "architecture": "hunyuan-video",
            "implementation": "https://github.com/Tencent-Hunyuan/HunyuanVideo",
        }
