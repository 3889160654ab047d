"""Cut images around faces: which cut, by arithmetic alone, and the tool that looks for faces and writes the cuts."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from library.core.errors import ConfigError
from library.core.options import Config, option
from library.scripts.folder_tool import (
    DetailOptions,
    FolderTool,
    Tally,
    WriteOptions,
    folder_problem,
    images_of,
    numbers_problem,
    read_ahead,
)
from library.scripts.tool_script import tool_exit_code
from library.training.option_groups import ConsoleOptions

if TYPE_CHECKING:
    import numpy as np

logger = logging.getLogger("atelier")

PACKAGE = "anime_face_detector"
INSTALL = "pip install anime-face-detector"
LEAST_SCORE = 0.90
EYES = (11, 19)
"""numbers of the detector's key points for the outer ends of both eyes"""


@dataclass(frozen=True, kw_only=True)
class FaceOptions:
    """Faces"""

    src_dir: str | None = option(None, help="folder of the images")
    dst_dir: str | None = option(None, help="folder for the cuts; made when it is missing")
    rotate: bool = option(False, help="turn the image around the face until the eyes are level")
    resize_fit: bool = option(False, help="scale the image so that it just covers --crop_size")
    resize_face_size: int | None = option(
        None, help="scale the image so that the longer side of the face has this many px"
    )
    crop_size: str | None = option(None, help="width,height of the cut around the face; the whole image when not given")
    crop_ratio: str | None = option(None, help="width,height of the cut in sizes of the face, e.g. 4,5")
    min_size: int | None = option(None, help="leave out images with a side shorter than this")
    max_size: int | None = option(None, help="leave out images with a side longer than this")
    multiple_faces: bool = option(False, help="a cut for every face, numbered; without it for the largest alone")


CLASSES = (FaceOptions, DetailOptions, WriteOptions, ConsoleOptions)
TOOL = FolderTool(
    "Cut images around the faces of drawn people; the place of the face goes into the names of the files", CLASSES
)


@dataclass(frozen=True)
class Face:
    """Centre and size in px, and by how many degrees the line of the eyes falls to the right."""

    x: int
    y: int
    width: int
    height: int
    angle: float = 0.0

    @property
    def size(self) -> int:
        return max(self.width, self.height)

    def scaled(self, factor: float) -> Face:
        return dataclasses.replace(
            self, **{name: int(getattr(self, name) * factor + 0.5) for name in ("x", "y", "width", "height")}
        )


Detector = Callable[["np.ndarray"], list[Face]]
"""[H, W, 3] RGB -> faces"""


# -- geometry ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cut:
    """Scale the image to `resized_wh`, cut `size_wh` at `offset` (left, top); `face` is where the face is then."""

    resized_wh: tuple[int, int]
    offset: tuple[int, int]
    size_wh: tuple[int, int]
    face: Face


def pair(text: str | None, kind: type = int) -> tuple | None:
    return None if text is None else tuple(kind(part) for part in text.split(","))


