"""Its image script."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from library.core.options import option
from library.dataset.strategies import StrategySet
from library.dataset.text_cache_io import TEXT_LAYOUTS
from library.generation.adapters import LoadedAdapters
from library.generation.pipeline import PictureMaker
from library.generation.requests import COMMON_LINE_OPTIONS, SessionOptions, request_of
from library.generation.script import ImageScript
from library.generation.video_requests import VideoRequest
from library.training.option_groups import ConsoleOptions
from library.training.sampling_prompts import LineOption
from tests.toy_video.family import ToyTextEncoding, ToyTokenize
from tests.toy_video.models import ToyTextEncoder, ToyVideoDit, ToyVideoVae, seeded
from tests.toy_video.pipeline import ToyVideoPipeline


@dataclass(frozen=True, kw_only=True)
class ToyModelOptions:
    """Models"""

    num_adapters, merge_lora_weights = 0, False


@dataclass(frozen=True, kw_only=True)
class ToyPictureOptions:
    """Pictures"""

    prompt: str = option("a red cat", help="what is seen")
    width: int = option(32, help="width in pixels")
    height: int = option(32, help="height in pixels")
    frames: int = option(5, help="frames")
    steps: int = option(2, help="steps")
    seed: int | None = option(None, help="number that fixes the clip")
    output_dir: str = option(".", help="folder")

    @property
    def request(self) -> VideoRequest:
        return request_of(VideoRequest, self)


class ToyVideoScript(ImageScript[VideoRequest]):
    family, title = "toy_video", "Toy video"
    adapters, pictures = ToyModelOptions, ToyPictureOptions
    groups = (ToyModelOptions, ToyPictureOptions, SessionOptions, ConsoleOptions)
    line_options: Mapping[str, LineOption] = {**COMMON_LINE_OPTIONS, "f": LineOption("frames", int)}
    size_step = 16

    def check(self, config) -> None: ...

    def load(self, config) -> PictureMaker[VideoRequest]:
        denoiser, encoder = seeded(ToyVideoDit(), 3), seeded(ToyTextEncoder(), 2)
        pipeline = ToyVideoPipeline(denoiser, seeded(ToyVideoVae(), 1))
        strategies = StrategySet(ToyTokenize(), ToyTextEncoding(), text_layout=TEXT_LAYOUTS[self.family])
        cpu = torch.device("cpu")
        return PictureMaker(pipeline, strategies, [encoder], LoadedAdapters(denoiser, [encoder]), cpu, cpu)
