"""The models of Wan put together for making clips."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch
from torch import Tensor

from library.core.errors import ConfigError
from library.dataset.collate import stack_padded
from library.families.wan_tasks import DEFAULT_TASK, TASKS, WanTask, is_high_noise
from library.generation.control_pictures import open_picture
from library.generation.sampling_utils import NUM_TRAIN_TIMESTEPS, Conditioning, computing_on
from library.generation.video_pipeline import VideoPipeline, clip_pixels, picture_pixels, read_clip_frames
from library.generation.wan_options import WanRequest, parse_one_frame
from library.training.timesteps import shift_sigmas
from library.wan_clip_utils import vision_states
from library.wan_conditioning_utils import OneFrame, generation_condition, one_frame, one_frame_conditions
from library.wan_models import AttentionGuidance
from library.wan_train_utils import predict_velocity

LARGEST_SIGMA = 0.999
"""of the table of a thousand noise levels, before it is shifted, from which UniPC starts"""


@dataclass(frozen=True)
class WanCondition:
    """What a clip is conditioned on beside text, [1, ...] each; `latent_frames`: how many it has; `layout`: of a single
    frame among reference frames."""

    y: Tensor | None
    vision: Tensor | None
    latent_frames: int
    layout: OneFrame | None = None


@dataclass
class WanPipeline(VideoPipeline):
    """UniPC steps along shifted times, guided away from the negative prompt. Where there are two experts, the one for
    much noise predicts down to the noise level `boundary`, with a guidance of its own. `vision`: the encoder of
    pictures, for tasks that look at its states."""

    task: WanTask = field(default=TASKS[DEFAULT_TASK], kw_only=True)
    boundary: float | None = field(default=None, kw_only=True)
    vision: Any = field(default=None, kw_only=True)
    split_uncond: bool = field(default=True, kw_only=True)
    _kept: tuple[Any, WanCondition] | None = field(default=None, init=False, repr=False)

    family = "wan"
    request_class = WanRequest
    default_sampler = "unipc"

    def velocity(
        self, latents: Tensor, times: Tensor, conditioning: Conditioning, request: WanRequest,
        skip_layers: Collection[int] = (),
    ) -> Tensor:
        made, rows = self.condition(request), len(latents)

        def of_each(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.expand(rows, *tensor.shape[1:])

        places = None if made.layout is None else of_each(torch.tensor([made.layout.f_indices]))
        return predict_velocity(
            self.denoiser, latents, times, conditioning["t5"], y=of_each(made.y), vision=of_each(made.vision),
            f_indices=places, skip_layers=skip_layers, attention_guidance=conditioning.get("attention"),
        )  # fmt: skip

    def schedule(self, request: WanRequest) -> Tensor:
        first = LARGEST_SIGMA if request.sampler == "unipc" else 1.0
        times = torch.linspace(first, 0, request.steps + 1, dtype=torch.float64)
        return shift_sigmas(times, self.shift(request)).float()

    def shift(self, request: WanRequest) -> float:
        return request.flow_shift or self.task.flow_shift(request.width, request.height)

    def guided(
        self, request: WanRequest, conditioning: Conditioning, negative: Conditioning | None
    ) -> Callable[[Tensor, Tensor], Tensor]:
        conditioning = self._with_guidance(conditioning, request)
        low = high = super().guided(request, conditioning, negative)
        boundary = self.boundary
        if boundary is None:
            return low
        if request.cfg_scale_high_noise is not None:
            own = dataclasses.replace(request, cfg_scale=request.cfg_scale_high_noise, cfg_scale_high_noise=None)
            high = super().guided(own, conditioning, negative)

        def velocity(latents: Tensor, sigma: Tensor) -> Tensor:
            time = float(torch.tensor(float(sigma) * NUM_TRAIN_TIMESTEPS))  # in float32, as in training
            self.denoiser.experts.use(high_noise=is_high_noise(time / NUM_TRAIN_TIMESTEPS, boundary))
            return (high if is_high_noise(float(sigma), boundary) else low)(latents, sigma)

        return velocity

    def _with_guidance(self, conditioning: Conditioning, request: WanRequest) -> Conditioning:
        """The prompt with what its attention is guided away from, where the request asks for that."""
        if request.nag_scale is None:
            return conditioning
        text = stack_padded(list(self.brought(self.further["attention"])["t5"]))
        guidance = AttentionGuidance(text, request.nag_scale, request.nag_tau, request.nag_alpha)
        return {**conditioning, "attention": guidance}

    def latent_shape(self, request: WanRequest) -> tuple[int, ...]:
        channels, *_, height, width = super().latent_shape(request)
        return channels, self.condition(request).latent_frames, height, width

    def latents_together(
        self, requests: Sequence[WanRequest], conditioning: Conditioning, negative: Conditioning | None
    ) -> Tensor:
        return self.kept(super().latents_together(requests, conditioning, negative), requests[0])

    def kept(self, latents: Tensor, request: WanRequest) -> Tensor:
        layout = self.condition(request).layout
        return latents if layout is None else latents[:, :, layout.target : layout.target + 1]

    def encode(self, pixels: Tensor, seed: int) -> Tensor:
        return self.vae.encode(pixels.to(self.vae.dtype))

    # -- what stands beside the latents --------------------------------------------------------------------------------

    def condition(self, request: WanRequest) -> WanCondition:
        """Made once for all forwards of a request. ConfigError when the task needs what is not given."""
        names = (
            "width", "height", "frames", "image_path", "end_image_path", "control_path", "control_image_paths",
            "one_frame",
        )  # fmt: skip
        noise = (request.i2_extra_noise, request.seed if request.i2_extra_noise else None)
        key = (*(getattr(request, name) for name in names), *noise)
        if self._kept is None or self._kept[0] != key:
            self._kept = (key, self._condition(request))
        return self._kept[1]

    @torch.no_grad()
    def _condition(self, request: WanRequest) -> WanCondition:
        problem = request_problem(self.task, request)
        if problem:
            raise ConfigError(problem)
        device = self.denoiser.device

        def latents_of(clips: Tensor) -> Tensor:
            return self.encode(clips, 0).float()

        def picture(path: str | None) -> Tensor | None:
            size = (request.width, request.height)
            return None if path is None else picture_pixels(path, *size)[:, :, 0].to(device)

        if not (self.task.takes_picture or self.task.fun_control or request.one_frame):
            return WanCondition(None, None, generation_condition(latents_of, request.frames).latent_frames)
        with computing_on(self.vae, device):
            if request.one_frame:
                places = parse_one_frame(request.one_frame, "one_frame", len(request.control_image_paths))
                layout = one_frame(*places)
                references = [picture(path) for path in request.control_image_paths]
                _, y = one_frame_conditions(latents_of, layout, None, references)
                vision = self._vision(request.control_image_paths)
                return WanCondition(y, vision, len(layout.f_indices), layout)
            control = None
            if self.task.fun_control:
                frames = read_clip_frames(request.control_path, request.frames)
                control = clip_pixels(frames, request.width, request.height).to(device)
            made = generation_condition(
                latents_of, request.frames, first=picture(request.image_path), last=picture(request.end_image_path),
                control=control, takes_last=self.task.takes_last,
            )  # fmt: skip
        y = made.y
        if request.image_path and y is not None:  # the last channels are the latents of the pictures
            own = self.latent_spec.channels
            y = torch.cat((y[:, :-own], self.with_extra_noise(y[:, -own:], request)), dim=1)
        pictures = [request.image_path, request.end_image_path if self.task.takes_last else None]
        return WanCondition(y, self._vision([path for path in pictures if path]), made.latent_frames)

    def _vision(self, paths: Sequence[str]) -> Tensor | None:
        """States [1, n * 257, D] of pictures, as they are in their files; None where nothing looks at them."""
        if self.vision is None or not paths:
            return None
        device = self.denoiser.device
        home = next(self.vision.parameters()).device
        self.vision.to(device)
        try:
            states = [vision_states(self.vision, _pixels(path).to(device)) for path in paths]
        finally:
            self.vision.to(home)
        return torch.cat(states, dim=1)


def _pixels(path: str) -> Tensor:
    """[1, 3, H, W] float32 in -1..1 of a picture file."""
    values = torch.from_numpy(numpy.asarray(open_picture(path).convert("RGB")).astype(numpy.float32))
    return (values / 127.5 - 1).permute(2, 0, 1)[None].contiguous()


def unread_files(task: WanTask, request: WanRequest) -> list[str]:
    """Fields of a request that name a file which its task, or a single frame, does not look at."""
    clip = not request.one_frame
    pictures = clip and (task.takes_picture or task.fun_control)
    reads = {"image_path": pictures, "end_image_path": pictures, "control_path": clip and task.fun_control}
    return [name for name, is_read in reads.items() if getattr(request, name) and not is_read]


def request_problem(task: WanTask, request: WanRequest) -> str | None:
    """As `condition_problem`, of a request."""
    return condition_problem(
        task, image=request.image_path, control=request.control_path, one_frame=request.one_frame,
        controls=request.control_image_paths,
    )  # fmt: skip


def condition_problem(
    task: WanTask, *, image: str | None, control: str | None, one_frame: str | None, controls: Sequence[str]
) -> str | None:
    """What a clip lacks that its task is conditioned on, or None, by the files that are given: a first frame, a control
    clip, and the control pictures of a single frame with these settings. ConfigError when these cannot be read."""
    if one_frame:
        places, _ = parse_one_frame(one_frame, "one_frame", len(controls))
        if len(controls) != len(places) or not places:
            return (
                f"one_frame names places of {len(places)} control pictures (control_index), {len(controls)} are given;"
                " needed: one picture for each, and one at least (--control_image_path, in a prompt line --ci)"
            )
        return None if task.takes_picture else f"the task {task.name} has no place for control pictures (one_frame)"
    if task.takes_picture and not image:
        return (
            f"the task {task.name} begins with a picture, and none is given; needed: the first frame (--image_path"
            " FILE, in a prompt line --i FILE)"
        )
    if task.fun_control and not control:
        return (
            f"the task {task.name} follows a clip, and none is given; needed: the control clip (--control_path FILE, in"
            " a prompt line --cn FILE)"
        )
    return None
