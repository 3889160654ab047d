"""Compiled blocks give the same outputs and gradients, also with a forward that an adapter has put in place."""

from pathlib import Path

import pytest
import torch
from torch import nn

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
