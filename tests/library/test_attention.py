"""Every way to compute attention against torch's: on the CPU by itself where it runs there, by stubs of its package
where not, which check the layout of what they get and compute by the plain formula, sequence by sequence."""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from library import attention
from library.attention import AttentionModule, scaled_attention, use_attention
from library.components.attention_backends import KERNELS
from library.components.packed_tokens import Stream, segments
from library.core.attention_modes import ALIASES, ATTENTION_MODES, AttentionChoice
from tests.networks.tiny_denoisers import DENOISERS, tiny_denoiser

BATCH, HEADS, WIDTH = 3, 2, 8
MASK = torch.tensor([[1, 1, 0, 1, 1, 0, 1], [1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 1]]) == 1
"""true tokens behind hidden ones, a full row, a single key that stands last"""


def plain(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
    """[L, heads, D] each -> [L, heads, D], by the formula."""
    products = torch.einsum("qhd,khd->hqk", query, key) / query.shape[-1] ** 0.5
    products = products if bias is None else products + bias
    return torch.einsum("hqk,khd->qhd", products.softmax(dim=-1), value)


def even(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    assert query.shape[2] == HEADS and query.shape[0] == key.shape[0]
    return torch.stack([plain(*rows) for rows in zip(query, key, value, strict=True)])


def varied(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
    max_seqlen_k: int,
) -> Tensor:
    """As flash-attn and SageAttention read sequences end to end; a sequence without keys has no queries."""
    for ends, states, most in ((cu_seqlens_q, query, max_seqlen_q), (cu_seqlens_k, key, max_seqlen_k)):
        assert ends.dtype == torch.int32 and ends[0] == 0 and ends[-1] == len(states) and states.is_contiguous()
        assert isinstance(most, int) and ends.diff().max() <= most and ends.diff().min() >= 0
    parts = []
    for q, k in zip(cu_seqlens_q.tolist()[:-1], range(len(cu_seqlens_k) - 1), strict=True):
        stop_q, (start_k, stop_k) = int(cu_seqlens_q[k + 1]), cu_seqlens_k[k : k + 2].tolist()
        assert stop_k > start_k or stop_q == q, "queries without keys are no numbers"
        parts.append(plain(query[q:stop_q], key[start_k:stop_k], value[start_k:stop_k]))
    return torch.cat(parts)


def stub(monkeypatch: pytest.MonkeyPatch, name: str, **functions: Callable) -> list[str]:
    """Put a package in the place of the one that is not installed; the names of its functions as they are called."""
    calls: list[str] = []
    module = ModuleType(name)
    module.__spec__ = type(sys)("spec")
    for function, body in functions.items():
        def counted(*words, body=body, function=function, **more):
            calls.append(function)
            return body(*words, **more)

        setattr(module, function, counted)
    monkeypatch.setitem(sys.modules, name, module)
    return calls


def with_packages(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    def sage(query: Tensor, key: Tensor, value: Tensor, tensor_layout: str) -> Tensor:
        assert tensor_layout == "HND" and query.shape[1] == HEADS
        return even(*(states.transpose(1, 2) for states in (query, key, value))).transpose(1, 2)

    def efficient(query: Tensor, key: Tensor, value: Tensor, attn_bias: Tensor | None) -> Tensor:
        if attn_bias is None:
            return even(query, key, value)
        assert attn_bias.shape == (len(query), HEADS, query.shape[1], key.shape[1])
        assert attn_bias.dtype == query.dtype and not attn_bias.requires_grad
        assert attn_bias.stride(-1) == 1 and all(stride % 8 == 0 for stride in attn_bias.stride()[:-1])
        return torch.stack([plain(*rows) for rows in zip(query, key, value, attn_bias, strict=True)])

    calls = [
        stub(monkeypatch, "flash_attn", flash_attn_func=even, flash_attn_varlen_func=varied),
        stub(  # early releases of flash-attn 3 give the sums of the softmax too
            monkeypatch, "flash_attn_interface", flash_attn_func=lambda *words: (even(*words), None),
            flash_attn_varlen_func=lambda *words, **more: (varied(*words, **more), None),
        ),
        stub(monkeypatch, "sageattention", sageattn=sage, sageattn_varlen=varied),
        stub(monkeypatch, "xformers.ops", memory_efficient_attention=efficient),
    ]  # fmt: skip
    monkeypatch.setitem(sys.modules, "xformers", ModuleType("xformers"))
    return calls


def states(length: int, seed: int, requires_grad: bool) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(BATCH, HEADS, length, WIDTH, generator=generator).requires_grad_(requires_grad)


def computed(choice: AttentionChoice, mask: Tensor | None, num_queries: int, learns: bool) -> list[Tensor]:
    """The result, and where it learns the gradients of query, key and value."""
    inputs = [states(length, seed, learns) for seed, length in enumerate((num_queries, MASK.shape[1], MASK.shape[1]))]
    result = scaled_attention(*inputs, mask, choice)
    if not learns:
        return [result]
    weighed = (result * torch.linspace(-1, 1, result.numel()).view_as(result)).sum()
    return [result, *torch.autograd.grad(weighed, inputs)]


def test_every_way_gives_what_torch_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = with_packages(monkeypatch)
    assert set(KERNELS) == set(ATTENTION_MODES) and set(ALIASES.values()) <= set(KERNELS)
    for mask in (None, MASK, MASK.float()):
        for num_queries in (MASK.shape[1], 4):
            expected = computed(AttentionChoice(), mask, num_queries, True)
            assert expected[0].shape == (BATCH, num_queries, HEADS * WIDTH)
            for mode in KERNELS:
                for split in (False, True):
                    found = computed(AttentionChoice(mode, split), mask, num_queries, mode != "flex")
                    for number, (a, b) in enumerate(zip(found, expected)):
                        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=f"{mode} {split} {number} {mask}")
    assert [set(names) for names in calls] == [
        {"flash_attn_func", "flash_attn_varlen_func"}, {"flash_attn_func", "flash_attn_varlen_func"},
        {"sageattn", "sageattn_varlen"}, {"memory_efficient_attention"},
    ]  # fmt: skip


def test_packed_tokens_are_attended_to_in_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of text and picture of three samples in two sizes, to themselves and to another text."""
    flash, flash3, *_ = with_packages(monkeypatch)
    text, image, other = Stream(((2, 3), (1, 1))), Stream(((2, 4), (1, 5))), Stream(((2, 2), (1, 6)))
    for kinds in (segments((text, image)), segments((image,), (other,)), segments((text, image), (other,))):
        sizes = [sum(s * t for part in side for _, s, t in part) for side in (kinds.queries, kinds.keys)]
        generator = torch.Generator().manual_seed(sum(sizes))
        inputs = [
            torch.randn(1, HEADS, size, WIDTH, generator=generator).requires_grad_()
            for size in (sizes[0], sizes[1], sizes[1])
        ]
        results = {}
        for mode in ("torch", "flash", "flash3"):
            result = scaled_attention(*inputs, kinds, AttentionChoice(mode))
            weighed = (result * torch.linspace(-1, 1, result.numel()).view_as(result)).sum()
            results[mode] = [result, *torch.autograd.grad(weighed, inputs)]
        for mode in ("flash", "flash3"):
            for found, expected in zip(results[mode], results["torch"], strict=True):
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert flash == flash3 == ["flash_attn_varlen_func"] * 3


def test_masks_are_read_on_the_host_once_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    copies: list[int] = []
    plain_cpu = Tensor.cpu
    monkeypatch.setattr(Tensor, "cpu", lambda self: copies.append(1) or plain_cpu(self))
    mask, inputs = MASK.clone(), [states(MASK.shape[1], seed, False) for seed in range(3)]
    for _ in range(4):
        scaled_attention(*inputs, mask, AttentionChoice(split=True))
    assert len(copies) == 1
    scaled_attention(*inputs, mask.logical_not() | mask, AttentionChoice(split=True))
    assert len(copies) == 2


@pytest.mark.parametrize("family", list(DENOISERS))
def test_the_attention_of_every_denoiser_is_chosen(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No attention of a denoiser goes past the choice."""
    model, inputs = tiny_denoiser(family)
    expected, called = model(*inputs), []

    def counting(query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None) -> Tensor:
        called.append(query.shape)
        return KERNELS["torch_math"](query, key, value, key_mask)

    monkeypatch.setitem(KERNELS, "flash", counting)
    monkeypatch.setitem(KERNELS, "torch", None)
    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", guarded(called))
    assert use_attention(model, AttentionChoice("flash")) == sum(
        isinstance(module, AttentionModule) for module in model.modules()
    )
    torch.testing.assert_close(model(*inputs), expected, rtol=1e-4, atol=1e-5)
    assert called


def guarded(called: list) -> Callable:
    """torch's function for those alone who come through `called`."""
    body, passed = nn.functional.scaled_dot_product_attention, []

    def function(*words: Tensor, **more: Tensor) -> Tensor:
        passed.append(1)
        assert len(passed) == len(called), "an attention that is not chosen"
        return body(*words, **more)

    return function


ALWAYS_TORCH = {"ldm_models.py", "siglip_models.py", "hunyuan_vae_models.py", "wan_vae_models.py"}
"""autoencoders and an encoder of pictures"""


def test_only_autoencoders_and_encoders_compute_attention_past_the_choice() -> None:
    """Denoisers of videos too."""
    past = re.compile(r"(?<!self\.)(?<!def )\bscaled_attention\(|scaled_dot_product_attention\(")
    library = Path(attention.__file__).parent
    files = [*library.glob("*_models.py"), *library.glob("components/*_models.py")]
    assert {path.name for path in files if past.search(path.read_text(encoding="utf-8"))} == ALWAYS_TORCH
    assert sum("(AttentionModule)" in path.read_text(encoding="utf-8") for path in files) >= 8
