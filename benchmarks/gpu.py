"""Training of models of real size on a GPU: time of a step, peak memory, and the share of what the arithmetic allows.

    python -m benchmarks gpu [--minutes 10] [--models flux sdxl wan] [--folder DIR]
    python -m benchmarks gpu --cpu          # the same cells with small models on the CPU: whether the script works

Weights are random, of the shapes of FLUX.1 dev, SDXL and Wan 2.1 1.3B; nothing is downloaded. Each cell is the ordinary
training of a LoRA of rank 16, batch 1, with checkpointing, in a process of its own, so that one that runs out of memory
costs only itself. Cells come in the order of what they tell; those for which no time is left are named and left out.
Steps are timed between the ends of successive ones by events on the device, which nothing waits for. FLOPs are those of
the first step, counted by torch as they are done, recomputation among them; the rates of products and of copies from
pinned memory are measured in the same process.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.figures import Baseline, Figure, spread
from benchmarks.processes import ROOT
from benchmarks.words import amount, count, folder

if TYPE_CHECKING:
    import torch

    from library.training.hooks.base import Hook
    from library.training.run import Run, StepOutput

FORMATS = {
    "fp32": (),
    "bf16": ("--mixed_precision=bf16",),
    "fp8_scaled": ("--mixed_precision=bf16", "--fp8_scaled"),
    "fp8_fast": ("--mixed_precision=bf16", "--fp8_scaled", "--fp8_fast"),
}
"""`fp8_fast` multiplies in 8 bits too, at up to twice the rate of the bound, which is that of bfloat16"""
RANK = 16
WARM_UP, STEPS, SMALL_STEPS = 3, 6, 2
SWAPPED, SMALL_SWAPPED = (10, 20, 35), (1, 2, 3)
MATMUL_SIDE, COPIED = 4096, 1 << 28
SECONDS_OF_A_CELL = 25
"""less time than this is left: no further cell is begun"""


@dataclass(frozen=True)
class Cell:
    """One training. `swapped`: blocks that wait in main memory; `compiled`: by torch.compile."""

    model: str
    format: str
    swapped: int = 0
    compiled: bool = False

    def name(self) -> str:
        told = [self.format, f"{self.swapped} swapped" if self.swapped else "", "compiled" if self.compiled else ""]
        return ", ".join(word for word in told if word)

    def words(self, is_small: bool) -> list[str]:
        """Options of the script."""
        return [
            *FORMATS[self.format], *([f"--blocks_to_swap={self.swapped}"] if self.swapped else []),
            *(["--torch_compile", f"--dynamo_backend={'eager' if is_small else 'inductor'}"] if self.compiled else []),
        ]  # fmt: skip


def cells_of(models: Sequence[str], is_small: bool) -> list[Cell]:
    """In the order of what they tell: each model once, then swap by swap, then what is compiled."""
    depths = SMALL_SWAPPED if is_small else SWAPPED
    cells = [Cell(model, "bf16") for model in models]
    if "flux" in models:
        cells.append(Cell("flux", "fp8_scaled"))
        cells += [Cell("flux", kind, depth) for depth in depths for kind in ("bf16", "fp8_scaled")]
        cells += [Cell("flux", kind, compiled=True) for kind in ("bf16", "fp8_scaled")]
        cells += [] if is_small else [Cell("flux", "fp8_fast")]
        cells += [Cell("flux", kind, depth, True) for depth in depths for kind in ("bf16", "fp8_scaled")]
    return cells


def add_options(parser: argparse.ArgumentParser) -> None:
    models = ("flux", "sdxl", "wan")
    parser.add_argument("--models", nargs="+", choices=models, default=list(models), help="default: all")
    parser.add_argument("--minutes", type=amount, default=10.0, help="no cell is begun that would end later (default: 10)")
    parser.add_argument("--cells", type=count, help="only the first of them, so many")
    parser.add_argument(
        "--folder", type=folder, help="where 32 GB of models are written; the system's temporary folder by default"
    )
    parser.add_argument("--cpu", action="store_true", help="small models on the CPU, in this process")


def measure(options: argparse.Namespace) -> list[Figure]:
    import torch

    if not options.cpu and not torch.cuda.is_available():
        print("gpu: torch sees no GPU here; left out (`gpu --cpu` runs the same cells on small models)", file=sys.stderr)
        return []
    deadline = time.monotonic() + 60 * options.minutes
    cells = cells_of(options.models, options.cpu)[: options.cells]
    with tempfile.TemporaryDirectory(prefix="gpu-", dir=options.folder) as temporary:
        bench = GpuBench(Path(temporary), options.cpu, deadline)
        results = {}
        for cell in cells:
            results[cell] = bench.result_of(cell)
            print(f"gpu: {cell.model}, {cell.name()}: {summary(results[cell])}", file=sys.stderr, flush=True)
    return list(figures_of(results, options.cpu))


def summary(result: dict[str, Any]) -> str:
    """One line at once, which stays when the command is stopped before its table."""
    if "problem" in result:
        return result["problem"]
    peak = f", at most {result['peak'] / 1e9:.1f} GB on the GPU" if result["peak"] else ""
    return f"{spread(result['ms']).median:.0f} ms{peak}"


class GpuBench:
    """Runs cells: each in a process of its own, which ends with its memory; small ones in this process."""

    def __init__(self, folder: Path, is_small: bool, deadline: float) -> None:
        self.folder, self.is_small, self.deadline = folder, is_small, deadline
        self.words: dict[str, list[str]] = {}

    def result_of(self, cell: Cell) -> dict[str, Any]:
        """What `run_cell` gives, or {"problem": why there is nothing}."""
        if self.deadline - time.monotonic() < (0 if self.is_small else SECONDS_OF_A_CELL):
            return {"problem": "left out: no time is left"}
        from benchmarks.real_models import MODELS

        if cell.model not in self.words:
            self.words[cell.model] = MODELS[cell.model].write(self.folder / cell.model, self.is_small)
        if self.is_small:
            return problems_as_results(lambda: run_cell(cell, self.words[cell.model], self.folder, is_small=True))
        return self._in_a_process(cell)

    def _in_a_process(self, cell: Cell) -> dict[str, Any]:
        given = json.dumps({"cell": asdict(cell), "words": self.words[cell.model], "folder": str(self.folder)})
        try:
            done = subprocess.run(
                [sys.executable, "-m", "benchmarks.gpu", given], cwd=ROOT, capture_output=True, text=True, check=False,
                timeout=max(1.0, self.deadline - time.monotonic()),
            )
        except subprocess.TimeoutExpired:
            return {"problem": "stopped: the time was over"}
        lines = done.stdout.strip().splitlines()
        if done.returncode or not lines:
            told = done.stderr.strip().splitlines() or ["no message"]
            return {"problem": f"failed with exit code {done.returncode}: {told[-1]}"}
        return json.loads(lines[-1])


def problems_as_results(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What the work gives; a combination that is refused, or memory that does not suffice, is a result too."""
    import torch

    from library.core.errors import AtelierError

    try:
        return work()
    except (AtelierError, torch.OutOfMemoryError) as error:
        return {"problem": f"{type(error).__name__}: {' '.join(str(error).split())}"}


