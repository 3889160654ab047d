"""What is counted on the meta device is what a run on the CPU holds."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from library.training.memory.tracing import META, ROUNDED_TO, tracing


class Net(torch.nn.Module):
    """Attention and a wide layer, with sizes at which every storage is a multiple of what is rounded to."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.first = torch.nn.Linear(64, 192, device=device)
        self.wide = torch.nn.Linear(64, 256, device=device)
        self.last = torch.nn.Linear(256, 64, device=device)

    def block(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = self.first(x).unflatten(-1, (3, 4, 16)).permute(2, 0, 3, 1, 4)  # [B, heads, L, D] each
        mask = torch.ones(len(x), 1, 1, x.shape[1], dtype=torch.bool, device=x.device)
        x = x + F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2).flatten(2)
        return x + self.last(F.silu(self.wide(F.layer_norm(x, (64,)))))

    def forward(self, x: torch.Tensor, again: bool) -> torch.Tensor:
        return (checkpoint(self.block, x, use_reentrant=False) if again else self.block(x)).square().mean()


def saved_bytes(net: Net, x: torch.Tensor) -> int:
    """What autograd keeps of a forward on the CPU, by torch's own account, without weights and input."""
    own = {p.untyped_storage().data_ptr() for p in (*net.parameters(), x)}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = -(-storage.nbytes() // ROUNDED_TO) * ROUNDED_TO
        held.append(tensor)
        return tensor

    held: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = net(x, again=False)
    del loss
    return sum(kept.values())


def test_what_a_forward_leaves_is_what_autograd_keeps_on_the_cpu() -> None:
    expected = saved_bytes(Net("cpu"), torch.randn(2, 64, 64))
    with tracing("cpu") as tracker:
        net, x = Net("meta"), torch.empty(2, 64, 64, device=META)
        with tracker.measured() as taken:
            loss = net(x, again=False)
    assert loss.device == META
    assert 0 <= taken.kept - expected <= ROUNDED_TO  # the loss itself
    assert taken.peak >= taken.kept


def test_checkpoints_are_computed_again_in_the_type_of_the_forward() -> None:
    peaks = {}
    for again in (False, True):
        with tracing("cuda") as tracker:
            net, x = Net("meta"), torch.empty(2, 64, 64, device=META)
            with tracker.measured() as taken, torch.autocast("meta", torch.bfloat16):
                loss = net(x, again)
            kept = taken.kept
            loss.backward()
        peaks[again] = kept
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in net.parameters())
    assert peaks[True] < peaks[False] / 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_results_have_the_type_that_autocast_gives_them(dtype: torch.dtype) -> None:
    calls = {
        "linear": lambda x, w: F.linear(x, w), "matmul": lambda x, w: x @ w.t(), "add": lambda x, w: x + 1,
        "norm": lambda x, w: F.layer_norm(x, (8,)), "softmax": lambda x, w: x.softmax(-1),
        "loss": lambda x, w: F.mse_loss(x, x), "einsum": lambda x, w: torch.einsum("ab,cb->ac", x, w),
    }  # fmt: skip
    found = {}
    for device in ("cpu", "meta"):
        x, w = torch.ones(4, 8, device=device, dtype=dtype), torch.ones(8, 8, device=device, requires_grad=True)
        if device == "meta":
            with tracing("cpu"), torch.autocast("meta", torch.bfloat16):
                found[device] = {name: call(x, w).dtype for name, call in calls.items()}
        else:
            with torch.autocast("cpu", torch.bfloat16):
                found[device] = {name: call(x, w).dtype for name, call in calls.items()}
    assert found["meta"] == found["cpu"]


def test_convolutions_copy_their_sides_on_a_cpu_alone() -> None:
    side, peaks = 4 * 8 * 16 * 16 * 4, {}  # bytes of input and output
    for kind in ("cpu", "cuda"):
        for learns in (False, True):
            with tracing(kind) as tracker:
                weight = torch.empty(8, 8, 1, 1, device=META, requires_grad=learns)
                x = torch.empty(4, 8, 16, 16, device=META, requires_grad=True)
                with tracker.measured() as taken:
                    y = F.conv2d(x, weight)
                forward, gradient = taken.peak, torch.empty_like(y)
                with tracker.measured() as taken:
                    y.backward(gradient)
            peaks[kind, learns] = (forward // side, taken.peak // side)
    assert peaks == {
        ("cpu", False): (2, 2), ("cpu", True): (2, 3), ("cuda", False): (1, 1), ("cuda", True): (1, 1),
    }


def test_lengths_are_read_off_masks() -> None:
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
    with tracing("cpu") as tracker:
        known = tracker.know(mask)
        lengths = known.bool().sum(dim=1)
        assert lengths.device == META and lengths.tolist() == [3, 1] and int(lengths.max()) == 3
        known.zero_()
        assert torch.empty(2, device=META).tolist() == [1.0, 1.0]  # not known
