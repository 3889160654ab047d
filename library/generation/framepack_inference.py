"""The video script of FramePack: what its files must be, and how they are loaded."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from library.components import framepack_sections as sections
from library.core.errors import AtelierError
from library.core.options import Config
from library.generation.framepack_options import (
    GROUPS,
    LINE_OPTIONS,
    FramePackClipOptions,
    FramePackModelOptions,
    MagCacheOptions,
    OneFrameOptions,
)
from library.generation.framepack_requests import FramePackRequest
from library.generation.llama_clip_script import LlamaClipScript
from library.generation.video_requests import VideoRequest

if TYPE_CHECKING:
    import torch
    from torch import nn

    from library.checkpoints.loading import Transform
    from library.dataset.strategies import StrategySet
    from library.framepack_models import FramePackParams
    from library.generation.pipeline import PictureMaker
    from library.generation.video_pipeline import VideoPipeline

logger = logging.getLogger(__name__)


class FramePackScript(LlamaClipScript):
    family = "framepack"
    title = "FramePack"
    pictures = FramePackClipOptions
    models = FramePackModelOptions
    groups = GROUPS
    line_options = LINE_OPTIONS
    vae_kinds = frozenset({"vae_hunyuan_video"})
    texts = {"flow-shift": "flow_shift", "guidance": "embedded_guidance_scale"}
    request_class = FramePackRequest
    request_groups = (*LlamaClipScript.request_groups, OneFrameOptions, MagCacheOptions)
    needs = {
        **LlamaClipScript.needs, "control_image_path": "one_frame_inference",
        "one_frame_auto_resize": "control_image_path", "rope_scaling_factor": "rope_scaling_timestep_threshold",
        **{f"magcache_{name}": "magcache_mag_ratios" for name in ("retention_ratio", "threshold", "k")},
    }  # fmt: skip

    # -- loading -------------------------------------------------------------------------------------------------------

    def slots(self, config: Config) -> list[tuple[str, set[str]]]:
        return [("dit", {"framepack"}), *self.encoder_slots, ("image_encoder", {"siglip"})]

    def strategies(self, config: Config) -> StrategySet:
        from library.dataset.strategies import StrategySet
        from library.dataset.text_cache_io import TEXT_LAYOUTS
        from library.strategy_framepack import FramePackTextEncodingStrategy, FramePackTokenizeStrategy
        from library.strategy_llama_clip import system_head

        told = config[self.models].custom_system_prompt
        head = {} if told is None else {"head": system_head(told)}
        tokenize = FramePackTokenizeStrategy(*self.tokenizer_files(config), **head)
        return StrategySet(tokenize, FramePackTextEncodingStrategy(), text_layout=TEXT_LAYOUTS[self.family])

    def load_denoiser(
        self, config: Config, dtype: torch.dtype | None, device: torch.device, transform: Transform | None
    ) -> nn.Module:
        from library.framepack_utils import load_framepack

        options = config[self.models]
        return load_framepack(
            options.dit, dtype, device, self.disable_mmap(config), form=options.form, by_rows=options.multiplies_fp8,
            transform=transform,
        )  # fmt: skip

    def save_denoiser(self, denoiser: Any, target: str, dtype: torch.dtype | None) -> None:
        from library.framepack_utils import save_framepack

        save_framepack(denoiser, target, dtype)

    def pipeline(self, config: Config, denoiser: Any, vae: Any) -> VideoPipeline:
        from library.generation.framepack_pipeline import FramePackPipeline

        options = config[self.models]
        return FramePackPipeline(
            denoiser, vae, image_encoder=None if denoiser is None else self._load_image_encoder(config),
            split_uncond=config[self.pictures].split_uncond, window=options.latent_window_size, is_f1=options.f1,
            bulk_decode=options.bulk_decode, rope_scale=options.rope_scaling_factor,
            rope_threshold=options.rope_scaling_timestep_threshold,
        )  # fmt: skip

    def _load_image_encoder(self, config: Config) -> nn.Module:
        """On the CPU, where it waits."""
        import torch

        from library.components.siglip_utils import load_siglip

        dtype = torch.float32 if self.text_device(config).type == "cpu" else torch.float16
        return load_siglip(config[self.models].image_encoder, dtype, "cpu", self.disable_mmap(config))

    # -- requests ------------------------------------------------------------------------------------------------------

    def completed(self, request: FramePackRequest, maker: PictureMaker[VideoRequest]) -> FramePackRequest:
        """The number of frames follows from that of the sections."""
        window = maker.pipeline.window
        if request.one_frame is not None:
            frames, count = 1, None
            if request.takes_shape and request.control_image_paths:
                width, height = shape_of(request.control_image_paths[0], request.width, request.height)
                logger.info("the shape of the first control picture at this area: %dx%d", width, height)
                request = dataclasses.replace(request, width=width, height=height)
        else:
            count = sections.count_sections(seconds=request.seconds, sections=request.sections, window=window)
            tell_effects(request, count)
            frames = sections.frames_needed(window, count)
        return super().completed(
            dataclasses.replace(request, frames=frames, sections=count, magcache=request.own_magcache), maker
        )

    def named_files(self, request: FramePackRequest) -> Iterator[tuple[str, str]]:
        for name, path in super().named_files(request):
            yield from ((name, part) for part in section_paths(path)) if name == "image_path" else ((name, path),)

    def request_problems(self, config: Config, request: FramePackRequest) -> list[str]:
        """Notations that cannot be read."""
        found: list[str] = []
        if not self.is_without_prompts(config):
            window, controls = config[self.models].latent_window_size, len(request.control_image_paths)
            texts = (request.prompt, request.image_path or "")
            checks = [functools.partial(sections.section_texts, text) for text in texts]
            if request.one_frame is not None:
                checks.append(lambda: sections.parse_one_frame(request.one_frame, controls, window))
            for check in checks:
                try:
                    check()
                except AtelierError as error:
                    found.append(str(error))
            if request.one_frame is not None and request.video_path is not None:
                found.append(
                    "--video_path is given for a single frame (--one_frame_inference), which is made of noise alone;"
                    " leave one out"
                )
            if request.magcache is not None and request.sampler == "heun":
                found.append(
                    "--magcache_mag_ratios is given with the sampler heun, which asks the model twice in a step; steps"
                    " are left out by counting what it is asked: needed: another sampler, e.g. unipc"
                )
            if request.cfg_schedule is not None and request.magcache is not None:
                found.append(
                    "--cfg_schedule and --magcache_mag_ratios are both given; steps are left out by counting those of"
                    " each text, which a schedule interrupts: leave one out"
                )
        return found or super().request_problems(config, request)

    def latent_texts(self, request: FramePackRequest) -> dict[str, str]:
        told = super().latent_texts(request)
        return told if request.one_frame else {**told, "video_seconds": str(request.seconds)}

    # -- checks --------------------------------------------------------------------------------------------------------

    def fitting_problems(self, config: Config) -> list[str]:
        from library.framepack_utils import fitting_problems

        options = config[self.models]
        found = fitting_problems(
            lambda: self._params(config), **dict(zip(("text_encoder1", "text_encoder2"), self.encoder_files(config))),
            image_encoder=options.image_encoder, vae=options.vae, model=options.dit,
            blocks_to_swap=options.blocks_to_swap,
        )  # fmt: skip
        return found + self.tokenizer_problems(config)

    def _params(self, config: Config) -> FramePackParams:
        from library.framepack_utils import inspect_framepack

        return inspect_framepack(config[self.models].dit).params

    def notices(self, config: Config) -> list[str]:
        found, options, single = super().notices(config), config[self.pictures], config[OneFrameOptions]
        if "embedded_cfg_scale" in config.explicit and not self._params(config).guidance_embeds:
            found.append("--embedded_cfg_scale has no effect: the file is of a model without embedded guidance")
        if options.end_image_path and (config[self.models].f1 or single.one_frame_inference is not None):
            found.append("--end_image_path has no effect with --f1 and --one_frame_inference")
        if options.latent_paddings and config[self.models].f1:
            found.append("--latent_paddings has no effect with --f1, which makes sections from the first to the last")
        if options.video_sections and options.fps != sections.FPS:
            found.append(
                "--video_sections counts sections whatever --fps is (known scripts make others where it is not 30)"
            )
        return found


def tell_effects(request: FramePackRequest, count: int) -> None:
    """Warn of what a clip of so many sections is made without: a first picture, and texts and pictures of sections
    that it does not have."""
    if not (request.image_path or request.video_path):
        logger.warning("there is no --image_path; the clip begins with zeros, in the place of a picture")
    for option, text in (("prompt", request.prompt), ("image_path", request.image_path or "")):
        if unused := sections.unused_texts(text, count):
            numbers = ", ".join(map(str, unused))
            logger.warning("--%s: what is given for %s has no effect, of %d sections", option, numbers, count)


def section_paths(text: str) -> list[str]:
    """The files of --image_path, with or without the notation of sections; the text itself where it cannot be read."""
    try:
        return list(dict.fromkeys(sections.section_texts(text).values()))
    except AtelierError:
        return [text]


def shape_of(path: str, width: int, height: int) -> tuple[int, int]:
    """(width, height) on the grid with about the area of these and the shape of a picture."""
    from library.dataset.area_buckets import own_bucket
    from library.generation.control_pictures import open_picture

    return own_bucket(open_picture(path).size, (width, height), FramePackScript.size_step)


SCRIPT = FramePackScript()
build_parser, main, run = SCRIPT.build_parser, SCRIPT.main, SCRIPT.run
