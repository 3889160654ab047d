"""State folders as files: what belongs to one, its checksums, what is damaged, which is the newest. Nothing here needs
torch."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from library.core.errors import CheckpointError, ConfigError
from library.core.file_owners import is_owned

logger = logging.getLogger(__name__)

WEIGHTS_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer.bin"
SCHEDULER_FILE = "scheduler.bin"
SCALER_FILE = "scaler.pt"
HOOKS_FILE = "hooks.bin"
STATE_FILE = "train_state.json"
SUMS_FILE = "SHA256SUMS"
"""checksums of all other files of a state, as `sha256sum -c` reads them; states of older versions have none"""
LATEST = "latest"
"""value of --resume for the newest state of the run's own name"""
STATE_ENDING = "-state"
_SUM_LINE = re.compile(r"([0-9a-f]{64}) [ *](.+)")


def write_sums(folder: Path) -> None:
    """Write SUMS_FILE for all files of the folder."""
    lines = [f"{checksum(path)}  {path.name}\n" for path in sorted(folder.iterdir()) if path.name != SUMS_FILE]
    (folder / SUMS_FILE).write_text("".join(lines), encoding="utf-8", newline="\n")


def checksum(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def state_problems(folder: Path) -> list[str]:
    """What is wrong with the files of a state folder, as one message; every file that has a checksum is read."""
    missing = [name for name in (STATE_FILE, WEIGHTS_FILE, OPTIMIZER_FILE) if not (folder / name).is_file()]
    if missing:
        return [
            f"--resume is {folder}, in which {_are(missing, 'missing')}; give a whole state folder (its name ends in "
            f"{STATE_ENDING})"
        ]
    try:
        sums = _read_sums(folder)
        lost = [name for name in sums if not (folder / name).is_file()]
        changed = [name for name, known in sums.items() if name not in lost and checksum(folder / name) != known]
    except OSError as error:
        return [f"--resume is {folder}, which cannot be read ({error.strerror}: {error.filename})"]
    except ValueError as error:
        return [f"--resume is {folder}, which is damaged: {error}. Go on from an earlier state"]
    said = [
        *([_are(lost, "missing")] if lost else []),
        *([f"{_are(changed, 'not as written')} (by {SUMS_FILE})"] if changed else []),
    ]
    if said:
        return [
            f"--resume is {folder}, which is damaged: {'; '.join(said)}. Go on from an earlier state, or copy this one "
            "again"
        ]
    try:
        read_train_state(folder)
    except CheckpointError as error:
        return [str(error)]
    return []


def _are(names: list[str], what: str) -> str:
    return f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'} {what}"


def _read_sums(folder: Path) -> dict[str, str]:
    """File name -> checksum; empty for a state without them. ValueError when the table is damaged."""
    path = folder / SUMS_FILE
    if not path.is_file():
        return {}
    try:
        matches = [_SUM_LINE.fullmatch(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError:
        matches = []
    if not matches or None in matches or any(Path(match[2]).name != match[2] for match in matches if match):
        raise ValueError(f"{SUMS_FILE} holds something else than checksums")
    return {match[2]: match[1] for match in matches if match}


def read_train_state(folder: str | Path) -> dict[str, Any]:
    """The counters of a state folder; CheckpointError when it is not one."""
    path = Path(folder) / STATE_FILE
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        state = {**state, "current_epoch": int(state["current_epoch"]), "current_step": int(state["current_step"])}
        if min(state["current_epoch"], state["current_step"]) < 0:
            raise ValueError("a negative number")
        return state
    except FileNotFoundError:
        raise CheckpointError(
            f"--resume is {folder}, which holds no {STATE_FILE}; give a state folder that --save_state wrote (its name "
            f"ends in {STATE_ENDING})"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); the state folder is damaged") from None


def states_in(folder: Path) -> list[Path]:
    """State folders below a folder, the newest last: by step, then by time."""
    found = []
    try:
        candidates = [path for path in folder.iterdir() if not is_owned(path.name) and (path / STATE_FILE).is_file()]
        for path in candidates:
            try:
                found.append((read_train_state(path)["current_step"], (path / STATE_FILE).stat().st_mtime_ns, path))
            except CheckpointError as error:
                logger.warning("%s; passed over", error)
    except OSError:
        return []
    return [path for _, _, path in sorted(found)]


def chosen_state(resume: str | None, output_dir: str | None, is_own: Any) -> Path | None:
    """The state folder that --resume means; None without one, and for "latest" when there is no state yet.

    "latest" is the newest state of the run's own name in --output_dir; a folder that holds states is its newest, those
    of the own name first. `is_own(name)` tells the names of the run. ConfigError when there is nothing to go on with.
    """
    if not resume:
        return None
    if resume == LATEST and not Path(LATEST).is_dir():
        return _newest(path for path in states_in(Path(output_dir or ".")) if is_own(path.name))
    folder = Path(resume)
    if not folder.is_dir():
        raise ConfigError(
            f"--resume is {resume}; there is no such folder. Needed: a state folder, a folder of states, or {LATEST} "
            "for the newest of --output_dir"
        )
    if (folder / STATE_FILE).exists() or (folder / WEIGHTS_FILE).exists():
        return folder
    states = states_in(folder)
    found = _newest(path for path in states if is_own(path.name)) or _newest(states)
    if found is None:
        raise ConfigError(
            f"--resume is {folder}, which holds no {STATE_FILE} and no folder with one; give a state folder that "
            "--save_state wrote"
            f" (its name ends in {STATE_ENDING}), or the folder of such folders"
        )
    return found


def _newest(states: Iterable[Path]) -> Path | None:
    return next(iter(reversed(list(states))), None)
