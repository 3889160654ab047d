"""Cache files that a data set made and no longer has: of videos that are gone, of clips of other lengths.

A file goes only where that is certain. Ours say from which folder or list their source came: those of the same folder
or list, and of this architecture, belong to the data set. A file of the known video trainer says no more than its
architecture: it goes where the dataset names a cache_directory, which that trainer keeps in the same way. All else
stays: files beside images, of other data sets, and damaged ones.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Sequence

from library.core.errors import CheckpointError
from library.dataset.cache_io import source_of
from library.dataset.cache_stores import is_tensor_file
from library.dataset.items import ImageItem, SubsetParams
from library.dataset.tensor_cache_io import TensorFile, architecture_problem
from library.families.record import DataArchitecture

logger = logging.getLogger(__name__)

LISTED = 3
"""files named in a message"""


def listed_in(cache_path: str | None, subset: SubsetParams) -> str:
    """The folders and lists of a subset as its cache files record them."""
    places = (
        subset.image_dir, subset.metadata_file, subset.image_jsonl_file, subset.video_directory, subset.video_jsonl_file
    )
    return "|".join(source_of(cache_path, place) for place in places if place is not None and cache_path is not None)


def leftovers(
    items: Sequence[ImageItem], path_of: Callable[[ImageItem], str | None], suffix: str, architecture: DataArchitecture
) -> list[str]:
    """Files with this ending that the data set made and none of its items has. `path_of`: the file of an item."""
    kept: set[tuple[int, int] | None] = set()
    folders: dict[str, dict[int, tuple[SubsetParams, str]]] = {}
    for item in items:
        path = path_of(item)
        if path is not None:
            path = os.path.abspath(path)
            kept.add(_file_id(path))
            folders.setdefault(os.path.dirname(path), {}).setdefault(id(item.subset), (item.subset, path))
    found = []
    for folder, subsets in folders.items():
        made_for = {listed_in(path, subset) for subset, path in subsets.values()}
        is_given = all(
            subset.cache_directory is not None and os.path.abspath(subset.cache_directory) == folder
            for subset, _ in subsets.values()
        )
        paths = (os.path.join(folder, name) for name in sorted(os.listdir(folder)) if name.endswith(suffix))
        others = (path for path in paths if _file_id(path) not in kept)
        found += [path for path in others if _is_of(path, architecture, made_for, is_given)]
    return found


def _file_id(path: str) -> tuple[int, int] | None:
    """Of the file itself, which may have several names: by links to its folder, in letters of another case."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _is_of(path: str, architecture: DataArchitecture, made_for: Iterable[str], takes_known: bool) -> bool:
    """Whether a file belongs to the data set of these folders and lists. `takes_known`: or was made by the known video
    trainer."""
    try:
        file = TensorFile.of(path)
    except CheckpointError:
        return False
    if "architecture" not in file.metadata or architecture_problem(file, architecture) is not None:
        return False
    made = file.listed_in()
    return takes_known if made is None else bool(made) and made in made_for


def prune(
    items: Sequence[ImageItem], path_of: Callable[[ImageItem], str | None], suffix: str, architecture: DataArchitecture
) -> int:
    """Remove `leftovers`, of families whose caches say where they come from; how many went."""
    if not is_tensor_file(suffix):
        return 0
    removed = []
    for path in leftovers(items, path_of, suffix, architecture):
        try:
            os.remove(path)
        except OSError as error:
            logger.warning("%s, which the data set no longer has, cannot be removed: %s", path, error)
        else:
            removed.append(path)
    if removed:
        more = f" and {len(removed) - LISTED} more" if len(removed) > LISTED else ""
        logger.info(
            "%d cache files were removed, which this data set made and no longer has: %s%s; --keep_cache keeps them",
            len(removed), ", ".join(removed[:LISTED]), more,
        )
    return len(removed)
