"""`make test` runs cross products pairwise, `make test-all` in full."""

from __future__ import annotations

import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest

from tests.waiting import PATIENCE

ROOT = Path(__file__).resolve().parent.parent
CASES = """
import pytest
from tests.pairwise import Each, Sort

@pytest.mark.cross_product("a", ("b", "c"), "d")
@pytest.mark.parametrize("a", range(4))
@pytest.mark.parametrize(("b", "c"), [(0, 0), (0, 1), (1, 0)])
@pytest.mark.parametrize("d", "xy")
def test_product(a, b, c, d):
    print("case", a, b, c, d)

@pytest.mark.cross_product("a", Sort("b", lambda b: b > 2, frozenset({5})), Each("b"))
@pytest.mark.parametrize("a", range(3))
@pytest.mark.parametrize("b", range(6))
def test_sorts(a, b):
    print("sorts", a, b)

@pytest.mark.parametrize("a", range(5))
def test_other(a):
    print("other")
"""


@pytest.fixture
def cases(tmp_path):
    (tmp_path / "test_cases.py").write_text(CASES, encoding="utf-8")

    def run(*words: str, name: str = "test_cases.py", kind: str = "case") -> list[tuple[str, ...]]:
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-s",
            "-p",
            "no:cacheprovider",
            "-p",
            "tests.conftest",
            "--rootdir",
            str(tmp_path),
        ]
        result = subprocess.run(
            [*command, str(tmp_path / name), *words], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE
        )
        assert result.returncode == 0, result.stdout + result.stderr
        lines = [line.lstrip(".") for line in result.stdout.splitlines()]
        assert sum(line == "other" for line in lines) == (0 if "::" in name else 5)
        return [tuple(line.split()[1:]) for line in lines if line.startswith(f"{kind} ")]

    return run


def test_every_pair_is_met_in_half_of_the_cases(cases):
    found = cases()
    assert len(found) <= 14 < 24
    axes = [{(case[0],) for case in found}, {case[1:3] for case in found}, {case[3:] for case in found}]
    assert [len(axis) for axis in axes] == [4, 3, 2]
    spans = [slice(0, 1), slice(1, 3), slice(3, 4)]
    for first, second in ((0, 1), (0, 2), (1, 2)):
        met = {(case[spans[first]], case[spans[second]]) for case in found}
        assert met == set(product(axes[first], axes[second]))


def test_in_full_and_by_name(cases):
    assert len(set(cases("--full"))) == 24
    assert cases(name="test_cases.py::test_product[x-0-0-3]") == [("3", "0", "0", "x")]


def test_a_sort_stands_for_its_values_and_each_of_them_is_met_all_the_same(cases):
    found = cases(kind="sorts")
    assert len(found) < 10 < 18
    assert {(a, int(b) > 2) for a, b in found} == set(product("012", (False, True)))
    assert {b for _, b in found} == set("012345")
    assert sum(b == "5" for _, b in found) == 1, "a dear value stands for no other"
