"""--offload_optimizer on a simulated device, which raises when a step uses states that have not arrived."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from library.core.errors import ConfigError
from library.training import optimizers
from library.training.optimizers import OptimizerOptions, host_states
from library.training.optimizers.host_states import HostStates
from library.training.optimizers.single_steps import COMPENSATION, steps_singly
from library.training.updaters.single import RoundingUpdater, bring_states
from tests.runs.conftest import largest_difference
from tests.runs.families import Tinies
from tests.simulated_device import SimulatedDevice

SIZES = ((24, 16), (40, 16), (3,), (64, 32), (8, 8))
LEAST = 128
NAMES = ("AdamW", "AdaFactor", "SGDNesterov", "Lion", "CAME", "Prodigy", "AdEMAMix", "RMSprop")


def options_of(name: str) -> OptimizerOptions:
    args = ["relative_step=False"] if name == "AdaFactor" else None
    return OptimizerOptions(optimizer_type=name, learning_rate=1e-2, optimizer_args=args, offload_optimizer=True)


def weights() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(size, generator=generator)) for size in SIZES]


def gradient(size: tuple[int, ...], step: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(step))


def made(options: OptimizerOptions, trained: list[nn.Parameter]):
    groups = [{"params": trained[:3], "lr": 1e-2, "name": "a"}, {"params": trained[3:], "lr": 3e-3, "name": "b"}]
    if options.optimizer_type == "Prodigy":
        groups = [{"params": trained, "lr": 1.0, "name": "all"}]
    return optimizers.build(options, groups).optimizer


def stepped(optimizer, trained: list[nn.Parameter], steps: range, device: SimulatedDevice | None = None) -> None:
    for step in steps:
        for weight in trained:
            weight.grad = None if step == 1 and len(weight) == 3 else gradient(tuple(weight.shape), step)
        if device is None:
            optimizer.step()
            continue
        with device.watching():
            optimizer.step()


def tensors_of(state: dict) -> list[Tensor]:
    return [value for entry in state["state"].values() for value in entry.values() if isinstance(value, Tensor)]


@pytest.mark.parametrize("name", NAMES)
def test_a_step_with_states_at_home_is_the_same_to_the_bit(name: str) -> None:
    """Also after a state was saved and loaded on the way."""
    options, expected = options_of(name), weights()
    try:
        plain = made(options, expected)
    except ConfigError as error:
        pytest.skip(str(error))
    stepped(plain, expected, range(5))
    found, device = weights(), SimulatedDevice()
    optimizer = made(options, found)
    states = HostStates(optimizer, device, singly=steps_singly(options), least=LEAST, room=8192)
    torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)  # it wraps the step
    stepped(optimizer, found, range(3), device)
    saved = optimizer.state_dict()
    kept = [device.host_reads(value) for value in tensors_of(saved) if device.is_home(value)]
    assert kept and len(kept) == len([value for value in tensors_of(saved) if value.nbytes >= LEAST])
    states.send_all()  # what is there stays

    again, device = [nn.Parameter(weight.detach().clone()) for weight in found], SimulatedDevice()
    copied = {
        number: {key: value.clone() if isinstance(value, Tensor) else value for key, value in entry.items()}
        for number, entry in saved["state"].items()
    }
    optimizer = made(options, again)
    states = HostStates(optimizer, device, singly=steps_singly(options), least=LEAST, room=8192)
    optimizer.load_state_dict({**saved, "state": copied})
    states.send_all()
    stepped(optimizer, again, range(3, 5), device)
    for one, other in zip(again, expected, strict=True):
        assert torch.equal(one, other)
    for one, other in zip(tensors_of(optimizer.state_dict()), tensors_of(plain.state_dict()), strict=True):
        assert torch.equal(device.host_reads(one), other)


def test_no_more_states_than_two_pieces_are_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """One is stepped and the next is on its way."""
    trained, device, at_once = weights(), SimulatedDevice(), []
    optimizer = made(options_of("AdamW"), trained)
    plain = optimizer.step

    def counting(self, *words):
        at_once.append(sum(
            value.nbytes for entry in self.state.values() for value in entry.values()
            if value.nbytes >= LEAST and not device.is_home(value)
        ))  # fmt: skip
        return plain(*words)

    monkeypatch.setattr(optimizer, "step", counting.__get__(optimizer))
    HostStates(optimizer, device, singly=True, least=LEAST, room=2 * 4 * 40 * 16)
    stepped(optimizer, trained, range(2), device)
    sizes = [2 * 4 * 24 * 16, 2 * 4 * 40 * 16, 2 * 4 * 64 * 32, 2 * 4 * 8 * 8]  # [3] is small
    assert at_once[-4:] == [sizes[0] + sizes[1], sizes[1] + sizes[2], sizes[2] + sizes[3], sizes[3]]
    assert device.copies


def test_paged_states_and_small_ones_stay() -> None:
    class Paged(torch.optim.AdamW):
        def step(self):
            super().step()
            for entry in self.state.values():
                for value in entry.values():
                    value.is_paged = True

    trained, device = weights(), SimulatedDevice()
    optimizer = Paged(trained, lr=1e-2)
    HostStates(optimizer, device, singly=True, least=LEAST)
    stepped(optimizer, trained, range(2), device)
    assert not device.copies and not any(device.is_home(value) for value in tensors_of(optimizer.state_dict()))


def test_states_that_a_step_makes_anew_are_sent_too() -> None:
    class Anew(torch.optim.Optimizer):
        def step(self):
            for weight in self.param_groups[0]["params"]:
                self.state[weight]["sum"] = self.state[weight].get("sum", 0) + weight.grad

    device = SimulatedDevice()
    trained = [nn.Parameter(torch.zeros(24, 16))]
    optimizer = Anew(trained, {})
    HostStates(optimizer, device, singly=True, least=LEAST)
    for step in range(3):
        trained[0].grad = torch.full((24, 16), 2.0**step)
        with device.watching():
            optimizer.step()
    (found,) = tensors_of(optimizer.state_dict())
    assert torch.equal(device.host_reads(found), torch.full((24, 16), 7.0))


def run_of(optimizer, device: str = "cpu") -> Any:
    """What updaters read of a run."""
    return SimpleNamespace(
        optimizer=optimizer, runtime=SimpleNamespace(device=torch.device(device)), step=SimpleNamespace(seed=0),
        progress=SimpleNamespace(global_step=0), hooks=SimpleNamespace(on_gradients_ready=lambda run: None),
    )  # fmt: skip


def test_what_weights_in_bfloat16_lack_stays_where_it_is_read() -> None:
    """It is added to them beside the steps, also after a state was loaded."""
    trained, device = [nn.Parameter(one.detach().bfloat16()) for one in weights()], SimulatedDevice()
    optimizer = made(options_of("AdamW"), trained)
    states = HostStates(optimizer, device, singly=True, least=LEAST)
    updater = RoundingUpdater(singly=True, bf16_update="kahan")
    updater.begin(run_of(optimizer))
    for step in range(2):
        for weight in trained:
            weight.grad = gradient(tuple(weight.shape), step).bfloat16()
        with device.watching():
            updater.step(run_of(optimizer))
        states.send_all()
    kept = [entry[COMPENSATION] for entry in optimizer.state.values()]
    assert len(kept) == len(trained) and not any(device.is_home(one) for one in kept) and device.copies


def test_states_at_home_stay_there_when_a_run_with_swapped_weights_goes_on() -> None:
    """Their weights are in main memory between steps; the states come with the step of each."""
    trained, device = weights(), SimulatedDevice()
    optimizer = made(options_of("AdamW"), trained)
    stepped(optimizer, trained, range(1))
    HostStates(optimizer, device, singly=True, least=LEAST).send_all()
    bring_states(run_of(optimizer, "meta"))
    moved = [value for value in tensors_of(optimizer.state_dict()) if value.device.type == "meta"]
    assert moved and all(value.nbytes < LEAST for value in moved)
    assert any(device.is_home(value) for value in tensors_of(optimizer.state_dict()))


def test_what_cannot_wait_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def options(name: str) -> OptimizerOptions:
        return OptimizerOptions(optimizer_type=name, offload_optimizer=True)

    with pytest.raises(ConfigError, match="AdamWScheduleFree, which makes the weights of samples .* AdamW say"):
        optimizers.check_offload(options("AdamWScheduleFree"), optimizers.check(options("AdamWScheduleFree")))
    optimizers.check_offload(options("AdamW"), optimizers.check(options("AdamW")))
    assert "wait in main memory by themselves" in str(optimizers.idle(options("PagedAdamW8bit"))[0])
    assert "computes in main memory" in str(optimizers.idle(options("AdamW"))[0])
    assert not optimizers.idle(OptimizerOptions())
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="bitsandbytes, which is not installed.*AdaFactor"):
        optimizers.check(options("AdamW8bit"))


def test_a_run_with_states_at_home_is_the_same_to_the_bit(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, device = Tinies(tmp_path_factory).work("sd1", tmp_path), SimulatedDevice()
    expected = work.train("plain", "--max_train_steps=2")
    monkeypatch.setattr(host_states, "transfers_to", lambda place: device)
    monkeypatch.setattr(host_states, "LEAST_BYTES", 16)
    options = ("--offload_optimizer", "--save_state_on_train_end")
    work.train("first", "--max_train_steps=1", *options)
    (state,) = tmp_path.rglob("*-state")
    found = work.train("second", "--max_train_steps=2", *options, f"--resume={state}")
    assert largest_difference(found, expected) == 0 and device.copies
