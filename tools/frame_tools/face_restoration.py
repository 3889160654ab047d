"""Face restoration, which is refused with its reason: there is no package for it that is kept well."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from library.core.errors import ConfigError
from library.scripts.tool_script import tool_exit_code

REASON = (
    "faces are not restored here: GFPGAN and CodeFormer need packages that nobody keeps up any more, and weights that"
    " must not be used commercially. docs/frame_tools.md tells what to use instead"
)


def build_parser() -> argparse.ArgumentParser:
    return argparse.ArgumentParser(description=f"Not available: {REASON}")


def run(argv: Sequence[str] | None = None) -> None:
    """ConfigError, whatever is asked for."""
    build_parser().parse_known_args(argv)
    raise ConfigError(REASON)


def main(argv: Sequence[str] | None = None) -> int:
    return tool_exit_code(run, argv)
