"""The packages and kernels that compute attention, behind one signature: those of `library/core/attention_modes.py`.

Each takes query [B, heads, L, D], key and value [B, heads, T, D] of one type and a mask of keys [B, T] (true = attend,
in every row at least one) or None, and gives [B, L, heads, D]. Packages are imported by the first call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.weak import WeakIdKeyDictionary

Kernel = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
EndToEnd = Callable[..., Tensor]
"""of sequences end to end, [tokens, heads, D] -> the same: (query, key, value, where the queries of each end [n + 1],
where its keys end [n + 1], most queries of one, most keys)"""
ROW_ALIGNMENT = 8
"""numbers to a multiple of which xformers wants the rows of a bias apart"""


def torch_attention(query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None) -> Tensor:
    mask = None if key_mask is None else key_mask[:, None, None, :]  # [B, 1, 1, T]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)


def with_torch_kernel(first: SDPBackend) -> Kernel:
    """torch's attention, by this kernel where it can do a call, by the next best where it cannot (a mask, say)."""
    others = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH)
    order = [first, *(kernel for kernel in others if kernel != first)]

    def attend(query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None) -> Tensor:
        with sdpa_kernel(order, set_priority=True):
            return torch_attention(query, key, value, key_mask)

    return attend


def tokens_first(*states: Tensor) -> list[Tensor]:
    """[B, heads, L, D] -> [B, L, heads, D], the layout of these packages."""
    return [part.transpose(1, 2) for part in states]


