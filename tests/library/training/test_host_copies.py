"""Copies to main memory that the device does not wait for: order, bound, errors."""

from __future__ import annotations

import threading

import pytest
import torch

from library.components.device_transfers import Event, Transfers
from library.training import host_copies
from library.training.averaging import WeightAverage
from library.training.host_copies import MOST_ON_THE_WAY, HostCopies
from tests.waiting import PATIENCE


class Gated(Transfers):
    """Copies that are complete when `gate` opens; what the sources become meanwhile does not count."""

    gate: threading.Event

    def finish(self, event: Event) -> None:
        assert self.gate.wait(PATIENCE)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    found = threading.Event()
    transfers = Gated(torch.device("cpu"))
    transfers.gate = found
    monkeypatch.setattr(host_copies, "transfers_to", lambda device: transfers)
    return found


def replace(targets, sources) -> None:
    targets[0].copy_(sources[0])


def test_merges_wait_for_the_device_and_keep_their_order(gate: threading.Event) -> None:
    copies = HostCopies()
    target, source = torch.zeros(3), torch.ones(3)
    for number in range(MOST_ON_THE_WAY):
        source.fill_(number + 1)
        copies.add([target], [source], lambda to, of: to[0].mul_(10).add_(of[0]))
    source.fill_(9)
    assert torch.equal(target, torch.zeros(3)), "nothing is merged before the device is done"
    gate.set()
    copies.settle()
    assert torch.equal(target, torch.full((3,), 12.0))


def test_no_more_parts_than_allowed_are_on_their_way(gate: threading.Event) -> None:
    copies, target = HostCopies(), torch.zeros(1)
    for _ in range(MOST_ON_THE_WAY):
        copies.add([target], [torch.ones(1)], replace)
    third = threading.Thread(target=copies.add, args=([target], [torch.full((1,), 7.0)], replace))
    third.start()
    third.join(0.05)
    assert third.is_alive(), "it waits for one of the others"
    gate.set()
    third.join(PATIENCE)
    copies.settle()
    assert target.item() == 7


def test_an_error_is_told_to_who_waits() -> None:
    copies = HostCopies()

    def broken(targets, sources) -> None:
        raise OSError("no room")

    copies.add([torch.zeros(1)], [torch.ones(1)], broken)
    with pytest.raises(OSError, match="no room"):
        copies.settle()
    copies.settle()


def test_an_average_in_main_memory_is_that_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit, whatever the number format of the weights; main memory stands for a device from which copies are queued."""
    layers = {"a": torch.nn.Linear(5, 3), "b": torch.nn.Linear(4, 2).to(torch.bfloat16)}
    plain, beside = WeightAverage(lambda: layers), WeightAverage(lambda: layers, on_cpu=True)
    monkeypatch.setattr("library.training.averaging.PART_BYTES", 64)
    plain.begin()
    beside.begin()
    for step in range(5):
        with torch.no_grad():
            for layer in layers.values():
                layer.weight.add_(0.1 * step)
        with monkeypatch.context() as patch:
            patch.setattr("library.training.averaging.copies_are_queued", lambda device: True)
            beside.begin() if step == 0 else beside.follow(0.3)
        plain.begin() if step == 0 else plain.follow(0.3)
    for name, tensor in plain.tensors.items():
        assert torch.equal(beside.tensors[name], tensor)
