"""Options of the cache tools that the known video trainer has for all of its families, beside those of a family."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from library.core.options import LARGEST_BATCH, Config, Ignored, equivalent_option, option, option_fields

DEBUG_MODES = ("image", "console", "video")
BACKGROUNDS = ("black", "red", "green", "yellow", "blue", "magenta", "cyan", "white")
_AT_ONCE = "--num_workers: captions are read at once, in this process"


@dataclass(frozen=True, kw_only=True)
class ClipCacheOptions:
    """Filling caches of clips"""

    batch_size: int | None = option(
        None, help="samples that are encoded together; default: one, of captions the dataset's batch size", least=1,
        most=LARGEST_BATCH,
    )
    device: str | None = option(None, help="where models run, e.g. cpu or cuda:1; default: the first GPU there is")
    keep_cache: bool = option(
        False, help="keep cache files that this data set made and no longer has, of videos that are gone, say"
    )


@dataclass(frozen=True, kw_only=True)
class ClipLatentsOptions:
    """Reading and looking at clips"""

    num_workers: int | None = option(
        None, help="threads that read files; default: one for each core, and at most eight", least=1, most=1024
    )
    debug_mode: str | None = option(
        None, choices=DEBUG_MODES,
        help="show what would be encoded, and encode nothing: in a window, as text in the console, or as files beside"
        " the caches",
    )
    console_width: int = option(80, help="characters of a line, with --debug_mode console", least=8, most=1000)
    console_back: str | None = option(
        None, choices=BACKGROUNDS, help="colour behind the characters, with --debug_mode console"
    )
    console_num_images: int | None = option(
        None, help="samples of each dataset that --debug_mode console shows without asking; default: all, one by one",
        least=1,
    )
    disable_cudnn_backend: bool = option(False, help="compute without cuDNN, where it fails (some AMD GPUs)")


@dataclass(frozen=True, kw_only=True)
class ClipTextOptions:
    """Reading captions"""

    num_workers: int | None = equivalent_option(None, help="threads that read captions", reason=_AT_ONCE)


def idle(config: Config) -> list[Ignored]:
    """What was written for a way to look at samples that is not chosen."""
    if ClipLatentsOptions not in config.classes() or config[ClipLatentsOptions].debug_mode == "console":
        return []
    names = [name for name in option_fields(ClipLatentsOptions) if name.startswith("console_")]
    return [
        Ignored(f"--{name}", "it belongs to --debug_mode console") for name in names if name in config.explicit
    ]


OPTIONS: Mapping[str, tuple[type, ...]] = {
    "latents": (ClipCacheOptions, ClipLatentsOptions), "text": (ClipCacheOptions, ClipTextOptions)
}
"""what is cached -> groups of its tool"""
STANDS_FOR: Mapping[str, Mapping[str, Mapping[str, object]]] = {
    "latents": {"batch_size": {"vae_batch_size": int}}, "text": {"batch_size": {"text_encoder_batch_size": int}}
}
"""what is cached -> as ModelFamily.stands_for"""
