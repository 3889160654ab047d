"""Reading, checking, resizing, cropping and augmenting images. Random parts take their numbers or a generator.

Arrays are uint8 [H, W, 3] (RGB) or [H, W, 4] (RGBA); sizes are (width, height), after the EXIF orientation.
"""

from __future__ import annotations

import os
import random
import stat
import struct
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from library.core.errors import ConfigError
from library.generation.picture_files import allow_long_texts

Size = tuple[int, int]

ORIENTATION_TAG = 0x0112
TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SWAPPED = (5, 6, 7, 8)
DEEP_MODES = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")
PILLOW_FILTERS = {"lanczos": Image.Resampling.LANCZOS, "box": Image.Resampling.BOX}
OPENCV_FILTERS = {
    "nearest": "INTER_NEAREST_EXACT", "bilinear": "INTER_LINEAR", "linear": "INTER_LINEAR",
    "bicubic": "INTER_CUBIC", "cubic": "INTER_CUBIC", "area": "INTER_AREA",
}
FORMATS = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
PLUGINS = {".avif": ("pillow_avif",), ".jxl": ("pillow_jxl", "jxlpy")}

COLOR_PROBABILITY = 0.33
HUE_RANGE = 8.0  # in steps of 2 degrees, the unit of OpenCV's 8-bit hue
GAMMA_RANGE = (0.95, 1.05)


class ImageFileError(ConfigError):
    """An image file that cannot be used; the message names the file and the reason."""


def image_extensions() -> frozenset[str]:
    """Suffixes of the image files that can be read here, in lower case. AVIF and JPEG XL need support in Pillow or a
    plug-in."""
    known = set(FORMATS)
    registered = Image.registered_extensions()
    for extension, modules in PLUGINS.items():
        if extension in registered or any(_importable(module) for module in modules):
            known.add(extension)
    return frozenset(known)


def _importable(module: str) -> bool:
    try:
        __import__(module)
    except ImportError:
        return False
    return True


# ---------------------------------------------------------------- headers


def image_size(path: str | Path) -> Size:
    """Size of the image as shown, from its header. Raises ImageFileError."""
    with opened_image(path) as image:
        return shown_size(image, path)


def shown_size(image: Image.Image, path: str | Path) -> Size:
    width, height = image.size
    if width < 1 or height < 1:
        raise ImageFileError(f"{path} has the size {width}x{height}")
    return (height, width) if _orientation(image, path) in SWAPPED else (width, height)


def _orientation(image: Image.Image, path: str | Path) -> int:
    """The EXIF orientation, 1 when there is none. The answer is the same before and after the pixels are read."""
    if image.format == "PNG" and not _png_has_exif(path):
        return 1  # Pillow would decode the whole file to look for it
    try:
        orientation = image.getexif().get(ORIENTATION_TAG, 1)
    except (
        ValueError,
        TypeError,
        SyntaxError,
        OSError,
        struct.error,
    ):  # a damaged EXIF block does not spoil the picture
        return 1
    return orientation if orientation in TRANSPOSITIONS else 1


def _png_has_exif(path: str | Path) -> bool:
    with open(path, "rb") as file:
        file.seek(8)
        while len(header := file.read(8)) == 8:
            length, name = struct.unpack(">I4s", header)
            if name in (b"eXIf", b"IEND"):
                return name == b"eXIf"
            file.seek(length + 4, 1)
    return False


class opened_image:
    """Open an image and turn what Pillow raises, while opening or reading, into an ImageFileError that names the
    file."""

    def __init__(self, path: str | Path) -> None:
        self.path = path
        self.image: Image.Image | None = None

    def __enter__(self) -> Image.Image:
        allow_long_texts()
        try:
            status = os.stat(self.path)
            if not stat.S_ISREG(status.st_mode):
                raise ImageFileError(f"{self.path} is a folder, a pipe or a device; the file of an image is needed")
            if status.st_size == 0:
                raise ImageFileError(f"{self.path} is an empty file (0 bytes)")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                self.image = Image.open(self.path)
            return self.image
        except ImageFileError:
            raise
        except Exception as error:
            raise self._named(error) from error

    def __exit__(self, kind, error, traceback) -> None:
        if self.image is not None:
            self.image.close()
        if isinstance(error, Exception) and not isinstance(error, (ImageFileError, MemoryError)):
            raise self._named(error) from error

    def _named(self, error: Exception) -> Exception:
        if isinstance(error, FileNotFoundError):
            return ImageFileError(f"{self.path} does not exist")
        if isinstance(error, UnidentifiedImageError):
            return ImageFileError(f"{self.path} is not an image that can be read, or its header is damaged")
        return ImageFileError(f"{self.path} cannot be read: {error}")


# ---------------------------------------------------------------- pixels


