"""What a start costs with few and with many pictures: the first one, which fills the caches on disk, and the second.

    python -m benchmarks start [--family sdxl] [--counts 20 20000] [--runs 5] [--latents_only] [--encode_all] [--folder DIR]

Small noise pictures with captions and a tiny random model; every run is the real script in a process of its own and
trains one step. Beside it stands the least that a start must do for as many pictures: list the folder, read every
header with imagesize and every caption. Files of the data set that are opened and decoded pictures are counted inside
the runs. The second start should take at most twice the CPU time of that baseline beyond what it takes with the
smallest count, and the first should decode what it encodes and nothing else.

CPU time is that of the process and of all that it started, user and system, on one thread. The second start is run
several times, in turn with few and with many pictures and the baseline, so that all see the same load of the machine;
the least of each counts, since a start with few pictures takes many times what is compared.

With more than 64 pictures the further ones are copies, and so are their cache files: the "first" start then meets
finished caches of which it knows nothing, as after copying a data set, and encodes nothing. --encode_all has it encode
every picture (half an hour for 20,000 on one core). Figures: docs/caching.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.figures import Baseline, Figure, spread
from benchmarks.processes import ROOT, used_by
from benchmarks.words import count, tiny_family

TIMES_THE_LEAST, MOST_SECONDS, MOST_BYTES = 2.0, 10.0, 1024
"""wanted of a second start with many pictures: beyond few pictures at most so many times the least; at most so long; so
much memory for each picture"""

SIZE_PX = 64
DISTINCT = 64
KINDS = {".png": "pictures", ".txt": "captions", ".npz": "caches"}


@dataclass
class Start:
    """One run, as its process and the system saw it."""

    seconds: float
    cpu: float
    memory: int
    """bytes at most"""
    opened: dict[str, int]
    decoded: int


# ---- inside the measured processes -----------------------------------------------------------------------------------


def counted_run(script: str, argv: list[str], report: str, images: str) -> None:
    """Run a script and write what it opened in a folder and decoded. The hook costs a microsecond a file, which stays
    in the figures."""
    import runpy

    opened = dict.fromkeys(KINDS.values(), 0)

    def hook(event: str, arguments: tuple) -> None:
        if event == "open" and isinstance(arguments[0], str) and (arguments[1] or "r").startswith("r"):
            name = KINDS.get(arguments[0][-4:])
            if name is not None and arguments[0].startswith(images):
                opened[name] += 1

    from PIL import ImageFile

    decoded, load = [0], ImageFile.ImageFile.load

    def counting(self):
        decoded[0] += bool(self.tile)
        return load(self)

    ImageFile.ImageFile.load = counting
    sys.addaudithook(hook)
    sys.argv = [script, *argv]
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    finally:
        Path(report).write_text(json.dumps({"opened": opened, "decoded": decoded[0]}), encoding="utf-8")


def baseline(folder: str) -> None:
    """Print the CPU seconds of listing a folder, reading every header and every caption."""
    import imagesize

    started = time.process_time()
    for entry in os.scandir(folder):
        if entry.name.endswith(".png"):
            imagesize.get(entry.path)
        elif entry.name.endswith(".txt"):
            with open(entry.path, encoding="utf-8") as file:
                file.read()
    print(time.process_time() - started)


# ---- around them -----------------------------------------------------------------------------------------------------


def write_pictures(folder: Path, count: int) -> None:
    """Noise pictures with captions; those beyond the first ones are copies."""
    import io

    import numpy as np
    from PIL import Image

    random = np.random.default_rng(0)
    contents = []
    for _ in range(min(count, DISTINCT)):
        buffer = io.BytesIO()
        Image.fromarray(random.integers(0, 255, (SIZE_PX, SIZE_PX, 3), dtype=np.uint8)).save(buffer, "PNG")
        contents.append(buffer.getvalue())
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        (folder / f"{number:06d}.png").write_bytes(contents[number % DISTINCT])
        (folder / f"{number:06d}.txt").write_text(
            f"picture {number % DISTINCT}, noise, grey, one of many", encoding="utf-8"
        )


def copy_caches(folder: Path, count: int) -> None:
    """Give every copy of a picture the cache files of its original, and forget what is known of them."""
    for path in sorted(folder.glob("*.npz")):
        content = path.read_bytes()
        for number in range(int(path.name[:6]) + DISTINCT, count, DISTINCT):
            (folder / f"{number:06d}{path.name[6:]}").write_bytes(content)
    for path in folder.glob(".*index*"):
        path.unlink()


def measured(script: str, argv: list[str], folder: Path) -> Start:
    """Run a script in a process of its own."""
    report = folder / "report.json"
    command = [sys.executable, "-m", "benchmarks.start", "--child", script, str(report), str(folder / "images"), *argv]
    started = time.perf_counter()
    used = used_by(command, folder / "log.txt", {"OMP_NUM_THREADS": "1"})
    seconds = time.perf_counter() - started
    counts = json.loads(report.read_text(encoding="utf-8"))
    return Start(seconds, used.cpu, used.memory, counts["opened"], counts["decoded"])


class Case:
    """The starts with one number of pictures."""

    def __init__(self, family: str, count: int, folder: Path, more: list[str], encode_all: bool) -> None:
        from library.tiny_models import build_tiny, tiny_entry
        from library.tiny_models.pictures import write_configuration

        self.count, self.folder, self.images, self.num_runs = count, folder, folder / "images", 0
        entry, tiny = tiny_entry(family), build_tiny(family, folder / "model")
        write_configuration(folder / "data.toml", self.images, SIZE_PX, batch_size=4)
        self.script, self.argv = entry.script, [
            *tiny.arguments(), f"--network_module={entry.network_module}", *entry.options,
            f"--dataset_config={folder / 'data.toml'}",
            "--network_dim=4", "--network_alpha=4", "--max_train_steps=1", "--seed=1", "--max_data_loader_n_workers=0",
            "--cache_latents_to_disk", "--vae_batch_size=4", "--output_name=lora", *more,
        ]
        if count > DISTINCT and not encode_all:
            write_pictures(self.images, DISTINCT)
            self.start()
        write_pictures(self.images, count)
        if count > DISTINCT and not encode_all:
            copy_caches(self.images, count)
        self.first = self.start()
        self.seconds: list[Start] = []
        self.baselines: list[float] = []

    def start(self) -> Start:
        time.sleep(1.1)  # files of the second that is still running are read again by the next start
        self.num_runs += 1
        return measured(self.script, [*self.argv, f"--output_dir={self.folder / f'out{self.num_runs}'}"], self.folder)

    def second(self) -> None:
        """One more second start, and the baseline."""
        self.seconds.append(self.start())
        command = [sys.executable, "-m", "benchmarks.start", "--baseline", str(self.images)]
        self.baselines.append(float(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout))

    @property
    def least(self) -> Start:
        return min(self.seconds, key=lambda start: start.cpu)

    def notes(self) -> dict[str, object]:
        return {"first": asdict(self.first), "second": [asdict(start) for start in self.seconds]}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--family", type=tiny_family, default="sdxl", help="tiny model to train (default: sdxl)")
    parser.add_argument("--counts", type=count, nargs=2, metavar=("FEW", "MANY"),
                        help="numbers of pictures (default: 20 20000)")
    parser.add_argument("--runs", type=count, help="second starts with each number (default: 5)")
    parser.add_argument("--latents_only", action="store_true", help="cache no text encoder outputs")
    parser.add_argument(
        "--encode_all", action="store_true", help="encode every picture in the first start, instead of copying caches"
    )
    parser.add_argument("--folder", help="work in this folder and leave it (default: a temporary one)")


def measure(options: argparse.Namespace) -> list[Figure]:
    caches_text = options.family not in ("sd1", "sd2") and not options.latents_only
    more = ["--network_train_unet_only", *(["--cache_text_encoder_outputs_to_disk"] if caches_text else [])]
    counts = sorted(options.counts or ([4, 80] if options.quick else [20, 20000]))
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(options.folder or temporary)
        few, many = (Case(options.family, count, place / str(count), more, options.encode_all) for count in counts)
        for _ in range(options.runs or (1 if options.quick else 5)):
            few.second()
            many.second()
    return figures_of(few, many, options.family)


def figures_of(few: Case, many: Case, family: str) -> list[Figure]:
    """The second start with many pictures: what they cost, how long it takes, what memory each takes; and what the
    first one decoded."""
    least = spread(min(many.baselines))
    memory = (many.least.memory - few.least.memory) / (many.count - few.count)
    name = f"{family}, second start"
    return [
        Figure(
            "start", f"{name}: {many.count} pictures beyond {few.count}", "s of CPU",
            spread(many.least.cpu - few.least.cpu),
            (Baseline("list, headers and captions", least, TIMES_THE_LEAST),),
            notes={str(case.count): case.notes() for case in (few, many)},
        ),
        Figure(
            "start", f"{name}: {many.count} pictures and one step", "s", spread(s.seconds for s in many.seconds),
            wanted=MOST_SECONDS,
        ),
        Figure("start", f"{name}: memory of a picture", "bytes", spread(memory), wanted=MOST_BYTES),
        Figure(
            "start", f"{family}, first start", "decoded", spread(few.first.decoded),
            (Baseline("pictures", spread(few.count), 1.0),),
        ),
    ]  # fmt: skip


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        counted_run(sys.argv[2], sys.argv[5:], sys.argv[3], sys.argv[4])
    elif sys.argv[1:2] == ["--baseline"]:
        baseline(sys.argv[2])
    else:
        sys.exit("this is a subject: python -m benchmarks start")
