"""Pictures that control the making of others, read at the size of what is made."""

from __future__ import annotations

import os

import numpy
import torch
from PIL import Image

from library.components.control_models import Control, GuidedBy
from library.core.errors import ConfigError
from library.dataset.media_utils import ImageFileError, decode_image


def open_picture(path: str | os.PathLike, size_wh: tuple[int, int] | None = None) -> Image.Image:
    """RGB, read as control pictures of a dataset are (deep and turned ones too), resized to a size where one is given.
    ConfigError when it cannot be read."""
    try:
        image = Image.fromarray(decode_image(path))  # [H, W, 3]
    except ImageFileError as error:
        raise ConfigError(f"the control picture {error}") from error
    return image if size_wh in (None, image.size) else image.resize(size_wh, Image.Resampling.LANCZOS)


def control_of_picture(
    net: torch.nn.Module, path: str | os.PathLike, size_wh: tuple[int, int], value_range: tuple[float, float]
) -> Control:
    """What one net makes of a picture file, for pictures of a size. ConfigError when the file cannot be read."""
    return Control((GuidedBy(net, picture_tensor(open_picture(path, size_wh), value_range)),))


def picture_tensor(image: Image.Image, value_range: tuple[float, float]) -> torch.Tensor:
    """[1, 3, H, W] float32, black and white at the ends of the range."""
    low, high = value_range
    values = torch.from_numpy(numpy.asarray(image, dtype=numpy.float32).copy()) / 255  # [H, W, 3]
    return (values * (high - low) + low).permute(2, 0, 1)[None]
