"""FramePack and F1: options and wiring. Numerics are in framepack_train_utils, loading in framepack_utils, sections in
components/framepack_sections, text and caches in strategy_framepack."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from library.core.errors import ConfigError, Problems
from library.core.options import Ignored, option, shortened, without_effect
from library.families.framepack import FAMILY
from library.training.wiring.video_llama_clip import LlamaClipFamily, LlamaClipOptions

if TYPE_CHECKING:
    import torch

    from library.checkpoints.denoisers import DenoiserInfo
    from library.dataset.batch import Batch
    from library.dataset.latent_cache import LatentCache
    from library.dataset.strategies import Conditioning
    from library.generation.pipeline import PicturePipeline
    from library.training.accelerator_setup import Runtime
    from library.training.objective import NoisyLatents
    from library.training.protocols import Plain
    from library.training.run import DiTOutput, Models
    from library.training.sampling_prompts import SamplePrompt

logger = logging.getLogger(__name__)

ONE_FRAME = "default"
"""settings of a single frame where a prompt has none"""


@dataclass(frozen=True, kw_only=True)
class FramePackOptions(LlamaClipOptions):
    """FramePack"""

    image_encoder: str | None = option(
        None, help="file or folder of the SigLIP image encoder, which reads the picture that a clip begins with"
    )
    f1: bool = option(
        False, help="sections see those before them, as FramePack-F1 makes clips: in caches and in samples"
    )
    latent_window_size: int = option(9, help="latent frames of a section in samples", least=1)
    one_frame: bool = option(
        False, help="make single frames of the sample prompts, as --of says; pictures are learned so in any case"
    )
    one_frame_no_2x: bool = option(False, help="learn single frames without the frames of zeros at half the resolution")
    one_frame_no_4x: bool = option(
        False, help="learn single frames without the frames of zeros at a quarter of the resolution"
    )
    bulk_decode: bool = option(False, help="decode all sections of a sample at once: more memory, nothing is faded")


class FramePackFamily(LlamaClipFamily):
    """The wiring of FramePack."""

    record = FAMILY
    denoiser_kinds = ("framepack",)
    denoiser_writer = "library.framepack_utils:save_framepack"
    options = FramePackOptions
    vae_kind = "vae_hunyuan_video"
    text_strategy = "library.strategy_framepack:FramePack"
    part_options = {
        **LlamaClipFamily.part_options,
        "vae": LlamaClipFamily.part_options["vae"]
        | {"image_encoder", "f1", "one_frame", "one_frame_no_2x", "one_frame_no_4x"},
    }

    def part_files(self, part: str) -> Mapping[str, str | None]:
        files = super().part_files(part)
        return {**files, "image_encoder": self.opts.image_encoder} if part == "vae" else files

    def _slot_problems(self, part: str) -> list[str]:
        from library.checkpoints.kinds import check_slot

        found = super()._slot_problems(part)
        encoder = check_slot(self.opts.image_encoder, "image_encoder", {"siglip"}) if part == "vae" else None
        return [*found, encoder] if encoder else found

    def _size_problems(self) -> list[str]:
        """Sizes of the files against each other; headers only."""
        from library.framepack_utils import fitting_problems

        text = {} if self.lacks("text_encoders") else self.part_files("text_encoders")
        pictures = {} if self.lacks("vae") else self.part_files("vae")
        return fitting_problems(
            lambda: self._denoiser_info.params, **text, **pictures, model=self._denoiser_path,
            blocks_to_swap=self.blocks_to_swap,
        )  # fmt: skip

    def idle(self) -> list[Ignored]:
        reads = "guidance_scale" not in self.config.explicit or self._denoiser_info.params.guidance_embeds
        return [
            *super().idle(),
            *without_effect([] if reads else ["guidance_scale"], "this file is of a model without embedded guidance"),
        ]

    @property
    def num_blocks(self) -> int:
        params = self._denoiser_info.params
        return params.num_layers + params.num_single_layers

    @cached_property
    def _denoiser_info(self) -> DenoiserInfo:
        from library.framepack_utils import inspect_framepack

        return inspect_framepack(self._denoiser_path)

    def latents_caching(self) -> LatentCache:
        from library.checkpoints.identity import combined_identity, model_identity
        from library.strategy_framepack import FramePackLatentEncoder

        opts = self.opts
        encoder = FramePackLatentEncoder(
            is_f1=opts.f1, middle=not opts.one_frame_no_2x, far=not opts.one_frame_no_4x,
            image_width=self._image_width, tile_size=opts.tile_size,
        )  # fmt: skip
        cache = self.latent_cache(encoder, self._vae_path)
        if opts.image_encoder and cache.model_identity:  # of both files, where they are given
            cache.model_identity = combined_identity([cache.model_identity, model_identity(opts.image_encoder)])
        return cache

    @property
    def _image_width(self) -> int:
        """Of the states of the image encoder, by its file or by the denoiser's."""
        from library.components.siglip_utils import inspect_siglip

        if self.opts.image_encoder:
            return inspect_siglip(self.opts.image_encoder).hidden_size
        if self._denoiser_path is None:
            return 0  # of a tool that makes no latents
        return self._denoiser_info.params.image_proj_dim

    def load_parts(self, runtime: Runtime, beside: str) -> dict[str, torch.nn.Module]:
        """The image encoder beside the VAE, in the VAE's type."""
        if beside != "vae":
            return {}
        from library.components.siglip_utils import load_siglip
        from library.strategy_framepack import IMAGE_ENCODER

        dtype = self.vae_dtype(runtime)
        return {IMAGE_ENCODER: load_siglip(self.opts.image_encoder, dtype, runtime.device, self._disable_mmap)}

    def load_denoiser(self, runtime: Runtime) -> torch.nn.Module:
        from library.framepack_utils import load_framepack

        return self.placed_denoiser(load_framepack, self._denoiser_path, runtime)

    def scale_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """They are cached with the scale; a single frame is a clip of one frame."""
        return latents[:, :, None] if latents.ndim == 4 else latents

    def predict(
        self, models: Models, sample: NoisyLatents, conditioning: Conditioning, batch: Batch, **inputs: object
    ) -> DiTOutput:
        from library.framepack_train_utils import predict_velocity
        from library.training.run import DiTOutput

        prediction = predict_velocity(
            models.denoiser, sample.noisy_latents, sample.timesteps, conditioning, batch.conditions,
            guidance=self.opts.guidance_scale, **inputs,
        )  # fmt: skip
        prediction, extra = self.with_side_outputs(prediction)
        return DiTOutput(prediction, sample.target, extra)

    # -- samples -------------------------------------------------------------------------------------------------------

    def pipeline(self, models: Models) -> PicturePipeline:
        from library.strategy_framepack import IMAGE_ENCODER

        pipeline = super().pipeline(models)
        return dataclasses.replace(pipeline, image_encoder=models.extra.get(IMAGE_ENCODER))

    def pipeline_settings(self) -> Mapping[str, object]:
        opts = self.opts
        return {"window": opts.latent_window_size, "is_f1": opts.f1, "bulk_decode": opts.bulk_decode}

    def prompt_rows(self, text: str) -> list[str]:
        from library.components.framepack_sections import section_texts

        return list(section_texts(text).values())

    def first_frames(self, text: str) -> list[str]:
        """One for each section."""
        return self.prompt_rows(text)

    def sample_defaults(self, prompt: SamplePrompt) -> SamplePrompt:
        """With the frames of whole sections. ConfigError for a clip that is too short for one, and for settings of a
        single frame that cannot be read."""
        from library.components.framepack_sections import parse_one_frame, section_texts, usable_frames

        complete = super().sample_defaults(prompt)
        if self.opts.one_frame and complete.one_frame is None:
            complete = dataclasses.replace(complete, one_frame=ONE_FRAME)
        problems, window = Problems(), self.opts.latent_window_size
        if complete.one_frame is not None:
            controls = len(complete.control_image_path or ())
            problems.attempt(lambda: parse_one_frame(complete.one_frame, controls, window, "--of"))
            complete = dataclasses.replace(complete, frame_count=1)
        elif complete.frame_count > 1:
            used = problems.attempt(lambda: usable_frames(complete.frame_count, window))
            complete = dataclasses.replace(complete, frame_count=used)
        for text in filter(None, (complete.prompt, complete.image_path)):
            problems.attempt(lambda text=text: section_texts(text))
        if problems.messages:
            told = shortened(prompt.prompt)
            raise ConfigError([f"the sample prompt '{told}': {problem}" for problem in problems.messages])
        self._tell_without_picture(complete)
        return complete

    def _tell_without_picture(self, prompt: SamplePrompt) -> None:
        """Once of each prompt."""
        if prompt.frame_count > 1 and not prompt.image_path and prompt.prompt not in self._told:
            self._told.add(prompt.prompt)
            logger.warning(
                "the sample prompt '%s' has no picture (--i): the clip begins with nothing, and the model makes clips of"
                " a first picture", shortened(prompt.prompt),
            )  # fmt: skip

    @cached_property
    def _told(self) -> set[str]:
        return set()

    # -- what files say ------------------------------------------------------------------------------------------------

    def _notices(self) -> list[str]:
        line = "a video is learned in sections, a picture as a single frame beside its control pictures"
        return [*super()._notices(), line]

    def metadata(self) -> dict[str, Plain]:
        return {"ss_base_model_version": "framepack", **self.timestep_metadata()}

    def modelspec(self) -> dict[str, str | None]:
        """No prediction_type: readers know flow models by their architecture."""
        return {"architecture": "framepack", "implementation": "https://github.com/lllyasviel/FramePack"}
