"""Copies on a stream of their own, against a stand-in for a device that counts what is queued where; memory for them."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from library.components import device_transfers
from library.components.device_transfers import (
    ALIGNMENT,
    HostMemory,
    StreamTransfers,
    Transfers,
    pieces,
    room_for,
    transfers_to,
)
from tests.simulated_device import SimulatedDevice


class FakeStream:
    def __init__(self, log: list[str], name: str) -> None:
        self.log, self.name = log, name

    def record_event(self) -> SimpleNamespace:
        self.log.append(f"{self.name} records")
        return SimpleNamespace(of=self.name, synchronize=lambda: self.log.append(f"host waits for {self.name}"))

    def wait_event(self, event: SimpleNamespace) -> None:
        self.log.append(f"{self.name} waits for {event.of}")


class FakeBackend:
    """What torch.cuda and torch.xpu have."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.current = FakeStream(self.log, "computation")

    def Stream(self, device: torch.device) -> FakeStream:
        return FakeStream(self.log, "copies")

    def current_stream(self, device: torch.device) -> FakeStream:
        return self.current

    @contextmanager
    def stream(self, stream: FakeStream):
        before, self.current = self.current, stream
        yield
        self.current = before


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> FakeBackend:
    fake = FakeBackend()
    monkeypatch.setattr(torch, "get_device_module", lambda device: fake)
    monkeypatch.setattr(
        torch.Tensor, "record_stream", lambda self, stream: fake.log.append(f"memory kept for {stream.name}")
    )
    return fake


def test_streams_wait_for_each_other_by_events_and_the_host_for_none(backend: FakeBackend) -> None:
    transfers = StreamTransfers(torch.device("cpu"))
    target, source = transfers.buffer(8), torch.arange(8, dtype=torch.uint8)
    event = transfers.copy([(target, source)], after=transfers.computed())
    transfers.wait(event)
    assert torch.equal(target, source)
    assert backend.log == [
        "memory kept for copies", "computation records", "copies waits for computation", "copies records",
        "computation waits for copies",
    ]  # fmt: skip
    transfers.finish(event)
    assert backend.log[-1] == "host waits for copies"


def test_main_memory_that_cannot_be_locked_is_told_once(
    backend: FakeBackend, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plain, transfers = torch.empty, StreamTransfers(torch.device("cpu"))

    def empty(*size, pin_memory: bool = False, **how):
        if pin_memory:
            raise RuntimeError("no pinned memory\nand more")
        return plain(*size, **how)

    monkeypatch.setattr(torch, "empty", empty)
    assert not transfers.is_fast(plain(3))
    assert [len(transfers.host_buffer(n)) for n in (4, 5)] == [4, 5]
    assert transfers.is_fast(plain(3))  # as fast as it gets here
    assert [record.getMessage() for record in caplog.records] == [
        "main memory cannot be page-locked (no pinned memory): what waits there is copied more slowly, and the host"
        " waits for it"
    ]  # fmt: skip


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of main memory, without streams, with them."""
    assert transfers_to(torch.device("cpu")) is None and transfers_to(torch.device("meta")) is None
    modules = {"mps": SimpleNamespace(), "xpu": FakeBackend()}
    monkeypatch.setattr(torch, "get_device_module", lambda device: modules[device.type])
    made = device_transfers.transfers_to.__wrapped__
    assert type(made(torch.device("mps"))) is Transfers and type(made(torch.device("xpu"))) is StreamTransfers


def test_tensors_of_all_types_lie_aligned_in_one_buffer() -> None:
    tensors = [
        torch.randn(3, 5), torch.randn(4, 4).to(torch.float8_e4m3fn), torch.randn(7, 2).bfloat16(),
        torch.ones(2, 3, 2, 2, dtype=torch.int8),
    ]  # fmt: skip
    buffer = torch.zeros(room_for(tensors), dtype=torch.uint8)
    for piece, tensor in zip(pieces(buffer, tensors), tensors, strict=True):
        assert (piece.data_ptr() - buffer.data_ptr()) % ALIGNMENT == 0
        piece.copy_(tensor)
    for piece, tensor in zip(pieces(buffer, tensors), tensors, strict=True):
        assert (piece.dtype, piece.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(piece.view(torch.uint8), tensor.view(torch.uint8))


def test_main_memory_is_taken_in_chunks() -> None:
    """So many tensors as fit share one; what is there already stays, and what is not contiguous becomes so."""
    device = SimulatedDevice()
    memory = HostMemory(device, expected=1000)  # chunks of 1024
    first = memory.hold(torch.ones(64))
    assert memory.hold(first) is first
    second, large = memory.hold(torch.arange(128.0).view(8, 16).T), memory.hold(torch.ones(300))
    assert second.is_contiguous() and torch.equal(second, torch.arange(128.0).view(8, 16).T)
    third = memory.hold(torch.ones(60))
    owner = first.untyped_storage().data_ptr()
    assert [one.untyped_storage().data_ptr() == owner for one in (second, large, third)] == [True, False, True]
    assert first.untyped_storage().nbytes() == 1024 and torch.equal(large, torch.ones(300))
