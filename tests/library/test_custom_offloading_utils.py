"""Block swap: whatever passes run in whatever order, no block computes without its weights, and few are there at a
time."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from library.custom_offloading_utils import BlockOffloader, row_swap_problem
from library.flux_models import Flux, FluxParams, block_swap_problem, split_blocks_to_swap
from library.training.averaging import WeightAverage
from library.training.run import Models
from library.training.updaters.single import FusedUpdater

PARAMS = FluxParams(
    in_channels=16, vec_in_dim=8, context_in_dim=12, hidden_size=32, mlp_ratio=2.0, num_heads=2, depth=5,
    depth_single_blocks=7, axes_dim=(4, 6, 6), guidance_embed=False,
)  # fmt: skip


class TwoPlaces(BlockOffloader):
    """The same logic with both places in the memory of one machine: a block that is away holds NaN in its weights."""

    def __init__(self, blocks, num_swapped: int) -> None:
        super().__init__(blocks, num_swapped, torch.device("meta"))  # any device that is not the CPU switches it on
        self.kept = [{name: weight.detach().clone() for name, weight in block.items()} for block in self.weights]
        self.here = set(range(len(self.blocks)))
        self.most_here = 0
        self.num_swaps = 0

    def is_here(self, index: int) -> bool:
        return index in self.here

    def bring(self, index: int) -> None:
        if index not in self.here:
            for name, weight in self.weights[index].items():
                weight.data = self.kept[index][name].clone()
            self.here.add(index)
        self.most_here = max(self.most_here, len(self.here))

    def send_away(self, index: int) -> None:
        for weight in self.weights[index].values():
            weight.data.fill_(float("nan"))  # in place: what autograd saved of it becomes useless too
        self.here.discard(index)

    def swap(self, outgoing: int, incoming: int, ready: object) -> None:
        self.num_swaps += 1
        self.send_away(outgoing)
        self.bring(incoming)


def make_model(seed: int = 0) -> Flux:
    torch.manual_seed(seed)
    model = Flux(PARAMS)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.requires_grad_(False).train()


def inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "img": torch.randn(2, 6, 16, generator=generator), "img_ids": torch.zeros(2, 6, 3),
        "txt": torch.randn(2, 4, 12, generator=generator), "txt_ids": torch.zeros(2, 4, 3),
        "timesteps": torch.tensor([0.2, 0.8]), "y": torch.randn(2, 8, generator=generator),
    }  # fmt: skip


def swapped(num_double: int, num_single: int) -> tuple[Flux, list[TwoPlaces]]:
    model = make_model()
    offloaders = [TwoPlaces(model.double_blocks, num_double), TwoPlaces(model.single_blocks, num_single)]
    model.offloaders = tuple(offloaders)
    return model, offloaders


def gradients(model: Flux) -> list[torch.Tensor]:
    """Gradients of the biases, which block swap leaves in place."""
    biases = [block.img_attn.proj.bias for block in model.double_blocks] + [
        block.linear1.bias for block in model.single_blocks
    ]
    for bias in biases:
        bias.requires_grad_(True)
        bias.grad = None
    model(**inputs()).square().mean().backward()
    return [bias.grad.clone() for bias in biases]


@pytest.mark.parametrize("counts", [(1, 1), (2, 4), (3, 5), (4, 6)])
def test_swapped_blocks_give_the_same_gradients(counts: tuple[int, int]) -> None:
    expected = gradients(make_model())
    model, offloaders = swapped(*counts)
    for _ in range(2):  # the second pass starts from the layout that the first one left
        for result, wanted in zip(gradients(model), expected):
            assert torch.equal(result, wanted)
    for offloader, count in zip(offloaders, counts):
        assert offloader.num_swaps == 4 * count
        assert len(offloader.here) == len(offloader.blocks) - count


def test_no_more_blocks_are_there_than_allowed_once_armed() -> None:
    model, offloaders = swapped(2, 4)
    model.prepare_block_swap_before_forward()
    for offloader in offloaders:
        offloader.most_here = 0
    gradients(model)
    assert [offloader.most_here for offloader in offloaders] == [3, 3]


def test_forwards_without_backward_and_interrupted_passes_leave_nothing_wrong() -> None:
    model, _ = swapped(2, 4)
    with torch.no_grad():
        first = model(**inputs())
        assert torch.equal(model(**inputs()), first)
    assert torch.equal(first, make_model()(**inputs()))
    with pytest.raises(RuntimeError):
        model(**{**inputs(), "txt": torch.randn(2, 4, 5)})
    for result, wanted in zip(gradients(model), gradients(make_model())):
        assert torch.equal(result, wanted)


def test_backward_that_ends_early_and_two_graphs_at_once() -> None:
    model, _ = swapped(3, 5)
    plain = make_model()
    results = []
    for one in (model, plain):
        bias = one.single_blocks[5].linear1.bias.requires_grad_(True)  # nothing below it needs a gradient
        one(**inputs()).mean().backward()
        losses = [one(**inputs()).square().mean(), one(**inputs()).abs().mean()]
        sum(losses).backward()
        results.append(bias.grad)
    assert torch.equal(*results)


class Learning(TwoPlaces):
    """Takes what a block has become along when it goes."""

    def send_away(self, index: int) -> None:
        if index in self.here:
            self.kept[index] = {name: weight.detach().clone() for name, weight in self.weights[index].items()}
        super().send_away(index)


def fused_steps(model: Flux, dtype: torch.dtype, frozen: str) -> list[torch.Tensor]:
    """The weights after three updates inside the backward pass, which begins behind the `frozen` parts."""
    model.to(dtype)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not re.match(frozen, name))
    run: Any = SimpleNamespace(
        optimizer=torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2), max_grad_norm=0.0,
        models=Models(None, [], model), lr_scheduler=SimpleNamespace(step=lambda: None), step=SimpleNamespace(seed=0),
        progress=SimpleNamespace(global_step=0),
        runtime=SimpleNamespace(backward=lambda loss: loss.backward(), device=torch.device("cpu")),
    )  # fmt: skip
    updater = FusedUpdater("stochastic")
    model.prepare_block_swap_before_forward()
    updater.begin(run)
    values = {name: value.to(dtype) if name in ("img", "txt", "y") else value for name, value in inputs().items()}
    for _ in range(3):
        updater.backward(run, model(**values).float().square().mean())
        updater.update(run)
        for offloader in model.offloaders:
            assert offloader is None or offloader.here == set(range(offloader.first_away))
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("dtype, frozen", [(torch.float32, r"\w+_in\.|double_blocks\.[0-3]\."), (torch.bfloat16, "-")])
def test_weights_that_travel_learn_what_others_learn(dtype: torch.dtype, frozen: str) -> None:
    """And are in their places when hooks look at them."""
    expected = fused_steps(make_model(), dtype, frozen)
    model = make_model().to(dtype)
    model.offloaders = (Learning(model.double_blocks, 2), Learning(model.single_blocks, 4))
    fused_steps(model, dtype, frozen)
    for offloader in model.offloaders:
        for index in range(len(offloader.blocks)):
            offloader.bring(index)
    assert all(torch.equal(p, wanted) for p, wanted in zip(model.parameters(), expected, strict=True))


def test_an_average_in_the_place_of_weights_that_travel_stays_as_it_is() -> None:
    """Another block gets their memory meanwhile."""
    model, (double, _) = swapped(2, 4)
    average = WeightAverage(lambda: {"model": model})
    average.begin()
    before = {name: tensor.clone() for name, tensor in average.tensors.items()}
    weight = double.weights[0]["img_attn.qkv"]
    with average.applied():
        weight.data.fill_(1.0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in average.tensors.items())


def test_swap_on_the_cpu_moves_nothing() -> None:
    model = make_model()
    before = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    expected = model(**inputs())
    model.enable_block_swap(2, torch.device("cpu"))
    model.move_to_device_except_swap_blocks(torch.device("cpu"))
    assert torch.equal(model(**inputs()), expected)
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == before


@pytest.mark.parametrize(("depths", "allowed"), [((19, 38), 35), ((5, 7), 4), ((2, 2), 0), ((1, 1), 0), ((20, 10), 8)])
def test_limit_of_blocks_to_swap(depths: tuple[int, int], allowed: int) -> None:
    double, single = split_blocks_to_swap(allowed)
    assert block_swap_problem(allowed, *depths) is None
    assert double <= max(depths[0] - 2, 0) and single <= max(depths[1] - 2, 0)
    message = block_swap_problem(allowed + 1, *depths)
    assert str(allowed + 1) in message and f"at most {allowed}" in message


def test_models_of_clips_keep_one_block_as_known_programs_do() -> None:
    """38 of HunyuanVideo and FramePack, 39 and 29 of the two sizes of Wan."""
    from library.framepack_models import HunyuanVideoTransformer3DModelPacked
    from library.hunyuan_video_models import HYVideoDiffusionTransformer
    from library.wan_models import WanModel

    for model in (HYVideoDiffusionTransformer, HunyuanVideoTransformer3DModelPacked):
        assert block_swap_problem(38, 20, 40, model.blocks_that_stay) is None
        assert "at most 38" in block_swap_problem(39, 20, 40, model.blocks_that_stay)
    for blocks in (30, 40):
        assert row_swap_problem(blocks - 1, blocks, WanModel.blocks_that_stay) is None
        assert f"at most {blocks - 1}" in row_swap_problem(blocks, blocks, WanModel.blocks_that_stay)


def test_too_many_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match="blocks_to_swap"):
        make_model().enable_block_swap(9, torch.device("cpu"))


@pytest.mark.parametrize("cpu_offload", [False, True])
def test_checkpointed_blocks_give_the_same_gradients(cpu_offload: bool) -> None:
    expected = gradients(make_model())
    model = make_model()
    model.enable_gradient_checkpointing(cpu_offload)
    for result, wanted in zip(gradients(model), expected):
        assert torch.equal(result, wanted)
