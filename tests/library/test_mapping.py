"""Files that the system has no room to map are read all the same."""

from __future__ import annotations

import logging
import sys

import pytest
import torch
from safetensors.torch import save_file

from library.safetensors_utils import is_mapping_failure, load_pickled_tensors, load_safetensors

SIZE = 4 << 20


@pytest.fixture
def little_room():
    """Room in the address space for a few tensors, not for a file of 64 of them."""
    resource = pytest.importorskip("resource")
    if sys.platform != "linux":
        pytest.skip("the limit holds on Linux only")
    with open("/proc/self/statm", encoding="ascii") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    ballast = torch.empty(64 << 20, dtype=torch.uint8)  # so that the heap has room for the tensors
    del ballast
    resource.setrlimit(resource.RLIMIT_AS, (now + (160 << 20), limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    return {f"t{number:02d}": torch.full((SIZE // 4,), float(number)) for number in range(64)}


def test_a_file_that_cannot_be_mapped_is_read(tmp_path, tensors, request, caplog) -> None:
    save_file(tensors, tmp_path / "large.safetensors")
    wanted = float(sum(t[0] for t in tensors.values()))
    tensors.clear()
    request.getfixturevalue("little_room")
    from library.safetensors_utils import iterate_tensors

    with caplog.at_level(logging.WARNING):
        total = sum(float(tensor[-1]) for _, tensor in iterate_tensors(tmp_path / "large.safetensors"))
    assert total == wanted
    (line,) = [record.getMessage() for record in caplog.records]
    assert "large.safetensors" in line and "--disable_mmap_load_safetensors" in line


@pytest.mark.parametrize("at", ["opening", "reading"])
def test_wherever_mapping_fails_every_tensor_is_there(tmp_path, monkeypatch, at) -> None:
    """As Windows tells it, when a file is opened or when one of its tensors is asked for."""
    import safetensors

    wanted = {name: torch.randn(3) for name in "abc"}
    save_file(wanted, tmp_path / "m.safetensors")
    original = safetensors.safe_open

    class Failing:
        def __init__(self, *words, **more) -> None:
            if at == "opening":
                raise OSError(0, "The paging file is too small for this operation to complete. (os error 1455)")
            self.file, self.given = original(*words, **more), 0

        def __enter__(self):
            return self

        def __exit__(self, *exc) -> None: ...

        def get_tensor(self, name):
            if self.given == 2:
                raise RuntimeError("Couldn't open file mapping: <m.safetensors>, error code: <1455>")
            self.given += 1
            return self.file.get_tensor(name)

    monkeypatch.setattr(safetensors, "safe_open", Failing)
    found = load_safetensors(tmp_path / "m.safetensors")
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_a_pickle_that_cannot_be_mapped_is_read(tmp_path, monkeypatch) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "a.pt")
    original = torch.load

    def load(*words, mmap=False, **more):
        if mmap:
            raise RuntimeError("unable to mmap 24000000000 bytes from file <a.pt>: Cannot allocate memory (12)")
        return original(*words, **more)

    monkeypatch.setattr(torch, "load", load)
    assert torch.equal(load_pickled_tensors(tmp_path / "a.pt")["a"], torch.ones(2))


def test_other_errors_stay_what_they_are() -> None:
    assert not is_mapping_failure(RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB (os error 120)"))
    assert not is_mapping_failure(OSError(5, "Input/output error"))
