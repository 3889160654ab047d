"""The nets of gen_img.py that follow guide pictures, ControlNets and LLLites: what is wrong with their files, and how
they steer the sampling of a batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor

from library.checkpoints.kinds import check_slot
from library.components.control_models import Control, GuidedBy
from library.components.control_nets import control_nets_of
from library.components.lllite_models import VALUE_RANGE, LLLite
from library.components.lllite_utils import load_lllite, misfit
from library.components.unet_utils import UNetInfo
from library.core.errors import CheckpointError, ConfigError, Problems
from library.dataset.image_files import edges
from library.families.registry import record_of
from library.generation.control_pictures import picture_tensor
from library.generation.gen_img.options import GenerationControlOptions, GuideFile
from library.generation.gen_img.plan import ImageRequest
from library.generation.gen_img.sources import open_picture, source_files
from library.generation.unet_pipeline import ControlledPredict
from library.training.inference_samplers.discrete import Predict

if TYPE_CHECKING:
    from PIL import Image

LLLITE = "lllite"
"""kind of its files, and of the script that trains them"""


Steer = Callable[[ControlledPredict], Predict]


# -- checks ------------------------------------------------------------------------------------------------------------


def guide_problems(
    options: GenerationControlOptions, family: str, inspect: Callable[[], UNetInfo | None]
) -> list[str]:
    """What is wrong with files of nets for the model of a family, and with guide pictures, from headers. `inspect`
    reads the model's; where it gives None or raises a CheckpointError, what is wrong is told elsewhere."""
    problems = Problems()
    try:
        info = inspect()
    except CheckpointError:
        info = None
    for file in options.guides:
        problem = file_problem(file, family, info)
        if problem:
            problems.add(problem)
    if options.guides:
        for place in options.guide_image_path or []:
            for file in problems.attempt(lambda place=place: source_files(place, "guide_image_path")) or []:
                problems.attempt(lambda file=file: open_picture(file, "RGB", "guide_image_path"))
        problems.attempt(lambda: picture_files(options))
    return problems.messages


def file_problem(file: GuideFile, family: str, info: UNetInfo | None) -> str | None:
    """What is wrong with the file of a net for this U-Net, or None."""
    record = record_of(family)
    if file.is_lllite and LLLITE not in record.scripts:
        return (
            f"--{file.option} is given, and the checkpoint is {record.title}; there are ControlNet-LLLites of SDXL"
            " alone"
        )
    kinds = {LLLITE} if file.is_lllite else set(control_nets_of(family).kinds)
    problem = check_slot(file.path, file.option, kinds, with_pickles=True)
    if problem or info is None:
        return problem
    try:
        if file.is_lllite:
            found = misfit(file.path, info)
        else:
            found = control_nets_of(family).check(file.path, info.params)
    except CheckpointError as error:
        return f"--{file.option}: {error}"
    return f"--{file.option} is {file.path}: {found}" if found else None


def picture_files(options: GenerationControlOptions) -> list[Path]:
    """All guide pictures in their order. ConfigError when there are not as many for each net."""
    found = [file for path in options.guide_image_path or [] for file in source_files(path, "guide_image_path")]
    count = len(options.guides)
    if len(found) > 1 and len(found) % count:
        raise ConfigError(
            f"--guide_image_path has {len(found)} pictures for {count} nets; give one for each net, as often as you"
            " like, or a single one for all"
        )
    return found


