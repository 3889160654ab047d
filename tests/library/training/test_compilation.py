"""Compiled blocks give the same outputs and gradients, also with a forward that an adapter has put in place."""

from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import nn

from library.core.keyed_random import StepDraws
from library.flux_utils import prepare_img_ids
from library.training import trainer_base
from library.training.compilation import compile_blocks
from tests.networks.tiny_denoisers import DENOISERS, tiny_denoiser
from tests.runs.conftest import largest_difference
from tests.runs.families import Tinies


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


LIKE_ANOTHER = ("sdxl", "chroma")
"""families whose blocks are those of Stable Diffusion and FLUX.1"""


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=pytest.mark.full if name in LIKE_ANOTHER else ()) for name in DENOISERS]
)
def test_every_compiled_block_runs_compiled_and_computes_the_same(family: str):
    model, inputs = tiny_denoiser(family)
    layer = next(module for module in model.repeated_blocks()[-1].modules() if isinstance(module, nn.Linear))
    plain, scale = layer.forward, nn.Parameter(torch.tensor(1.5))
    layer.forward = lambda h: scale * plain(h)  # as an adapter does
    expected = model(*inputs)
    expected.sum().backward()
    gradient, scale.grad = scale.grad.clone(), None
    blocks, compiled, called = model.repeated_blocks(), [], set()
    assert len(blocks) == len(set(blocks)) >= 2

    def counting(graph, _):
        compiled.append(graph)
        return graph.forward

    for number, block in enumerate(blocks):
        block.register_forward_pre_hook(lambda *_, number=number: called.add(number))
        inside = {module for module in block.modules() if module is not block}
        assert not inside.intersection(blocks), "a block inside another one is compiled with it"
    assert compile_blocks(model, counting) == len(blocks)
    found = model(*inputs)
    found.sum().backward()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(scale.grad, gradient)
    assert called == set(range(len(blocks))) and compiled
    before = len(compiled)
    model(*inputs)
    assert len(compiled) == before


@pytest.mark.parametrize("family", [pytest.param("sd", marks=pytest.mark.full), "sdxl"])
def test_a_run_on_a_compiled_u_net(family: str, tmp_path: Path, tmp_path_factory, monkeypatch: pytest.MonkeyPatch):
    work, numbers = Tinies(tmp_path_factory).work(family, tmp_path), []
    monkeypatch.setattr(trainer_base, "compile_blocks", lambda *words, **more: numbers.append(compile_blocks(*words, **more)))
    plain = work.train("plain", "--max_train_steps=1")
    compiled = work.train("compiled", "--max_train_steps=1", "--torch_compile", "--dynamo_backend=eager")
    assert numbers and numbers[0] >= 4
    assert largest_difference(plain, compiled) < 1e-4


SIZES = ((2, 3), (3, 4), (4, 5), (2, 3))
"""pictures in tokens, of one bucket after the other"""


def of_size(family: str, model: nn.Module, inputs: tuple, height: int, width: int) -> tuple:
    """The inputs of a picture of height * width tokens (of the coarsest level of a U-Net)."""
    if family == "flux":
        image = torch.ones(2, height * width, model.params.in_channels)
        return image, prepare_img_ids(2, height, width), *inputs[2:]
    step = 8 if family == "sd" else 2
    return torch.ones(*inputs[0].shape[:-2], step * height, step * width), *inputs[1:]


@pytest.mark.parametrize(
    ("family", "dropouts"),
    [("flux", {}), ("flux", {"neuron_dropout": 0.2}),
     pytest.param("anima", {"rank_dropout": "0.3"}, marks=pytest.mark.full),
     pytest.param("sd", {}, marks=pytest.mark.full)],
)  # fmt: skip
def test_no_bucket_and_no_step_compiles_anew(family: str, dropouts: dict) -> None:
    """The first size, and the second, with which sizes are found to change: after that nothing is compiled, whatever a
    step draws; sampling has versions of its own."""
    model, inputs = tiny_denoiser(family)
    network = import_module(f"networks.lora_{family}").create_network(1.0, 2, 2, None, [], model, **dropouts)
    network.apply_to([], model, False, True)
    network.requires_grad_(True).train()
    for layer in network.unet_loras:
        nn.init.constant_(layer.lora_up.weight, 0.01)
    for layer in network.unet_loras[:-2] if dropouts else ():
        layer.remove_from()  # two show it
    graphs: list = []

    def counting(graph, _):
        graphs.append(graph)
        return graph.forward

    def step(number: int, size: tuple[int, int]) -> torch.Tensor:
        network.set_step_draws(StepDraws(3, number, (2 * number, 2 * number + 1)))
        network.zero_grad()
        found = model(*of_size(family, model, inputs, *size))
        found.square().sum().backward()
        return torch.cat([found.detach().flatten(), network.unet_loras[-1].lora_up.weight.grad.flatten()])

    expected = [step(number, size) for number, size in enumerate(SIZES)]
    compile_blocks(model, counting)
    made = []
    for number, size in enumerate(SIZES):
        before = len(graphs)
        torch.testing.assert_close(step(number, size), expected[number], rtol=1e-4, atol=1e-5)
        made.append(len(graphs) - before)
    assert made[0] and not any(made[2:]), made
    assert dropouts or sum(made) <= 2 * len(model.repeated_blocks())
    if not dropouts:
        with torch.no_grad():
            for size in SIZES[:3]:
                before = len(graphs)
                model(*of_size(family, model, inputs, *size))
        assert len(graphs) == before
