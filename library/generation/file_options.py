"""How made pictures are written, and from which file the settings of one are taken: options that all scripts have."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from library.core.errors import ConfigError
from library.core.options import option

IMAGE_FORMATS = ("png", "webp", "jpeg")
ENDINGS = {"png": ".png", "webp": ".webp", "jpeg": ".jpg"}
DEFAULT_QUALITY = 95


def wildcard_folder_problem(folder: str | None) -> str | None:
    """What is wrong with the value of --prompt_wildcards; None where it is a folder, or not given."""
    if folder is None or (folder and Path(folder).is_dir()):
        return None
    return f"--prompt_wildcards is '{folder}'; needed: a folder with files NAME.txt"


@dataclass(frozen=True, kw_only=True)
class PictureFileOptions:
    """Picture files"""

    image_format: str = option("png", choices=IMAGE_FORMATS, help="kind of the picture files")
    image_quality: int = option(
        DEFAULT_QUALITY, least=1, most=100, help="quality of --image_format webp and jpeg; webp of 100 is lossless"
    )
    no_metadata: bool = option(
        False, help="do not write prompt and settings into the files that are made", flags=("--no-metadata",)
    )
    metadata_file_names: bool = option(
        False, help="write files that the settings name without their folders, which tell of your disk; --from_metadata"
        " then wants these files on the command line",
    )  # fmt: skip
    from_metadata: str | None = option(
        None, help="make what this picture, video or file of latents was made with: its settings are taken, and options"
        " that stand beside it win",
    )  # fmt: skip

    @property
    def picture_ending(self) -> str:
        return ENDINGS[self.image_format]

    def idle_file_options(self, explicit: Collection[str], writes_pictures: bool = True) -> list[str]:
        """Lines about options that were written and change nothing."""
        given = [name for name in ("image_format", "image_quality") if name in explicit]
        if not writes_pictures:
            return [f"--{name} has no effect: no pictures are written" for name in given]
        if "image_quality" in given and self.image_format == "png":
            return ["--image_quality has no effect: PNG keeps every pixel; --image_format webp and jpeg have a quality"]
        return []

    def raise_file_problems(self) -> None:
        """ConfigError for what contradicts itself."""
        if self.no_metadata and self.metadata_file_names:
            raise ConfigError("--metadata_file_names and --no_metadata are both given; leave one out")