# ---- one cell --------------------------------------------------------------------------------------------------------


def run_cell(cell: Cell, words: Sequence[str], folder: Path, *, is_small: bool) -> dict[str, Any]:
    """Train some steps; their milliseconds, peak memory, FLOPs, and the rates of this machine."""
    import library
    from benchmarks.real_models import MODELS

    model, meter = MODELS[cell.model], meter_hook(counts_flops=not cell.compiled)
    training = library.Training(
        [*words, *cell.words(is_small)], family=model.family, hooks=[meter], network_module=model.network_module,
        network_dim=RANK, network_alpha=RANK, network_train_unet_only=True, gradient_checkpointing=True,
        cache_latents_to_disk=True, cache_text_encoder_outputs_to_disk=True, learning_rate=1e-4, seed=1, sdpa=True,
        max_train_steps=WARM_UP + (SMALL_STEPS if is_small else STEPS), max_data_loader_n_workers=0, console_log_level="ERROR",
        output_dir=folder / "out" / re.sub(r"\W+", "_", f"{cell.model} {cell.name()}"), output_name="lora",
    )  # fmt: skip
    training.train()
    return {**meter.result(), **rates(training.runtime.device)}


def meter_hook(counts_flops: bool) -> Hook:
    """A hook that notes the ends of steps and what the device held."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from library.training.hooks.base import Hook

    class Meter(Hook):
        def __init__(self) -> None:
            super().__init__()
            self.marks: list[Any] = []
            self.flops, self.peak, self.peak_of_start, self.moved = 0, 0, 0, 0.0
            self._counter = contextlib.ExitStack()

        def on_train_start(self, run: Run) -> None:
            if run.runtime.device.type == "cuda":
                self.moved = bytes_moved(run.models.denoiser)
                self.peak_of_start = torch.cuda.max_memory_allocated()
                torch.cuda.reset_peak_memory_stats()

        def on_step_start(self, run: Run, batch: Any) -> None:
            if not self.marks and counts_flops:
                self._mode = self._counter.enter_context(FlopCounterMode(display=False))

        def on_step_end(self, run: Run, output: StepOutput) -> None:
            if not self.marks and counts_flops:
                self._counter.close()
                self.flops = self._mode.get_total_flops()
            self.marks.append(mark_on(run.runtime.device))
            if run.runtime.device.type == "cuda":
                self.peak = torch.cuda.max_memory_allocated()

        def close(self, run: Run, error: BaseException | None) -> None:
            self._counter.close()

        def result(self) -> dict[str, Any]:
            return {
                "ms": milliseconds_between(self.marks)[WARM_UP - 1 :], "flops": self.flops, "peak": self.peak,
                "peak_of_start": self.peak_of_start, "moved": self.moved,
            }  # fmt: skip

    return Meter()


def bytes_moved(denoiser: torch.nn.Module) -> float:
    """To the device in a step: the blocks that travel come once for the forward pass and once for the backward pass, but
    for those that lie in the ring when it turns."""
    moved = 0.0
    for row in getattr(denoiser, "offloaders", ()):
        if row is not None and row.num_swapped:
            travelling = sum(tensor.nbytes for tensor in row.travellers())
            number = row.num_swapped + row.ring_size
            moved += travelling * (2 * number - row.ring_size) / number
    return moved


def mark_on(device: torch.device) -> Any:
    """Now, on the device: an event that nothing waits for, or the time of this process."""
    import torch

    if device.type != "cuda":
        return time.process_time()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def milliseconds_between(marks: Sequence[Any]) -> list[float]:
    """Between each mark and the next one."""
    if not marks or isinstance(marks[0], float):
        return [1e3 * (after - before) for before, after in zip(marks, marks[1:])]
    marks[-1].synchronize()
    return [before.elapsed_time(after) for before, after in zip(marks, marks[1:])]


def rates(device: torch.device) -> dict[str, float]:
    """FLOPs per second of a product in bfloat16, and bytes per second of a copy from main memory to the device."""
    import torch

    from benchmarks.bounds import copy_rate, matmul_rate

    on_gpu = device.type == "cuda"
    clock, wait = (time.perf_counter, torch.cuda.synchronize) if on_gpu else (time.process_time, lambda: None)
    source = torch.empty(COPIED if on_gpu else 1 << 20, dtype=torch.uint8, pin_memory=on_gpu)
    target = torch.empty_like(source, device=device)
    return {
        "matmul": matmul_rate(device, torch.bfloat16, MATMUL_SIDE if on_gpu else 256, 10, clock, wait),
        "copy": copy_rate(source, target, 5, clock, wait),
    }  # fmt: skip


# ---- figures ---------------------------------------------------------------------------------------------------------


def figures_of(results: dict[Cell, dict[str, Any]], is_small: bool) -> Iterator[Figure]:
    """Two for each cell that ran: the time of a step beside its bounds, and the peak of memory. FLOPs of a compiled cell
    are those of its model uncompiled."""
    from benchmarks.real_models import MODELS

    flops = {cell.model: result["flops"] for cell, result in reversed(results.items()) if result.get("flops")}
    for cell, result in results.items():
        if "problem" in result:
            continue
        case = f"{MODELS[cell.model].name(is_small)}: {cell.name()}"
        bounds = []
        if cell.model in flops:
            bounds.append(Baseline("its multiplications", spread(1e3 * flops[cell.model] / result["matmul"]), is_bound=True))
        if result["moved"]:
            bounds.append(Baseline("its copies", spread(1e3 * result["moved"] / result["copy"]), is_bound=True))
        yield Figure("gpu", case, "ms", spread(result["ms"]), bounds, notes={**asdict(cell), **result})
        if result["peak"]:
            yield Figure("gpu", f"{case}, peak of a step", "GB", spread(result["peak"] / 1e9))


def main(argv: Sequence[str]) -> int:
    """A cell in a process of its own: its result is the last line."""
    if len(argv) != 1 or not argv[0].startswith("{"):
        raise SystemExit("this is a subject: python -m benchmarks gpu")
    given = json.loads(argv[0])
    cell, words, folder = Cell(**given["cell"]), given["words"], Path(given["folder"])
    with contextlib.redirect_stdout(sys.stderr):
        result = problems_as_results(lambda: run_cell(cell, words, folder, is_small=False))
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
