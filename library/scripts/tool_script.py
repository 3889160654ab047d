"""What the tools for adapter and model files share: options, errors as one message, outputs that overwrite nothing by
accident."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from library.core.options import Config, option
from library.training import cli

DTYPES: dict[str, str] = {
    "float": "float32", "float32": "float32", "fp32": "float32",
    "fp16": "float16", "float16": "float16", "half": "float16",
    "bf16": "bfloat16", "bfloat16": "bfloat16",
    "fp8": "float8_e4m3fn", "e4m3fn": "float8_e4m3fn", "fp8_e4m3fn": "float8_e4m3fn", "float8_e4m3fn": "float8_e4m3fn",
    "fp8_e5m2": "float8_e5m2", "e5m2": "float8_e5m2", "float8_e5m2": "float8_e5m2",
}  # fmt: skip
"""words for number formats that known tools take -> name in torch"""


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """Output"""

    overwrite: bool = option(False, help="write over an output file that exists; an input is never written over")
    dry_run: bool = option(False, help="show what would be done and write nothing")


def output_problems(outputs: Iterable[str | None], inputs: Iterable[str | None], config: Config) -> list[str]:
    """Why files cannot be written: they are inputs, or are there already without --overwrite."""
    problems, sources = [], [path for path in inputs if path]
    for path in outputs:
        if not path:
            continue
        same = next((source for source in sources if _is_same(path, source)), None)
        if same is not None:
            problems.append(f"the output {path} is an input too; give it another name")
        elif os.path.isdir(path):
            problems.append(f"the output {path} is a folder; the name of a file is needed")
        elif os.path.exists(path) and not config[OutputOptions].overwrite:
            problems.append(f"the output {path} exists; give another name or add --overwrite")
    return problems


def _is_same(first: str, second: str) -> bool:
    if os.path.exists(first) and os.path.exists(second):
        return os.path.samefile(first, second)
    return os.path.abspath(first) == os.path.abspath(second)


def dtype_problem(name: str, value: str | None) -> str | None:
    """A message for a number format that is not known, or None."""
    if value is None or value.lower() in DTYPES:
        return None
    return f"--{name} is '{value}'; known: {', '.join(DTYPES)}"


def tool_exit_code(run: Callable[[Sequence[str] | None], object], argv: Sequence[str] | None) -> int:
    """Call `run(argv)`: 0, or the exit code of the error after its one message."""
    try:
        return cli.exit_code(lambda: run(argv))
    except BrokenPipeError:  # the program that reads the output (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0
