"""The inside of tools/plan_memory.py: which script a command starts, and the tables of its memory."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import PurePath

from library.core.errors import ConfigError, did_you_mean
from library.families.registry import FAMILIES, script_name
from library.training import cli
from library.training.option_groups import ConsoleOptions

DEVICES = ("cpu", "cuda")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="plan_memory.py", description="Tell how much memory a training will need; no weights are read."
    )
    parser.add_argument(
        "--device", choices=DEVICES,
        help="plan for such a device, whatever this machine has; the one that the training would use when not given",
    )
    parser.add_argument(
        "command", nargs=argparse.REMAINDER, help="the command of a training: a script with its options"
    )
    return parser


def scripts() -> Iterator[tuple[str, tuple[str, str]]]:
    """Name of a training script without .py -> (family, what it trains)."""
    for name, record in FAMILIES.items():
        if record.variant_of:
            continue
        yield script_name(name), (name, "network")
        yield from ((other.name, (name, what)) for what, other in record.scripts.items())


def what_it_trains(command: Sequence[str]) -> tuple[str, str, list[str]]:
    """(family, what is trained, options) of a command line. ConfigError when no training script is in it."""
    known = dict(scripts())
    for place, word in enumerate(command):
        path = PurePath(word)
        if path.suffix != ".py" and path.name not in (*known, "train"):
            continue
        rest = list(command[place + 1 :])
        if path.stem == "train":
            if len(rest) < 2:
                raise ConfigError("train.py needs two words behind it: a family and what is trained")
            return rest[0], rest[1], rest[2:]
        if path.stem in known:
            return *known[path.stem], rest
        raise ConfigError(f"{word} is no training script{did_you_mean(path.stem, known) or ''}")
    raise ConfigError(
        "no training script is named; needed: its command line, as in plan_memory.py train_network.py --config_file"
        " train.toml"
    )


def main(argv: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(argv)
    return cli.exit_code(lambda: show(options.command, options.device))


def show(command: Sequence[str], device: str | None) -> None:
    """Print the tables of a command. ConfigError."""
    family, trainable, words = what_it_trains(command)
    family, parsed = cli.read_command(family, trainable, words)
    cli.set_up_logging(parsed.config[ConsoleOptions])
    import torch

    trainer = cli.trainer_of(family, trainable, parsed.config)
    for plan in trainer.plans(None if device is None else torch.device(device)):
        print(plan.table())
