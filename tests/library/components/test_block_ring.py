"""Block swap on a simulated device: what comes out of a denoiser does not depend on it, no block computes before its
weights have arrived, none is overwritten too early, and never are more on the device than allowed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from library.checkpoints.weight_forms import FORMS
from library.components.block_ring import bring_weights_home, spread_evenly
from library.components.device_transfers import room_for
from library.fp8_optimization_utils import store_layers
from library.training.averaging import WeightAverage
from library.training.run import Models
from library.training.updaters.single import FusedUpdater
from library.wan_expert_utils import TwoExperts
from tests.library.components.deep_denoisers import DEPTHS, MOST, Denoiser
from tests.simulated_device import RaceError, SimulatedDevice, simulated_device


def learn_beside(denoiser: Denoiser) -> list[Tensor]:
    """Low-rank changes hooked to all linear layers, as adapters are; what is trained of them."""
    draws = torch.Generator().manual_seed(2)
    trained = []
    for module in denoiser.model.modules():
        if isinstance(module, torch.nn.Linear):
            down = torch.randn(2, module.in_features, generator=draws).mul_(0.1).requires_grad_()
            up = torch.randn(module.out_features, 2, generator=draws).mul_(0.1).requires_grad_()
            module.forward = lambda x, inner=module.forward, down=down, up=up: inner(x) + x @ down.T @ up.T
            trained += [down, up]
    return trained


def learn_whole(denoiser: Denoiser) -> list[Tensor]:
    return list(denoiser.model.requires_grad_(True).parameters())


def step(denoiser: Denoiser, trained: list[Tensor]) -> list[Tensor]:
    """The output and the gradients."""
    for one in trained:
        one.grad = None
    output = denoiser()
    output.square().mean().backward()
    return [output.detach().clone(), *(one.grad.clone() for one in trained if one.grad is not None)]


def swapped(family: str, device: SimulatedDevice, *, count: int = 2, ring: int = 2) -> Denoiser:
    denoiser = Denoiser(family)
    denoiser.model.enable_block_swap(count, device.device, ring)
    denoiser.model.move_to_device_except_swap_blocks(device.device)
    return denoiser


SHOWN = ("flux", "sd3", "anima", "wan")
"""rows of all kinds: two, one of unequal blocks, one of equal ones, one that may leave out some"""


def cases() -> Iterator[Any]:
    for family in DEPTHS:
        for learning, checkpoints in product((learn_beside, learn_whole), (False, True)):
            like_another = family not in SHOWN and (learning is learn_whole or not checkpoints)
            yield pytest.param(family, learning, checkpoints, marks=pytest.mark.full if like_another else ())


def assert_equal(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize(("family", "learning", "checkpoints"), list(cases()))
def test_results_are_those_without_swap(family: str, learning: Callable, checkpoints: bool) -> None:
    """To the bit, in the first step and in those after it."""
    plain = Denoiser(family)
    expected = step(plain, learning(plain))
    with simulated_device() as device:
        denoiser = swapped(family, device, count=MOST[family])
        trained = learning(denoiser)
        if checkpoints:
            denoiser.model.enable_gradient_checkpointing()
        for _ in range(2):
            with device.watching():
                found = step(denoiser, trained)
            assert_equal(found, expected)
        assert_few_on_the_device(denoiser, device)


def assert_few_on_the_device(denoiser: Denoiser, device: SimulatedDevice) -> None:
    """Of each row those that stay and the places for others are no more than `blocks_to_swap` leaves, and their size is
    known beforehand."""
    for one in denoiser.offloaders:
        staying = len(one.blocks) - len(one._travellers)
        assert staying + len(one._places) == len(one.blocks) - one.num_swapped
    at_home, places = denoiser.model.swapped_bytes(MOST[denoiser.family])
    assert sum(buffer.numel() for buffer in device.buffers) == places
    homes = [home for one in denoiser.offloaders for traveller in one._travellers for home in traveller.tensors]
    assert room_for(homes) == at_home


def loads_of(denoiser: Denoiser, device: SimulatedDevice) -> list[int]:
    """The numbers of the blocks that were copied to the device, in order; of a denoiser with one row."""
    (offloader,) = denoiser.offloaders
    places = {one.homes[0].data_ptr(): one.number for one in offloader._travellers}
    return [places[copy.pairs[0][1].data_ptr()] for copy in device.copies]


@pytest.mark.parametrize(("count", "ring", "travelling"), [
    (1, 1, [1, 4]), (2, 2, [0, 2, 3, 5]), (2, 3, [0, 1, 3, 4, 5]), (4, 2, [0, 1, 2, 3, 4, 5]),
    (5, 2, [0, 1, 2, 3, 4, 5]),
])  # fmt: skip
def test_order_residency_and_number_of_copies(count: int, ring: int, travelling: list[int]) -> None:
    """Of a row of 6, 6 - `count` blocks have room on the device at most. What a forward pass has brought last stays for
    the backward pass; frozen weights never go back to main memory."""
    plain = Denoiser("wan")
    expected = step(plain, learn_beside(plain))
    with simulated_device() as device:
        denoiser = swapped("wan", device, count=count, ring=ring)
        (offloader,) = denoiser.offloaders
        trained, places = learn_beside(denoiser), min(ring, 6 - count)
        assert_equal(step(denoiser, trained), expected)
        assert [one.number for one in offloader._travellers] == travelling
        assert len(device.buffers) == places and 6 - len(travelling) + places == 6 - count
        assert loads_of(denoiser, device) == travelling + travelling[: len(travelling) - places][::-1]
        assert device.sent == 0


def test_the_next_blocks_are_on_their_way_while_one_computes() -> None:
    """With two places one behind it, with three two; in both directions."""
    for ring in (2, 3):
        with simulated_device() as device:
            denoiser = swapped("anima", device, count=3, ring=ring)
            (offloader,) = denoiser.offloaders
            order = [one.number for one in offloader._travellers]
            seen: list[tuple[int, int]] = []
            for number in order:
                denoiser.model.blocks[number].register_forward_pre_hook(
                    lambda block, given, number=number: seen.append((number, len(device.copies)))
                )
            trained = learn_beside(denoiser)
            denoiser.model.enable_gradient_checkpointing()
            step(denoiser, trained)
            ahead = [min(place + ring, len(order)) for place in range(len(order))]
            assert seen[: len(order)] == list(zip(order, ahead))
            last = len(order)
            back = [last + min(max(place, 0), last - ring) for place in range(last)]
            assert seen[last:] == list(zip(reversed(order), back))


def test_passes_of_all_kinds_leave_nothing_wrong() -> None:
    """Samples between steps, errors in either pass, a backward pass that never comes or ends early, two graphs at
    once."""
    plain = Denoiser("flux")
    beside = learn_beside(plain)
    expected = step(plain, beside)
    sums = two_graphs(plain, beside)
    for checkpoints in (False, True):
        with simulated_device() as device, device.watching():
            denoiser = swapped("flux", device, count=3)
            trained = learn_beside(denoiser)
            if checkpoints:
                denoiser.model.enable_gradient_checkpointing()
            denoiser()
            with torch.no_grad():
                assert_equal([denoiser(), denoiser()], [expected[0]] * 2)
            block = denoiser.model.single_blocks[3]
            with failing(block), pytest.raises(ZeroDivisionError):
                denoiser()
            assert_equal(step(denoiser, trained), expected)
            with failing_backward(denoiser), pytest.raises(ZeroDivisionError):
                step(denoiser, trained)
            assert_equal(step(denoiser, trained), expected)
            assert_equal(two_graphs(denoiser, trained), sums)


def two_graphs(denoiser: Denoiser, trained: list[Tensor]) -> list[Tensor]:
    for one in trained:
        one.grad = None
    (denoiser().square().mean() + denoiser().abs().mean()).backward()
    return [one.grad.clone() for one in trained if one.grad is not None]


@contextmanager
def failing(module: torch.nn.Module) -> Iterator[None]:
    handle = module.register_forward_pre_hook(lambda *given: 1 / 0)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def failing_backward(denoiser: Denoiser) -> Iterator[None]:
    """An error while gradients are in the middle of the blocks."""
    def fail(module: torch.nn.Module, given: object, output: object) -> None:
        (output if isinstance(output, Tensor) else output[0]).register_hook(lambda grad: 1 / 0)

    handle = denoiser.model.double_blocks[3].register_forward_hook(fail)
    try:
        yield
    finally:
        handle.remove()


def test_a_backward_pass_that_ends_early() -> None:
    def gradient(denoiser: Denoiser) -> Tensor:
        bias = denoiser.model.blocks[4].ffn[0].bias.requires_grad_()
        denoiser().mean().backward()
        return bias.grad.clone()

    expected = gradient(Denoiser("wan"))
    with simulated_device() as device, device.watching():
        assert torch.equal(gradient(swapped("wan", device, count=4)), expected)


@pytest.mark.parametrize("checkpoints", [False, True])
def test_gradients_that_come_to_a_block_beside_its_outputs(checkpoints: bool) -> None:
    """From what somebody took from its inside, while other blocks lie in its place."""
    def gradients(denoiser: Denoiser) -> list[Tensor]:
        taken: list[Tensor] = []
        trained = learn_whole(denoiser)
        if checkpoints:
            denoiser.model.enable_gradient_checkpointing()
        handle = denoiser.model.blocks[1].ffn[0].register_forward_hook(lambda *given: taken.append(given[-1]))
        denoiser()
        handle.remove()
        taken[0].square().mean().backward()
        return [one.grad.clone() for one in trained if one.grad is not None]

    expected = gradients(Denoiser("wan"))
    with simulated_device() as device, device.watching():
        denoiser = swapped("wan", device, count=4)
        assert_equal(gradients(denoiser), expected)
        assert device.sent > 0 and not any(place.holds for place in denoiser.offloaders[0]._places)


def test_weights_that_change_between_passes() -> None:
    """Because something is merged into them, say: they lie in main memory, and nothing old is left on the device."""
    plain, results = Denoiser("flux"), []
    with simulated_device() as device:
        denoiser = swapped("flux", device, count=3)
        for one in (plain, denoiser):
            trained = learn_beside(one)
            found = step(one, trained)
            with pytest.raises(RaceError) if one is denoiser else nullcontext():
                for parameter in denoiser.model.parameters():
                    device.host_writes(parameter)
            for changing in bring_weights_home(one.model):
                device.host_writes(changing)
            for parameter in one.model.parameters():
                parameter.data.mul_(0.9)
            with torch.no_grad():
                found.append(one().clone())
            for parameter in one.model.parameters():
                parameter.data.mul_(0.9)
            results.append([*found, *step(one, trained)])
    assert_equal(*results)


def fused_steps(denoiser: Denoiser, dtype: torch.dtype, frozen: str, look: Callable[[], None]) -> list[Tensor]:
    """The weights after three updates inside the backward pass, which begins behind the `frozen` parts; `look` sees
    them after each."""
    denoiser.model.to(dtype)
    for name, parameter in denoiser.model.named_parameters():
        parameter.requires_grad_(not re.match(frozen, name))
    run: Any = SimpleNamespace(
        optimizer=torch.optim.AdamW([p for p in denoiser.model.parameters() if p.requires_grad], lr=1e-2),
        max_grad_norm=0.0, models=Models(None, [], denoiser.model), lr_scheduler=SimpleNamespace(step=lambda: None),
        step=SimpleNamespace(seed=0), progress=SimpleNamespace(global_step=0),
        runtime=SimpleNamespace(backward=lambda loss: loss.backward(), device=torch.device("cpu")),
    )  # fmt: skip
    updater = FusedUpdater("stochastic")
    updater.begin(run)
    for _ in range(3):
        updater.backward(run, denoiser().float().square().mean())
        updater.update(run)
        look()
    updater.end(run)
    return list(denoiser.model.parameters())


@pytest.mark.parametrize(("family", "dtype", "frozen"), [
    ("flux", torch.float32, r"\w+_in\.|double_blocks\.[0-3]\."), ("sd3", torch.bfloat16, "-"),
    ("anima", torch.float32, "-"), ("wan", torch.float32, r"blocks\.\d\.ffn"),
    ("wan", torch.float32, r"(?!blocks\.1\.ffn\.2\.weight)"),
])  # fmt: skip
def test_weights_that_travel_learn_what_others_learn(family: str, dtype: torch.dtype, frozen: str) -> None:
    """And lie complete in main memory when hooks look at them. Only those that learn go there."""
    expected = fused_steps(Denoiser(family), dtype, frozen, lambda: None)
    with simulated_device() as device:
        denoiser = Denoiser(family)
        denoiser.model.to(dtype).enable_block_swap(MOST[family], device.device)

        def look() -> None:
            for tensor in denoiser.model.parameters():
                device.host_reads(tensor)

        with device.watching():
            found = fused_steps(denoiser, dtype, frozen, look)
        assert_equal(found, expected)
        learning = [one for row in denoiser.offloaders for one in row.travellers() if one.requires_grad]
        assert device.sent == 3 * len(learning)


def test_an_average_in_the_place_of_weights_that_travel() -> None:
    """Passes compute with it, it stays as it is, and so do the weights."""
    plain, average_of = Denoiser("flux"), {}
    before = plain().clone()
    with simulated_device() as device:
        denoiser = swapped("flux", device, count=3)
        with torch.no_grad():
            assert torch.equal(denoiser(), before)
            average = WeightAverage(lambda: {"model": denoiser.model})
            average.begin()
            for tensor in average.tensors.values():
                tensor.mul_(0.9)
            for parameter in plain.model.parameters():
                parameter.mul_(0.9)
            average_of = {name: tensor.clone() for name, tensor in average.tensors.items()}
            for _ in range(2):
                with average.applied():
                    for parameter in denoiser.model.parameters():
                        device.host_writes(parameter)
                    assert torch.equal(denoiser(), plain())
            with pytest.raises(ZeroDivisionError), average.applied(), failing(denoiser.model.single_blocks[4]):
                denoiser()
            assert all(torch.equal(tensor, average_of[name]) for name, tensor in average.tensors.items())
            assert torch.equal(denoiser(), before)


def test_two_experts_share_the_places_of_their_blocks() -> None:
    def experts(make: Callable[[], Denoiser]) -> list[Tensor]:
        low, high = make(), make()
        with torch.no_grad():
            for parameter in high.model.parameters():
                parameter.mul_(1.1)
        both = TwoExperts(low.model, high.model)
        found = []
        for high_noise in (False, True, True, False):
            both.use(high_noise=high_noise)
            found.append(low().detach().clone())
        return found

    expected = experts(lambda: Denoiser("wan"))
    assert not torch.equal(expected[0], expected[1])
    with simulated_device() as device:
        assert_equal(experts(lambda: swapped("wan", device, count=3)), expected)
        assert len(device.buffers) == 2


def test_blocks_that_are_left_out() -> None:
    expected = {}
    for skipped in ((1, 3), (5,), ()):
        denoiser = Denoiser("wan")
        denoiser.inputs[1]["skip_block_indices"] = skipped
        expected[skipped] = denoiser()
    with simulated_device() as device, device.watching(), torch.no_grad():
        denoiser = swapped("wan", device, count=3)
        for skipped, output in expected.items():
            denoiser.inputs[1]["skip_block_indices"] = skipped
            assert torch.equal(denoiser(), output)


@pytest.mark.parametrize("form", FORMS)
def test_weights_in_fewer_bits_travel_so_with_their_scales(form: str) -> None:
    """In every form, with checkpoints and without."""
    plain = Denoiser("flux")
    store_layers(plain.model, form, block=16)
    expected = step(plain, learn_beside(plain))
    with simulated_device() as device, device.watching():
        denoiser = Denoiser("flux")
        store_layers(denoiser.model, form, block=16)
        denoiser.model.enable_block_swap(3, device.device)
        trained = learn_beside(denoiser)
        assert_equal(step(denoiser, trained), expected)
        denoiser.model.enable_gradient_checkpointing()
        assert_equal(step(denoiser, trained), expected)
        moved = [one for row in denoiser.offloaders for one in row.travellers()]
        blocks = denoiser.model.repeated_blocks()
        scales = [buffer for block in blocks for buffer in block.buffers() if buffer.ndim == 2]
        assert not scales or any(one is scale for one in moved for scale in scales)
        assert sum(one.numel() for one in moved if one.itemsize == 1) > 0.8 * sum(one.numel() for one in moved)


def test_compiled_blocks() -> None:
    """One graph serves all blocks of a kind, wherever their weights lie."""
    def compiled(denoiser: Denoiser) -> list[list[Tensor]]:
        trained = learn_beside(denoiser)
        for block in denoiser.model.blocks:
            block.compile(backend="aot_eager")
        plain = step(denoiser, trained)
        denoiser.model.enable_gradient_checkpointing()
        return [plain, step(denoiser, trained)]

    expected = compiled(Denoiser("wan"))
    with simulated_device() as device:
        for found, wanted in zip(compiled(swapped("wan", device, count=4)), expected, strict=True):
            assert_equal(found, wanted)


FAULTS = {
    "a block does not wait for its copies": ("wait", lambda device, event: None),
    "a copy does not wait for the computation": ("computed", lambda device: 0),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_simulated_device_sees(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, replacement = FAULTS[fault]
    with simulated_device() as device, device.watching():
        denoiser = swapped("wan", device, count=4)
        monkeypatch.setattr(SimulatedDevice, name, replacement)
        with pytest.raises(RaceError):
            step(denoiser, learn_beside(denoiser))


@pytest.mark.parametrize("count, total", [(1, 5), (5, 5), (3, 7), (37, 38), (20, 40)])
def test_numbers_are_spread_evenly(count: int, total: int) -> None:
    numbers = spread_evenly(count, total)
    steps = [after - before for before, after in zip(numbers, numbers[1:])]
    assert len(set(numbers)) == count and 0 <= min(numbers) and max(numbers) < total
    assert not steps or max(steps) - min(steps) <= 1
