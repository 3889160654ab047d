"""Where curves go: TensorBoard files, Weights & Biases and lines of JSON. The first two are optional packages, imported
when they are chosen."""

from __future__ import annotations

import json
import math
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.core.errors import ConfigError
from library.core.options import Config, option_fields
from library.core.text_files import parse_toml, read_text
from library.generation.picture_files import gif_of
from library.generation.video_files import read_video
from library.training.checkpoint import METRICS_ENDING, CheckpointNames
from library.training.parser_common import PATH_OPTIONS

if TYPE_CHECKING:
    from PIL import Image

    from library.training.option_groups import LoggingOptions, SavingOptions
    from library.training.progress_facts import Meter

DEFAULT_PROJECT = "network_train"


@dataclass(frozen=True)
class Point:
    """Values at one place. `axis` is "step" or "epoch"; `x` is the place on it."""

    values: Mapping[str, float]
    axis: str
    x: int
    step: int
    epoch: int


class Tracker(ABC):
    """One destination of the curves; lives on the main process only. `folder`: where its files are, or its one file."""

    folder: Path | None = None

    @abstractmethod
    def log(self, point: Point) -> None: ...

    @abstractmethod
    def log_image(self, name: str, picture: Image.Image, caption: str, point: Point) -> None: ...

    @abstractmethod
    def log_video(self, name: str, path: Path, fps: float, caption: str, point: Point) -> None:
        """A video file."""

    @abstractmethod
    def close(self) -> None: ...


class TensorBoardTracker(Tracker):
    """Event files; x is the global step, or the epoch for values of an epoch."""

    def __init__(self, folder: Path, project: str, config: Mapping[str, Any] | None) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                f"--log_with tensorboard needs the package tensorboard ({error}); install it with: pip install "
                "tensorboard"
            ) from error
        self.folder = folder / project
        self._writer = SummaryWriter(str(self.folder))
        if config:
            text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False)
            self._writer.add_text("config", f"```\n{text}\n```", 0)

    def log(self, point: Point) -> None:
        for name, value in point.values.items():
            self._writer.add_scalar(name, value, point.x)
        self._writer.flush()

    def log_image(self, name: str, picture: Image.Image, caption: str, point: Point) -> None:
        import numpy

        self._writer.add_image(name, numpy.asarray(picture.convert("RGB")), point.x, dataformats="HWC")
        self._writer.add_text(f"{name}/prompt", caption, point.x)

    def log_video(self, name: str, path: Path, fps: float, caption: str, point: Point) -> None:
        """As a moving picture, which the event file holds as it is; `add_video` of torch needs a further package."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        frames = read_video(path)
        image = Summary.Image(
            height=frames[0].height, width=frames[0].width, colorspace=3, encoded_image_string=gif_of(frames, fps)
        )
        self._writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=name, image=image)]), point.x)
        self._writer.add_text(f"{name}/prompt", caption, point.x)

    def close(self) -> None:
        self._writer.close()


class WandbTracker(Tracker):
    """Weights & Biases. Points carry `global_step` and `epoch` as fields, because W&B drops points whose own step goes
    back; values of an epoch have the epoch as their axis."""

    def __init__(
        self, folder: Path | None, project: str, options: LoggingOptions, config: Mapping[str, Any] | None
    ) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ConfigError(
                f"--log_with wandb needs the package wandb ({error}); install it with: pip install wandb"
            ) from error
        self._wandb = wandb
        self.folder = folder
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            os.environ["WANDB_DIR"] = str(folder)
        if options.wandb_api_key:
            wandb.login(key=options.wandb_api_key)
        arguments: dict[str, Any] = {"name": options.wandb_run_name} if options.wandb_run_name else {}
        if options.log_tracker_config:
            arguments = _wandb_arguments(options.log_tracker_config)
        self._run = wandb.init(**{"project": project, "config": dict(config or {}), **arguments})
        for axis in ("global_step", "epoch"):
            self._run.define_metric(axis, hidden=True)
        self._run.define_metric("*", step_metric="global_step")
        for name in (
            "loss/epoch_average",
            "loss/validation/epoch_average",
            "loss/validation/epoch_divergence",
            "loss/validation/epoch_level_*",
        ):
            self._run.define_metric(name, step_metric="epoch")

    def log(self, point: Point) -> None:
        self._run.log({**point.values, "global_step": point.step, "epoch": point.epoch})

    def log_image(self, name: str, picture: Image.Image, caption: str, point: Point) -> None:
        self._log_medium(name, self._wandb.Image(picture, caption=caption), point)

    def log_video(self, name: str, path: Path, fps: float, caption: str, point: Point) -> None:
        """The file itself, which has its own rate."""
        self._log_medium(name, self._wandb.Video(str(path), caption=caption, format=path.suffix[1:]), point)

    def _log_medium(self, name: str, shown: Any, point: Point) -> None:
        self._run.log({name: shown, "global_step": point.step, "epoch": point.epoch}, commit=False)

    def close(self) -> None:
        self._run.finish()


class MetricsFile(Tracker):
    """A file of JSON objects, one in a line, which another program can read while it grows: each line is written whole,
    and at once. A run that goes on after `done` steps goes on in the file of its earlier part, where the lines of later
    steps are gone; a run from the start begins it anew."""

    def __init__(self, path: Path, done: int, meter: Meter) -> None:
        self.folder, self._meter = path, meter
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = length_up_to(path, done) if done else 0
        self._file = open(path, "ab", buffering=0)
        self._file.truncate(kept)

    def log(self, point: Point) -> None:
        line: dict[str, Any] = {
            "step": point.step, "epoch": point.epoch, "axis": point.axis, "time": round(time.time(), 3), **point.values
        }
        if point.axis == "step":
            memory = self._meter.memory()
            line |= {"steps_per_second": self._meter.steps_per_second, "memory_bytes": memory and memory[0]}
        self._append(json.dumps({name: _finite(value) for name, value in line.items()}, allow_nan=False) + "\n")

    def _append(self, line: str) -> None:
        """The whole line, or nothing of it when the disk is full."""
        start, left = os.fstat(self._file.fileno()).st_size, memoryview(line.encode())
        try:
            while left:
                left = left[self._file.write(left):]
        except OSError:
            self._file.truncate(start)
            raise

    def log_image(self, name: str, picture: Image.Image, caption: str, point: Point) -> None: ...

    def log_video(self, name: str, path: Path, fps: float, caption: str, point: Point) -> None: ...

    def close(self) -> None:
        self._file.close()


def metrics_path(saving: SavingOptions) -> Path:
    return Path(saving.output_dir or "") / f"{CheckpointNames(saving.output_name).last()}{METRICS_ENDING}"


def length_up_to(path: Path, step: int) -> int:
    """Bytes of the lines of a metrics file before the first that is of a later step, or broken."""
    length = 0
    if not path.is_file():
        return 0
    with open(path, "rb") as file:
        for line in file:
            try:
                is_kept = line.endswith(b"\n") and json.loads(line)["step"] <= step
            except (ValueError, TypeError, KeyError):
                is_kept = False
            if not is_kept:
                break
            length += len(line)
    return length


def _finite(value: Any) -> Any:
    """None for what JSON has no number for."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _wandb_arguments(path: str) -> dict[str, Any]:
    """Arguments of wandb.init from a TOML file; they may stand in a table called `wandb`."""
    name = f"--log_tracker_config is '{path}', which"
    values = parse_toml(read_text(path, name), name)
    return dict(values.get("wandb", values))


