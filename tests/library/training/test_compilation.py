"""Compiled blocks give the same outputs and gradients, also with a forward that an adapter has put in place."""

import torch

from library.training.compilation import compile_blocks


class Tiny(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(4, 4)
        self.blocks = torch.nn.ModuleList(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.GELU()) for _ in range(2))
        self.more = torch.nn.ModuleList([torch.nn.Linear(4, 4)])

    def forward(self, x):
        for block in (self.first, *self.blocks, *self.more):
            x = block(x)
        return x


def test_compiled_blocks_compute_the_same():
    torch.manual_seed(0)
    model, x = Tiny(), torch.randn(3, 4)
    scale = torch.nn.Parameter(torch.tensor(1.5))
    layer = model.blocks[0][0]
    plain = layer.forward
    layer.forward = lambda h: plain(h) + scale * h
    expected = model(x)
    expected.sum().backward()
    gradient = scale.grad.clone()
    scale.grad = None
    assert compile_blocks(model, "eager") == 3
    found = model(x)
    found.sum().backward()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(scale.grad, gradient)
    torch._dynamo.reset()
