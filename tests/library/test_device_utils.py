"""Tensors on their way to a device."""

from __future__ import annotations

import torch

from library.device_utils import copies_are_queued, to_device, to_like
from tests.host_waits import HostWaits


def test_copies_to_a_device_are_queued_and_converted_there() -> None:
    with HostWaits() as waits:
        found = to_device(torch.ones(3), "meta", torch.bfloat16)
        to_device(found, "meta")
        to_like(torch.ones(3), found)
    assert (found.device.type, found.dtype) == ("meta", torch.bfloat16)
    assert not waits.places and sum(waits.queued.values()) == 2
    with HostWaits() as waits:
        torch.ones(3).to("meta")
        found.sum().item()
    assert len(waits.places) == 2, "what waits is seen"


def test_nothing_is_copied_where_it_lies_already() -> None:
    tensor = torch.ones(3)
    assert to_device(tensor, "cpu") is tensor and to_like(tensor, torch.zeros(1)) is tensor
    assert not copies_are_queued("cpu") and not copies_are_queued("mps"), "MPS may read a copy before it is there"
    assert copies_are_queued("cuda:1")
