"""Train a LoRA on the demo's pictures with the embedded base, and show what it learned.

    python examples/demo/run_demo.py

Runs `flux_train_network.py --config_file examples/demo/train.toml` as a user would, which also makes the same samples
before and after, then `flux_minimal_inference.py` with the finished file, and puts a before/after sheet together.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

TRAIN_CONFIG, PROMPTS = "examples/demo/train.toml", "examples/demo/prompts.txt"
BASE = "assets/tiny-flux"
NAME = "zorbit"
PICTURE_PROMPT = "a zorbit in the snow"
FIRST_MARK = "e000000"  # in the names of samples made before the first step


class DemoError(Exception):
    """A step of the demo that did not do what it should."""


def run_script(*arguments: str) -> None:
    """One of the project's scripts, in a process of its own, from the top of the repository."""
    print("\n$ python " + " ".join(arguments), flush=True)
    result = subprocess.run([sys.executable, *arguments], cwd=ROOT)
    if result.returncode:
        raise DemoError(f"{arguments[0]} ended with exit code {result.returncode}")


def prompts_of(path: Path) -> list[str]:
    """The prompts of a prompt file without their options."""
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    return [line.split(" --")[0] for line in lines if line and not line.startswith("#")]


def sample_files(folder: Path, count: int) -> tuple[list[Path], list[Path]]:
    """(before, after): the samples of the first and of the last occasion, in the order of the prompts."""
    before, after = [], []
    for number in range(count):
        files = sorted(folder.glob(f"{NAME}_*_{number:02d}_*.png"), key=lambda path: path.stat().st_mtime)
        first = [path for path in files if path.name.startswith(f"{NAME}_{FIRST_MARK}_")]
        later = [path for path in files if path not in first]
        if not first or not later:
            raise DemoError(f"no samples of prompt {number} from before and after the training in {folder}")
        before.append(first[-1])
        after.append(later[-1])
    return before, after


def write_sheet(prompts: list[str], before: list[Path], after: list[Path], target: Path) -> None:
    """Before above after, one column per prompt."""
    from PIL import Image

    from library.generation.image_grid import GridCell, image_grid

    def cells(paths: list[Path], word: str) -> list[GridCell]:
        pictures = []
        for path, prompt in zip(paths, prompts):
            with Image.open(path) as image:
                pictures.append(GridCell(image.convert("RGB"), f"{word}: {prompt}"))
        return pictures

    sheet = image_grid(
        [*cells(before, "before"), *cells(after, "after")], columns=len(prompts), title="before and after training"
    )
    sheet.save(target)


def validation_losses(table: Path) -> tuple[float, float]:
    """(before, after): first and last held-out loss in the table of the loss curve."""
    with open(table, encoding="utf-8", newline="") as file:
        values = [float(row["validation"]) for row in csv.DictReader(file) if row["validation"]]
    if len(values) < 2:
        raise DemoError(
            f"{table} holds {len(values)} validation losses; one before and one after the training are needed"
        )
    return values[0], values[-1]


def clear(output: Path) -> None:
    """Remove what an earlier demo left, so that its samples are not mixed with the new ones."""
    for pattern in (f"{NAME}*", "picture/*.png"):
        for path in output.glob(pattern):
            if path.is_file():
                path.unlink()
    for path in (output / "sample").glob(f"{NAME}_*.png"):
        path.unlink()


def make_picture(output: Path) -> Path:
    """One picture with the finished file, by the image script."""
    folder = output / "picture"
    run_script(
        "flux_minimal_inference.py", "--ckpt_path", f"{BASE}/flux1-tiny.safetensors", "--clip_l",
        f"{BASE}/clip_l.safetensors",
        "--t5xxl", f"{BASE}/t5xxl.safetensors", "--ae", f"{BASE}/ae.safetensors", "--tokenizer_cache_dir",
        f"{BASE}/tokenizers",
        "--t5xxl_max_token_length", "32", "--dtype", "float32", "--lora_weights", str(output / f"{NAME}.safetensors"),
        "--prompt", PICTURE_PROMPT, "--negative_prompt", "", "--cfg_scale", "3", "--guidance", "1", "--steps", "20",
        "--width", "64", "--height", "64", "--seed", "1", "--output_dir", str(folder),
    )
    return max(folder.glob("*.png"), key=lambda path: path.stat().st_mtime)


def setup_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="demo_output", help="folder of the results")
    return parser


def main(argv: list[str] | None = None) -> None:
    output = ROOT / setup_parser().parse_args(argv).output_dir
    started = time.monotonic()
    clear(output)
    run_script("flux_train_network.py", "--config_file", TRAIN_CONFIG, "--output_dir", str(output))
    picture = make_picture(output)
    prompts = prompts_of(ROOT / PROMPTS)
    sheet = output / f"{NAME}-before-after.png"
    write_sheet(prompts, *sample_files(output / "sample", len(prompts)), sheet)
    before, after = validation_losses(output / f"{NAME}-loss.csv")
    print(f"\nDone in {time.monotonic() - started:.0f} s.")
    print(f"held-out validation loss: {before:.4f} before, {after:.4f} after ({after / before:.2f} of it)")
    for what, path in (
        ("LoRA", output / f"{NAME}.safetensors"), ("before and after", sheet),
        ("loss curve", output / f"{NAME}-loss.png"),
        ("a picture made with the LoRA", picture),
    ):
        print(f"{what}: {path}")


if __name__ == "__main__":
    try:
        main()
    except DemoError as error:
        sys.exit(f"error: {error}")
