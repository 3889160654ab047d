"""What captioning models share: options, pixels as they take them, the loop over a folder, caption files."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from library.core.errors import CheckpointError
from library.core.options import Config, option
from library.scripts.folder_tool import (
    DetailOptions,
    Tally,
    WriteOptions,
    batches,
    folder_problem,
    images_of,
    logger,
    read_ahead,
)

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
LEGACY_ENDINGS = (".pth", ".pt", ".ckpt", ".bin")


@dataclass(frozen=True, kw_only=True)
class FolderOptions:
    """Images and captions"""

    train_data_dir: str | None = option(None, help="folder of the images")
    caption_extension: str = option(
        ".caption", flags=("--caption_extention",), help="ending of the caption files, beside the images"
    )
    recursive: bool = option(False, help="images in folders within the folder too")
    batch_size: int = option(1, help="images that go through the model at a time")
    max_data_loader_n_workers: int | None = option(None, help="images that are read at a time")


def folder_problems(config: Config) -> Iterator[str]:
    options = config[FolderOptions]
    found = folder_problem("train_data_dir", options.train_data_dir)
    if found:
        yield found
    if options.batch_size < 1:
        yield f"--batch_size is {options.batch_size}; needed: 1 or more"
    found = ending_problem(options.caption_extension)
    if found:
        yield found


def ending_problem(ending: str) -> str | None:
    """Why files beside images cannot end like this, or None."""
    from library.dataset.media_utils import image_extensions

    if f".{ending.lower().lstrip('.')}" in image_extensions():
        return f"--caption_extension is '{ending}', with which text would replace images; needed: another ending, e.g. .txt"
    return None if ending.strip(".") else f"--caption_extension is '{ending}'; needed: an ending, e.g. .txt"


def model_problem(name: str, model: str | None) -> str | None:
    """Why a text cannot be a model for transformers: a folder with its files, or the name of one on the hub."""
    if not model:
        return f"--{name} is missing; name a folder of a model, or a model of the hub"
    if "://" in model or model.lower().endswith(LEGACY_ENDINGS) or os.path.isfile(model):
        return (
            f"--{name} is {model}, a single file; needed: the folder of a model in the layout of transformers "
            "(config.json, weights,"
            " tokenizer), or its name on the hub"
        )
    if os.path.isdir(model):
        return (
            None
            if os.path.isfile(os.path.join(model, "config.json"))
            else f"--{name} is {model}, a folder without a config.json"
        )
    is_name = model.count("/") <= 1 and not model.startswith((".", "/", "~"))
    return None if is_name else f"--{name} is {model}, which does not exist"


def caption_path(image: str, extension: str) -> str:
    return os.path.splitext(image)[0] + (extension if extension.startswith(".") else f".{extension}")


def images_to_caption(config: Config, tally: Tally) -> list[str]:
    """Images of the folder, but for those that have a caption already."""
    options, found, seen = config[FolderOptions], [], set()
    for path in images_of(options.train_data_dir, options.recursive):
        target = caption_path(path, options.caption_extension)
        if os.path.exists(target) and not config[WriteOptions].overwrite:
            tally.skip(f"whose {options.caption_extension} file exists; --overwrite makes it anew")
        elif target in seen:
            tally.skip("sharing its name, and so its caption, with another image")
        else:
            found.append(path)
        seen.add(target)
    return found


def caption_images(
    images: Sequence[str], config: Config, tally: Tally, prepare: Callable[[np.ndarray], Tensor],
    describe: Callable[[Sequence[str], Tensor], Sequence[str]],
) -> None:
    """Write a caption for each image: `prepare` gives its pixels [3, H, W], `describe` the captions of a batch [B, 3,
    H, W]."""
    import torch

    from library.core.atomic_file import write_text_atomically
    from library.dataset.image_files import read_on_white

    options = config[FolderOptions]
    pixels = read_ahead(
        lambda path: prepare(read_on_white(path)),
        images,
        tally,
        what="captions",
        workers=options.max_data_loader_n_workers,
    )
    for batch in batches(pixels, options.batch_size):
        paths = [path for path, _ in batch]
        for path, caption in zip(paths, describe(paths, torch.stack([image for _, image in batch]))):
            if not caption:
                tally.fail(f"{path}: the model gives no words")
                continue
            write_text_atomically(caption_path(path, options.caption_extension), f"{caption}\n")
            tally.done += 1
            if config[DetailOptions].debug:
                logger.info("%s: %s", path, caption)


# -- models ------------------------------------------------------------------------------------------------------------


def load_model(class_name: str, model: str, option_name: str) -> tuple[Any, Any]:
    """(model, tokenizer) of a folder or of the hub, on the best device. CheckpointError when they cannot be loaded."""
    import transformers

    from library.device_utils import get_preferred_device
    from library.huggingface_util import is_hub_reachable

    is_local = os.path.isdir(model) or not is_hub_reachable()
    try:
        loaded = getattr(transformers, class_name).from_pretrained(model, local_files_only=is_local)
        tokenizer = transformers.AutoTokenizer.from_pretrained(model, local_files_only=is_local)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0]
        raise CheckpointError(f"--{option_name} is {model}, which cannot be loaded: {first}") from error
    return loaded.to(get_preferred_device()).eval(), tokenizer


def normalized(image: np.ndarray, size: int, *, whole: bool) -> Tensor:
    """[3, size, size] of [H, W, 3], as CLIP's normalization has it; bicubic. `whole`: the image is squeezed into the
    square, else its middle is cut from an image whose shorter side has the size."""
    import numpy as np
    import torch
    from PIL import Image

    picture = Image.fromarray(image)
    if whole:
        picture = picture.resize((size, size), Image.Resampling.BICUBIC)
    else:
        factor = size / min(picture.size)
        picture = picture.resize(
            tuple(max(round(side * factor), size) for side in picture.size), Image.Resampling.BICUBIC
        )
        left, top = ((side - size) // 2 for side in picture.size)
        picture = picture.crop((left, top, left + size, top + size))
    values = (np.asarray(picture, np.float32) / 255 - np.array(CLIP_MEAN, np.float32)) / np.array(CLIP_STD, np.float32)
    return torch.from_numpy(values).permute(2, 0, 1).contiguous()
