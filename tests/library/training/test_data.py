"""How batches are read and brought to the device."""

from __future__ import annotations

import dataclasses
import multiprocessing

import pytest
import torch
from torch.overrides import TorchFunctionMode

from library.core.keyed_random import StepDraws
from library.training.data import BatchLoader, Loading, loading_of, with_noise
from library.training.option_groups import LoopOptions
from tests.library.dataset.test_dataset import epoch_requests, make_folder, make_group, small_strategies


@pytest.mark.parametrize(
    ("method", "options", "number", "stay"),
    [
        ("fork", {}, 8, False), ("fork", {"persistent_data_loader_workers": True}, 8, True),
        ("spawn", {}, 2, True), ("forkserver", {}, 2, True),
        ("spawn", {"max_data_loader_n_workers": 5}, 5, True), ("spawn", {"max_data_loader_n_workers": 0}, 0, True),
    ],
)  # fmt: skip
def test_workers_where_they_are_forked_and_where_they_start_anew(monkeypatch, method, options, number, stay) -> None:
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda allow_none=False: method)
    monkeypatch.setattr("os.cpu_count", lambda: 16)
    loading = loading_of(LoopOptions(**options), set(options), pin_memory=False)
    assert (loading.num_workers, loading.persistent_workers) == (number, stay)
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    assert loading_of(LoopOptions(**options), set(options), pin_memory=False).num_workers == min(number, 1)


class Copies(TorchFunctionMode):
    """Notes whether copies to a device are waited for; nothing is copied to one that is not there."""

    def __init__(self) -> None:
        super().__init__()
        self.unwaited: list[bool] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__name__", "") == "to" and isinstance(args[0], torch.Tensor):
            self.unwaited.append(bool((kwargs or {}).get("non_blocking")))
            return args[0]
        if getattr(function, "__name__", "") == "pin_memory":
            return args[0]
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("device", "unwaited"), [("cuda", True), ("cuda:1", True), ("mps", False), ("xpu", False)])
def test_only_copies_to_cuda_are_not_waited_for(tmp_path, device, unwaited) -> None:
    """Elsewhere a copy from plain memory may be read before it is there."""
    group = make_group(make_folder(tmp_path, 2))
    group.set_strategies(small_strategies())
    batch = group.load(epoch_requests(group)[0])
    with Copies() as noted:
        batch.to(device)
    assert noted.unwaited and set(noted.unwaited) == {unwaited}
    assert batch.to("cpu") is batch


def test_workers_draw_the_noise_of_a_step(tmp_path) -> None:
    """The same numbers that the step draws by itself; none for images that are encoded in it, and for validation."""
    group = make_group(make_folder(tmp_path, 2))
    group.set_strategies(small_strategies())
    live = group.load(epoch_requests(group)[0])
    cached = dataclasses.replace(live, latents=torch.zeros(len(live), 4, 3, 6, 5))
    noise = with_noise(cached, seed=7).noise
    draws = StepDraws(7, cached.request.step, cached.request.positions)
    assert torch.equal(noise, draws.normal("noise", (4, 3, 6, 5)))
    with_axis = draws.normal("noise", (4, 1, 3, 6, 5))
    assert torch.equal(noise.view(with_axis.shape), with_axis), "a family may give pictures an axis of frames"
    held_out = dataclasses.replace(cached.request, is_training=False)
    assert with_noise(live, 7).noise is None
    assert with_noise(dataclasses.replace(cached, request=held_out), 7).noise is None
    alone = BatchLoader(group, Loading(0), noise_seed=7).loader.dataset
    assert alone.noise_seed is None, "nothing is gained in one process"