def recorded_config(config: Config) -> dict[str, Any]:
    """The options for `--log_config`: no secrets, none of the path options and nothing else that is a path.

    Lists become texts.
    """
    left_out = {*PATH_OPTIONS, "config_file"}
    for options_class in config.classes():
        left_out.update(name for name, (_, spec) in option_fields(options_class).items() if spec.secret)
    return {
        name: value if isinstance(value, (bool, int, float, str)) else str(value)
        for name, value in config.values().items()
        if name not in left_out and not _names_a_place(value)
    }


def _names_a_place(value: Any) -> bool:
    """Whether a value, or one of a list, is a path that tells of the machine."""
    if isinstance(value, (list, tuple)):
        return any(_names_a_place(item) for item in value)
    if isinstance(value, str):
        return os.path.isabs(value) or value.startswith("~")
    return isinstance(value, os.PathLike)


def run_log_dir(options: LoggingOptions, now: float | None = None) -> Path | None:
    """`{logging_dir}/{log_prefix}{YYYYmmddHHMMSS}`, or None without --logging_dir."""
    if not options.logging_dir:
        return None
    stamp = time.strftime("%Y%m%d%H%M%S", time.localtime(now))
    return Path(options.logging_dir) / f"{options.log_prefix or ''}{stamp}"


def open_trackers(options: LoggingOptions, config: Config, default_project: str = DEFAULT_PROJECT) -> list[Tracker]:
    """The trackers that the options ask for. Only --logging_dir means TensorBoard; "all" means both."""
    chosen = options.log_with or ("tensorboard" if options.logging_dir else None)
    if chosen is None:
        return []
    folder = run_log_dir(options)
    project = options.log_tracker_name or default_project
    recorded = recorded_config(config) if options.log_config else None
    trackers: list[Tracker] = []
    if chosen in ("tensorboard", "all"):
        if folder is None:
            raise ConfigError(f"--log_with is {chosen} without --logging_dir, the folder of the logs; add it")
        trackers.append(TensorBoardTracker(folder, project, recorded))
    if chosen in ("wandb", "all"):
        trackers.append(WandbTracker(folder, project, options, recorded))
    return trackers