@dataclass(frozen=True)
class ImageCheck:
    """What a full read of an image showed."""

    size: Size
    deep: bool = False
    """more than 8 bits per channel, of which 8 are used"""
    transparent: bool = False
    """has an alpha channel"""
    black: bool = False
    """the red channel is zero everywhere: as a mask it leaves nothing to train on"""
    invisible: bool = False
    """the alpha channel is zero everywhere"""


def verify_image(path: str | Path) -> ImageCheck:
    """Read all pixels of an image. Raises ImageFileError, which names the file, when it is empty, damaged or
    truncated."""
    with opened_image(path) as image:
        size = shown_size(image, path)
        image.load()
        _check_numbers(image, path)
        transparent = has_alpha(image)
        alpha_range = image.convert("RGBA").getchannel("A").getextrema() if transparent else (255, 255)
        bands = image.getextrema()
        first = bands if isinstance(bands[0], (int, float)) else bands[0]
        could_be_black = image.mode in ("P", "CMYK", "LAB", "HSV", "YCbCr") or first[1] == 0
        black = could_be_black and image.convert("RGB").getextrema()[0][1] == 0
        return ImageCheck(size, image.mode in DEEP_MODES, transparent, black, alpha_range[1] == 0)


def has_alpha(image: Image.Image) -> bool:
    return image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info


def count_frames(path: str | Path) -> int:
    """Frames of an animated file; 1 for a picture. Raises ImageFileError."""
    with opened_image(path) as image:
        return getattr(image, "n_frames", 1)


def decode_image(path: str | Path, *, with_alpha: bool = False) -> np.ndarray:
    """Pixels of an image as shown: [H, W, 3] RGB, or [H, W, 4] RGBA (opaque where the file has no alpha).

    The first frame of an animation; palette, grey and CMYK become RGB; 16-bit values keep their upper 8 bits. Without
    `with_alpha` transparency is dropped. Raises ImageFileError.
    """
    return decode_frames(path, 1, with_alpha=with_alpha)[0]


def decode_frames(path: str | Path, count: int, *, with_alpha: bool = False) -> list[np.ndarray]:
    """The first `count` frames of a file, each as `decode_image` gives it."""
    with opened_image(path) as image:
        orientation = _orientation(image, path)
        frames = []
        for number in range(count):
            if number:
                image.seek(number)
            frames.append(_shown_pixels(image, orientation, path, with_alpha))
        return frames


def _shown_pixels(image: Image.Image, orientation: int, path: str | Path, with_alpha: bool) -> np.ndarray:
    image.load()
    _check_numbers(image, path)
    shown: Image.Image = _eight_bit(image) if image.mode in DEEP_MODES else image
    shown = shown.convert("RGBA" if with_alpha else "RGB")
    if orientation in TRANSPOSITIONS:
        shown = shown.transpose(TRANSPOSITIONS[orientation])
    return np.array(shown, dtype=np.uint8)  # [H, W, C]


def _check_numbers(image: Image.Image, path: str | Path) -> None:
    """ImageFileError when pixels of a picture in floating point are no numbers."""
    if image.mode == "F" and not np.isfinite(np.asarray(image)).all():
        raise ImageFileError(f"{path} holds pixels that are no finite numbers (NaN or infinity)")


def _eight_bit(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.float64)
    if image.mode == "F" and values.size and values.max() <= 1.0:
        values = values * 255
    elif image.mode.startswith("I") and values.size and values.max() > 255:
        values = values // 256
    return Image.fromarray(values.clip(0, 255).astype(np.uint8), "L")


def usual_filter(size: Size, wanted: Size) -> str:
    """Area when both sides shrink or stay, else lanczos."""
    return "area" if wanted[0] <= size[0] and wanted[1] <= size[1] else "lanczos"


def resize_image(image: np.ndarray, size: Size, interpolation: str | None = None) -> np.ndarray:
    """Resize [H, W, C] to `size`. Without a name: by `usual_filter`."""
    height, width = image.shape[:2]
    if (width, height) == size:
        return image
    name = interpolation or usual_filter((width, height), size)
    if name in PILLOW_FILTERS:
        # channels that Pillow takes for colour and alpha together would blacken what is transparent
        if image.ndim == 3 and image.shape[2] == 4:
            parts = (resize_image(image[..., :3], size, name), resize_image(image[..., 3], size, name)[..., None])
            return np.concatenate(parts, axis=2)
        return np.array(Image.fromarray(np.ascontiguousarray(image)).resize(size, PILLOW_FILTERS[name]))
    import cv2

    return cv2.resize(np.ascontiguousarray(image), size, interpolation=getattr(cv2, OPENCV_FILTERS[name]))


def resize_and_crop(
    image: np.ndarray, resized: Size, bucket: Size, offset: Size, interpolation: str | None = None
) -> np.ndarray:
    """Scale to `resized`, then cut `bucket` at `offset` (left, top): [H, W, C] -> [bucket_h, bucket_w, C].

    Raises ValueError when the crop does not lie inside the resized image.
    """
    (left, top), (width, height) = offset, bucket
    if left < 0 or top < 0 or left + width > resized[0] or top + height > resized[1]:
        raise ValueError(f"crop {width}x{height} at {offset} does not lie inside {resized[0]}x{resized[1]}")
    return np.ascontiguousarray(resize_image(image, resized, interpolation)[top : top + height, left : left + width])


