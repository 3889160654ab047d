"""Pictures of the steps in between: latents shown by a table of colours, or by a tiny autoencoder."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from library.core.errors import AtelierError
from library.families.registry import record_of
from library.generation.picture_files import write_picture
from library.generation.sampling_utils import images_of
from library.generation.tiny_decoders import TinyDecoder, load_tiny_decoder
from library.generation.video_files import ending_problem, write_video

if TYPE_CHECKING:
    from library.training.inference_samplers.flow import Observe

logger = logging.getLogger(__name__)

NAME = "latent_preview"
ENLARGED = 8
"""pixels along a side of a latent, of pictures by colours"""


def linear_pictures(latents: Tensor, colours: Sequence[Sequence[float]]) -> Tensor:
    """[F, 3, 8 h, 8 w] from 0 to 1 of latents [C, F, h, w]: the colours of their channels ([C + 1] of R, G, B, the last
    is added), stretched over all frames from the darkest value to the brightest."""
    table = torch.tensor(colours, dtype=torch.float32)
    rgb = torch.einsum("cfhw,ck->fkhw", latents.float().cpu(), table[:-1]) + table[-1][:, None, None]
    low, high = rgb.min(), rgb.max()
    rgb = (rgb - low) / (high - low).clamp_min(1e-9)
    return functional.interpolate(rgb, scale_factor=ENLARGED, mode="bicubic", align_corners=False).clamp(0, 1)


@dataclass
class Previews:
    """Sees the steps, and writes every N-th. `show`: pictures [n, 3, H, W] from 0 to 1 of latents [C, F, h, w]."""

    folder: Path
    every: int
    show: Callable[[Tensor], Tensor]
    fps: float

    @torch.no_grad()
    def __call__(self, step: int, steps: int, latents: Tensor) -> None:
        """Of latents [1, C, h, w] or [1, C, F, h, w]. A preview that cannot be written is told; the picture is made all
        the same."""
        if step == 1 and steps < self.every:
            logger.info("no preview: --preview_latent_every is %d, and there are %d", self.every, steps)
        if step % self.every:
            return
        first = latents[0] if latents.ndim == 5 else latents[0][:, None]  # [C, F, h, w]
        with torch.autocast(latents.device.type, enabled=False):
            frames = images_of(self.show(first.float()) * 2 - 1)
        try:
            if len(frames) == 1:
                path = write_picture(frames[0], self.folder / f"{NAME}.png")
            else:
                path = write_video(frames, self.folder / f"{NAME}.mp4", self.fps)
        except (AtelierError, OSError) as error:
            logger.warning("no preview of step %d of %d: %s", step, steps, error)
        else:
            logger.info("preview of step %d of %d: %s", step, steps, path)


def previews_of(family: str, folder: Path, every: int, file: str | None, fps: float) -> Observe:
    """`fps`: of the finished clip; a table has one picture for each latent frame, that is for four frames."""
    if file is None:
        colours, stride = record_of(family).latent_colours, record_of(family).latents.temporal_stride or 1
        return Previews(folder, every, lambda latents: linear_pictures(latents, colours), max(1, fps // stride))
    return Previews(folder, every, _decoding(load_tiny_decoder(file)), fps)


def _decoding(decoder: TinyDecoder) -> Callable[[Tensor], Tensor]:
    """Computes where the latents are, and waits on the CPU in between; in half precision on a GPU."""

    def show(latents: Tensor) -> Tensor:
        dtype = torch.float16 if latents.device.type == "cuda" else torch.float32
        decoder.to(latents.device, dtype)
        try:
            return decoder(latents.to(dtype))
        finally:
            decoder.to("cpu", torch.float32)

    return show


def preview_problems(family: str, file: str | None) -> list[str]:
    """Why there can be no previews of a family's latents, by this file or without one."""
    record = record_of(family)
    spec, found = record.latents, []
    if spec.clips and (problem := ending_problem(".mp4")):
        found.append(f"--preview_latent_every: {problem}")
    if file is None:
        if not record.latent_colours:
            found.append(
                f"--preview_latent_every: there is no table of colours for the {spec.channels} channels of"
                f" {record.title}'s autoencoder; needed: a tiny autoencoder of it (--preview_vae FILE)"
            )
        return found
    if not Path(file).is_file():
        return [*found, f"--preview_vae is {file}: there is no such file"]
    try:
        decoder = load_tiny_decoder(file)
    except AtelierError as error:
        return [*found, f"--preview_vae: {error}"]
    kind = "TAEHV, for clips" if decoder.is_clips else "TAESD, for pictures"
    if decoder.is_clips != (spec.temporal_stride is not None):
        wanted = "TAESD" if decoder.is_clips else "TAEHV"
        found.append(f"--preview_vae is {file}, a {kind}; needed for {record.title}: {wanted}")
    if decoder.channels != spec.channels:
        found.append(
            f"--preview_vae is {file}, which reads {decoder.channels} channels; the latents of {record.title} have"
            f" {spec.channels}"
        )
    return found
