"""What is installed: ranges for users, one version of everything for the tests, torch chosen apart."""

from __future__ import annotations

import re
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from packaging.requirements import Requirement
from tests.third_parties import WISHES, disagreements, need_agreement
from tests.write_constraints import lines_of, plain_name

ROOT = Path(__file__).resolve().parent.parent
PYTHONS = ("3.10", "3.11", "3.12", "3.13")


def lines(name: str) -> list[str]:
    """The entries of a list, and of those that it takes in."""
    found = [line.strip() for line in (ROOT / name).read_text(encoding="utf-8").splitlines()]
    found = [line for line in found if line and not line.startswith("#")]
    return [one for line in found for one in (lines(line[3:].strip()) if line.startswith("-r ") else [line])]


def pinned(python: str) -> dict[str, str]:
    """{package: version} of constraints.txt for one Python."""
    found: dict[str, str] = {}
    for line in lines("constraints.txt"):
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate(
            {"python_version": python, "python_full_version": f"{python}.0"}
        ):
            name = plain_name(requirement.name)
            assert name not in found, f"{name} twice for Python {python}"
            found[name] = re.fullmatch(r"==([\w.+!]+)", str(requirement.specifier))[1]
    return found


def test_constraints_never_choose_torch():
    names = {plain_name(Requirement(line).name) for line in lines("constraints.txt")}
    assert not [name for name in names if re.match(r"(torch|torchvision|triton|nvidia-|sympy)", name)]


@pytest.mark.parametrize("python", PYTHONS)
def test_every_listed_package_has_one_version_within_its_range(python):
    versions = pinned(python)
    for line in lines("requirements.txt") + lines("requirements-dev.txt"):
        requirement = Requirement(line)
        if requirement.name == "torch":
            continue
        assert requirement.specifier.contains(versions[plain_name(requirement.name)]), f"{line} on Python {python}"
        if line in lines("requirements.txt"):
            assert "<" in str(requirement.specifier), f"{line} has no upper end: users get whatever comes next"
    assert {"opencv-python-headless", "open-clip-torch"} <= set(versions)


IMPORT_NAMES = {"opencv-python": "cv2", "Pillow": "PIL", "lycoris-lora": "lycoris"}  # where they differ


def never_imported(packages: list[str]) -> list[str]:
    """Those that no file of the project imports, nor a registry by its text "package.module:name"."""
    files = [path for folder in ("library", "networks", "tools") for path in (ROOT / folder).rglob("*.py")]
    source = "\n".join(path.read_text(encoding="utf-8") for path in files)
    statement = r"(?m)^\s*(?:import|from) (?:\w+\.)*{0}\b|[\"']{0}[.:]"
    return [name for name in packages if not re.search(statement.format(IMPORT_NAMES.get(name, name)), source)]


def test_every_required_package_is_used():
    """What nothing imports need not be installed; a package that is only loaded by choice is an extra."""
    assert never_imported([Requirement(line).name for line in lines("requirements.txt")] + ["nowhere"]) == ["nowhere"]


def test_what_the_tests_run_with_agrees():
    """The constrained environment compares with every third party; make test-newest may hold two that disagree, and
    says so."""
    current = pinned(f"{sys.version_info.major}.{sys.version_info.minor}")
    if any(version(name) != current[name] for name in {name for pair in WISHES for name in pair}):
        pytest.skip("not the versions of constraints.txt: " + ("; ".join(disagreements()) or "newer or older ones"))
    assert disagreements() == []


def test_a_skip_names_the_two_that_disagree(monkeypatch):
    deps = pytest.importorskip("transformers.dependency_versions_table").deps
    pytest.importorskip("peft")
    monkeypatch.setitem(deps, "peft", "peft>=999")
    with pytest.raises(pytest.skip.Exception, match=r"transformers \S+ asks for peft>=999, and peft \S+ is installed"):
        need_agreement("transformers", "peft")


def test_markers_are_the_shortest_that_tell_pythons_apart():
    old, new = {"a": "1", "b": "1"}, {"a": "1", "b": "2"}
    assert lines_of({"3.10": old | {"d": "1"}, "3.11": old, "3.12": new, "3.13": new | {"c": "1"}}) == [
        "a==1",
        'b==1; python_version < "3.12"',
        'b==2; python_version >= "3.12"',
        'c==1; python_version >= "3.13"',
        'd==1; python_version == "3.10"',
    ]


def test_the_makefile_takes_all_but_torch_with_the_constraints():
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    plain = re.findall(r"\$\(PIP\) (?!\$\(if)(.*)", text)
    assert plain == ['"$(TORCH)"']
    assert re.search(r"^LISTED := \$\(PIP\) \$\(if \$\(CONSTRAINTS\),-c \$\(CONSTRAINTS\)\)$", text, re.MULTILINE)
    assert re.search(r"^CONSTRAINTS \?= constraints.txt$", text, re.MULTILINE)
    assert "requirements-dev.txt" in text


def test_no_test_limits_the_time_of_a_process_by_a_number():
    """A busy machine is slow: only a process that hangs may meet a limit (tests/waiting.py)."""
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in sorted((ROOT / "tests").rglob("*.py"))
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if re.search(r"\btimeout=\d", line)
    ]
    assert not found, "use tests.waiting.PATIENCE: " + ", ".join(found)