def random_offset(resized: Size, bucket: Size, rng: random.Random) -> Size:
    """(left, top) of a random crop, uniform over all places."""
    return rng.randint(0, resized[0] - bucket[0]), rng.randint(0, resized[1] - bucket[1])


# ---------------------------------------------------------------- masks and control images


def alpha_to_mask(image: np.ndarray) -> np.ndarray:
    """Weights of the loss from the alpha channel: alpha / 255, float32 [H, W]; all ones without one."""
    if image.shape[2] < 4:
        return np.ones(image.shape[:2], dtype=np.float32)
    return image[..., 3].astype(np.float32) / 255


def conditioning_to_mask(image: np.ndarray) -> np.ndarray:
    """Weights of the loss from a mask image: its red channel / 255, float32 [H, W]."""
    return image[..., 0].astype(np.float32) / 255


def check_conditioning_size(path: str | Path, size: Size, image_wh: Size) -> None:
    """ImageFileError for a mask or control picture whose size is not that of its image."""
    if size != image_wh:
        raise ImageFileError(
            f"{path} is {size[0]}x{size[1]}, its image is {image_wh[0]}x{image_wh[1]}; both must have one size"
        )


# ---------------------------------------------------------------- augmentation


@dataclass(frozen=True)
class ColorChange:
    """A small change of colour: `hue` in steps of 2 degrees, or a gamma."""

    hue: float = 0.0
    gamma: float = 1.0


def draw_color_change(rng: random.Random) -> ColorChange | None:
    """One sample in three gets a change: half of these of hue (+-16 degrees), half of gamma (0.95..1.05)."""
    if rng.random() >= COLOR_PROBABILITY:
        return None
    if rng.random() < 0.5:
        return ColorChange(hue=rng.uniform(-HUE_RANGE, HUE_RANGE))
    return ColorChange(gamma=rng.uniform(*GAMMA_RANGE))


def change_color(image: np.ndarray, change: ColorChange) -> np.ndarray:
    """Apply a colour change to RGB (an alpha channel stays): hue shift, or 255 * (x / 255) ** gamma. uint8 [H, W,
    C]."""
    rgb = image[..., :3].astype(np.float32) / 255
    if change.gamma != 1.0:
        rgb = rgb**change.gamma
    if change.hue != 0.0:
        import cv2

        hsv = cv2.cvtColor(rgb, cv2.COLOR_RGB2HSV)  # hue in degrees, saturation and value in 0..1
        hsv[..., 0] = (hsv[..., 0] + 2 * change.hue) % 360
        rgb = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    changed = (rgb * 255 + 0.5).clip(0, 255).astype(np.uint8)
    return np.concatenate((changed, image[..., 3:]), axis=2)


@dataclass(frozen=True)
class CropGeometry:
    """Scale to `resized`, cut the target at `offset` (left, top)."""

    resized: Size
    offset: Size


def face_crop_geometry(
    size: Size, target: Size, face: tuple[int, int, int, int], aug_range: tuple[float, float], rng: random.Random, *,
    random_crop: bool
) -> CropGeometry:
    """A crop of `target` around a face (centre x, centre y, width, height), in pixels of an image of `size`.

    The scale is drawn so that the short side of the crop is between lo and hi times the face, as far as the image
    allows: it always covers the target and is not enlarged beyond that. The window is centred on the face and shifted a
    little; with `random_crop` by the sum of two uniform numbers, so that places near the face are the more likely.
    """
    face_px, short_px = max(face[2:]), min(target)
    cover = max(target[0] / size[0], target[1] / size[1])
    lowest = max(cover, min(1.0, short_px / (face_px * aug_range[1]) if face_px else 1.0))
    highest = max(lowest, min(1.0, short_px / (face_px * aug_range[0]) if face_px else 1.0))
    scale = rng.uniform(lowest, highest) if lowest < highest else lowest
    resized = tuple(max(int(length * scale + 0.5), wanted) for length, wanted in zip(size, target))
    offset = []
    for length, wanted, centre in zip(resized, target, (face[0] * scale, face[1] * scale)):
        start = int(centre) - wanted // 2
        if random_crop:
            reach = max(length - int(centre), int(centre), 0)
            start += rng.randint(0, reach) + rng.randint(0, reach) - reach
        elif aug_range[0] != aug_range[1]:
            jitter = int(face_px * scale) // 20
            start += rng.randint(-jitter, jitter)
        offset.append(min(max(start, 0), length - wanted))
    return CropGeometry(resized, tuple(offset))  # type: ignore[arg-type]

