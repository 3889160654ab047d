"""Earlier runs of the same name in the same folder: the state to go on with, and what becomes of their files."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path

from library.core.atomic_file import move
from library.core.errors import ConfigError
from library.core.file_limits import name_length, name_limit
from library.core.file_owners import clean_leftovers
from library.core.options import Config
from library.dataset import DatasetOptions
from library.training.checkpoint import (
    AVERAGED,
    CURVE_ENDINGS,
    DEFAULT_FORMAT,
    LAST_STEM,
    STATE_ENDING,
    CheckpointNames,
)
from library.training.option_groups import ResumeOptions, SavingOptions
from library.training.own_hooks import companion_endings
from library.training.state_files import LATEST, chosen_state
from library.training.whole_models import side_endings

logger = logging.getLogger(__name__)

SAMPLES = "sample"
_SAMPLE = re.compile(r"(?:e?\d{6,}_(?:\d{2,}_\d{14}(?:_\d+)?|grid)|sheet)\.(?:png|mp4)")


def is_output_of(
    name: str, saving: SavingOptions, endings: Sequence[str] = (AVERAGED,), sides: Sequence[str] = ()
) -> bool:
    """Whether a run with these options could write a file or folder of this name: final, epoch and step files, their
    companions with these endings, parts beside either with the endings `sides`, states, curves."""
    for side in sides:
        model = name.removesuffix(f"{side}.{DEFAULT_FORMAT}")
        if model != name:
            extension = CheckpointNames(None, saving.save_model_as).extension
            return is_output_of(f"{model}{extension}", saving, endings)
    names = CheckpointNames(saving.output_name, saving.save_model_as)
    number = re.search(rf"-(?:step)?(\d{{6,}})(?:-state|(?:{'|'.join(map(re.escape, endings))})?(?:\.\w+)?)$", name)
    stems = [names.last()]
    if number:
        stems += [names.epoch(int(number.group(1))), names.step(int(number.group(1)))]
    curves = [f"{names.last()}{ending}" for ending in CURVE_ENDINGS]
    if name in curves or any(name in (names.file(stem), names.state(stem)) for stem in stems):
        return True
    return any(name == names.companion(stem, ending) for stem in stems for ending in endings)


def is_sample_of(name: str, saving: SavingOptions) -> bool:
    """The same for the folder of samples."""
    prefix = f"{saving.output_name}_" if saving.output_name else ""
    if name == f"{saving.output_name or 'samples'}_sheet.png":
        return True
    return name.startswith(prefix) and _SAMPLE.fullmatch(name[len(prefix):]) is not None


def final_file(config: Config) -> Path:
    """Where the file of the whole run goes."""
    saving = config[SavingOptions]
    names = CheckpointNames(saving.output_name, saving.save_model_as)
    return Path(saving.output_dir or "") / names.file(names.last())


def resumed_state(config: Config) -> Path | None:
    """The local folder that --resume means, None without one; ConfigError when there is none to go on with."""
    resume, saving = config[ResumeOptions], config[SavingOptions]
    if resume.resume_from_huggingface:
        return None
    return chosen_state(resume.resume, saving.output_dir, lambda name: is_output_of(name, saving))


def goes_on(config: Config) -> bool:
    """Whether the run goes on with one of its own name in its folder (or with one from the hub), whose files are its
    own."""
    if config[ResumeOptions].resume and config[ResumeOptions].resume_from_huggingface:
        return True
    try:
        state = resumed_state(config)
    except ConfigError:
        return True  # told by the check of --resume
    saving = config[SavingOptions]
    if state is None or not is_output_of(state.resolve().name, saving):
        return False
    return state.resolve().parent == Path(saving.output_dir or "").resolve()


def earlier_files(config: Config) -> list[Path]:
    """Files and states of an earlier run that this one could replace, or would mix with; none when it goes on with that
    run."""
    saving = config[SavingOptions]
    if not saving.output_dir or config[DatasetOptions].debug_dataset or goes_on(config):
        return []
    folder, endings = Path(saving.output_dir), companion_endings(config)
    sides = side_endings(config)
    found = [folder / name for name in _names_in(folder) if is_output_of(name, saving, endings, sides)]
    return found + [folder / SAMPLES / name for name in _names_in(folder / SAMPLES) if is_sample_of(name, saving)]


def _names_in(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []


def existing_problems(config: Config) -> list[str]:
    """No folder is where the file of the run goes. --on_existing refuse: no file of an earlier run under the same name
    is there, unless this run goes on with it."""
    what, target = config[SavingOptions].what_of_existing, final_file(config)
    is_folder = CheckpointNames(None, config[SavingOptions].save_model_as).is_folder
    if target.is_dir() and not is_folder and (what == "overwrite" or goes_on(config)):
        return [
            f"{target} is a folder, and the file of this run goes there; rename or remove it, or choose another "
            "--output_name"
        ]
    if what != "refuse":
        return backup_problems(config)
    earlier = [path for path in earlier_files(config) if path.parent.name != SAMPLES]
    if not earlier:
        return []
    others = f" and {len(earlier) - 1} more" if len(earlier) > 1 else ""
    return [
        f"{earlier[0]}{others} of an earlier run would be replaced; choose another --output_name or --output_dir,"
        " go on with that run by --resume, keep its files under another name with --on_existing backup, or replace "
        "them with --overwrite"
    ]


def backup_problems(config: Config) -> list[str]:
    """The names under which files of an earlier run would be kept are no longer than the file system takes."""
    folder = Path(config[SavingOptions].output_dir or ".")
    longest = max((target.name for target in _backups(config).values()), key=name_length, default="")
    surplus = name_length(longest) - name_limit(folder)
    if surplus <= 0:
        return []
    return [
        f"{folder} holds an earlier run of this name, and the names of its kept files would be {surplus} too long for "
        "the"
        " file system; choose another --output_name or --output_dir, or move them away"
    ]


def _backups(config: Config) -> dict[Path, Path]:
    """Files of an earlier run that make room -> their names afterwards; states alone with --overwrite."""
    saving = config[SavingOptions]
    earlier = earlier_files(config) if saving.what_of_existing != "refuse" else []
    if saving.what_of_existing == "overwrite":
        earlier = [path for path in earlier if path.is_dir() and path.name.endswith(STATE_ENDING)]
    name = _free_name(saving) if earlier else ""
    return {path: path.with_name(_renamed(path, saving, name)) for path in earlier}


def keep_earlier_files(config: Config) -> dict[Path, Path]:
    """--on_existing backup: rename the files, states and samples of an earlier run of this name, as if it had been
    called NAME-backupN; overwrite: its states alone, which `--resume latest` would take for those of the new run.
    Returns old -> new. ConfigError when one cannot be renamed."""
    saving, moves = config[SavingOptions], _backups(config)
    if not moves:
        return {}
    name = _free_name(saving)
    for source, target in moves.items():
        try:
            move(source, target)
        except OSError as error:
            raise ConfigError(
                f"{source} of an earlier run cannot be renamed to {target.name} ({error.strerror or error}); close the "
                "program that uses it,"
                " or choose another --output_name"
            ) from error
    states = [target for target in moves.values() if target.name.endswith(STATE_ENDING) and target.is_dir()]
    going_on = (
        f"; go on with it by --output_name {name} --resume {max(states, key=lambda path: path.stat().st_mtime_ns)}"
        if states
        else ""
    )
    logger.warning(
        "%s holds an earlier run of this name: its %d files are kept as %s (%s)%s", saving.output_dir, len(moves), name,
        ", ".join(target.name for target in list(moves.values())[:3]) + (", ..." if len(moves) > 3 else ""), going_on,
    )  # fmt: skip
    return moves


def _free_name(saving: SavingOptions) -> str:
    """NAME-backupN with the lowest N that no file begins with."""
    folder, base = Path(saving.output_dir or ""), saving.output_name or LAST_STEM
    taken = re.compile(rf"{re.escape(base)}-backup(\d+)(?!\d)")
    names = [*_names_in(folder), *_names_in(folder / SAMPLES)]
    numbers = {int(match[1]) for name in names if (match := taken.match(name))}
    return f"{base}-backup{max(numbers, default=0) + 1}"


def _renamed(path: Path, saving: SavingOptions, name: str) -> str:
    """The name of the same file of a run that is called `name`."""
    if saving.output_name:
        return name + path.name[len(saving.output_name):]
    if path.parent.name == SAMPLES:
        return f"{name}_{path.name}"
    return name + re.sub(rf"^({LAST_STEM}|epoch|at)(?=[-.]|$)", "", path.name)


def clean_up(config: Config) -> None:
    """Remove what killed runs left half written where this one writes, and where its state is."""
    folder, resume = Path(config[SavingOptions].output_dir or ""), config[ResumeOptions]
    if not config[SavingOptions].output_dir:
        return
    clean_leftovers(folder)
    clean_leftovers(folder / SAMPLES)
    if resume.resume and resume.resume != LATEST and not resume.resume_from_huggingface:
        clean_leftovers(Path(resume.resume).absolute().parent)
