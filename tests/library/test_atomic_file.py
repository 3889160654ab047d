"""A file is complete or not there."""

import pytest

from library.core.atomic_file import atomic_path, write_text_atomically


def test_a_failure_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "new" / "a.txt"
    write_text_atomically(path, "old")
    with pytest.raises(RuntimeError), atomic_path(path) as temporary:
        temporary.write_text("half")
        assert path.read_text() == "old" and temporary.parent == path.parent and temporary.suffix == ".txt"
        raise RuntimeError
    assert path.read_text() == "old" and list(path.parent.iterdir()) == [path]


def test_the_file_can_be_read_by_others_as_usual(tmp_path):
    plain, atomic = tmp_path / "plain", tmp_path / "atomic"
    plain.write_text("x")
    write_text_atomically(atomic, "x")
    assert plain.stat().st_mode == atomic.stat().st_mode
