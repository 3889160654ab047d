"""What a run is about to do, on one page: made from plain data, printed once at start."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

MAX_BUCKETS_SHOWN = 8


@dataclass(frozen=True, kw_only=True)
class BucketSummary:
    """One bucket: size in pixels and frames, images or clips with repeats, batches of one process."""

    width: int
    height: int
    frames: int = 1
    num_images: int
    num_batches: int


@dataclass(frozen=True, kw_only=True)
class DatasetSummary:
    """One dataset. `num_images` counts images and clips, `num_clips` the clips among them, `num_samples` counts with
    repeats."""

    name: str
    resolution: tuple[int, int]
    """(width, height)"""
    batch_size: int
    num_images: int
    num_samples: int
    num_clips: int = 0
    num_reg_images: int = 0
    num_validation_images: int = 0
    buckets: tuple[BucketSummary, ...] = ()

    @property
    def kind(self) -> str:
        """What it holds, in words."""
        return kind_of(self.num_images, self.num_clips)


def kind_of(samples: int, clips: int) -> str:
    """What these samples are, clips or images."""
    return "image" if not clips else "clip" if clips == samples else "sample"



@dataclass(frozen=True, kw_only=True)
class StartSummary:
    """Everything that the page shows. `parts`: trained part -> number of parameters; `files`: what -> path;
    `ignored`: what was written and has no effect; `notes`: other lines for the user."""

    model: str
    files: Mapping[str, str]
    precision: str
    datasets: Sequence[DatasetSummary]
    num_epochs: int
    max_train_steps: int
    steps_per_epoch: int
    gradient_accumulation_steps: int
    num_processes: int
    device: str
    optimizer: str
    lr_scheduler: str
    learning_rates: Mapping[str, float | None]
    network: str
    parts: Mapping[str, int]
    memory: Sequence[str]
    seed: int
    seed_was_drawn: bool = False
    output: str = ""
    outputs: Sequence[str] = ()
    """what will be written, names below the folder `output`"""
    first_step: int = 0
    ignored: Sequence[str] = field(default_factory=tuple)
    notes: Sequence[str] = field(default_factory=tuple)


def start_summary(run: StartSummary) -> str:
    """The page as text, no line of it empty but the first and last."""
    lines = _line("model", run.model)
    for what, path in run.files.items():
        lines += _line(f"  {what}", path)
    lines += _line("precision", run.precision)
    for dataset in run.datasets:
        lines += _dataset_lines(dataset)
    lines += _line("length", _length(run))
    lines += _line("batch", _batch(run))
    lines += _line("trained", run.network)
    for part, count in run.parts.items():
        lines += _line(f"  {part}", f"{count:,} parameters")
    lines += _line("optimizer", f"{run.optimizer}; {run.lr_scheduler}; {_rates(run.learning_rates)}")
    lines += _line("memory", "; ".join(run.memory) or "no memory option in use")
    lines += _line(
        "seed", f"{run.seed}{' (drawn; give it with --seed to repeat this run)' if run.seed_was_drawn else ''}"
    )
    if run.output:
        lines += _line("output", run.output)
    for text in run.outputs:
        lines += _line("", f"  {text}")
    if run.ignored:
        lines += _line("ignored", "without effect here (--strict makes it an error):")
        for text in run.ignored:
            lines += _line("", f"  {text}")
    for note in run.notes:
        lines += _line("note", note)
    width = max(len(label) for label, _ in lines)
    return "\n".join(["", *(f"{label:<{width}} {text}".rstrip() for label, text in lines), ""])


def _line(label: str, text: str) -> list[tuple[str, str]]:
    return [(label, text)]


def _length(run: StartSummary) -> str:
    steps = f"{run.max_train_steps} steps, {_count(run.num_epochs, 'epoch')} of {run.steps_per_epoch} steps"
    return f"{steps}, going on at step {run.first_step + 1}" if run.first_step else steps


def _batch(run: StartSummary) -> str:
    sizes = sorted({dataset.batch_size for dataset in run.datasets})
    size = " or ".join(map(str, sizes)) or "0"
    text = f"{size} per process, {_count(run.num_processes, 'process', 'processes')} on {run.device}"
    if run.gradient_accumulation_steps > 1:
        text += f", {run.gradient_accumulation_steps} batches per step"
    totals = [n * run.num_processes * run.gradient_accumulation_steps for n in sizes]
    kind = kind_of(sum(d.num_images for d in run.datasets), sum(d.num_clips for d in run.datasets))
    return f"{text}: {' or '.join(map(str, totals)) or '0'} {kind}s per step"


def _rates(rates: Mapping[str, float | None]) -> str:
    """`learning rate 0.0001` when all groups have one rate, else one per group; None: the optimizer finds its own."""
    different = set(rates.values())
    if len(different) == 1:
        return f"learning rate {_rate(next(iter(different)))}"
    return "learning rates " + ", ".join(f"{name} {_rate(rate)}" for name, rate in rates.items())


def _rate(rate: float | None) -> str:
    return "chosen by the optimizer" if rate is None else f"{rate:g}"


def _dataset_lines(dataset: DatasetSummary) -> list[tuple[str, str]]:
    width, height = dataset.resolution
    text = f"{_count(dataset.num_images, dataset.kind)}, {dataset.num_samples} per epoch, {width}x{height}"
    if dataset.num_reg_images:
        text += f", {_count(dataset.num_reg_images, 'regularisation image')}"
    if dataset.num_validation_images:
        text += f", {dataset.num_validation_images} held out"
    lines = _line(dataset.name, text)
    if len(dataset.buckets) > 1 or any(bucket.frames > 1 for bucket in dataset.buckets):
        shown = sorted(dataset.buckets, key=lambda bucket: -bucket.num_images)
        width_of_sizes = 22 if dataset.num_clips else 10
        for bucket in shown[:MAX_BUCKETS_SHOWN]:
            size = f"{bucket.width}x{bucket.height}" + (f", {bucket.frames} frames" if bucket.frames > 1 else "")
            lines += _line("", f"  {size:<{width_of_sizes}} {_counts(bucket.num_images, bucket.num_batches, dataset.kind)}")
        rest = shown[MAX_BUCKETS_SHOWN:]
        if rest:
            total = sum(bucket.num_images for bucket in rest)
            batches = sum(bucket.num_batches for bucket in rest)
            lines += _line("", f"  {f'{len(rest)} others':<{width_of_sizes}} {_counts(total, batches, dataset.kind)}")
    return lines


def _counts(samples: int, batches: int, kind: str) -> str:
    return f"{_column(samples, kind)} {_column(batches, 'batch', 'batches')}"


def _column(number: int, one: str, several: str | None = None) -> str:
    """`_count`, the number right-aligned."""
    return f"{number:>6} {one if number == 1 else several or one + 's'}"


def _count(number: int, one: str, several: str | None = None) -> str:
    return f"{number} {one if number == 1 else several or one + 's'}"
