"""Old commands for model files: their options translated into those of tools/convert_model.py, with one line of
advice."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

MODEL_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")


def _forward(old: str, words: list[str]) -> int:
    """Run the new tool. Old scripts wrote over a file that existed, so their commands still do."""
    from tools.convert_model import main

    print(f"{old} is an old name; the same with: python tools/convert_model.py {' '.join(words)}", file=sys.stderr)
    return main([*words, "--overwrite"])


def convert_diffusers_to_flux(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="convert_diffusers_to_flux.py", description="FLUX.1 shards of diffusers to one file", allow_abbrev=False
    )
    parser.add_argument("--diffusers_path", required=True, help="folder of the model, or one of its shards")
    parser.add_argument("--save_to", required=True, help="the file to write")
    parser.add_argument(
        "--mem_eff_load_save", action="store_true", help="without effect: files are always read tensor by tensor"
    )
    parser.add_argument("--save_precision", help="number format of the result")
    args = parser.parse_args(argv)
    precision = ["--save_precision", args.save_precision] if args.save_precision else []
    return _forward("convert_diffusers_to_flux.py", [args.diffusers_path, args.save_to, "--to", "single", *precision])


def convert_diffusers20_original_sd(argv: Sequence[str] | None = None) -> int:
    """Options that asked for something that is not there are refused with the reason."""
    parser = argparse.ArgumentParser(
        prog="convert_diffusers20_original_sd.py",
        description="Stable Diffusion 1 and 2 between one file and a diffusers folder", allow_abbrev=False
    )
    parser.add_argument("model_to_load", help="file, or folder of diffusers")
    parser.add_argument("model_to_save", help="file with .safetensors, or folder")
    for name in ("v1", "v2"):
        parser.add_argument(f"--{name}", action="store_true", help="without effect: the model is recognised")
    for name in ("fp16", "bf16", "float"):
        parser.add_argument(f"--{name}", action="store_true", help=f"write {name} numbers")
    parser.add_argument(
        "--save_precision_as", default="no", choices=("no", "fp16", "bf16", "float"), help="number format of the result"
    )
    parser.add_argument("--use_safetensors", action="store_true", help="without effect: always so")
    parser.add_argument("--variant", help="word in the names of the weight files of a folder")
    parser.add_argument("--reference_model", help="folder of a model whose tokenizer goes into the folder")
    parser.add_argument("--epoch", type=int, default=0, help="not available: .safetensors files have no place for it")
    parser.add_argument(
        "--global_step", type=int, default=0, help="not available: .safetensors files have no place for it"
    )
    parser.add_argument("--metadata", help="not available: the metadata of the file are kept as they are")
    parser.add_argument(
        "--unet_use_linear_projection", action="store_true", help="not available: projections keep their form"
    )
    args = parser.parse_args(argv)
    for name in ("epoch", "global_step", "metadata", "unet_use_linear_projection"):
        if getattr(args, name):
            parser.error(
                f"--{name} is {getattr(args, name)}: {next(a.help for a in parser._actions if a.dest == name)}"
            )
    is_file = os.path.splitext(args.model_to_save)[1] in MODEL_SUFFIXES
    words = [args.model_to_load, args.model_to_save, "--to", "single" if is_file else "diffusers"]
    precision = next((name for name in ("fp16", "bf16", "float") if getattr(args, name)), args.save_precision_as)
    words += ["--save_precision", precision] if precision != "no" else []
    if not is_file:
        words += ["--variant", args.variant] if args.variant else []
        words += ["--tokenizer", args.reference_model] if args.reference_model else []
    return _forward("convert_diffusers20_original_sd.py", words)
