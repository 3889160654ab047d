"""What making an image has in common in all families: the start and the picture; and guidance of flow models."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from library.device_utils import to_device

if TYPE_CHECKING:
    from PIL import Image

NUM_TRAIN_TIMESTEPS = 1000.0

Conditioning = Mapping[str, Tensor]
Sampler = Callable[[Callable[[Tensor, Tensor], Tensor], Tensor, Tensor, Callable[[], Tensor]], Tensor]
"""(velocity function, latents, sigmas, noise function) -> latents; library/training/inference_samplers"""


def step_draws(seed: int) -> torch.Generator:
    """Where samplers that add noise in their steps take that of one picture or clip from."""
    return torch.Generator("cpu").manual_seed(seed + 1)


def start_noise(seed: int, *shape: int) -> Tensor:
    """Standard normal latents [1, C, H, W] (or of any `shape`): drawn on the CPU in float32, so that a seed means one
    picture everywhere."""
    return torch.randn((1, *shape), generator=torch.Generator("cpu").manual_seed(seed))


def on_device(conditioning: Conditioning, device: torch.device) -> Conditioning:
    """Texts where the denoiser reads them at every step; what is no tensor, or not there, stays."""

    def brought(value: Any) -> Any:
        if isinstance(value, list):
            return [brought(one) for one in value]
        return to_device(value, device) if isinstance(value, Tensor) else value

    return {name: brought(value) for name, value in conditioning.items()}


def guided(negative: Tensor, positive: Tensor, cfg_scale: float) -> Tensor:
    """Of the velocities for both prompts the one that goes `cfg_scale` times as far from the negative one."""
    return negative + cfg_scale * (positive - negative)


def with_spread(guided: Tensor, positive: Tensor, share: float) -> Tensor:
    """`guided` with its standard deviation pulled towards that of `positive`: 0 not at all, 1 all the way.

    Source: arXiv 2305.08891, section 3.4.
    """
    if not share:
        return guided
    axes = tuple(range(1, positive.ndim))
    rescaled = guided * (positive.std(dim=axes, keepdim=True) / guided.std(dim=axes, keepdim=True))
    return share * rescaled + (1 - share) * guided


def one_batch(texts: Sequence[Conditioning]) -> Conditioning:
    """The conditioning of several texts as one batch; what differs in length is a list, with one tensor for each."""

    def joined(parts: Sequence[Any]) -> Any:
        return [row for part in parts for row in part] if isinstance(parts[0], list) else torch.cat(tuple(parts))

    return {name: joined([text[name] for text in texts]) for name in texts[0]}


def guided_velocity(
    predict: Callable[[Tensor, Tensor, Conditioning], Tensor],
    conditioning: Conditioning,
    negative: Conditioning | None,
    cfg_scale: float,
    combine: Callable[..., Tensor] | None = None,
    *,
    neutral: Conditioning | None = None,
    apart: bool = False,
) -> Callable[[Tensor, Tensor], Tensor]:
    """A function (latents [B, C, ...], sigma []) -> velocity, float32. `predict` takes latents, times on the 0..1000
    scale and conditioning. With a negative prompt both run as one batch, negative first, and `combine` makes one
    velocity of (v_neg, v_pos): `guided` by the scale when None. With a `neutral` one it runs beside them, and `combine`
    takes (v_neg, v_pos, v_neutral). `apart`: one after the other, in less memory."""
    texts = [text for text in (negative, conditioning, None if negative is None else neutral) if text is not None]
    together = len(texts) > 1 and not apart
    copies, count = len(texts) if together else 1, len(texts)
    if together:
        texts = [one_batch(texts)]
    combine = combine or (lambda negative_part, positive_part: guided(negative_part, positive_part, cfg_scale))

    def velocity(latents: Tensor, sigma: Tensor) -> Tensor:
        rows = copies * len(latents)
        times = torch.full((rows,), float(sigma) * NUM_TRAIN_TIMESTEPS, device=latents.device, dtype=torch.float32)
        given = torch.cat([latents] * copies)
        predicted = torch.cat([predict(given, times, text) for text in texts]).float()
        return predicted if negative is None else combine(*predicted.chunk(count))

    return velocity


@contextmanager
def computing_on(part: Any, device: torch.device) -> Iterator[None]:
    """Inside, a part that waits elsewhere (a VAE on the CPU) is on the device, and computes in the type that was chosen
    for it; then it goes back."""
    home = part.device
    part.to(device)
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        part.to(home)


@torch.no_grad()
def decode_to_frames(vae: Any, latents: Tensor) -> list[Image.Image]:
    """The frames of latents [1, C, h, w] (one, a picture) or [1, C, F, h, w] as PIL images. A VAE that waits on the CPU
    computes where the latents are and goes back."""
    with computing_on(vae, latents.device):
        pixels = vae.decode(latents)  # [1, 3, H, W] or [1, 3, F, H, W]
    return images_of(pixels if pixels.ndim == 4 else pixels[0].movedim(1, 0))


def decode_to_image(vae: Any, latents: Tensor) -> Image.Image:
    """The picture of latents: of several frames the first."""
    return decode_to_frames(vae, latents)[0]


def images_of(pixels: Tensor) -> list[Image.Image]:
    """PIL images of pixels [B, 3, H, W]; what is beyond -1..1 is cut off."""
    from PIL import Image

    values = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return [Image.fromarray(value) for value in values.permute(0, 2, 3, 1).cpu().numpy()]