def num_turns(options: GenerationControlOptions) -> int:
    """How many sets of guide pictures take turns; 0 without nets."""
    count = len(options.guides)
    return max(1, len(picture_files(options)) // count) if count else 0


# -- nets --------------------------------------------------------------------------------------------------------------


class GuidedNet(ABC):
    """A loaded net. `value_range`: darkest and brightest value of the pictures that it sees."""

    value_range: tuple[float, float]

    def __init__(self, file: GuideFile) -> None:
        self.file = file

    @abstractmethod
    def follow(self, picture: Tensor | None) -> tuple[GuidedBy, ...]:
        """Work with a picture [B, 3, H, W], or rest (None), in the coming forward of the denoiser. What the forward has
        to be given for that."""


class ControlNetGuide(GuidedNet):
    """A net beside the denoiser, which adds to its features."""

    def __init__(self, file: GuideFile, net: torch.nn.Module, value_range: tuple[float, float]) -> None:
        super().__init__(file)
        self.net, self.value_range = net, value_range

    def follow(self, picture: Tensor | None) -> tuple[GuidedBy, ...]:
        return () if picture is None else (GuidedBy(self.net, picture, self.file.multiplier),)


class LLLiteGuide(GuidedNet):
    """Modules in the denoiser's layers."""

    value_range = VALUE_RANGE

    def __init__(self, file: GuideFile, net: LLLite) -> None:
        super().__init__(file)
        self.net = net
        net.state.multiplier = file.multiplier

    def follow(self, picture: Tensor | None) -> tuple[GuidedBy, ...]:
        if picture is not self.net.state.picture:
            self.net.set_picture(picture)
        return ()


def load_guides(
    options: GenerationControlOptions, family: str, unet: Any, dtype: torch.dtype, device: torch.device
) -> Guides:
    """All nets of the options, in their order. CheckpointError when a file does not fit."""
    nets: list[GuidedNet] = []
    for file in options.guides:
        if file.is_lllite:
            nets.append(LLLiteGuide(file, load_lllite(file.path, unet, dtype, device)))
        else:
            kind = control_nets_of(family)
            net = kind.load(file.path, unet.params, dtype, device).requires_grad_(False).eval()
            nets.append(ControlNetGuide(file, net, kind.picture_range))
    pictures = [open_picture(path, "RGB", "guide_image_path") for path in picture_files(options)] if nets else []
    return Guides(nets, pictures, device, dtype)


# -- steering ----------------------------------------------------------------------------------------------------------


@dataclass
class Guides:
    """The nets of a run, in their order. `pictures`: one for each net, several times over, or one for all."""

    nets: Sequence[GuidedNet] = ()
    pictures: Sequence[Image.Image] = ()
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32

    @contextmanager
    def over(self, requests: Sequence[ImageRequest], timesteps: Sequence[float], stride: int) -> Iterator[Steer]:
        """Inside, what makes predictions of a batch follow the nets. `timesteps` of the steps that are made; `stride`:
        pixels of a latent's side."""
        size = (requests[0].width, requests[0].height)
        turns = [request.guide or 0 for request in requests]
        parts = [
            _Part(net, self._batch(place, turns, size), first_resting(timesteps, net.file.ratio), stride)
            for place, net in enumerate(self.nets)
        ]
        try:
            yield lambda predict: steered(predict, parts) if parts else predict
        finally:
            for net in self.nets:
                net.follow(None)

    def _batch(self, place: int, turns: Sequence[int], size_wh: tuple[int, int]) -> Tensor:
        """The pictures [B, 3, H, W] of a net for requests of these turns."""
        net, made = self.nets[place], []
        for turn in turns:
            image = self.pictures[turn * len(self.nets) + place] if len(self.pictures) > 1 else self.pictures[0]
            made.append(picture_tensor(prepared(image, size_wh, net.file.edges), net.value_range))
        return torch.cat(made).to(self.device, self.dtype)


def prepared(image: Image.Image, size_wh: tuple[int, int], thresholds: tuple[int, int] | None) -> Image.Image:
    """A guide picture at the size of what is made, or its edges there (white on black)."""
    from PIL import Image

    resized = image if image.size == size_wh else image.resize(size_wh, Image.Resampling.LANCZOS)
    if thresholds is None:
        return resized
    return Image.fromarray(edges(numpy.asarray(resized), *thresholds)).convert("RGB")


def first_resting(timesteps: Sequence[float], ratio: float) -> float:
    """The timestep from which on a net rests: that of the first step behind the first `ratio` of them, -inf where there
    is none. A step counts when it ends within that part. What a sampler predicts inside a step, below its timestep, is
    the step's."""
    working = int(len(timesteps) * ratio + 1e-6)
    return float(timesteps[working]) if working < len(timesteps) else float("-inf")


@dataclass
class _Part:
    """A net with its pictures of a batch, at the sizes that latents had so far (they may grow)."""

    net: GuidedNet
    picture: Tensor
    resting_from: float
    stride: int
    _sizes: dict[tuple[int, ...], Tensor] = field(default_factory=dict)

    def at(self, latents: Tensor, timestep: float) -> tuple[GuidedBy, ...]:
        is_resting = timestep <= self.resting_from + 1e-3  # samplers count in float32
        return self.net.follow(None if is_resting else self._fitting(latents))

    def _fitting(self, latents: Tensor) -> Tensor:
        size = tuple(side * self.stride for side in latents.shape[2:])
        if size == tuple(self.picture.shape[2:]):
            return self.picture
        if size not in self._sizes:
            resized = F.interpolate(self.picture.float(), size=size, mode="bilinear", antialias=True)
            self._sizes[size] = resized.to(self.picture.dtype)
        return self._sizes[size]


def steered(predict: ControlledPredict, parts: Sequence[_Part]) -> Predict:
    """The prediction with every net that works at a timestep; what ControlNets add to one place is summed."""

    def prediction(latents: Tensor, timestep: Tensor) -> Tensor:
        working = [guided for part in parts for guided in part.at(latents, float(timestep))]
        return predict(latents, timestep, Control(tuple(working)) if working else None)

    return prediction
