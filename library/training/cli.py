"""What an entry script calls: build_parser() and main(), with the names of a family and of a trainable."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from library.core.errors import AtelierError, ConfigError, RunInterrupted
from library.core.garbage import wait_until_started
from library.core.plugins import import_plugins, plugins_on
from library.core.registry import import_target
from library.core.write_errors import disk_problem
from library.families.registry import record_of
from library.training import parser_common
from library.training.config_file import write_config_file
from library.training.failures import failure_of
from library.training.idle_options import as_block
from library.training.option_groups import ConfigFileOptions, ConsoleOptions
from library.training.option_reader import OptionsError, names_any
from library.training.stopping import INTERRUPTED, exit_code_of, signals_end_cleanly  # noqa: F401
from library.training.timestep_samplers import TimestepOptions

if TYPE_CHECKING:
    from library.core.options import Config
    from library.training.trainer_base import Trainer

logger = logging.getLogger("atelier")


def build_parser(family: str, trainable: str) -> argparse.ArgumentParser:
    """A parser as scripts and plug-ins expect it: its namespace holds every option, with its default when not given."""
    parser = parser_common.build_parser(family, trainable)
    parser.set_defaults(**parser_common.script(family, trainable).all_defaults())
    return parser


def main(family: str, trainable: str, argv: Sequence[str] | None = None) -> None:
    """Read the options, set up the log, train. Ends the process with the exit code of an error, one message and,
    except under --console_log_level DEBUG, no traceback."""
    if argv is None:
        wait_until_started()
    code = exit_code(lambda: run(family, trainable, argv))
    if code:
        sys.exit(code)


def main_with_plugins(family: str, trainable: str, argv: Sequence[str]) -> None:
    """`main` where the family and the trainable may be those that a module behind --plugins registers."""

    def start() -> None:
        import_plugins(plugins_on(argv))
        record_of(family)
        run(family, trainable, argv)

    code = exit_code(start)
    if code:
        sys.exit(code)


def exit_code(run: Callable[[], object], interrupted: str = "interrupted") -> int:
    """Call `run`: 0, or the exit code of what ended it, after its one message. Signals leave in good order."""
    try:
        with signals_end_cleanly():
            run()
    except AtelierError as error:
        return report(error)
    except KeyboardInterrupt as interrupt:
        print(interrupted, file=sys.stderr)
        return exit_code_of(interrupt)
    except Exception as error:
        told = failure_of(error)
        if told is None:
            raise
        told.__cause__ = error
        return report(told)
    return 0


def run(family: str, trainable: str, argv: Sequence[str] | None = None) -> None:
    """`main` without the handling of errors."""
    family, parsed = read_command(family, trainable, argv)
    config = parsed.config
    set_up_logging(config[ConsoleOptions])
    for note in parsed.notes:
        _tell(note.level, note.text)
    file_options = config[ConfigFileOptions]
    if file_options.output_config and config.ignored:
        _tell(logging.WARNING, as_block(config.ignored))
    if file_options.output_config:
        defaults = parser_common.script(family, trainable).defaults
        path = write_config_file(file_options.config_file, config, defaults)
        logger.info("wrote %s; train with --config_file %s", path, path)
        return
    family_class = import_target(record_of(family).family)
    if config[TimestepOptions].show_timesteps:
        from library.training.show_timesteps import show_timesteps

        shown = family_class(config)
        shown.check_timesteps()
        show_timesteps(config, shown)
        return
    from library.training import checks

    for line in checks.warnings(config):
        _tell(logging.WARNING, line)
    trainer_of(family, trainable, config).run()


def read_command(
    family: str, trainable: str, argv: Sequence[str] | None = None
) -> tuple[str, parser_common.Parsed]:
    """The family that a command line means, and its options; one ConfigError with everything that is wrong with it."""
    family = parser_common.chosen_variant(family, argv)
    try:
        return family, parser_common.parse_command(argv, family, trainable)
    except OptionsError as error:
        raise ConfigError([*error.problems, *further_problems(error, family, trainable)]) from error


def trainer_of(family: str, trainable: str, config: Config) -> Trainer:
    """The run of options that were read, of which nothing has begun."""
    from library.training.trainer_base import Trainer

    trainable_class = parser_common.TRAINABLES.resolve(trainable)
    return Trainer(config, import_target(record_of(family).family)(config), trainable_class(config))


def further_problems(error: OptionsError, family: str, trainable: str) -> list[str]:
    """What files, packages and data have against a run, beside the options that are wrong already."""
    if ConfigFileOptions not in error.config or error.config[ConfigFileOptions].output_config:
        return []
    if TimestepOptions in error.config and error.config[TimestepOptions].show_timesteps:
        return []  # it needs neither models nor data
    from library.training.checks import all_problems

    family_class = import_target(record_of(family).family)
    trainable_class = parser_common.TRAINABLES.resolve(trainable)
    logging.disable(logging.CRITICAL)
    try:
        found = all_problems(error.config, family_class, trainable_class)
    finally:
        logging.disable(logging.NOTSET)
    return [problem for problem in found if problem not in error.problems and not names_any(problem, error.failed)]


def _rank() -> int:
    """Number of this process, as the launchers set it."""
    return int(os.environ.get("RANK", "0") or 0)


def _is_said_by_another() -> bool:
    """Before the processes of a run know each other, all of them find the same; one per machine says it."""
    torch = sys.modules.get("torch")
    together = torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized()
    return not together and os.environ.get("LOCAL_RANK", "0") not in ("", "0")


def _tell(level: int, text: str) -> None:
    """A line that is the same in every process: the first one says it."""
    if _rank() == 0:
        logger.log(level, text)


def report(error: AtelierError) -> int:
    """Show an error, with its traceback when the log level is DEBUG; returns the exit code."""
    if isinstance(error, RunInterrupted):
        if _rank() == 0:
            print(error, file=sys.stderr)
        return error.exit_code
    if _is_said_by_another():
        return error.exit_code
    process = f"[process {_rank()}] " if _rank() else ""
    print(f"{process}error: {error}", file=sys.stderr)
    if logging.getLogger().isEnabledFor(logging.DEBUG):
        logging.getLogger().debug("the way to this error", exc_info=error)
    return error.exit_code


def is_worth_showing(record: logging.LogRecord) -> bool:
    """False for what bitsandbytes says of its 4-bit kernels on some CPUs when it is imported: what is stored in 4 bits
    here does not need them."""
    return not (record.name.startswith("bitsandbytes") and "gemm_4bit" in str(record.msg))


class _LogFile(logging.FileHandler):
    """A log file whose disk runs full stops growing; that is told once, on the console."""

    is_told = False

    def handleError(self, record: logging.LogRecord) -> None:
        problem = disk_problem(sys.exc_info()[1]) if sys.exc_info()[1] is not None else None
        if problem is None:
            super().handleError(record)
        elif not self.is_told:
            self.is_told = True
            print(f"--console_log_file {self.baseFilename}: {problem}; lines are left out of it", file=sys.stderr)

    def close(self) -> None:
        with suppress(OSError):
            super().close()


def set_up_logging(options: ConsoleOptions) -> None:
    """Handlers of the root logger, once per process: the console (stderr) or a file. Of several processes only the
    first tells what is going on; the others show warnings, marked with their number."""
    level = getattr(logging, options.console_log_level or "INFO")
    rank = _rank()
    text = "%(message)s" if options.console_log_simple else "%(asctime)s %(levelname)s %(message)s"
    if rank > 0:
        level, text = max(level, logging.WARNING), f"[process {rank}] {text}"
    if options.console_log_file:
        name = options.console_log_file if rank == 0 else f"{options.console_log_file}.{rank}"
        try:
            handler: logging.Handler = _LogFile(name, mode="w", encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            raise ConfigError(f"--console_log_file is {name}; it cannot be written ({error.strerror})") from error
    else:
        handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(text, "%H:%M:%S"))
    root = logging.getLogger()
    for old in list(root.handlers):
        if getattr(old, "set_by_atelier", False):
            root.removeHandler(old)
            old.close()
    handler.set_by_atelier = True  # type: ignore[attr-defined]
    handler.addFilter(is_worth_showing)
    root.addHandler(handler)
    root.setLevel(level)
