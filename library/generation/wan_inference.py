"""The video script of Wan 2.1 and 2.2: what its files must be, and how they are loaded."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.core.errors import AtelierError, ConfigError, Problems, problems_of
from library.core.options import Config
from library.families.wan_tasks import DEFAULT_TASK, TASKS, WanTask, boundary_of
from library.generation.adapter_files import file_problem
from library.generation.nag_options import NagOptions
from library.generation.requests import DTYPE_NAMES
from library.generation.speed_options import speed_of
from library.generation.video_options import OldCompileOptions
from library.generation.video_requests import VideoRequest
from library.generation.video_script import VideoScript, device_of
from library.generation.wan_options import (
    GROUPS,
    LINE_OPTIONS,
    WanAdapterOptions,
    WanClipOptions,
    WanModelOptions,
    WanRequest,
)
from library.training.wiring.base import tokenizer_problems

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from torch import nn

    from library.checkpoints.loading import Transform
    from library.dataset.strategies import StrategySet
    from library.generation.pipeline import PictureMaker
    from library.generation.video_pipeline import VideoPipeline
    from library.wan_models import WanParams

logger = logging.getLogger(__name__)


class WanScript(VideoScript):
    family = "wan"
    title = "Wan 2.1 and 2.2"
    adapters = WanAdapterOptions
    pictures = WanClipOptions
    models = WanModelOptions
    compilation = OldCompileOptions
    groups = GROUPS
    line_options = LINE_OPTIONS
    vae_kinds = frozenset({"vae_wan"})
    request_class = WanRequest
    needs = {
        **VideoScript.needs, "control_image_path": "one_frame_inference",
        **dict.fromkeys(("nag_tau", "nag_alpha", "nag_prompt"), "nag_scale"),
        **dict.fromkeys(
            ("timestep_boundary", "offload_inactive_dit", "lazy_loading", "guidance_scale_high_noise"),
            "dit_high_noise",
        ),
    }  # fmt: skip
    option_names = {**VideoScript.option_names, "cfg_scale_high_noise": "guidance_scale_high_noise"}
    recorded_with = {"cfg_scale": "cfg_scale_high_noise"}
    texts = {"flow-shift": "flow_shift", "sampler": "sampler", "scale-high-noise": "cfg_scale_high_noise"}

    # -- the task ------------------------------------------------------------------------------------------------------

    def task(self, config: Config) -> WanTask:
        """By the option, or else by the denoiser's file."""
        options = config[self.models]
        if options.task is not None:
            return TASKS[options.task]
        from library.wan_fitting_utils import fitting_tasks

        try:
            found = fitting_tasks(self._params(config)) if options.dit else ()
        except (AtelierError, OSError):  # told by the check
            found = ()
        return found[0] if found else TASKS[DEFAULT_TASK]

    def boundary(self, config: Config) -> float | None:
        """The noise level down to which the expert for much noise predicts; None of one model."""
        options = config[self.models]
        if options.dit_high_noise is None:
            return None
        given = options.timestep_boundary
        return self.task(config).boundary if given is None else boundary_of(given)

    def _params(self, config: Config, path: str | None = None) -> WanParams:
        from library.wan_utils import inspect_wan

        return inspect_wan(path or config[self.models].dit).params

    # -- requests ------------------------------------------------------------------------------------------------------

    def base_request(self, config: Config) -> WanRequest:
        """What the options leave open is that of the task."""
        request, task, options = super().base_request(config), self.task(config), config[self.pictures]
        low, high = options.guidance_scale, options.guidance_scale_high_noise
        return dataclasses.replace(
            request, frames=options.video_length or task.frames, steps=options.infer_steps or task.steps,
            cfg_scale=task.guidance[0] if low is None else low,
            cfg_scale_high_noise=task.guidance[-1] if high is None and low is None else high,
            negative_prompt=task.negative_prompt if options.negative_prompt is None else options.negative_prompt,
        )  # fmt: skip

    def completed(self, request: WanRequest, maker: PictureMaker[VideoRequest]) -> WanRequest:
        """With a first frame the clip has its shape, at the area that is asked for."""
        from library.generation.wan_pipeline import unread_files

        task = maker.pipeline.task
        for name in unread_files(task, request):
            logger.warning("%s %s has no effect: the task %s reads none", name, getattr(request, name), task.name)
            request = dataclasses.replace(request, **{name: None})
        if request.image_path and not request.one_frame:
            from library.generation.control_pictures import open_picture
            from library.wan_conditioning_utils import size_beside

            width, height = size_beside(open_picture(request.image_path).size, (request.width, request.height))
            if (width, height) != (request.width, request.height):
                logger.info("the shape of the first frame at this area: %dx%d", width, height)
                request = dataclasses.replace(request, width=width, height=height)
        return super().completed(request, maker)

    def request_problems(self, config: Config, request: WanRequest) -> list[str]:
        from library.generation.wan_pipeline import request_problem

        found = super().request_problems(config, request)
        if not self.is_without_prompts(config):
            found += problems_of(lambda: _raise(request_problem(self.task(config), request)))
            found += self._skipped_block_problems(config, request)
        return found

    def _skipped_block_problems(self, config: Config, request: WanRequest) -> list[str]:
        try:
            count = self._params(config).num_layers if request.skip_layers and config[self.models].dit else 0
        except (AtelierError, OSError):  # told by the check
            return []
        beyond = [number for number in request.skip_layers.layers if number >= count] if count else []
        if not beyond:
            return []
        return [f"--slg_layers names {', '.join(map(str, beyond))}; the model has {count} blocks, numbered from 0 on"]

    def kept_frames(self, config: Config, frames: list[Image.Image]) -> list[Image.Image]:
        trimmed = config[self.pictures].trim_tail_frames
        return frames[: max(len(frames) - trimmed, 1)] if trimmed else frames

    # -- loading -------------------------------------------------------------------------------------------------------

    def frequencies_of_time(self, config: Config) -> int | None:
        try:
            return self._params(config).axes_dim[0] // 2 if config[self.models].dit else None
        except (AtelierError, OSError):
            return None  # `check` tells of the file

    def slots(self, config: Config) -> list[tuple[str, set[str]]]:
        found = [("dit", {"wan"}), ("t5", {"umt5"})]
        if config[self.models].dit_high_noise is not None:
            found.append(("dit_high_noise", {"wan"}))
        return [*found, ("clip", {"clip_vision"})] if self.task(config).needs_vision else found

    def strategies(self, config: Config) -> StrategySet:
        from library.dataset.strategies import StrategySet
        from library.dataset.text_cache_io import TEXT_LAYOUTS
        from library.strategy_wan import WanTextEncodingStrategy, WanTokenizeStrategy

        tokenize = WanTokenizeStrategy(tokenizer=self._tokenizer(config))
        return StrategySet(tokenize, WanTextEncodingStrategy(), text_layout=TEXT_LAYOUTS[self.family])

    def _tokenizer(self, config: Config) -> Any:
        from library.strategy_wan import load_umt5_tokenizer

        options = config[self.models]
        return load_umt5_tokenizer(options.t5_tokenizer, options.tokenizer_cache_dir, options.t5)

    def load_encoders(self, config: Config) -> list[nn.Module]:
        import torch

        from library.components.stored_parts import stored_model
        from library.wan_text_encoder_utils import load_umt5

        options = config[self.models]
        return [
            stored_model(
                lambda place: load_umt5(options.t5, torch.bfloat16, place, options.disable_numpy_memmap),
                "fp8" if options.fp8_t5 else None, "cpu",
            )
        ]  # fmt: skip

    def load_vae(self, config: Config) -> nn.Module:
        import torch

        from library.components.wan_vae_utils import load_wan_vae

        options = config[self.models]
        dtype = getattr(torch, DTYPE_NAMES[options.vae_dtype.lower()])
        vae = load_wan_vae(options.vae, dtype, "cpu", options.disable_numpy_memmap)
        vae.cache_on_cpu = options.vae_cache_cpu
        return vae

    def load_denoiser(
        self, config: Config, dtype: torch.dtype | None, device: torch.device, transform: Transform | None
    ) -> nn.Module:
        return self._load_expert(config, config[self.models].dit, dtype, device, transform)

    def _load_expert(
        self, config: Config, path: str, dtype: torch.dtype | None, device: torch.device, transform: Transform | None
    ) -> nn.Module:
        from library.wan_utils import load_wan

        options = config[self.models]
        return load_wan(
            path, dtype, device, options.disable_numpy_memmap, form=options.form, by_rows=options.multiplies_fp8,
            transform=transform,
        )  # fmt: skip

    def load_placed(
        self, config: Config, dtype: torch.dtype, home: torch.device, transform: Transform | None
    ) -> nn.Module:
        """Both experts, with the adapters of each in it."""
        denoiser, options = super().load_placed(config, dtype, home, transform), config[self.models]
        if options.dit_high_noise is None:
            return denoiser
        from library.generation.adapters import merging
        from library.generation.speed import type_to_load
        from library.wan_expert_utils import TwoExperts

        adapters = config[self.adapters].high_noise
        merge = merging(self.family, adapters.files) if adapters else None
        kind = type_to_load(dtype, speed_of(config))
        other = self.placed(config, self._load_expert(config, options.dit_high_noise, kind, home, merge))
        if merge:
            merge.finish()
        denoiser.experts = TwoExperts(denoiser, other, offload=options.offloads)
        return denoiser

    def denoiser_waits(self, config: Config, device: torch.device) -> bool:
        """Two experts that stay on the device change places there."""
        options = config[self.models]
        stay = options.dit_high_noise is not None and not options.offloads
        return super().denoiser_waits(config, device) and not stay

    def pipeline(self, config: Config, denoiser: Any, vae: Any) -> VideoPipeline:
        from library.generation.wan_pipeline import WanPipeline

        task = self.task(config)
        vision = self._load_vision(config) if denoiser is not None and task.needs_vision else None
        return WanPipeline(
            denoiser, vae, task=task, boundary=self.boundary(config), vision=vision,
            split_uncond=config[self.pictures].split_uncond,
        )  # fmt: skip

    def _load_vision(self, config: Config) -> nn.Module:
        """On the CPU, where it waits."""
        import torch

        from library.wan_clip_utils import load_vision

        options = config[self.models]
        dtype = torch.float32 if device_of(options).type == "cpu" else torch.float16
        return load_vision(options.clip, dtype, "cpu", options.disable_numpy_memmap)

    def save_denoiser(self, denoiser: Any, target: str, dtype: torch.dtype | None) -> None:
        from library.wan_utils import save_wan

        save_wan(denoiser, target, dtype)

    # -- checks --------------------------------------------------------------------------------------------------------

    def extra_file_problems(self, config: Config) -> list[str | None]:
        adapters = config[self.adapters]
        found = super().extra_file_problems(config)
        found += [
            file_problem(path, "lora_weight_high_noise", self.family) for path in adapters.lora_weight_high_noise or ()
        ]
        if adapters.lora_weight_high_noise and config.value("save_merged_model"):
            found.append(
                "--save_merged_model writes --dit with --lora_weight in it; for the other expert give its file as --dit,"
                " and leave out --lora_weight_high_noise"
            )
        elif adapters.lora_weight_high_noise and config[self.models].dit_high_noise is None:
            found.append(
                "--lora_weight_high_noise is given without --dit_high_noise, the expert that these adapters are for"
            )
        return found

    def fitting_problems(self, config: Config) -> list[str]:
        """The task against the denoiser, both experts and sizes of the files against each other; from headers."""
        from library.components.llama_clip_utils import add_size_problems
        from library.custom_offloading_utils import row_swap_problem
        from library.wan_fitting_utils import check_second_expert, check_task, part_sizes
        from library.wan_models import WanModel
        from library.wan_text_encoder_utils import inspect_umt5

        options, problems, params = config[self.models], Problems(), self._params(config)
        task = self.task(config)
        clip = options.clip if task.needs_vision else None
        problems.attempt(lambda: check_task(options.task, params, options.dit))
        problems.attempt(
            lambda: check_second_expert(options.dit_high_noise, task, self.boundary(config), params, options.dit)
        )
        add_size_problems(problems, part_sizes(params, t5=options.t5, vae=options.vae, clip=clip), options.dit)
        swap = row_swap_problem(options.blocks_to_swap, params.num_layers, WanModel.blocks_that_stay)
        return [
            *problems.messages, *([swap] if swap else []),
            *tokenizer_problems(
                lambda: self._tokenizer(config), lambda: inspect_umt5(options.t5)["vocab_size"], "umT5",
                "--t5_tokenizer", f"--t5 {options.t5}",
            ),
        ]  # fmt: skip

    def notices(self, config: Config) -> list[str]:
        from library.strategy_wan import has_ftfy

        options, found = config[self.models], [f"the task is {self.task(config).name}", *super().notices(config)]
        if not has_ftfy():
            found.append(
                "ftfy is not installed: prompts are cleaned of HTML entities and white space alone (pip install ftfy)"
            )
        if "video_path" in config.explicit:
            found.append("--video_path is what the video starts from (known scripts take it and do not read it)")
        nag = config[NagOptions]
        if nag.nag_scale is not None and nag.nag_alpha > 1:
            found.append(f"--nag_alpha is {nag.nag_alpha}; above 1 it goes beyond the guided attention, which overshoots")
        if options.dit_high_noise is not None and "high" in Path(options.dit).name.lower():
            found.append("--dit has a name that says much noise; it is the expert for little noise")
        return found


def _raise(problem: str | None) -> None:
    if problem:
        raise ConfigError(problem)


SCRIPT = WanScript()
build_parser, main, run = SCRIPT.build_parser, SCRIPT.main, SCRIPT.run
