"""Sample images while training: when, for which prompts, and where the pictures go."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from library.atomic_file import atomic_path
from library.image_grid import GridCell, image_grid
from library.keyed_random import isolated_rng, key_seed
from library.training.hooks.base import Hook
from library.training.hooks.logging import LoggingHook
from library.training.hooks.losses import gather_objects
from library.training.option_groups import SamplingOptions, SavingOptions
from library.training.sampling_prompts import SamplePrompt, is_sample_due, sample_file_name, sample_suffix, unused_settings

if TYPE_CHECKING:
    from library.strategy_base import StrategySet
    from library.training.families.base import ModelFamily
    from library.training.run import Run, StepOutput

logger = logging.getLogger(__name__)

Conditioning = list[Any]


def texts_of(family: ModelFamily, prompts: Sequence[SamplePrompt]) -> list[str]:
    """Every different text to encode, in order: the prompts and, where CFG is on, the negative ones ("" when not given)."""
    texts: dict[str, None] = {}
    for prompt in map(family.sample_defaults, prompts):
        texts.setdefault(prompt.prompt)
        if family.needs_negative(prompt):
            texts.setdefault(prompt.negative_prompt or "")
    return list(texts)


@torch.no_grad()
def encode_sample_prompts(
    family: ModelFamily, strategies: StrategySet, text_encoders: list[Any], prompts: Sequence[SamplePrompt]
) -> dict[str, Conditioning]:
    """Text -> conditioning of one sample (tensors [1, ...] on the CPU) for every text that sampling needs.

    Made once while the text encoders are in memory. An encoder that is None leaves None at its places.
    """
    encoded: dict[str, Conditioning] = {}
    for text in texts_of(family, prompts):
        tokens, weights = strategies.tokenize.tokenize_prompt(text)
        outputs = strategies.text_encoding.encode(strategies.tokenize, text_encoders, tokens, weights)
        encoded[text] = [None if tensor is None else tensor.detach().cpu() for tensor in outputs]
    return encoded


@dataclasses.dataclass(frozen=True)
class SampleFile:
    """A picture that was written, and what it shows."""

    enum: int
    path: str
    caption: str


class SampleHook(Hook):
    """Makes the images of `--sample_prompts` at first, after every n epochs or after every n steps.

    `conditioning` holds the encoded texts; while text encoders are trained, the texts are encoded anew on each occasion.
    Prompts are dealt over the ranks. Each occasion gives one file per prompt and one sheet with all of them. A prompt
    without a seed gets one that depends on (`seed`, step, prompt), so that a repeated run shows the same pictures.
    """

    def __init__(self, prompts: Sequence[SamplePrompt], conditioning: dict[str, Conditioning], seed: int) -> None:
        self.prompts = list(prompts)
        self.conditioning = conditioning
        self.seed = seed

    def on_train_start(self, run: Run) -> None:
        unused = unused_settings(self.prompts, run.family.sampling) if self.prompts else []
        if unused and run.runtime.is_main_process:
            logger.warning("sample prompts set %s, which %s does not have; ignored", ", ".join(unused), run.family.name)
        if run.progress.global_step == 0:
            self._sample_if_due(run, "first")

    def on_step_end(self, run: Run, output: StepOutput) -> None:
        self._sample_if_due(run, "step")

    def on_epoch_end(self, run: Run) -> None:
        self._sample_if_due(run, "epoch")

    def _sample_if_due(self, run: Run, at: str) -> None:
        options, progress = run.config[SamplingOptions], run.progress
        if not self.prompts or not is_sample_due(options, at, progress.global_step, progress.epoch):
            return
        run.hooks.on_before_sample_images(run)
        try:
            self.sample(run, at)
        finally:  # always as a pair, also when sampling fails
            run.hooks.on_after_sample_images(run)

    def sample(self, run: Run, at: str) -> list[SampleFile]:
        """Make and write all images of one occasion; every rank returns the whole list."""
        runtime, started = run.runtime, time.perf_counter()
        with run.weights_for_eval(), isolated_rng(self.seed), torch.no_grad(), runtime.autocast():
            texts = self._current_conditioning(run)
            mine = [
                self._make(run, at, number, texts)
                for number in range(runtime.rank, len(self.prompts), runtime.num_processes)
            ]
        made = [file for part in gather_objects(mine) for file in part]
        made.sort(key=lambda file: file.enum)
        if runtime.is_main_process:
            self._present(run, at, made)
            logger.info("made %d sample images in %.1f s", len(made), time.perf_counter() - started)
        return made

    def _current_conditioning(self, run: Run) -> dict[str, Conditioning]:
        """Encoded texts; parts that come from text encoders in training are made from their present weights."""
        if not any(run.step.trained_text_encoders):
            return self.conditioning
        fresh = encode_sample_prompts(run.family, run.strategies, run.models.text_encoders, self.prompts)
        return {
            text: [old if new is None else new for old, new in zip(self.conditioning.get(text, outputs), outputs)]
            for text, outputs in fresh.items()
        }

    def _make(self, run: Run, at: str, number: int, texts: dict[str, Conditioning]) -> SampleFile:
        given = self.prompts[number]
        prompt = run.family.sample_defaults(given)
        if prompt.seed is None:
            drawn = key_seed(self.seed, "sample without a seed", run.progress.global_step, number) % 2**32
            prompt = dataclasses.replace(prompt, seed=drawn)
        negative = texts[prompt.negative_prompt or ""] if run.family.needs_negative(prompt) else None
        image = run.family.generate(run.models, prompt, texts[prompt.prompt], negative)
        saving, progress = run.config[SavingOptions], run.progress
        name = sample_file_name(
            saving.output_name, at, progress.epoch if at == "epoch" else progress.global_step,
            enum=number if given.enum is None else given.enum, seed=given.seed, timestamp=time.strftime("%Y%m%d%H%M%S"),
        )
        path = Path(saving.output_dir) / name
        save_png(image, path)
        return SampleFile(number, str(path), prompt.prompt)

    def _present(self, run: Run, at: str, made: list[SampleFile]) -> None:
        """The sheet of all pictures, and the trackers' images."""
        pictures = [(file, _open(file.path)) for file in made]
        cells = [GridCell(image, f"{file.enum}: {file.caption}") for file, image in pictures]
        saving = run.config[SavingOptions]
        name = sample_suffix(at, run.progress.epoch if at == "epoch" else run.progress.global_step)
        stem = f"{saving.output_name}_{name}" if saving.output_name else name
        title = f"{saving.output_name or 'samples'}, step {run.progress.global_step}"
        save_png(image_grid(cells, title=title), Path(saving.output_dir) / "sample" / f"{stem}_grid.png")
        log = run.hooks.find(LoggingHook)
        if log is not None:
            for file, image in pictures:
                log.log_image(f"sample_{file.enum}", image, file.caption)


def save_png(image: Image.Image, path: Path) -> None:
    with atomic_path(path) as temporary:
        image.save(temporary, format="PNG")


def _open(path: str) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")
