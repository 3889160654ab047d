"""What the video scripts share: models one after the other in memory, names and kinds of files, latents, V2V and I2V
files, checks. The script of a family says how its parts are loaded and what its pipeline is told."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import logging
import re
import time
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from library.core.errors import Problems, problems_of
from library.core.options import Config
from library.families.registry import record_of
from library.generation.adapter_files import MergedModelOptions
from library.generation.guidance_options import GuidanceOptions
from library.generation.latent_script import LatentScript
from library.generation.nag_options import NagOptions
from library.generation.recorded_requests import ENTRY
from library.generation.requests import SessionOptions
from library.generation.script import format_problems, free_path
from library.generation.speed_options import speed_of
from library.generation.step_options import SamplerStepOptions, StepOptions
from library.generation.video_options import (
    CompileOptions,
    LongClipOptions,
    StartOptions,
    StepGuidanceOptions,
    VideoAdapterOptions,
    VideoModelOptions,
)
from library.generation.video_requests import FRAME_OUTPUTS, LATENT_OUTPUTS, VideoRequest
from library.scripts.command_line import script_parser

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from torch import nn

    from library.checkpoints.loading import Transform
    from library.dataset.strategies import StrategySet
    from library.generation.pipeline import PictureMaker
    from library.generation.video_pipeline import VideoPipeline

logger = logging.getLogger(__name__)

NAMED_FILES: Mapping[str, str] = {
    "image_path": "image_path", "end_image_path": "end_image_path", "video_path": "video_path",
    "control_path": "control_path", "control_image_paths": "control_image_path",
    "control_mask_paths": "control_image_mask_path",
}  # fmt: skip
"""fields of a request that name files -> their option"""
LATENT_ENTRIES = frozenset({
    "seeds", "height", "width", "video_length", "infer_steps", "guidance_scale", "embedded_cfg_scale",
    "negative_prompt", "video_seconds",
})  # fmt: skip
"""entries of files of latents under the names of known scripts, which pictures have under others"""
GUIDED = (
    "negative_prompt", "split_uncond", "cfg_skip_mode", "cfg_apply_ratio", "slg_mode", "guidance_rescale",
)  # fmt: skip
"""options of the second forward of guidance"""


class VideoScript(LatentScript[VideoRequest]):
    """`pictures` is a ClipOptions, `models` a VideoModelOptions."""

    adapters = VideoAdapterOptions
    models: ClassVar[type[VideoModelOptions]]
    compilation: ClassVar[type[CompileOptions]] = CompileOptions
    request_class: ClassVar[type[VideoRequest]] = VideoRequest
    request_groups: ClassVar[tuple[type, ...]] = (
        StartOptions, LongClipOptions, StepGuidanceOptions, GuidanceOptions, StepOptions,
        SamplerStepOptions, NagOptions,
    )  # fmt: skip
    """groups that say fields of a request, where the script has them"""
    size_step = 16
    size_option = "video_size"
    option_names = {
        "steps": "infer_steps", "cfg_scale": "guidance_scale", "frames": "video_length", "pad_mode": "v2v_pad_mode",
        "one_frame": "one_frame_inference", "control_image_paths": "control_image_path",
        "control_mask_paths": "control_image_mask_path", "embedded_guidance_scale": "embedded_cfg_scale",
        "seconds": "video_seconds", "sections": "video_sections",
    }  # fmt: skip
    kind = "video"
    needs: ClassVar[Mapping[str, str]] = {
        "strength": "video_path", "v2v_pad_mode": "video_path", "noise_mode": "video_path",
        "v2_extra_noise": "video_path", "i2_extra_noise": "image_path", "cfg_skip_mode": "cfg_apply_ratio",
        "cfg_apply_ratio": "cfg_skip_mode",
        **dict.fromkeys(("slg_layers", "slg_scale", "slg_start", "slg_end"), "slg_mode"), "slg_mode": "slg_layers",
        **{f"compile_{name}": "compile" for name in ("backend", "mode", "dynamic", "fullgraph", "cache_size_limit")},
    }  # fmt: skip
    """option -> the one without which it has no effect"""

    # -- what a family says --------------------------------------------------------------------------------------------

    @abstractmethod
    def slots(self, config: Config) -> list[tuple[str, set[str]]]:
        """(option, kinds of file that it may be) of what must be there to make videos of prompts, without the VAE."""

    vae_kinds: ClassVar[frozenset[str]]

    @abstractmethod
    def load_encoders(self, config: Config) -> list[nn.Module]:
        """Text encoders on the CPU."""

    @abstractmethod
    def strategies(self, config: Config) -> StrategySet: ...

    @abstractmethod
    def load_vae(self, config: Config) -> nn.Module:
        """On the CPU, where it waits."""

    @abstractmethod
    def load_denoiser(
        self, config: Config, dtype: torch.dtype | None, device: torch.device, transform: Transform | None
    ) -> nn.Module:
        """In `dtype`, or in 8 bits of it where the options say so; None = in the types of the file."""

    @abstractmethod
    def pipeline(self, config: Config, denoiser: Any, vae: Any) -> VideoPipeline: ...

    @abstractmethod
    def save_denoiser(self, denoiser: Any, target: str, dtype: torch.dtype | None) -> None:
        """Write a denoiser file, for --save_merged_model."""

    def fitting_problems(self, config: Config) -> list[str]:
        """Files that do not fit each other, a block swap that the depth does not allow, tokenizers that are not
        there."""
        return []

    def frequencies_of_time(self, config: Config) -> int | None:
        """How many --riflex_index can choose among, from the header of the denoiser; None where that cannot be read."""
        return None

    def build_parser(self) -> argparse.ArgumentParser:
        return script_parser(f"Make videos with {self.title}", self.groups)

    # -- making --------------------------------------------------------------------------------------------------------

    def base_request(self, config: Config) -> VideoRequest:
        """That of the options, before lines of prompts change it."""
        fields = config[self.pictures].request_fields()
        for group in self.request_groups:
            if group in config:
                fields |= config[group].request_fields()
        return self.request_class(**fields)

    def load(self, config: Config) -> PictureMaker[VideoRequest]:
        return self.load_for(config, None)

    def load_for(self, config: Config, requests: Iterable[VideoRequest] | None) -> PictureMaker[VideoRequest]:
        """Text encoders first: those of a list of requests encode all and go, those of typed ones wait. Then the
        denoiser and the autoencoder."""
        import torch

        from library.device_utils import clean_memory_on_device
        from library.generation.adapters import LoadedAdapters, load_with_adapters
        from library.generation.video_maker import VideoMaker

        options, device = config[self.models], device_of(config[self.models])
        maker = VideoMaker(
            self.pipeline(config, None, None), self.strategies(config), self.load_encoders(config),
            LoadedAdapters(None, []), device, self.text_device(config), text_waits=True,
            weighs_words=config[SessionOptions].prompt_weighting,
        )  # fmt: skip
        if isinstance(requests, Sequence):
            for request in requests:
                maker.conditioning(request)
                maker.further(request)
            maker.text_encoders = []
            clean_memory_on_device(device)
        waits = self.denoiser_waits(config, device)
        home = torch.device("cpu") if waits or options.blocks_to_swap else device
        wide = getattr(torch, options.dit_dtype_name)

        def load(transform: Transform | None) -> tuple[nn.Module, list[nn.Module]]:
            return self.load_placed(config, wide, home, transform), []

        denoiser, _, maker.adapters = load_with_adapters(self.family, config[self.adapters].adapters, load)
        self._compile(config, denoiser)
        maker.denoiser_waits = waits
        if options.is_plain_fp8:  # 8 bits compute in it
            maker.computing = functools.partial(torch.autocast, device.type, torch.bfloat16)
        maker.pipeline = self.pipeline(config, denoiser, self.load_vae(config) if self._needs_vae(config) else None)
        return maker

    def denoiser_waits(self, config: Config, device: torch.device) -> bool:
        """Whether the denoiser is on the CPU while the autoencoder works."""
        return device.type == "cuda" and not config[self.models].blocks_to_swap

    def load_placed(
        self, config: Config, dtype: torch.dtype, home: torch.device, transform: Transform | None
    ) -> nn.Module:
        """`load_denoiser`, with block swap spread over device and main memory."""
        from library.generation.speed import type_to_load

        kind = type_to_load(dtype, speed_of(config))
        return self.placed(config, self.load_denoiser(config, kind, home, transform))

    def placed(self, config: Config, denoiser: Any) -> Any:
        import torch

        from library.generation.speed import as_stored

        as_stored(denoiser, speed_of(config), getattr(torch, config[self.models].dit_dtype_name))
        swap, device = config[self.models].blocks_to_swap, device_of(config[self.models])
        if swap:
            denoiser.enable_block_swap(swap, device)
            denoiser.move_to_device_except_swap_blocks(device)
        return denoiser

    def text_device(self, config: Config) -> torch.device:
        """Where the text encoders compute."""
        return device_of(config[self.models])

    def load_decoder(self, config: Config) -> tuple[VideoPipeline, torch.device]:
        return self.pipeline(config, None, self.load_vae(config)), device_of(config[self.models])

    def save_merged(self, config: Config, target: str) -> None:
        import torch

        from library.generation.adapters import merging
        from library.generation.speed import type_to_load

        wide = type_to_load(getattr(torch, config[self.models].dit_dtype_name), speed_of(config))
        merge = merging(self.family, config[self.adapters].files)
        denoiser = self.load_denoiser(config, wide, torch.device("cpu"), merge)
        merge.finish()
        self.save_denoiser(denoiser, target, wide)

    def _compile(self, config: Config, denoiser: Any) -> None:
        options = config[self.compilation]
        if options.compile:
            from library.training.compilation import compile_blocks

            compile_blocks(
                denoiser, options.compile_backend, mode=options.compile_mode, dynamic=options.dynamic,
                fullgraph=options.compile_fullgraph, variants=options.compile_cache_size_limit,
            )  # fmt: skip

    def _needs_vae(self, config: Config) -> bool:
        """Whether something is decoded, or pictures are encoded."""
        wanted = config[self.pictures].output_type != "latent" or bool(config[self.models].vae)
        return wanted or any(self.named_files(self.base_request(config)))

    def completed(self, request: VideoRequest, maker: PictureMaker[VideoRequest]) -> VideoRequest:
        request = super().completed(request, maker)
        frames = record_of(self.family).latents.usable_frames(request.frames)
        if frames != request.frames:
            stride = record_of(self.family).latents.temporal_stride
            logger.warning("%d frames are asked for; made %d, %d n + 1", request.frames, frames, stride)
        return dataclasses.replace(request, frames=frames)

    def make_picture(
        self, maker: PictureMaker[VideoRequest], config: Config, request: VideoRequest, index: int
    ) -> Path:
        """Make and write one video: `{YYYYmmdd-HHMMSS-mmm}_{index}_{seed}.mp4`, with `_latent.safetensors` for its
        latents; frames are in a folder of that name. The path of the last of these."""
        asked, request = request, self.completed(request, maker)
        latents, texts = maker.generate(request), self.request_texts(config, asked, request)
        path = free_path(config[self.pictures].output_dir, video_name(index, request.seed), "")
        if config[self.pictures].output_type in LATENT_OUTPUTS:
            from library.generation.latent_files import save_latents

            told = {**texts, **self.latent_texts(request)} if texts else {}
            written = save_latents(latents, path.with_name(f"{path.name}_latent.safetensors"), told)
            if config[self.pictures].output_type == "latent":
                return written
        return self._write_frames(config, maker.decode(latents), path, texts)

    def latent_texts(self, request: VideoRequest) -> dict[str, str]:
        """What a file of latents tells, under the names of known scripts."""
        told = {
            "seeds": request.seed, "prompt": request.prompt, "height": request.height, "width": request.width,
            "video_length": request.frames, "infer_steps": request.steps, "guidance_scale": request.cfg_scale,
            "embedded_cfg_scale": request.embedded_guidance_scale, "negative_prompt": request.negative_prompt,
        }  # fmt: skip
        return {name: str(value) for name, value in told.items() if value is not None}

    def decode_files(self, config: Config) -> list[Path]:
        """Videos of the files of --latent_path: `{time}_{index}_{seed}_{name of the file}.mp4`; the size is that of the
        latents."""
        from library.generation.latent_files import read_latents

        paths = []
        pipeline, device = self.load_decoder(config)
        for index, source in enumerate(config[self.pictures].latent_path):
            latents, texts = read_latents(source, pipeline.latent_spec)
            seed = re.split(r"[\s,]", texts.get("seeds", ""))[0] or "0"
            name = f"{video_name(index, seed)}_{Path(source).stem}"
            path = free_path(config[self.pictures].output_dir, name, "")
            texts = {} if config[SessionOptions].no_metadata else picture_entries(texts)
            paths.append(self._write_frames(config, pipeline.decode(latents.to(device)), path, texts))
            logger.info("%s", paths[-1])
        return paths

    def _write_frames(
        self, config: Config, made: Image.Image | Sequence[Image.Image], path: Path, texts: Mapping[str, str]
    ) -> Path:
        from library.generation.picture_files import frames_of
        from library.generation.video_files import write_frames, write_video

        options, files = config[self.pictures], config[SessionOptions]
        frames = self.kept_frames(config, frames_of(made))
        if options.output_type in FRAME_OUTPUTS or options.keep_pngs:
            folder = write_frames(frames, path, texts, files.picture_ending, files.image_quality)
            if options.output_type in FRAME_OUTPUTS:
                return folder
        video = path.with_name(f"{path.name}{options.video_ending}")
        return write_video(frames, video, options.fps, options.codec, texts)

    def kept_frames(self, config: Config, frames: list[Image.Image]) -> list[Image.Image]:
        """Those of the decoded frames that are written."""
        return frames

    # -- checks --------------------------------------------------------------------------------------------------------

    def check(self, config: Config) -> None:
        problems = Problems()
        merged, model = config[MergedModelOptions], config[self.models]
        if merged.save_merged_model:
            found = merged.problems(config[self.adapters], is_fp8=model.is_fp8)
        else:
            found = self.prompt_problems(config, is_fp8=model.is_fp8) + self._output_problems(config)
        for problem in [*found, *self._file_problems(config), *self._compile_problems(config)]:
            problems.add(problem)
        if not problems.messages and not merged.save_merged_model and not config[self.pictures].latent_path:
            for problem in self.fitting_problems(config):
                problems.add(problem)
        problems.raise_if_any()

    def _output_problems(self, config: Config) -> list[str]:
        from library.generation.video_files import ending_problem

        options = config[self.pictures]
        if options.output_type not in ("video", "both"):
            return []
        problem = ending_problem(options.video_ending, options.codec)
        name = "container" if options.codec is None else "codec"
        return [f"--{name} is {getattr(options, name)}: {problem}"] if problem else []

    def _file_problems(self, config: Config) -> list[str]:
        from library.checkpoints.kinds import check_slot
        from library.device_utils import device_problem

        model, options = config[self.models], config[self.pictures]
        vae = [("vae", set(self.vae_kinds))] if self._needs_vae(config) else []
        if config[MergedModelOptions].save_merged_model:
            slots = self.slots(config)[:1]
        else:
            slots = vae if options.latent_path else [*self.slots(config), *vae]
        found = [
            check_slot(getattr(model, slot), slot, kinds, with_pickles=True, for_pictures=True) for slot, kinds in slots
        ]
        found += self.extra_file_problems(config)
        asked = {f"--{name}": "float8_e4m3fn" for name in ("fp8", "fp8_scaled") if getattr(model, name)}
        found += format_problems({f"--dit_dtype {model.dit_dtype}": model.dit_dtype_name, **asked}, model.device)
        found.append(device_problem("device", model.device))
        return [problem for problem in found if problem]

    def _compile_problems(self, config: Config) -> list[str]:
        options = config[self.compilation]
        if not options.compile:
            return []
        from library.training.compilation import backend_problems

        return backend_problems(options.compile_backend, "compile_backend")

    def request_problems(self, config: Config, request: VideoRequest) -> list[str]:
        if self.is_without_prompts(config):
            return []
        named = list(self.named_files(request))
        found = [problem for name, path in named if (problem := unreadable(name, path))]
        if request.riflex_index and (count := self.frequencies_of_time(config)) and request.riflex_index > count:
            found.append(f"--riflex_index is {request.riflex_index}; the model has {count} frequencies of time")
        if named and not self._needs_vae(config):
            found.append(f"--{named[0][0]} is encoded by the autoencoder; --vae is not given")
        return found

    def named_files(self, request: VideoRequest) -> Iterator[tuple[str, str]]:
        """(option, path) of every file that a request names."""
        for field, name in NAMED_FILES.items():
            value = getattr(request, field)
            yield from ((name, path) for path in ([value] if isinstance(value, str) else value or ()))

    @staticmethod
    def is_without_prompts(config: Config) -> bool:
        """Whether latents are decoded, or a merged model is written."""
        return bool(config.value("latent_path") or config.value("save_merged_model"))

    def writes_pictures(self, config: Config) -> bool:
        return config[self.pictures].output_type in FRAME_OUTPUTS or config[self.pictures].keep_pngs

    def notices(self, config: Config) -> list[str]:
        from library.generation.video_files import encoder_of

        options, found = config[self.pictures], []
        if options.output_type in ("video", "both"):
            encoder = encoder_of(options.video_ending, options.codec)
            found += [encoder.notice] if encoder.notice else []
            if encoder.package != "PyAV" and not config[SessionOptions].no_metadata:
                found.append("settings are not written into video files by OpenCV; PyAV does: pip install av")
            if options.video_ending != f".{options.container}":
                ending = options.video_ending[1:]
                found.append(f"--codec {options.codec}: {ending} files, as {options.container} has none")
        else:
            names = [name for name in ("codec", "keep_pngs", "container") if name in config.explicit]
            found += [f"--{name} has no effect: --output_type {options.output_type} writes no video" for name in names]
        if LongClipOptions in config and config[LongClipOptions].riflex_index:
            found.append(
                "--riflex_index slows a frequency down by the number of latent frames (known tools count pixel frames)"
            )
        return found + self._idle(config)

    def _idle(self, config: Config) -> list[str]:
        """Lines about options that were written and change nothing; lines of prompts may yet ask for what they need."""
        if config[SessionOptions].from_file or config[SessionOptions].interactive:
            return []
        found = [
            f"--{name} has no effect without --{needed}"
            for name, needed in self.needs.items()
            if name in config.explicit and config.value(needed) in (None, False, "", "none")
        ]
        if self.base_request(config).negative_text is None:
            given = [name for name in GUIDED if name in config.explicit and config.value(name) not in (None, "none")]
            reason = "--guidance_scale is 1, which takes no second forward"
            found += [f"--{name} has no effect: {reason}" for name in given]
        return found


CLIPS = frozenset({"video_path", "control_path"})
"""options that name clips; the others name pictures"""


def unreadable(name: str, path: str) -> str | None:
    """Why the file, or the folder of frames, of an option cannot be read; None when it can."""
    from library.dataset.clips.video_files import look_at_video
    from library.dataset.media_utils import image_extensions, image_size

    if not Path(path).exists():
        return f"--{name} is {path}: there is no such file"
    is_picture = name not in CLIPS or (Path(path).suffix.lower() in image_extensions() and not Path(path).is_dir())
    found = problems_of(lambda: image_size(path) if is_picture else look_at_video(path))
    return f"--{name}: {found[0]}" if found else None


def picture_entries(texts: Mapping[str, str]) -> dict[str, str]:
    """The texts of a file of latents without those that pictures and videos of the same request do not have."""
    return {name: text for name, text in texts.items() if ENTRY not in texts or name not in LATENT_ENTRIES}


def device_of(options: VideoModelOptions) -> torch.device:
    import torch

    from library.device_utils import get_preferred_device

    return get_preferred_device() if options.device is None else torch.device(options.device)


def video_name(index: int, seed: int | str | None, now: float | None = None) -> str:
    """`{YYYYmmdd-HHMMSS-mmm}_{index}_{seed}`."""
    now = time.time() if now is None else now
    stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime(now))
    return f"{stamp}-{int(now * 1000) % 1000:03d}_{index}_{seed}"
