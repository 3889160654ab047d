"""Sample images while training: when, for which prompts, and where the pictures go."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from library.core.keyed_random import isolated_rng, key_seed
from library.core.options import shortened
from library.dataset.batch import on_tensors
from library.dataset.strategies import NegativeText
from library.device_utils import clean_memory_on_device
from library.generation.control_pictures import open_picture
from library.generation.image_grid import GridCell, image_grid
from library.generation.picture_files import frames_of, read_frames, settings_texts, write_picture
from library.generation.sampling_utils import one_batch
from library.generation.video_files import encoder_of, write_clip
from library.generation.video_pipeline import frame_rate
from library.training.hooks.base import Hook
from library.training.hooks.logging import LoggingHook
from library.training.hooks.losses import gather_objects
from library.training.hooks.sample_sheet import SampleSheet
from library.training.option_groups import SamplingOptions, SavingOptions
from library.training.sampling_prompts import (
    SamplePrompt,
    is_sample_due,
    sample_file_name,
    sample_suffix,
    unreached_interval,
    unused_settings,
)

if TYPE_CHECKING:
    from PIL import Image

    from library.dataset.strategies import StrategySet, Texts
    from library.generation.picture_files import Picture
    from library.training.progress import Progress
    from library.training.run import Run, StepOutput
    from library.training.wiring.base import ModelFamily

logger = logging.getLogger(__name__)

T = TypeVar("T")
CLIP_ENDING = ".mp4"


def sample_texts(family: ModelFamily, prompts: Sequence[SamplePrompt]) -> list[tuple[str, bool]]:
    """Every different (text, whether it is a negative prompt) to encode, in order: the prompts and, where CFG is on,
    the negative ones ("" when not given)."""
    texts: dict[tuple[str, bool], None] = {}
    for prompt in map(family.sample_defaults, prompts):
        texts.setdefault((prompt.prompt, False))
        if family.needs_negative(prompt):
            texts.setdefault((prompt.negative_prompt or "", True))
    return list(texts)


@torch.no_grad()
def encode_sample_prompts(
    family: ModelFamily, strategies: StrategySet, text_encoders: list[torch.nn.Module | None],
    prompts: Sequence[SamplePrompt],
) -> Texts:
    """Conditioning of one sample (tensors [1, ...] on the CPU, with a row for each of `prompt_rows`) for every text
    that sampling needs; negative prompts stand under `StrategySet.negative_key`.

    Made once while the text encoders are in memory. What an encoder that is None would make is not there.
    """
    encoded: Texts = {}
    for text, is_negative in sample_texts(family, prompts):
        key = strategies.negative_key(text) if is_negative else text
        if key in encoded:
            continue
        if isinstance(key, NegativeText):
            parts = [(strategies.tokenize.tokenize_negative(strategies.prompt_text(text)), None)]
        else:
            texts = [strategies.prompt_text(part) for part in family.prompt_rows(text)]
            parts = [strategies.tokenize.tokenize_prompt(part) for part in texts]
        outputs = one_batch([strategies.encode(text_encoders, tokens, weights) for tokens, weights in parts])
        encoded[key] = on_tensors(lambda tensor: tensor.detach().cpu(), outputs)
    return encoded


@dataclasses.dataclass(frozen=True)
class SampleFile:
    """A picture that was written, and what it shows; of a clip its contact sheet, beside the `video`."""

    enum: int
    path: str
    caption: str
    video: str | None = None


class SampleHook(Hook):
    """Makes the images of `--sample_prompts` at first, after every n epochs or after every n steps.

    `conditioning` holds the encoded texts; while text encoders are trained, the texts are encoded anew on each
    occasion. Prompts are dealt over the ranks. Each occasion gives one file per prompt, one grid with all of them, and
    a column of the sheet of the run. A prompt without a seed gets one that depends on (`seed`, step, prompt), so that a
    repeated run shows the same pictures. When the interval is longer than the run, the pictures are made at its end.
    """

    def __init__(self, prompts: Sequence[SamplePrompt], conditioning: Texts, seed: int) -> None:
        self.prompts = list(prompts)
        self.conditioning = conditioning
        self.seed = seed
        self.sheet = SampleSheet()
        self._made, self._grids = {"picture": 0, "clip": 0}, 0
        self._folder: Path | None = None

    def on_train_start(self, run: Run) -> None:
        unused = unused_settings(self.prompts, run.family.sampling, run.trainable.sample_reads)
        if unused and run.runtime.is_main_process:
            logger.warning("sample prompts set %s, which %s does not have; ignored", ", ".join(unused), run.family.name)
        for line in run.family.sample_notices(self.prompts) if run.runtime.is_main_process else ():
            logger.warning("%s", line)
        if run.runtime.is_main_process and self._has_clips(run):
            encoder = self._tried("clips cannot be written", lambda: encoder_of(CLIP_ENDING))
            if encoder is not None and encoder.notice:
                logger.info(encoder.notice)
        if run.progress.global_step == 0:
            self._sample_if_due(run, "first")
        elif self.prompts and run.runtime.is_main_process:
            saving = run.config[SavingOptions]
            folder, done = Path(saving.output_dir) / "sample", run.progress.global_step
            self._tried(
                f"the pictures in {folder} could not be read",
                lambda: self.sheet.read_folder(folder, saving.output_name, done),
            )

    def on_step_end(self, run: Run, output: StepOutput) -> None:
        self._sample_if_due(run, "step")

    def on_epoch_end(self, run: Run) -> None:
        self._sample_if_due(run, "epoch")

    def on_train_end(self, run: Run) -> None:
        progress = run.progress
        unreached = unreached_interval(
            run.config[SamplingOptions], progress.max_train_steps, progress.max_train_steps // progress.steps_per_epoch
        )
        if self.prompts and unreached and progress.is_finished:
            self._occasion(run, "step")

    def planned_files(self, run: Run) -> list[str]:
        options, progress = run.config[SamplingOptions], run.progress
        if not self.prompts:
            return []
        finished, done = (
            progress.max_train_steps // progress.steps_per_epoch,
            progress.global_step // progress.steps_per_epoch,
        )
        if every := options.sample_every_n_epochs:  # see is_sample_due
            occasions = finished // every - done // every
        else:
            every = options.sample_every_n_steps
            occasions = progress.max_train_steps // every - progress.global_step // every if every else 0
        occasions += bool(options.sample_at_first and not progress.global_step)
        occasions += bool(unreached_interval(options, progress.max_train_steps, finished))
        if not occasions:
            return []
        kind = "clip" if self._has_clips(run) else "picture"
        pictures, times = counted(len(self.prompts), kind), counted(occasions, "occasion")
        return [f"sample/ with {pictures} and a grid on {times}, all of them on {self._sheet_path(run).name}"]

    def written_files(self) -> list[str]:
        if self._folder is None:
            return []
        made = [counted(number, kind) for kind, number in self._made.items() if number]
        return [f"{self._folder}{os.sep} with {', '.join(made)}, {counted(self._grids, 'grid')} and the sheet of all"]

    def _sheet_path(self, run: Run) -> Path:
        saving = run.config[SavingOptions]
        name = f"{saving.output_name}_sheet" if saving.output_name else "sheet"
        return Path(saving.output_dir) / "sample" / f"{name}.png"

    def _has_clips(self, run: Run) -> bool:
        return any((run.family.sample_defaults(prompt).frame_count or 1) > 1 for prompt in self.prompts)

    def _sample_if_due(self, run: Run, at: str) -> None:
        options, progress = run.config[SamplingOptions], run.progress
        if (
            not self.prompts
            or run.stop.agreed is not None
            or not is_sample_due(options, at, progress.global_step, progress.epoch)
        ):
            return
        self._occasion(run, at)

    def _occasion(self, run: Run, at: str) -> None:
        run.hooks.on_before_sample_images(run)
        try:
            self.sample(run, at)
        finally:  # always as a pair, also when sampling fails
            run.hooks.on_after_sample_images(run)

    def sample(self, run: Run, at: str) -> list[SampleFile]:
        """Make and write all images of one occasion; every rank returns the whole list. What fails is told and left
        out: a picture is never worth the training."""
        runtime, started = run.runtime, time.perf_counter()
        mine: list[SampleFile] = []
        with run.weights_for_eval(), isolated_rng(self.seed), torch.no_grad(), runtime.autocast():
            texts = self._tried("the sample texts could not be encoded", lambda: self._current_conditioning(run))
            if texts is not None:
                for numbers in self._groups(run, range(runtime.rank, len(self.prompts), runtime.num_processes)):
                    if run.stop.is_wanted:  # a run that is to end makes no further pictures
                        break
                    told = " and ".join(f"{number} ('{shortened(self.prompts[number].prompt)}')" for number in numbers)
                    what = f"the sample of prompt {told} could not be made"
                    mine += self._tried(what, lambda: self._make(run, at, numbers, texts)) or []
        made = [file for part in gather_objects(mine) for file in part]
        made.sort(key=lambda file: file.enum)
        if runtime.is_main_process:
            self._tried("the overview of the samples could not be written", lambda: self._present(run, at, made))
            files = [path for file in made for path in (file.video, file.path) if path is not None]
            if files:
                run.hooks.on_files_written(run, "samples", files, run.progress.global_step)
            kinds = "clip" if made and all(file.video for file in made) else "image"
            logger.info("made %s in %.1f s", counted(len(made), f"sample {kinds}"), time.perf_counter() - started)
        return made

    @staticmethod
    def _tried(what: str, action: Callable[[], T]) -> T | None:
        """The result, or None after a message."""
        try:
            return action()
        except Exception as error:  # a full disk, too little memory, a sampler that diverges
            reason = str(error).strip().split("\n")[0] or type(error).__name__
        logger.error("%s: %s. Training goes on", what, reason)
        clean_memory_on_device()  # here, where the error holds no tensors any more
        return None

    def _current_conditioning(self, run: Run) -> Texts:
        """Encoded texts; parts that come from text encoders in training are made from their present weights."""
        if not any(run.step.trained_text_encoders):
            return self.conditioning
        fresh = encode_sample_prompts(run.family, run.strategies, run.models.text_encoders, self.prompts)
        return {text: {**self.conditioning.get(text, {}), **outputs} for text, outputs in fresh.items()}

    def _groups(self, run: Run, numbers: Iterable[int]) -> list[list[int]]:
        """Prompts that are made as one batch: at most `sample_batch_size` of the family, equal but for texts and
        seeds."""
        alike: dict[Any, list[int]] = {}
        for number in numbers:
            prompt = run.family.sample_defaults(self.prompts[number])
            plain = dataclasses.replace(prompt, prompt="", negative_prompt=None, seed=None, enum=None)
            alike.setdefault((plain, run.family.needs_negative(prompt)), []).append(number)
        size = run.family.sample_batch_size
        groups = [group[start : start + size] for group in alike.values() for start in range(0, len(group), size)]
        return sorted(groups)

    def _make(self, run: Run, at: str, numbers: Sequence[int], texts: Texts) -> list[SampleFile]:
        prompts = [self._complete(run, number) for number in numbers]
        keys = [run.strategies.negative_key(prompt.negative_prompt or "") for prompt in prompts]
        positive = one_batch([texts[prompt.prompt] for prompt in prompts])
        negative = one_batch([texts[key] for key in keys]) if run.family.needs_negative(prompts[0]) else None
        with run.trainable.at_sample(prompts[0]) as fields:
            pipeline = run.family.pipeline(run.models)
            pipeline = dataclasses.replace(pipeline, **fields) if fields else pipeline
            made = pipeline.samples(prompts, positive, negative)
        return [self._write(run, at, *each) for each in zip(numbers, prompts, made, strict=True)]

    def _complete(self, run: Run, number: int) -> SamplePrompt:
        prompt = run.family.sample_defaults(self.prompts[number])
        if prompt.seed is not None:
            return prompt
        drawn = key_seed(self.seed, "sample without a seed", run.progress.global_step, number) % 2**32
        return dataclasses.replace(prompt, seed=drawn)

    def _write(self, run: Run, at: str, number: int, prompt: SamplePrompt, made: Picture) -> SampleFile:
        given, saving, progress = self.prompts[number], run.config[SavingOptions], run.progress
        name = sample_file_name(
            saving.output_name, at, progress.epoch if at == "epoch" else progress.global_step,
            enum=number if given.enum is None else given.enum, seed=given.seed, timestamp=time.strftime("%Y%m%d%H%M%S"),
        )
        path, texts = Path(saving.output_dir) / name, self._texts(run, at, number, prompt)
        frames = frames_of(made)
        if len(frames) == 1:
            return SampleFile(number, str(write_picture(made, path, texts)), prompt.prompt)
        clip = write_clip(frames, path.with_suffix(CLIP_ENDING), frame_rate(run.family.name), texts)
        return SampleFile(number, str(clip.sheet), prompt.prompt, str(clip.video))

    @staticmethod
    def _texts(run: Run, at: str, number: int, prompt: SamplePrompt) -> dict[str, str]:
        """What a picture's file tells: its settings as those of the image scripts do, and where in the run it was
        made."""
        return settings_texts(
            prompt=prompt.prompt, negative_prompt=prompt.negative_prompt, seed=prompt.seed, steps=prompt.sample_steps,
            scale=prompt.scale,
            guidance=prompt.guidance_scale, sampler=prompt.sample_sampler, flow_shift=prompt.flow_shift,
            frames=prompt.frame_count,
            model=run.config[SavingOptions].output_name, step=run.progress.global_step,
            occasion=occasion_label(run.progress, at),
            number=number,
        )  # fmt: skip

    def _guides(self, run: Run) -> dict[int, Image.Image]:
        """The control pictures that prompts name, by number of the prompt, at the size of their samples; none where
        nothing follows them."""
        if "controlnet_image" not in run.trainable.sample_reads:
            return {}
        complete = {number: run.family.sample_defaults(prompt) for number, prompt in enumerate(self.prompts)}
        return {
            number: open_picture(prompt.controlnet_image, (prompt.width, prompt.height))
            for number, prompt in complete.items()
            if prompt.controlnet_image
        }

    def _present(self, run: Run, at: str, made: list[SampleFile]) -> None:
        """The grid of this occasion's pictures, the sheet of all, and the trackers' images."""
        if not made:
            return
        pictures = [(file, read_frames(file.path)[0]) for file in made]
        guides, cells = self._guides(run), []
        for file, picture in pictures:
            cells += [GridCell(guides[file.enum], "control picture")] if file.enum in guides else []
            cells.append(GridCell(picture, f"{file.enum}: {file.caption}"))
        saving = run.config[SavingOptions]
        name = sample_suffix(at, run.progress.epoch if at == "epoch" else run.progress.global_step)
        stem = f"{saving.output_name}_{name}" if saving.output_name else name
        title = f"{saving.output_name or 'samples'}, step {run.progress.global_step}"
        pairs = len(cells) == 2 * len(made)  # which stay together
        columns = 2 * math.ceil(math.sqrt(len(made) / 2)) if pairs else None
        sheet = image_grid(cells, title=title, columns=columns)
        grid = write_picture(sheet, Path(saving.output_dir) / "sample" / f"{stem}_grid.png")
        self.sheet.guides = guides
        self.sheet.add(
            run.progress.global_step,
            occasion_label(run.progress, at),
            {file.enum: picture for file, picture in pictures},
        )
        self.sheet.write(
            self._sheet_path(run),
            {number: prompt.prompt for number, prompt in enumerate(self.prompts)},
            saving.output_name or "samples",
        )
        self._grids, self._folder = self._grids + 1, grid.parent
        for file in made:
            self._made["clip" if file.video else "picture"] += 1
        log = run.hooks.find(LoggingHook)
        if log is not None:
            for file, picture in pictures:
                if file.video is None:
                    log.log_image(f"sample_{file.enum}", picture, file.caption)
                else:
                    rate = frame_rate(run.family.name)
                    log.log_video(f"sample_{file.enum}", Path(file.video), rate, file.caption)


def counted(number: int, word: str) -> str:
    return f"{number} {word}{'s' * (number != 1)}"


def occasion_label(progress: Progress, at: str) -> str:
    """What stands below a picture of the sheet."""
    return {"first": "start", "epoch": f"epoch {progress.epoch}"}.get(at, f"step {progress.global_step}")
