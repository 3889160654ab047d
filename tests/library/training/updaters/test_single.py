"""Updates inside the backward pass: the same bits as ordinary ones, with every optimizer that steps tensors one by one."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import torch

from library.core.errors import ConfigError
from library.training.optimizers import OPTIMIZERS, OptimizerOptions, build, choose
from library.training.optimizers.single_steps import steps_singly
from library.training.updaters.base import Updater
from library.training.updaters.ordinary import OrdinaryUpdater
from library.training.updaters.single import FusedUpdater, RoundingUpdater

WAYS = {
    "float32": (torch.float32, lambda: OrdinaryUpdater(), lambda: FusedUpdater()),
    **{
        way: (torch.bfloat16, lambda way=way: RoundingUpdater(True, way), lambda way=way: FusedUpdater(way))
        for way in ("stochastic", "kahan")
    },
}
"""name -> (weights, ordinary updater, fused one)"""
COMMON = {"AdamW", "AdaFactor", "Lion"}


def options_of(name: str) -> OptimizerOptions:
    more = ["relative_step=False"] if choose(OptimizerOptions(optimizer_type=name)).is_adafactor else None
    return OptimizerOptions(optimizer_type=name, learning_rate=1e-2, optimizer_args=more)


def small_net(dtype: torch.dtype) -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.SiLU(), torch.nn.Flatten(2), torch.nn.Linear(16, 6),
        torch.nn.LayerNorm(6),
    ).to(dtype)  # fmt: skip


def trained(
    options: OptimizerOptions, updater: Updater, dtype: torch.dtype, clip: float = 0.0, steps: int = 3
) -> list[torch.Tensor]:
    """The weights afterwards, in groups of two rates; the last is in no forward."""
    net, unused = small_net(dtype), torch.nn.Parameter(torch.ones(2, dtype=dtype))
    parameters = list(net.parameters())
    groups = [
        {"params": parameters[:2], "lr": 1e-2, "name": "a"}, {"params": [*parameters[2:], unused], "lr": 1e-3, "name": "b"},
    ]  # fmt: skip
    run: Any = SimpleNamespace(
        optimizer=build(options, groups).optimizer, max_grad_norm=clip, models=SimpleNamespace(of_step=[net]),
        lr_scheduler=SimpleNamespace(step=lambda: None), hooks=SimpleNamespace(on_gradients_ready=lambda run: None),
        step=SimpleNamespace(seed=7), progress=SimpleNamespace(global_step=0),
        runtime=SimpleNamespace(
            backward=lambda loss: loss.backward(), reduce_gradients=lambda parameters: None,
            unscale_gradients=lambda: None, clip_gradients=torch.nn.utils.clip_grad_norm_,
        ),
    )  # fmt: skip
    updater.begin(run)
    drawn = torch.Generator().manual_seed(1)
    for step in range(steps):
        run.progress.global_step = step
        inputs = torch.randn(2, 3, 4, 4, generator=drawn).to(dtype)
        updater.backward(run, net(inputs).float().square().sum() * 10.0**-step)
        updater.update(run)
        assert all(p.grad is None for p in parameters)
    updater.end(run)
    return [p.detach() for p in (*parameters, unused)]


def singly() -> list[str]:
    """Names of optimizers that are installed and step tensors one by one."""
    found = []
    for name in OPTIMIZERS.names():
        try:
            if steps_singly(options_of(name)):
                build(options_of(name), [{"params": [torch.nn.Parameter(torch.ones(2, 2))], "lr": 1e-2, "name": "a"}])
                found.append(name)
        except ConfigError:
            continue
    return found


def test_fused_steps_are_ordinary_ones_with_every_optimizer() -> None:
    """Weights in bfloat16 with some of them."""
    wrong, names = [], []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in singly():
            options = options_of(name)
            names.append(name)
            for way, (dtype, ordinary, fused) in WAYS.items():
                if dtype == torch.bfloat16 and name not in COMMON:
                    continue
                one, two = trained(options, ordinary(), dtype), trained(options, fused(), dtype)
                if not all(torch.equal(a, b) for a, b in zip(one, two, strict=True)):
                    wrong.append((name, way))
                if not any(bool((a != b).any()) for a, b in zip(one, small_net(dtype).parameters())):
                    wrong.append((name, way, "nothing moved"))
    assert not wrong and COMMON <= set(names)


def test_clipping_is_by_tensor() -> None:
    """Each to the norm that is given, where the ordinary way brings all together to it."""
    options, clip = OptimizerOptions(optimizer_type="SGD"), 0.1
    norms = []
    for updater in (FusedUpdater(), OrdinaryUpdater()):
        after = trained(options, updater, torch.float32, clip, steps=1)
        moved = [(b - a.detach()).norm() for a, b in zip(small_net(torch.float32).parameters(), after)]
        norms.append(torch.stack(moved) / torch.tensor([1e-2, 1e-2, 1e-3, 1e-3, 1e-3, 1e-3]))  # of the gradients
    large = norms[0] > 0.99 * clip
    assert large.sum() > 3 and (norms[0][large] < 1.001 * clip).all()
    torch.testing.assert_close(norms[1].norm(), torch.tensor(clip), rtol=1e-3, atol=0)
