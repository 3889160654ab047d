"""Images at twice their size: a filter, then a network that sharpens their latents, then the autoencoder's decoder."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from library.core.errors import ConfigError
from library.core.options import Config, option
from library.scripts.folder_tool import DetailOptions, FolderTool, Tally, WriteOptions, logger, read_ahead
from library.scripts.tool_script import DTYPES, dtype_problem, tool_exit_code
from library.training.option_groups import ConsoleOptions

if TYPE_CHECKING:
    import numpy as np
    import torch

FACTOR = 2


@dataclass(frozen=True, kw_only=True)
class UpscaleOptions:
    """Enlarging"""

    vae_path: str | None = option(None, help="autoencoder of Stable Diffusion, or a checkpoint that holds one")
    sdxl: bool = option(False, help="the autoencoder is that of SDXL")
    weights: str | None = option(None, help="weights of the network that sharpens latents")
    image_pattern: str | None = option(None, help='images, as a pattern in quotation marks, e.g. "images/*.png"')
    output_dir: str = option(".", help="folder for the results, named <stem>_upscaled with the image's extension")
    batch_size: int = option(4, help="images of one size that go through the network at a time")
    vae_batch_size: int = option(1, help="images that go through the autoencoder at a time")
    precision: str = option("float", help="number format of both networks: float, bf16 or fp16")


CLASSES = (UpscaleOptions, DetailOptions, WriteOptions, ConsoleOptions)
TOOL = FolderTool("Enlarge images to twice their size by a network that sharpens their latents", CLASSES)


def main(argv: Sequence[str] | None = None) -> int:
    return tool_exit_code(run, argv)


def problems_of(config: Config) -> Iterator[str]:
    options = config[UpscaleOptions]
    for name in ("vae_path", "weights"):
        path = getattr(options, name)
        if not path:
            yield f"--{name} is missing; name a file"
        elif not os.path.exists(path):
            yield f"--{name} is {path}, which does not exist"
    if not options.image_pattern:
        yield '--image_pattern is missing; name images, e.g. "images/*.png"'
    elif not found_images(options.image_pattern):
        yield f"--image_pattern is {options.image_pattern}, which fits no image file"
    for name in ("batch_size", "vae_batch_size"):
        if getattr(options, name) < 1:
            yield f"--{name} is {getattr(options, name)}; needed: 1 or more"
    if os.path.isfile(options.output_dir):
        yield f"--output_dir is {options.output_dir}, which is a file; name a folder"
    wrong = dtype_problem("precision", options.precision)
    if wrong or DTYPES[options.precision.lower()].startswith("float8"):
        yield (
            wrong
            or f"--precision is {options.precision}; needed: float, bf16 or fp16, as networks do not compute in 8 bits"
        )


def found_images(pattern: str) -> list[str]:
    """Image files that fit a pattern, sorted."""
    from library.dataset.media_utils import image_extensions

    known = image_extensions()
    paths = glob.glob(pattern, recursive=True)
    return sorted(path for path in paths if os.path.isfile(path) and os.path.splitext(path)[1].lower() in known)


def run(argv: Sequence[str] | None = None) -> None:
    config = TOOL.read(argv, problems_of)
    tally = Tally()
    wanted = wanted_images(config, tally)
    if wanted:
        enlarge(wanted, config, tally)
    tally.finish("enlarged images")


def wanted_images(config: Config, tally: Tally) -> dict[str, str]:
    """Image -> result, of those whose result is to be made. ConfigError when two images would share one."""
    options, wanted, taken = config[UpscaleOptions], {}, set()
    for path in found_images(options.image_pattern):
        stem, extension = os.path.splitext(os.path.basename(path))
        target = os.path.join(options.output_dir, f"{stem}_upscaled{extension}")
        if target in taken:
            raise ConfigError(
                f"two images are called {stem}{extension}, and so would their results; name their folders one by one"
            )
        taken.add(target)
        if os.path.exists(target) and not config[WriteOptions].overwrite:
            tally.skip("whose result exists; --overwrite makes it anew")
        else:
            wanted[path] = target
    return wanted


def load_models(options: UpscaleOptions) -> tuple[Any, Any]:
    """(autoencoder, upscaler), on the best device there is. CheckpointError for files of other models."""
    import torch

    from library.components.latent_upscaler_utils import load_upscaler
    from library.core.registry import import_target
    from library.device_utils import get_preferred_device

    load_vae = import_target("library.sdxl_utils:load_vae_sdxl" if options.sdxl else "library.sd_utils:load_vae_sd")
    dtype, device = getattr(torch, DTYPES[options.precision.lower()]), get_preferred_device()
    upscaler = load_upscaler(options.weights).to(device, dtype)
    return load_vae(options.vae_path, dtype, device).eval(), upscaler


def enlarge(wanted: dict[str, str], config: Config, tally: Tally) -> None:
    """Images of one size together, in the order in which they come."""
    from library.dataset.image_files import read_on_white, write_image

    options = config[UpscaleOptions]
    vae, upscaler = load_models(options)
    by_size: dict[tuple[int, ...], list[tuple[str, Any]]] = {}

    def finish(batch: list[tuple[str, Any]]) -> None:
        for (path, _), result in zip(batch, doubled([image for _, image in batch], vae, upscaler, options)):
            write_image(wanted[path], result)
            tally.done += 1
            if config[DetailOptions].debug:
                logger.info("%s: %s", path, wanted[path])

    for path, image in read_ahead(read_on_white, list(wanted), tally, what="enlarging"):
        batch = by_size.setdefault(image.shape, [])
        batch.append((path, image))
        if len(batch) == options.batch_size:
            finish(by_size.pop(image.shape))
    for batch in by_size.values():
        finish(batch)


def doubled(images: Sequence[np.ndarray], vae: Any, upscaler: Any, options: UpscaleOptions) -> list[np.ndarray]:
    """[H, W, 3] of one size -> [2H, 2W, 3]. Sides that the autoencoder cannot cut into latents are padded by their
    border."""
    import numpy as np
    import torch
    from PIL import Image

    from library.components.latent_upscaler_utils import STRIDE

    height, width = images[0].shape[:2]
    step = STRIDE // FACTOR
    padding = ((0, -height % step), (0, -width % step), (0, 0))
    padded = [Image.fromarray(np.pad(image, padding, mode="edge")) for image in images]
    size_wh = (padded[0].width * FACTOR, padded[0].height * FACTOR)
    latents = upscaler.upscale(vae, padded, None, None, *size_wh, options.batch_size, options.vae_batch_size)
    with torch.no_grad():
        pixels = torch.cat(
            [
                decoded(vae, latents[at : at + options.vae_batch_size])
                for at in range(0, len(latents), options.vae_batch_size)
            ]
        )
    values = (
        ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    )  # [B, H, W, 3]
    return [value[: height * FACTOR, : width * FACTOR] for value in values]


def decoded(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """[B, 3, H, W]. ConfigError when the autoencoder overflowed."""
    import torch

    pixels = vae.decode(latents).float()
    if not bool(torch.isfinite(pixels).all()):
        raise ConfigError(
            "a result has values that are not finite; the autoencoder overflows: leave --precision out, or use bf16"
        )
    return pixels
