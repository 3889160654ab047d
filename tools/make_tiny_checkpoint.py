"""Write a complete tiny checkpoint of a family, with random weights, and the command that trains on it.

    python tools/make_tiny_checkpoint.py --family flux --output tiny_flux

Model files in their original layout, tokenizers, a few pictures with captions and a dataset configuration: two
megabytes, and nothing is downloaded. The printed command trains a LoRA in seconds on any machine. The pictures it
samples are noise: the model knows nothing.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from library.core.errors import AtelierError, ConfigError, Problems  # noqa: E402
from library.core.options import LARGEST_SEED, add_options, option, read_options  # noqa: E402
from library.tiny_models import TINY_SETS, TinySet, build_tiny, tiny_entry  # noqa: E402

DTYPES = {"float": "float32", "fp16": "float16", "bf16": "bfloat16"}
SAMPLE_PROMPTS = ("a red circle --w 64 --h 64 --s 4 --d 1", "a blue square --w 64 --h 64 --s 4 --d 2")
STEPS = 20


@dataclass(frozen=True, kw_only=True)
class MakeOptions:
    """What to write"""

    family: str | None = option(None, help=f"the model: {', '.join(TINY_SETS)}")
    output: str | None = option(None, help="folder for the files; a new or empty one")
    seed: int = option(
        0, help="seed of the weights and pictures; the same seed gives the same files", most=LARGEST_SEED
    )
    precision: str = option("float", choices=tuple(DTYPES), help="type of the stored weights")
    num_pictures: int = option(8, help="pictures of the dataset; 0 = none, and a command with a place to fill in")
    overwrite: bool = option(
        False, help="write into a folder that has files already; those of the same names are replaced"
    )

    def __post_init__(self) -> None:
        problems = Problems()
        if self.family is None:
            problems.add(f"--family is missing; it is one of {', '.join(TINY_SETS)}")
        else:
            problems.attempt(lambda: tiny_entry(self.family or ""))
        if not self.output:
            problems.add("--output is missing; name a folder for the files")
        if self.num_pictures < 0:
            problems.add(f"--num_pictures is {self.num_pictures}; use 0 (no dataset) or a positive number")
        problems.raise_if_any()


def setup_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, MakeOptions)
    return parser


def make(opts: MakeOptions) -> str:
    """Write everything; the command that trains on it. ConfigError when the folder is in use."""
    folder = Path(opts.output or "")
    check_folder(folder, overwrite=opts.overwrite)

    import torch

    from library.core.atomic_file import write_text_atomically
    from library.tiny_models.pictures import write_dataset

    tiny = build_tiny(opts.family or "", folder, seed=opts.seed, dtype=getattr(torch, DTYPES[opts.precision]))
    picture = folder / "images" / "00.png" if opts.num_pictures else "YOUR_PICTURE.png"
    more = f" --i {picture}" if tiny_entry(opts.family or "").first_frame else ""
    write_text_atomically(folder / "prompts.txt", "".join(f"{line}{more}\n" for line in SAMPLE_PROMPTS))
    dataset = (
        str(write_dataset(folder, count=opts.num_pictures, seed=opts.seed))
        if opts.num_pictures
        else "YOUR_DATASET.toml"
    )
    return command(opts.family or "", tiny, dataset)


def check_folder(folder: Path, *, overwrite: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--output is {folder}, which is a file; name a folder")
    if not overwrite and folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(
            f"--output is {folder}, which has files in it; name another folder, or add --overwrite to replace files "
            "there"
        )


def command(name: str, tiny: TinySet, dataset: str) -> str:
    """The training command as one line that can be pasted into a shell, from the folder that the tool was started
    in."""
    entry, folder = tiny_entry(name), tiny.folder
    script = ROOT / entry.script
    words = [
        "python", entry.script if Path.cwd() == ROOT else str(script), *tiny.arguments(), *entry.options,
        f"--dataset_config={dataset}",
        f"--network_module={entry.network_module}", "--network_dim=4", "--network_alpha=4", "--learning_rate=1e-3",
        f"--max_train_steps={STEPS}",
        "--max_data_loader_n_workers=0", "--seed=1", f"--output_dir={folder / 'output'}", f"--output_name={name}_lora",
        f"--sample_prompts={folder / 'prompts.txt'}", f"--sample_every_n_steps={STEPS}",
    ]  # fmt: skip
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def main(argv: list[str] | None = None) -> None:
    try:
        opts = read_options(vars(setup_parser().parse_args(argv)), MakeOptions)
        line = make(opts)
    except AtelierError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    print(f"{tiny_entry(opts.family or '').title}, tiny, with random weights: {opts.output}", file=sys.stderr)
    print(line)


if __name__ == "__main__":
    main()
