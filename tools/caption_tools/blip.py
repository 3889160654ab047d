"""Captions by BLIP."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from library.core.options import LARGEST_SEED, Config, option
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

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

PROMPT = "a picture of "
"""with which the model was trained to begin a caption; it is not part of the caption"""


@dataclass(frozen=True, kw_only=True)
class BlipOptions:
    """BLIP"""

    caption_weights: str = option(
        "Salesforce/blip-image-captioning-large",
        help="folder of a BLIP model in the layout of transformers, or its name on the hub",
    )
    beam_search: bool = option(False, help="the likeliest captions by beams; without it captions are drawn")
    num_beams: int = option(1, help="beams with --beam_search")
    top_p: float = option(0.9, help="share of the likeliest words from which is drawn")
    max_length: int = option(75, help="most tokens of a caption")
    min_length: int = option(5, help="least tokens of a caption")
    seed: int = option(42, help="number that fixes the draws", most=LARGEST_SEED)


CLASSES = (FolderOptions, BlipOptions, DetailOptions, WriteOptions, ConsoleOptions)
TOOL = FolderTool("Write captions beside images by BLIP", CLASSES, ("train_data_dir",))


def main(argv: Sequence[str] | None = None) -> int:
    return tool_exit_code(run, argv)


def problems_of(config: Config) -> Iterator[str]:
    yield from folder_problems(config)
    options = config[BlipOptions]
    found = model_problem("caption_weights", options.caption_weights)
    if found:
        yield found
    if options.num_beams < 1:
        yield f"--num_beams is {options.num_beams}; needed: 1 or more"
    if options.num_beams > 1 and not options.beam_search:
        yield f"--num_beams is {options.num_beams} without --beam_search; add it, or leave --num_beams out"
    if not 0 < options.top_p <= 1:
        yield f"--top_p is {options.top_p}; needed: above 0, up to 1"
    if not 0 <= options.min_length <= options.max_length or options.max_length < 1:
        yield f"--min_length is {options.min_length} and --max_length is {options.max_length}; needed: 0 <= min_length <= max_length, from 1 up"


def run(argv: Sequence[str] | None = None) -> None:
    config = TOOL.read(argv, problems_of)
    options, tally = config[BlipOptions], Tally()
    images = images_to_caption(config, tally)
    if images:
        captioner = Captioner(options)
        caption_images(images, config, tally, captioner.prepare, captioner.describe)
    tally.finish("captions")


class Captioner:
    """A loaded model. Draws depend on the seed and the first image of a batch alone."""

    def __init__(self, options: BlipOptions) -> None:
        self.options = options
        self.model, self.tokenizer = load_model(
            "BlipForConditionalGeneration", options.caption_weights, "caption_weights"
        )
        self.size = self.model.config.vision_config.image_size

    def prepare(self, image: np.ndarray) -> Tensor:
        return normalized(image, self.size, whole=True)

    def describe(self, paths: Sequence[str], pixels: Tensor) -> list[str]:
        """Captions of [B, 3, H, W]."""
        import torch

        from library.core.keyed_random import isolated_rng, key_seed

        options = self.options
        ids = self.tokenizer([PROMPT.strip()] * len(paths), return_tensors="pt").input_ids.to(
            self.model.device
        )  # [B, L]
        how = (
            {"num_beams": options.num_beams, "do_sample": False}
            if options.beam_search
            else {"do_sample": True, "top_p": options.top_p}
        )
        # generate() takes no generator of its own
        with isolated_rng(key_seed(options.seed, "caption", os.path.basename(paths[0]))), torch.no_grad():
            tokens = self.model.generate(
                pixel_values=pixels.to(self.model.device, self.model.dtype), input_ids=ids,
                max_length=options.max_length, min_length=options.min_length, **how,
            )  # fmt: skip
        texts = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [without_prompt(text) for text in texts]


def without_prompt(text: str) -> str:
    text = text.strip()
    return text[len(PROMPT) :].strip() if text.startswith(PROMPT) else text