def plan_cut(image_wh: tuple[int, int], face: Face, options: FaceOptions) -> Cut:
    """The cut of one face. All that follows a scaling is measured in the scaled image; a cut never leaves the image."""
    crop = pair(options.crop_size)
    factor = 1.0
    if options.resize_face_size is not None:
        factor = options.resize_face_size / face.size
    if crop is not None:
        cover = max(crop[0] / image_wh[0], crop[1] / image_wh[1])
        factor = cover if options.resize_fit else max(factor, cover)
    resized = tuple(max(int(side * factor + 0.5), 1) for side in image_wh)
    moved = face.scaled(factor) if factor != 1 else face
    if options.crop_ratio is not None:
        crop = tuple(int(moved.size * ratio + 0.5) for ratio in pair(options.crop_ratio, float))
    size = tuple(min(wanted, side) for wanted, side in zip(crop, resized)) if crop is not None else resized
    offset = tuple(
        min(max(centre - length // 2, 0), side - length)
        for centre, length, side in zip((moved.x, moved.y), size, resized)
    )
    moved = dataclasses.replace(moved, x=moved.x - offset[0], y=moved.y - offset[1])
    return Cut(resized, offset, size, moved)  # type: ignore[arg-type]


def levelled(image: np.ndarray, face: Face) -> np.ndarray:
    """[H, W, C] turned around the face, its size kept, so that the eyes are level; what comes in is mirrored at the
    borders."""
    import cv2

    height, width = image.shape[:2]
    turn = cv2.getRotationMatrix2D((face.x, face.y), face.angle, 1.0)
    return cv2.warpAffine(image, turn, (width, height), flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT)


def cut_image(image: np.ndarray, face: Face, options: FaceOptions) -> tuple[np.ndarray, Face]:
    """The cut [h, w, C] around a face of an image [H, W, C], and where the face is in it."""
    from library.dataset.media_utils import resize_and_crop

    if options.rotate:
        image = levelled(image, face)
    plan = plan_cut((image.shape[1], image.shape[0]), face, options)
    return resize_and_crop(image, plan.resized_wh, plan.size_wh, plan.offset), plan.face


def cut_name(stem: str, number: int | None, face: Face) -> str:
    """`<stem>[_NN]_<x>_<y>_<w>_<h>.png`: the place of the face, as training with face crops reads it."""
    numbered = stem if number is None else f"{stem}_{number:02d}"
    return f"{numbered}_{face.x:04d}_{face.y:04d}_{face.width:04d}_{face.height:04d}.png"


# -- detector ----------------------------------------------------------------------------------------------------------


def face_of(box: Sequence[float], points: Sequence[Sequence[float]]) -> Face:
    """A face from its box (left, top, right, bottom, ...) and its key points (x, y, ...)."""
    left, top, right, bottom = (float(value) for value in box[:4])
    (x0, y0), (x1, y1) = ((float(points[eye][0]), float(points[eye][1])) for eye in EYES)
    angle = math.degrees(math.atan2(y1 - y0, x1 - x0))
    return Face(int((left + right) / 2), int((top + bottom) / 2), int(right - left), int(bottom - top), angle)


def load_detector() -> Detector:
    from anime_face_detector import create_detector

    detector = create_detector("yolov3")

    def detect(image: np.ndarray) -> list[Face]:
        found = detector(image[..., ::-1])  # the package takes BGR
        return [face_of(one["bbox"], one["keypoints"]) for one in found if one["bbox"][4] >= LEAST_SCORE]

    return detect


# -- the tool ----------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    return tool_exit_code(run, argv)


def problems_of(config: Config) -> Iterator[str]:
    options = config[FaceOptions]
    found = folder_problem("--src_dir", options.src_dir)
    if found:
        yield found
    if not options.dst_dir:
        yield "--dst_dir is missing; name a folder for the cuts"
    elif os.path.isfile(options.dst_dir):
        yield f"--dst_dir is {options.dst_dir}, which is a file; name a folder"
    elif not found and os.path.realpath(options.src_dir) == os.path.realpath(options.dst_dir):
        yield f"--dst_dir is {options.dst_dir}, the folder of the images; name another one"
    yield from filter(
        None,
        (
            numbers_problem("--crop_size", options.crop_size, 2),
            numbers_problem("--crop_ratio", options.crop_ratio, 2, kind=float),
        ),
    )
    for name in ("resize_face_size", "min_size", "max_size"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            yield f"--{name} is {getattr(options, name)}; needed: 1 or more"
    yield from _pair_problems(options)


def _pair_problems(options: FaceOptions) -> Iterator[str]:
    for first, second in (
        ("resize_fit", "resize_face_size"),
        ("crop_ratio", "resize_face_size"),
        ("crop_ratio", "crop_size"),
    ):
        if getattr(options, first) not in (None, False) and getattr(options, second) is not None:
            yield f"--{first} and --{second} are both given; leave one out"
    if options.resize_fit and options.crop_size is None:
        yield "--resize_fit needs --crop_size: the size to fit"


def package_problem() -> str | None:
    from importlib.util import find_spec

    return (
        None if find_spec(PACKAGE) else f"faces are found by the package {PACKAGE}, which is not installed: {INSTALL}"
    )


def run(argv: Sequence[str] | None = None, make_detector: Callable[[], Detector] | None = None) -> None:
    """`make_detector` stands in for the package, e.g. where faces are known already."""
    config = TOOL.read(
        argv, lambda config: [*problems_of(config), *filter(None, [make_detector is None and package_problem()])]
    )
    options, tally = config[FaceOptions], Tally()
    images = images_of(options.src_dir)
    stems = Counter(os.path.splitext(os.path.basename(path))[0] for path in images)
    shared = sorted(stem for stem, count in stems.items() if count > 1)
    if shared:
        raise ConfigError(
            f"images in {options.src_dir} share a name, and so could their cuts: {', '.join(shared)}; rename them"
        )
    if not options.multiple_faces:
        logger.info("of several faces in an image the largest is cut; --multiple_faces cuts all of them")
    cut_faces(images, config, tally, (make_detector or load_detector)())
    tally.finish("images with faces")


def cut_faces(images: Sequence[str], config: Config, tally: Tally, detect: Detector) -> None:
    from library.dataset.image_files import over_white, read_for

    options = config[FaceOptions]
    for path, image in read_ahead(lambda path: read_for(path, ".png"), images, tally, what="cutting faces"):
        if options.min_size is not None and min(image.shape[:2]) < options.min_size:
            tally.skip("with a side below --min_size")
            continue
        if options.max_size is not None and max(image.shape[:2]) > options.max_size:
            tally.skip("with a side above --max_size")
            continue
        faces = [face for face in detect(over_white(image)) if face.size > 0]
        if not faces:
            tally.skip("without a face")
            logger.log(logging.INFO if config[DetailOptions].debug else logging.DEBUG, "%s: no face", path)
            continue
        if not options.multiple_faces:
            faces = [max(faces, key=lambda face: face.width * face.height)]
        write_cuts(path, image, faces, config, tally)


def write_cuts(path: str, image: np.ndarray, faces: Sequence[Face], config: Config, tally: Tally) -> None:
    from library.dataset.image_files import write_image

    options, written = config[FaceOptions], 0
    stem = os.path.splitext(os.path.basename(path))[0]
    for number, face in enumerate(faces, start=1):
        cut, moved = cut_image(image, face, options)
        target = os.path.join(options.dst_dir, cut_name(stem, number if options.multiple_faces else None, moved))
        if os.path.exists(target) and not config[WriteOptions].overwrite:
            continue
        write_image(target, cut)
        written += 1
        if config[DetailOptions].debug:
            logger.info("%s: %s", path, target)
    if written:
        tally.done += 1
    else:
        tally.skip("whose cuts exist; --overwrite makes them anew")
