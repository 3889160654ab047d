"""Its video script: models are made from seeds, and files stand only for checks."""

from __future__ import annotations

from dataclasses import dataclass

from library.core.errors import ConfigError
from library.core.options import option
from library.dataset.strategies import StrategySet
from library.dataset.text_cache_io import TEXT_LAYOUTS
from library.generation.adapter_files import MergedModelOptions
from library.generation.requests import SessionOptions
from library.generation.video_options import (
    CompileOptions,
    LengthOptions,
    StartOptions,
    StepGuidanceOptions,
    VideoAdapterOptions,
    VideoModelOptions,
)
from library.generation.video_requests import VIDEO_LINES
from library.generation.video_script import VideoScript
from library.safetensors_utils import save_file_atomic
from library.training.option_groups import ConsoleOptions
from tests.toy_video.family import ToyTextEncoding, ToyTokenize
from tests.toy_video.models import ToyTextEncoder, ToyVideoDit, ToyVideoVae, seeded
from tests.toy_video.pipeline import ToyVideoPipeline


@dataclass(frozen=True, kw_only=True)
class ToyModelOptions(VideoModelOptions):
    """Models"""

    dit_dtype: str = option("float32", help="number format")

    def __post_init__(self) -> None:
        if problems := self.model_problems():
            raise ConfigError(problems)


@dataclass(frozen=True, kw_only=True)
class ToyClipOptions(LengthOptions):
    """Videos"""

    video_length: int | None = option(5, help="frames")
    infer_steps: int | None = option(2, help="steps")

    def __post_init__(self) -> None:
        if problems := self.clip_problems():
            raise ConfigError(problems)


class ToyScript(VideoScript):
    family, title = "toy_video", "Toy video"
    pictures, models = ToyClipOptions, ToyModelOptions
    groups = (
        ToyModelOptions, CompileOptions, VideoAdapterOptions, MergedModelOptions, ToyClipOptions, StartOptions,
        StepGuidanceOptions, SessionOptions, ConsoleOptions,
    )  # fmt: skip
    line_options = VIDEO_LINES
    vae_kinds = frozenset()
    encoders_made = 0

    def slots(self, config):
        return []

    def _file_problems(self, config):
        return [problem for problem in self.extra_file_problems(config) if problem]

    def _needs_vae(self, config):
        return True

    def load_encoders(self, config):
        type(self).encoders_made += 1
        return [seeded(ToyTextEncoder(), 2)]

    def strategies(self, config):
        return StrategySet(ToyTokenize(), ToyTextEncoding(), text_layout=TEXT_LAYOUTS[self.family])

    def load_vae(self, config):
        return seeded(ToyVideoVae(), 1)

    def save_denoiser(self, denoiser, target, dtype):
        save_file_atomic({key: tensor.to(dtype) for key, tensor in denoiser.state_dict().items()}, target)

    def load_denoiser(self, config, dtype, device, transform):
        return seeded(ToyVideoDit(), 3).to(device, dtype)

    def pipeline(self, config, denoiser, vae):
        return ToyVideoPipeline(denoiser, vae, split_uncond=config[ToyClipOptions].split_uncond)
