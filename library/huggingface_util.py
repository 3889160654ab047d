"""Uploads to and downloads from the Hugging Face Hub; the package is imported only when a function needs it."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.core.errors import ConfigError

logger = logging.getLogger(__name__)

REPO_TYPES = ("model", "dataset", "space")
SECONDS_FOR_AN_ANSWER = 5
RESUME_FORM = "{owner}/{repo}/{path}[:{revision}[:{type}]]"


@dataclass(frozen=True)
class HubTarget:
    """Where files go. Any visibility but "public" makes a private repository; `path_in_repo` is a folder or empty."""

    repo_id: str
    repo_type: str | None = None
    path_in_repo: str | None = None
    token: str | None = None
    visibility: str | None = None

    @property
    def is_private(self) -> bool:
        return self.visibility != "public"


@dataclass(frozen=True)
class HubFolder:
    """A folder in a repository, as `--resume_from_huggingface` names it."""

    repo_id: str
    path: str
    revision: str | None = None
    repo_type: str | None = None


def parse_hub_folder(text: str) -> HubFolder:
    """Read `{owner}/{repo}/{path}[:{revision}[:{type}]]`; the type is "model" when a revision is given, else open.

    Raises ConfigError when the text has another form.
    """
    location, *rest = text.strip().split(":")
    parts = [part for part in location.split("/") if part]
    if len(parts) < 3 or len(rest) > 2:
        raise ConfigError(f"--resume is '{text}'; with --resume_from_huggingface it needs the form {RESUME_FORM}")
    revision = rest[0] if rest and rest[0] else None
    repo_type = rest[1] if len(rest) == 2 and rest[1] else ("model" if revision else None)
    if repo_type is not None and repo_type not in REPO_TYPES:
        raise ConfigError(f"--resume names the repository type '{repo_type}'; it is one of {', '.join(REPO_TYPES)}")
    return HubFolder("/".join(parts[:2]), "/".join(parts[2:]), revision, repo_type)


@functools.cache
def is_hub_reachable() -> bool:
    """Whether the hub answers, asked once for all: the packages that load from it try for half a minute before they say
    that it does not. False in offline mode."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=SECONDS_FOR_AN_ANSWER)
        return True
    except Exception as error:  # the classes differ between versions of the packages below
        logger.debug("the hub does not answer: %s", error)
        return False


def exists_repo(
    repo_id: str, repo_type: str | None = None, revision: str | None = None, token: str | None = None
) -> bool:
    """Whether the repository can be seen with this token. A failure to reach the hub raises ConfigError."""
    api, errors = _hub_api(token)
    try:
        api.repo_info(repo_id=repo_id, repo_type=repo_type, revision=revision)
        return True
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError):
        return False
    except (OSError, errors.HfHubHTTPError) as error:
        raise ConfigError(f"cannot ask the hub for '{repo_id}': {error}") from error


def list_dir(folder: HubFolder, token: str | None = None) -> list[str]:
    """Paths of all files in the repository whose name starts with the folder's path."""
    api, _ = _hub_api(token)
    names = api.list_repo_files(repo_id=folder.repo_id, revision=folder.revision, repo_type=folder.repo_type)
    return [name for name in names if name == folder.path or name.startswith(folder.path.rstrip("/") + "/")]


def download_folder(folder: HubFolder, token: str | None = None, workers: int = 4) -> Path:
    """Fetch all files of a folder, several at a time, and return where the folder lies now.

    Raises ConfigError when the folder is empty, is missing or cannot be reached.
    """
    _, errors = _hub_api(token)
    from huggingface_hub import hf_hub_download

    def fetch(name: str) -> Path:
        return Path(
            hf_hub_download(
                repo_id=folder.repo_id, filename=name, revision=folder.revision, repo_type=folder.repo_type, token=token
            )
        )

    try:
        names = list_dir(folder, token)
        if not names:
            raise ConfigError(f"the hub repository '{folder.repo_id}' has no files in '{folder.path}'")
        with ThreadPoolExecutor(workers) as pool:
            paths = list(pool.map(fetch, names))
    except (OSError, errors.HfHubHTTPError) as error:
        raise ConfigError(
            f"cannot fetch '{folder.path}' from the hub repository '{folder.repo_id}': {error}"
        ) from error
    depth = names[0].removeprefix(folder.path).strip("/").count("/") + 1
    return paths[0].parents[depth - 1]


def upload(target: HubTarget, source: str | Path, name: str = "") -> bool:
    """Upload a file or a folder; `name` is its path below `target.path_in_repo` (default: its own name).

    The repository is made when it is missing. A failure is logged and gives False: training goes on.
    """
    source = Path(source)
    place = "/".join(part for part in ((target.path_in_repo or "").strip("/"), name or source.name) if part)
    common = {"repo_id": target.repo_id, "repo_type": target.repo_type, "path_in_repo": place}
    try:
        api, _ = _hub_api(target.token)
        api.create_repo(repo_id=target.repo_id, repo_type=target.repo_type, private=target.is_private, exist_ok=True)
        if source.is_dir():
            api.upload_folder(folder_path=str(source), **common)
        else:
            api.upload_file(path_or_fileobj=str(source), **common)
    except Exception as error:  # noqa: BLE001 - whatever the network or the service does, the local file is safe
        logger.error("upload of %s to %s failed: %s", source, target.repo_id, error)
        return False
    logger.info("uploaded %s to %s/%s", source, target.repo_id, place)
    return True


class Uploader:
    """Uploads one after the other; with `in_background` in a thread, waited for by `finish`."""

    def __init__(self, target: HubTarget, in_background: bool = False, send: Callable[..., bool] = upload) -> None:
        self.target = target
        self.in_background = in_background
        self._send = send
        self._pool: ThreadPoolExecutor | None = None
        self._pending: list[Future] = []

    def __call__(self, source: str | Path, name: str = "", *, wait: bool = False) -> None:
        """Upload now, or start to; `wait` overrides `in_background` (the final file)."""
        if wait or not self.in_background:
            self._send(self.target, source, name)
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="upload")  # one thread keeps the order
        self._pending = [future for future in self._pending if not future.done()]
        self._pending.append(self._pool.submit(self._send, self.target, source, name))

    def finish(self) -> None:
        """Wait for the uploads that are under way."""
        for future in self._pending:
            future.result()
        self._pending.clear()


def _hub_api(token: str | None) -> tuple[Any, Any]:
    """(HfApi, its module of errors); ConfigError when the package is missing."""
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError as error:
        raise ConfigError(
            f"the Hugging Face options need the package huggingface_hub ({error}); install it with: pip install "
            "huggingface_hub"
        ) from error
    return huggingface_hub.HfApi(token=token), errors
