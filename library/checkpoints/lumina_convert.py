"""Lumina-Image 2.0 key names of the denoiser: the original layout and the one of diffusers folders, both ways.

Each pair is an original name and the parts that stand for its rows in diffusers; both directions read the same table.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from library.checkpoints.loading import count_blocks

Pair = tuple[str, tuple[str, ...]]

TOP: tuple[Pair, ...] = (
    ("x_embedder", ("x_embedder",)),
    ("t_embedder.mlp.0", ("time_caption_embed.timestep_embedder.linear_1",)),
    ("t_embedder.mlp.2", ("time_caption_embed.timestep_embedder.linear_2",)),
    ("cap_embedder.0", ("time_caption_embed.caption_embedder.0",)),
    ("cap_embedder.1", ("time_caption_embed.caption_embedder.1",)),
    ("final_layer.adaLN_modulation.1", ("norm_out.linear_1",)),
    ("final_layer.linear", ("norm_out.linear_2",)),
)
BLOCK: tuple[Pair, ...] = (
    ("attention.qkv", ("attn.to_q", "attn.to_k", "attn.to_v")),
    ("attention.out", ("attn.to_out.0",)),
    ("attention.q_norm", ("attn.norm_q",)),
    ("attention.k_norm", ("attn.norm_k",)),
    *((f"feed_forward.w{number}", (f"feed_forward.linear_{number}",)) for number in (1, 2, 3)),
    ("attention_norm2", ("norm2",)),
    ("ffn_norm1", ("ffn_norm1",)),
    ("ffn_norm2", ("ffn_norm2",)),
)
MODULATED: tuple[Pair, ...] = (*BLOCK, ("attention_norm1", ("norm1.norm",)), ("adaLN_modulation.1", ("norm1.linear",)))
PLAIN: tuple[Pair, ...] = (*BLOCK, ("attention_norm1", ("norm1",)))
ROWS: Mapping[str, tuple[Pair, ...]] = {"noise_refiner": MODULATED, "context_refiner": PLAIN, "layers": MODULATED}
"""rows of blocks, which have the same names in both layouts -> what is in a block"""
UNUSED = "norm_final.weight"
"""in original files alone, and nothing computes with it"""
HALVES = (".weight", ".bias")


def denoiser_pairs(keys: Mapping[str, object] | Sequence[str]) -> Iterator[Pair]:
    """Every pair of names, endings included, of a denoiser with the blocks of these keys, in either layout."""
    layers = [("", TOP), *((f"{row}.{i}.", pairs) for row, pairs in ROWS.items() for i in range(count_blocks(keys, f"{row}.")))]
    for place, pairs in layers:
        for original, parts in pairs:
            for ending in HALVES:
                yield f"{place}{original}{ending}", tuple(f"{place}{part}{ending}" for part in parts)


def is_diffusers_denoiser(keys: Mapping[str, object]) -> bool:
    return "noise_refiner.0.attn.to_q.weight" in keys


def to_original(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Denoiser weights from diffusers names to the original ones. Names outside the table stay as they are."""
    rest, converted = dict(state), {}
    for original, parts in denoiser_pairs(state):
        if all(part in rest for part in parts):
            tensors = [rest.pop(part) for part in parts]
            converted[original] = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
    return {**converted, **rest}


def to_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Denoiser weights from the original names to those of diffusers, without the norm that nothing uses."""
    rest, converted = {key: tensor for key, tensor in state.items() if key != UNUSED}, {}
    for original, parts in denoiser_pairs(state):
        if original not in rest:
            continue
        tensor = rest.pop(original)
        rows = [tensor.shape[0]] if len(parts) == 1 else qkv_rows(tensor.shape[0], tensor.shape[1])
        converted.update(zip(parts, tensor.split(rows)))
    return {**converted, **rest}


def qkv_rows(out_features: int, in_features: int) -> list[int]:
    """Rows of query, key and value in a fused projection: queries are as wide as the model, keys and values alike."""
    return [in_features, *[(out_features - in_features) // 2] * 2]
