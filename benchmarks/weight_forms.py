"""What it costs to store the weights of a frozen base in fewer bits: how far outputs move, what training still reaches,
and how much room is saved.

    python -m benchmarks forms [--forms nf4 int8] [--epochs 16]

Outputs: the reference denoiser of FLUX.1 (tests/golden/flux_dev.safetensors) computes in float32 with its weights in each
form, and the relative error of its output is that of the weights alone. Training: the LoRA of examples/demo learns on the
demo's base in each form, in bfloat16 (--mixed_precision bf16); the figure is the loss on the pictures that are held out,
with fixed noise, before and after. Room: the weights of FLUX.1 dev at their real sizes, by adding up.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.figures import Baseline, Figure, spread
from benchmarks.merge import DOUBLE, model_shapes
from benchmarks.processes import ROOT
from benchmarks.words import count

OPTIONS = {
    "bf16": [], "fp8": ["--fp8_base_unet"], "fp8_scaled": ["--fp8_scaled"], "int8": ["--quantize_base", "int8"],
    "nf4": ["--quantize_base", "nf4"],
}  # fmt: skip
"""form of the denoiser's weights -> the options of a training with it"""
GOLDEN = ROOT / "tests" / "golden" / "flux_dev.safetensors"
TRAIN_CONFIG = ROOT / "examples" / "demo" / "train.toml"


def add_options(parser: argparse._ArgumentGroup | argparse.ArgumentParser) -> None:
    parser.add_argument("--forms", nargs="+", choices=tuple(OPTIONS), help="of the weights (default: all)")
    parser.add_argument("--epochs", type=count, help="of each training (default: those of the demo, 16)")


def measure(options: argparse.Namespace) -> list[Figure]:
    forms = options.forms or (["bf16", "int8"] if options.quick else list(OPTIONS))
    epochs = options.epochs or (1 if options.quick else None)
    errors, sizes = output_errors(forms), {form: flux_gigabytes(form) for form in forms}
    losses = {form: held_out(form, epochs) for form in forms}
    whole = {name: spread(values["bf16"]) for name, values in (("error", errors), ("size", sizes)) if "bf16" in values}
    first = losses.get("bf16")

    def baseline(value: float | None) -> tuple[Baseline, ...]:
        return () if value is None else (Baseline("bf16", spread(value)),)

    figures = []
    for form in forms:
        before, after = losses[form]
        figures += [
            Figure("forms", f"{form}, golden FLUX, output error", "share", spread(errors[form]), baseline(errors.get("bf16"))),
            Figure("forms", f"{form}, demo, held-out loss before", "loss", spread(before), baseline(first and first[0])),
            Figure("forms", f"{form}, demo, held-out loss after", "loss", spread(after), baseline(first and first[1])),
            Figure("forms", f"{form}, weights of FLUX.1 dev", "GB", spread(sizes[form]), baseline(sizes.get("bf16"))),
        ]
    return figures


def output_errors(forms: list[str]) -> dict[str, float]:
    """Form -> |output - output of float32 weights| / |the latter|."""
    import torch
    from safetensors import safe_open

    from library.checkpoints.loading import build_on_meta
    from library.flux_models import Flux, FluxParams

    parts: dict[str, dict[str, torch.Tensor]] = {"weights": {}, "input": {}, "output": {}}
    with safe_open(GOLDEN, "pt") as file:
        config = json.loads(file.metadata()["golden"])["config"]
        for key in file.keys():
            part, _, name = key.partition("/")
            parts[part][name] = file.get_tensor(key)
    params = FluxParams(**{name: value for name, value in config.items() if name in FluxParams.__dataclass_fields__})
    found = {}
    for form in forms:
        model = build_on_meta(lambda: Flux(params))
        model.load_state_dict(parts["weights"], assign=True)
        store(model.requires_grad_(False).eval(), form)
        names = ("img", "img_ids", "txt", "txt_ids", "timesteps", "y", "guidance")
        with torch.no_grad():
            output = model(*(parts["input"][name] for name in names))
        expected = parts["output"]["out"]
        found[form] = float((output - expected).norm() / expected.norm())
    return found


def store(model, form: str) -> None:
    """As a run stores them: the cast to fp8 all matrices, the others those of the blocks."""
    import torch

    from library.checkpoints.weight_forms import is_stored
    from library.flux_utils import BLOCKS
    from library.fp8_optimization_utils import store_layers

    if form == "bf16":
        for parameter in model.parameters():
            parameter.data = parameter.data.to(torch.bfloat16).to(parameter.dtype)
    else:
        store_layers(model, form, wanted=lambda path: is_stored(form, path, BLOCKS))


def flux_gigabytes(form: str) -> float:
    """Weights and scales of FLUX.1 dev."""
    import math

    from library.flux_utils import BLOCKS
    from library.checkpoints.weight_forms import NF4_BLOCKS, is_stored

    total = 0.0
    for name, shape in model_shapes(DOUBLE).items():
        rows, count = shape[0], math.prod(shape)
        is_small = form != "bf16" and name.endswith(".weight") and len(shape) == 2 and is_stored(form, name, BLOCKS)
        scales = {"fp8_scaled": 4 * rows, "int8": 4 * rows, "nf4": 4 * count / NF4_BLOCKS[0]}
        total += (count * (0.5 if form == "nf4" else 1) + scales.get(form, 0)) if is_small else 2 * count
    return total / 1e9


def held_out(form: str, epochs: int | None) -> tuple[float, float]:
    """The demo's loss on pictures that are held out, (before, after) a training on the base in a form."""
    with tempfile.TemporaryDirectory(prefix="forms-") as folder:
        config = Path(folder) / "train.toml"
        lines = TRAIN_CONFIG.read_text(encoding="utf-8").splitlines()
        lines = [line for line in lines if not re.match(r"sample_|validate_|output_dir|max_train_epochs", line)]
        epochs_line = [line for line in TRAIN_CONFIG.read_text().splitlines() if line.startswith("max_train_epochs")]
        lines += epochs_line if epochs is None else [f"max_train_epochs = {epochs}"]
        lines += [f"output_dir = {json.dumps(folder)}", "validate_every_n_epochs = 1"]
        config.write_text("\n".join(lines), encoding="utf-8")
        words = ["flux_train_network.py", "--config_file", str(config), "--mixed_precision", "bf16", *OPTIONS[form]]
        result = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
        if result.returncode:
            raise SystemExit(f"the training with {form} ended with exit code {result.returncode}: {result.stderr[-2000:]}")
        (table,) = Path(folder).glob("*-loss.csv")
        with open(table, encoding="utf-8", newline="") as file:
            values = [float(row["validation"]) for row in csv.DictReader(file) if row["validation"]]
    return values[0], values[-1]
