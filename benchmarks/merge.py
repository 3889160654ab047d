"""What merging a LoRA into a large model costs: memory against the size of the model, time against a plain copy of the
file.

    python -m benchmarks merge [--gigabytes 4] [--folder DIR] [--sparse]

The model is a file in the layout of FLUX.1 with its real widths, in bfloat16, with as many blocks as fit the size (all
57 make 23.8 GB, 12 billion parameters). The merge is the command line of tools/merge_lora.py in a process of its own.
Memory is the peak of that process above what it had with torch imported, and must stay under a quarter of the model.
The copy reads, writes and fsyncs the same file. --sparse writes a model of zeros that takes no space on the disk.
Everything is removed afterwards.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.figures import Baseline, Figure, spread
from benchmarks.model_files import Shapes, count_of, shapes_of, write_random
from benchmarks.processes import ROOT
from benchmarks.words import amount, count, folder

MOST_MEMORY = 0.25
"""of the model, above what the process has with torch loaded"""
DOUBLE = 19
"""double blocks of FLUX.1; it has twice as many single ones"""
RANK = 16
CHUNK = 16 << 20

CHILD = """
import json, sys, time
import torch
from tools.lora_tools.merge import main

def status(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(name))

before, start = status("VmRSS"), time.perf_counter()
code = main(json.loads(sys.argv[1]))
print(json.dumps({"code": code, "seconds": time.perf_counter() - start, "before": before, "peak": status("VmHWM")}))
"""


def model_shapes(units: int) -> Shapes:
    """Names and shapes of a FLUX.1 denoiser with `units` double and twice as many single blocks, and its real
    widths."""
    from library.flux_models import Flux, FluxParams

    return shapes_of(lambda: Flux(FluxParams(depth=units, depth_single_blocks=2 * units)))


def units_for(gigabytes: float) -> int:
    one, two = (2 * count_of(model_shapes(units)) for units in (1, 2))
    return max(1, min(DOUBLE, 1 + round((gigabytes * 1e9 - one) / (two - one))))


def write_lora(path: Path, shapes: Shapes) -> None:
    """Rank 16 on every layer of the blocks."""
    import torch

    from library.safetensors_utils import save_file_atomic

    tensors = {}
    for key, shape in shapes.items():
        if len(shape) == 2 and "blocks" in key:
            name = f"lora_unet_{key.removesuffix('.weight').replace('.', '_')}"
            tensors[f"{name}.lora_down.weight"] = torch.randn(RANK, shape[1], dtype=torch.bfloat16)
            tensors[f"{name}.lora_up.weight"] = torch.randn(shape[0], RANK, dtype=torch.bfloat16)
            tensors[f"{name}.alpha"] = torch.tensor(8.0)
    save_file_atomic(tensors, path, {"ss_base_model_version": "flux1"})


def copy_seconds(source: Path, target: Path) -> float:
    """Read, write and fsync; the copy is removed."""
    start, buffer = time.perf_counter(), bytearray(CHUNK)
    with open(source, "rb", buffering=0) as read, open(target, "wb", buffering=0) as write:
        while count := read.readinto(buffer):
            write.write(memoryview(buffer)[:count])
        os.fsync(write.fileno())
    seconds = time.perf_counter() - start
    target.unlink()
    return seconds


def merge(model: Path, lora: Path, target: Path) -> dict[str, float]:
    words = [
        "--model",
        str(model),
        "--models",
        str(lora),
        "--ratios",
        "0.8",
        "--save_to",
        str(target),
        "--console_log_level=WARNING",
    ]
    done = subprocess.run([sys.executable, "-c", CHILD, json.dumps(words)], cwd=ROOT, capture_output=True, text=True)
    if done.returncode or not done.stdout.strip():
        raise SystemExit(f"the merge failed: {done.stderr.strip()}")
    result = json.loads(done.stdout.strip().splitlines()[-1])
    if result["code"]:
        raise SystemExit(f"the merge failed: {done.stderr.strip()}")
    return result


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gigabytes", type=amount, help="size of the model (default: 4); 23.8 is all of FLUX.1")
    parser.add_argument(
        "--folder", type=folder, help="where the files are written; the system's temporary folder when not given"
    )
    parser.add_argument("--sparse", action="store_true", help="a model of zeros that takes no space")
    parser.add_argument("--runs", type=count, help="merges, each with a copy beside it (default: 3)")


def measure(options: argparse.Namespace) -> list[Figure]:
    shapes = model_shapes(units_for(options.gigabytes or (0.01 if options.quick else 4.0)))
    size = 2 * count_of(shapes)
    folder = Path(tempfile.mkdtemp(prefix="merge-", dir=options.folder))
    try:
        check_room(folder, size * (1 if options.sparse else 2))
        model, lora = folder / "model.safetensors", folder / "lora.safetensors"
        write_random(model, shapes, sparse=options.sparse)
        write_lora(lora, shapes)
        copies, merges = [], []
        for _ in range(options.runs or (1 if options.quick else 3)):
            copies.append(copy_seconds(model, folder / "copy.safetensors"))
            merges.append(merge(model, lora, folder / "merged.safetensors"))
            (folder / "merged.safetensors").unlink()
    finally:
        shutil.rmtree(folder)
    case = f"a LoRA into {size / 1e9:.2f} GB{', sparse' if options.sparse else ''}"
    above = spread((merged["peak"] - merged["before"]) / 1e9 for merged in merges)
    return [
        Figure(
            "merge", f"{case}, memory beyond torch", "GB", above,
            (Baseline("the model", spread(size / 1e9), MOST_MEMORY),),
            notes={"parameters": size // 2, "GB with torch loaded": merges[0]["before"] / 1e9},
        ),
        Figure("merge", case, "s", spread(m["seconds"] for m in merges), (Baseline("copy of the file", spread(copies)),)),
    ]  # fmt: skip


def check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed * 1.1:
        raise SystemExit(
            f"{folder} has {free / 1e9:.1f} GB free; needed are {needed * 1.1 / 1e9:.1f} GB: give a smaller --gigabytes"
        )
