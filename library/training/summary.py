"""What a run is about to do, on one page: made from plain data, printed once at start."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

MAX_BUCKETS_SHOWN = 8


@dataclass(frozen=True, kw_only=True)
class BucketSummary:
    """One bucket: size in pixels, samples with repeats, batches of one process. `frames`: of clips; None of pictures
    alone. `word`: what the samples are called."""

    width: int
    height: int
    num_images: int
    num_batches: int
    frames: int | None = None
    word: str = "image"


@dataclass(frozen=True, kw_only=True)
class PackSummary:
    """The packs of the first epoch of a dataset. `fill`: which part of the budget they fill in the mean; `samples`: how
    many the smallest and the largest have; `left_out`: samples of the pack that is left out."""

    count: int
    token_budget: int
    fill: float
    samples: tuple[int, int]
    left_out: int = 0


@dataclass(frozen=True, kw_only=True)
class DatasetSummary:
    """One dataset. `num_images` counts pictures and `num_clips` clips, of `num_videos` files; `num_samples` counts both
    with repeats."""

    name: str
    resolution: tuple[int, int]
    """(width, height)"""
    batch_size: int
    num_images: int
    num_samples: int
    num_clips: int = 0
    num_videos: int = 0
    num_reg_images: int = 0
    num_validation_images: int = 0
    buckets: tuple[BucketSummary, ...] = ()
    packs: PackSummary | None = None
    """instead of batches of one size"""
    keeps_sizes: bool = False
    """whether pictures keep their own sizes"""


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
    if any(dataset.packs for dataset in run.datasets):
        return _packs_of_step(run)
    sizes = sorted({dataset.batch_size for dataset in run.datasets})
    size = " or ".join(map(str, sizes)) or "0"
    text = f"{size} per process, {_count(run.num_processes, 'process', 'processes')} on {run.device}"
    if run.gradient_accumulation_steps > 1:
        text += f", {run.gradient_accumulation_steps} batches per step"
    totals = [n * run.num_processes * run.gradient_accumulation_steps for n in sizes]
    word = "samples" if any(dataset.num_clips for dataset in run.datasets) else "images"
    return f"{text}: {' or '.join(map(str, totals)) or '0'} {word} per step"


def _packs_of_step(run: StartSummary) -> str:
    text = f"a pack per process, {_count(run.num_processes, 'process', 'processes')} on {run.device}"
    if run.gradient_accumulation_steps > 1:
        text += f", {run.gradient_accumulation_steps} packs per step"
    packs = [dataset.packs for dataset in run.datasets if dataset.packs]
    most = max(pack.samples[1] for pack in packs) * run.num_processes * run.gradient_accumulation_steps
    word = "samples" if any(dataset.num_clips for dataset in run.datasets) else "images"
    return f"{text}: up to {most} {word} per step"


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
    size = "at their own sizes" if dataset.keeps_sizes else f"{width}x{height}"
    text = f"{_contents(dataset)}, {dataset.num_samples} per epoch, {size}"
    if dataset.num_reg_images:
        what = "sample" if dataset.num_clips else "image"
        text += f", {_count(dataset.num_reg_images, f'regularisation {what}')}"
    if dataset.num_validation_images:
        text += f", {dataset.num_validation_images} held out"
    lines = _line(dataset.name, text)
    if dataset.packs is not None:
        lines += _pack_lines(dataset.packs)
    if len(dataset.buckets) > 1 or dataset.num_clips:
        buckets = sorted(dataset.buckets, key=lambda bucket: -bucket.num_images)
        lines += _bucket_lines(buckets, with_batches=dataset.packs is None)
    return lines


def _pack_lines(packs: PackSummary) -> list[tuple[str, str]]:
    few, many = packs.samples
    samples = str(many) if few == many else f"{few} to {many}"
    text = (
        f"  {_count(packs.count, 'pack')} per epoch of {packs.token_budget} tokens at most, {packs.fill:.0%} full in"
        f" the mean, {samples} sample{'' if samples == '1' else 's'} each"
    )
    lines = [("", text)]
    if packs.left_out:
        left = _count(packs.left_out, "sample")
        lines.append(("", f"  one pack of every epoch is left out (--navit_drop_last), {left} in the first epoch"))
    return lines


def _contents(dataset: DatasetSummary) -> str:
    """What the files of a dataset give: "3 images and 7 clips of 4 videos"."""
    clips = f"{_count(dataset.num_clips, 'clip')} of {_count(dataset.num_videos, 'video')}"
    if not dataset.num_clips:
        return _count(dataset.num_images, "image")
    return f"{_count(dataset.num_images, 'image')} and {clips}" if dataset.num_images else clips


def _bucket_lines(buckets: Sequence[BucketSummary], with_batches: bool = True) -> list[tuple[str, str]]:
    """The largest buckets, one in a line, and the sum of the others. Sizes of clips end with the number of frames."""
    sizes = [
        f"{bucket.width}x{bucket.height}" + (f"x{bucket.frames}" if bucket.frames else "")
        for bucket in buckets[:MAX_BUCKETS_SHOWN]
    ]
    rows = [(size, bucket.num_images, bucket.word, bucket.num_batches) for size, bucket in zip(sizes, buckets)]
    if rest := buckets[MAX_BUCKETS_SHOWN:]:
        words = {bucket.word for bucket in rest}
        word = words.pop() if len(words) == 1 else "sample"
        total, batches = sum(bucket.num_images for bucket in rest), sum(bucket.num_batches for bucket in rest)
        rows.append((f"{len(rest)} others", total, word, batches))
    width = max((10, *map(len, sizes)))
    return [
        ("", f"  {size:<{width}} {_column(samples, word)}{_batches(batches) if with_batches else ''}")
        for size, samples, word, batches in rows
    ]


def _batches(number: int) -> str:
    return f" {_column(number, 'batch', 'batches')}"


def _column(number: int, one: str, several: str | None = None) -> str:
    """`_count`, the number right-aligned."""
    return f"{number:>6} {one if number == 1 else several or one + 's'}"


def _count(number: int, one: str, several: str | None = None) -> str:
    return f"{number} {one if number == 1 else several or one + 's'}"
