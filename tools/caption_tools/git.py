"""Captions by GIT."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from library.core.options import Config, option
from library.scripts.folder_tool import DetailOptions, FolderTool, Tally, WriteOptions
from library.scripts.tool_script import tool_exit_code
from library.training.option_groups import ConsoleOptions
from tools.caption_tools.captioning import (
    FolderOptions,
    caption_images,
    folder_problems,
    images_to_caption,
    load_model,
    model_problem,
    normalized,
)
from tools.caption_tools.text_rules import without_written_words

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class GitOptions:
    """GIT"""

    model_id: str = option(
        "microsoft/git-large-textcaps",
        help="folder of a GIT model in the layout of transformers, or its name on the hub",
    )
    max_length: int = option(50, help="most tokens of a caption")
    remove_words: bool = option(
        False, help='leave out phrases about letters in the picture, such as: with the word "x" on it'
    )


CLASSES = (FolderOptions, GitOptions, DetailOptions, WriteOptions, ConsoleOptions)
TOOL = FolderTool("Write captions beside images by GIT", CLASSES, ("train_data_dir",))


def main(argv: Sequence[str] | None = None) -> int:
    return tool_exit_code(run, argv)


def problems_of(config: Config) -> Iterator[str]:
    yield from folder_problems(config)
    found = model_problem("model_id", config[GitOptions].model_id)
    if found:
        yield found
    if config[GitOptions].max_length < 1:
        yield f"--max_length is {config[GitOptions].max_length}; needed: 1 or more"


def run(argv: Sequence[str] | None = None) -> None:
    config = TOOL.read(argv, problems_of)
    options, tally = config[GitOptions], Tally()
    images = images_to_caption(config, tally)
    if images:
        model, tokenizer = load_model("GitForCausalLM", options.model_id, "model_id")
        size = model.config.vision_config.image_size

        def describe(paths: Sequence[str], pixels: Tensor) -> list[str]:
            import torch

            with torch.no_grad():
                tokens = model.generate(
                    pixel_values=pixels.to(model.device, model.dtype), max_length=options.max_length, do_sample=False
                )
            texts = [text.strip() for text in tokenizer.batch_decode(tokens, skip_special_tokens=True)]
            return [without_written_words(text) for text in texts] if options.remove_words else texts

        caption_images(images, config, tally, lambda image: normalized(image, size, whole=False), describe)
    tally.finish("captions")