def first_of(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Some releases give the sums of the softmax beside the result."""
    return result[0] if isinstance(result, tuple) else result


def segments(key_mask: Tensor, num_queries: int) -> tuple[Tensor, Tensor, Tensor]:
    """(order of keys [B, T], ends of queries [2 B + 1], ends of keys [2 B + 1]) for kernels that take sequences end to
    end: of each sample the keys that are attended to, with all its queries, then the others, with none. Nothing is
    measured on the host: all sizes are those of the mask."""
    batch, length = key_mask.shape
    order = key_mask.logical_not().to(torch.int8).argsort(dim=1, stable=True)
    starts = torch.arange(batch + 1, device=key_mask.device, dtype=torch.int32)  # [B + 1]
    middle = starts[:-1] * length + key_mask.sum(dim=1, dtype=torch.int32)
    ends_of_keys = torch.cat((starts.new_zeros(1), torch.stack((middle, starts[1:] * length), dim=1).flatten()))
    ends_of_queries = torch.cat((starts[:1], starts[1:].repeat_interleave(2))) * num_queries
    return order, ends_of_queries, ends_of_keys


def by_segments(call: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor) -> Tensor:
    """A kernel for sequences end to end, `call(query, key, value, ends of queries, ends of keys, most queries, most
    keys)` with [tokens, heads, D], for a batch with a mask."""
    batch, num_queries, num_keys = query.shape[0], query.shape[2], key.shape[2]
    order, ends_of_queries, ends_of_keys = segments(key_mask, num_queries)
    query, key, value = tokens_first(query, key, value)
    places = order[:, :, None, None].expand_as(key)
    joined = (query, key.gather(1, places), value.gather(1, places))
    attended = call(
        *(part.flatten(0, 1).contiguous() for part in joined), ends_of_queries, ends_of_keys, num_queries, num_keys
    )
    return attended.unflatten(0, (batch, num_queries))


def flash_attention(query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None) -> Tensor:
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    return _flash(flash_attn_func, flash_attn_varlen_func, query, key, value, key_mask)


def flash3_attention(query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None) -> Tensor:
    from flash_attn_interface import flash_attn_func, flash_attn_varlen_func

    return _flash(flash_attn_func, flash_attn_varlen_func, query, key, value, key_mask)


def _flash(
    even: Callable[..., Tensor], varied: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor,
    key_mask: Tensor | None,
) -> Tensor:
    """By the two functions of a release: for sequences of one length, and for sequences end to end."""
    if key_mask is None:
        return first_of(even(*tokens_first(query, key, value)))
    return by_segments(_end_to_end(varied), query, key, value, key_mask)


def _end_to_end(varied: Callable[..., Tensor]) -> EndToEnd:
    def call(query: Tensor, key: Tensor, value: Tensor, *sizes: Tensor | int) -> Tensor:
        names = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
        return first_of(varied(query, key, value, **dict(zip(names, sizes, strict=True))))

    return call


def flash_end_to_end(query: Tensor, key: Tensor, value: Tensor, *sizes: Tensor | int) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    return _end_to_end(flash_attn_varlen_func)(query, key, value, *sizes)


def flash3_end_to_end(query: Tensor, key: Tensor, value: Tensor, *sizes: Tensor | int) -> Tensor:
    from flash_attn_interface import flash_attn_varlen_func

    return _end_to_end(flash_attn_varlen_func)(query, key, value, *sizes)


def sage_attention(query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None) -> Tensor:
    from sageattention import sageattn, sageattn_varlen

    if key_mask is None:
        return sageattn(query, key, value, tensor_layout="HND").transpose(1, 2)
    return by_segments(sageattn_varlen, query, key, value, key_mask)


def xformers_attention(query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None) -> Tensor:
    from xformers.ops import memory_efficient_attention

    bias = None if key_mask is None else bias_of(key_mask, query)
    return memory_efficient_attention(*tokens_first(query, key, value), attn_bias=bias)


def bias_of(key_mask: Tensor, query: Tensor) -> Tensor:
    """What is added to products [B, heads, L, T]: 0, or the lowest number of the type, beside which nothing counts (the
    first keys of a row may all be hidden, where minus infinity would be no number). One row that all heads and queries
    share, in memory of an aligned length."""
    batch, num_keys = key_mask.shape
    rows = query.new_zeros(batch, num_keys + -num_keys % ROW_ALIGNMENT)
    rows[:, :num_keys].masked_fill_(key_mask.logical_not(), torch.finfo(query.dtype).min)
    return rows[:, None, None, :num_keys].expand(-1, query.shape[1], query.shape[2], -1)


def flex_attention(query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None) -> Tensor:
    hidden = None
    if key_mask is not None:

        def hidden(score: Tensor, sample: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
            return torch.where(key_mask[sample, column], score, -torch.inf)

    from torch.nn.attention.flex_attention import flex_attention as plain

    # compiled it is one kernel; within a compiled block it is compiled with that
    kernel = plain if query.device.type == "cpu" or torch.compiler.is_compiling() else _compiled_flex()
    return kernel(query, key, value, score_mod=hidden).transpose(1, 2)


@functools.cache
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention as plain

    return torch.compile(plain, dynamic=True)


KERNELS: dict[str, Kernel] = {
    "torch": torch_attention,
    "torch_flash": with_torch_kernel(SDPBackend.FLASH_ATTENTION),
    "torch_efficient": with_torch_kernel(SDPBackend.EFFICIENT_ATTENTION),
    "torch_cudnn": with_torch_kernel(SDPBackend.CUDNN_ATTENTION),
    "torch_math": with_torch_kernel(SDPBackend.MATH),
    "flash": flash_attention,
    "flash3": flash3_attention,
    "xformers": xformers_attention,
    "sageattn": sage_attention,
    "flex": flex_attention,
}
"""by the names of ATTENTION_MODES"""


END_TO_END: dict[str, EndToEnd] = {"flash": flash_end_to_end, "flash3": flash3_end_to_end}
"""those that take sequences of several lengths in one call, for training"""


_KEPT = WeakIdKeyDictionary()
"""mask -> what `kept_keys` gives: all layers of a forward share one mask, and it is read on the host once"""


def kept_keys(key_mask: Tensor) -> list[Tensor | None]:
    """Of each row of a mask [B, T] the places that are true; None where all are."""
    if key_mask not in _KEPT:
        rows = key_mask.cpu()  # [B, T]
        _KEPT[key_mask] = [None if row.all() else row.nonzero().flatten().to(key_mask.device) for row in rows]
    return _KEPT[key_mask]


def by_sample(kernel: Kernel, query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None) -> Tensor:
    """One call for each sample, without mask: over the keys that are attended to. [B, L, heads, D]."""
    kept = [None] * len(query) if key_mask is None else kept_keys(key_mask)
    parts = []
    for sample, places in enumerate(kept):
        rows = [states[sample : sample + 1] for states in (query, key, value)]
        if places is not None:
            rows[1:] = (states.index_select(2, places) for states in rows[1:])
        parts.append(kernel(*rows, None))
    return torch.cat(parts)
