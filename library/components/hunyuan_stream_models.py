"""Denoisers with a refiner for the text, a row of double and a row of single stream blocks: what the families of
Hunyuan share.

Module paths are the key names of the original files; leaf layers are plain nn.Linear, so that adapters find them by
name and class.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.attention import (
    AttentionModule,
    DeviceTables,
    FinalLayer,
    in_heads,
    joined_along_tokens,
    modulate,
    never_empty,
    of_joined_tokens,
    of_text,
    of_tokens,
    per_token,
    plain_norm,
    riflex_frequencies,
    rms_normed,
    rope_cos_sin,
    rotate_pairs,
    split_query_key_value,
    timestep_embedding,
)
from library.components.block_calls import BlockCall
from library.components.mixed_models import entry_dtype
from library.components.packed_tokens import SampleVectors, Segments, Stream, ropes, segments, vectors
from library.core.courses import Course
from library.custom_offloading_utils import StreamStackMixin

Rope = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class StreamParams:
    """Hyper-parameters that all of them have. `rope_dim_list`: how many numbers of a head turn with each coordinate;
    `guidance_embed`: a model distilled to follow an embedded guidance."""

    in_channels: int
    hidden_size: int
    num_heads: int
    depth: int = 20
    depth_single: int = 40
    refiner_depth: int = 2
    mlp_ratio: float = 4.0
    text_dim: int
    rope_dim_list: tuple[int, ...]
    rope_theta: float = 256
    time_embed_dim: int = 256
    guidance_embed: bool = False

    num_axes = 2
    """coordinates of a place"""

    def __post_init__(self) -> None:
        object.__setattr__(self, "rope_dim_list", tuple(self.rope_dim_list))
        if self.hidden_size % self.num_heads:
            raise ValueError(f"num_heads is {self.num_heads}; it must divide hidden_size {self.hidden_size}")
        axes = self.rope_dim_list
        if len(axes) != self.num_axes or sum(axes) != self.head_dim or any(width % 2 for width in axes):
            number = {2: "two", 3: "three"}[self.num_axes]
            raise ValueError(
                f"rope_dim_list is {axes}; it needs {number} even numbers that sum to the head size {self.head_dim}"
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def mlp_hidden(self) -> int:
        return int(self.hidden_size * self.mlp_ratio + 1e-6)  # a ratio of shapes may miss its integer by rounding


class RMSNorm(nn.Module):
    """x / rms(x) in float32, rounded to the type of x and then multiplied by the weight."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return rms_normed(x, 1e-6).to(x.dtype) * self.weight


class MLP(nn.Module):
    """Two linear layers with an activation between them."""

    def __init__(self, hidden: int, mlp_hidden: int, activation: nn.Module) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden, mlp_hidden)
        self.act = activation
        self.fc2 = nn.Linear(mlp_hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class TimestepEmbedder(nn.Module):
    """A number (time, guidance) [B] or [B, L] as a vector."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.width = width
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden))

    def forward(self, values: Tensor) -> Tensor:
        return self.mlp(timestep_embedding(values, self.width, 1.0).to(self.mlp[0].bias.dtype))


class TextProjection(nn.Module):
    def __init__(self, in_dim: int, hidden: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_dim, hidden)
        self.act_1 = nn.SiLU()
        self.linear_2 = nn.Linear(hidden, hidden)

    def forward(self, caption: Tensor) -> Tensor:
        return self.linear_2(self.act_1(self.linear_1(caption)))


class IndividualTokenRefinerBlock(AttentionModule):
    """Self-attention and feed-forward over the text, gated by a vector."""

    def __init__(self, params: StreamParams) -> None:
        super().__init__()
        hidden = params.hidden_size
        self.num_heads = params.num_heads
        self.norm1 = nn.LayerNorm(hidden, eps=1e-6)
        self.self_attn_qkv = nn.Linear(hidden, 3 * hidden)
        self.self_attn_proj = nn.Linear(hidden, hidden)
        self.norm2 = nn.LayerNorm(hidden, eps=1e-6)
        self.mlp = MLP(hidden, params.mlp_hidden, nn.SiLU())
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden, 2 * hidden))

    def forward(self, x: Tensor, vec: Tensor, key_mask: Tensor | None = None) -> Tensor:
        attention_gate, mlp_gate = per_token(self.adaLN_modulation(vec)).chunk(2, dim=-1)
        query, key, value = split_query_key_value(self.self_attn_qkv(self.norm1(x)), self.num_heads)
        x = torch.addcmul(x, attention_gate, self.self_attn_proj(self.scaled_attention(query, key, value, key_mask)))
        return torch.addcmul(x, mlp_gate, self.mlp(self.norm2(x)))


class IndividualTokenRefiner(nn.Module):
    def __init__(self, params: StreamParams) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(IndividualTokenRefinerBlock(params) for _ in range(params.refiner_depth))


class SingleTokenRefiner(nn.Module):
    """Text states [B, T, text_dim] to tokens [B, T, hidden], refined in view of the time and of the caption as a
    whole."""

    def __init__(self, params: StreamParams) -> None:
        super().__init__()
        hidden = params.hidden_size
        self.input_embedder = nn.Linear(params.text_dim, hidden)
        self.t_embedder = TimestepEmbedder(params.time_embed_dim, hidden)
        self.c_embedder = TextProjection(params.text_dim, hidden)
        self.individual_token_refiner = IndividualTokenRefiner(params)

    def forward(self, states: Tensor, timestep: Tensor, mask: Tensor | None) -> Tensor:
        """timestep [B], or [B, L] of the image tokens; mask [B, T], true for tokens, None = all are."""
        valid = states.new_ones((*states.shape[:2], 1)).float() if mask is None else mask[..., None].float()
        caption = (states.float() * valid).sum(dim=1) / valid.sum(dim=1).clamp_min(1)  # [B, text_dim]
        vec = of_text(self.t_embedder(timestep)) + self.c_embedder(caption.to(states.dtype))
        visible = None if mask is None else never_empty(mask)
        x = self.input_embedder(states)
        for block in self.individual_token_refiner.blocks:
            x = block(x, vec, visible)
        return x


class ModulateDiT(nn.Module):
    """`factor` vectors (shifts, scales, gates) from the conditioning vector."""

    def __init__(self, hidden: int, factor: int) -> None:
        super().__init__()
        self.factor = factor
        self.act = nn.SiLU()
        self.linear = nn.Linear(hidden, factor * hidden)

    def forward(self, vec: Tensor | SampleVectors) -> Sequence[Tensor]:
        """vec [B, hidden], or [B, L, hidden] for a vector per token -> each [B, 1 or L, hidden]."""
        return of_tokens(lambda values: self.linear(self.act(values)), vec).chunk(self.factor, dim=-1)


def grid_rope(sizes: Sequence[int], axes: Sequence[int], theta: float, first_axis: Tensor | None = None) -> Rope:
    """Cosines and sines [1, L, D/2] of the places of a grid (rows and columns, or frames, rows and columns), the last
    coordinate changing fastest. `first_axis`: frequencies of the first one that are not the usual ones."""
    grid = torch.meshgrid(*(torch.arange(size) for size in sizes), indexing="ij")
    positions = torch.stack(grid, dim=-1).flatten(0, -2)[None]  # [1, L, coordinates]
    return rope_cos_sin(positions, axes, theta, first_axis)


def rotated(states: Tensor, rope: Rope) -> Tensor:
    """Query or key [B, heads, L + T, D] with its first L places, those of the image, turned."""
    places = rope[0].shape[1]
    return torch.cat((rotate_pairs(states[:, :, :places], rope).to(states.dtype), states[:, :, places:]), dim=2)


class MMDoubleStreamBlock(AttentionModule):
    """Image and text with weights of their own and one attention over both."""

    def __init__(self, params: StreamParams) -> None:
        super().__init__()
        hidden = params.hidden_size
        self.num_heads = params.num_heads
        for side in ("img", "txt"):
            self.add_module(f"{side}_mod", ModulateDiT(hidden, 6))
            self.add_module(f"{side}_norm1", plain_norm(hidden))
            self.add_module(f"{side}_attn_qkv", nn.Linear(hidden, 3 * hidden))
            self.add_module(f"{side}_attn_q_norm", RMSNorm(params.head_dim))
            self.add_module(f"{side}_attn_k_norm", RMSNorm(params.head_dim))
            self.add_module(f"{side}_attn_proj", nn.Linear(hidden, hidden))
            self.add_module(f"{side}_norm2", plain_norm(hidden))
            self.add_module(f"{side}_mlp", MLP(hidden, params.mlp_hidden, nn.GELU(approximate="tanh")))

    def forward(
        self, img: Tensor, txt: Tensor, vec: Tensor | SampleVectors, rope: Rope,
        key_mask: Tensor | Segments | None = None,
    ) -> tuple[Tensor, Tensor]:
        """img [B, L, hidden], txt [B, T, hidden], vec [B, hidden] or [B, L, hidden]; rope over the L image tokens,
        key_mask [B, L + T]."""
        img_shift1, img_scale1, img_gate1, img_shift2, img_scale2, img_gate2 = self.img_mod(vec)
        txt_shift1, txt_scale1, txt_gate1, txt_shift2, txt_scale2, txt_gate2 = self.txt_mod(of_text(vec))
        img_qkv = self._qkv(self.img_attn_qkv(modulate(self.img_norm1(img), img_shift1, img_scale1)))
        txt_qkv = self._qkv(self.txt_attn_qkv(modulate(self.txt_norm1(txt), txt_shift1, txt_scale1)))
        query = joined_along_tokens(
            self.img_attn_q_norm(img_qkv[0]), self.txt_attn_q_norm(txt_qkv[0])
        )  # [B, heads, L + T, D]
        key = joined_along_tokens(self.img_attn_k_norm(img_qkv[1]), self.txt_attn_k_norm(txt_qkv[1]))
        value = joined_along_tokens(img_qkv[2], txt_qkv[2])
        attended = self.scaled_attention(rotated(query, rope), rotated(key, rope), value, key_mask)
        img_attended, txt_attended = attended.split((img.shape[1], txt.shape[1]), dim=1)

        img = torch.addcmul(img, img_gate1, self.img_attn_proj(img_attended))
        img = torch.addcmul(img, img_gate2, self.img_mlp(modulate(self.img_norm2(img), img_shift2, img_scale2)))
        txt = torch.addcmul(txt, txt_gate1, self.txt_attn_proj(txt_attended))
        txt = torch.addcmul(txt, txt_gate2, self.txt_mlp(modulate(self.txt_norm2(txt), txt_shift2, txt_scale2)))
        return img, txt

    def packed_context(self, streams: Sequence[Stream], contexts: Sequence[tuple]) -> tuple:
        """See `BlockCall`."""
        (img, txt), (vecs, tables, masks) = streams, zip(*contexts)
        return vectors(vecs, img, txt), ropes(tables, (img,)), segments(streams, masks=masks)

    def _qkv(self, joined: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return split_query_key_value(joined, self.num_heads)


class MMSingleStreamBlock(AttentionModule):
    """Attention and feed-forward in parallel on the joined tokens, with fused input and output projections."""

    def __init__(self, params: StreamParams) -> None:
        super().__init__()
        hidden = params.hidden_size
        self.num_heads = params.num_heads
        self.split_sizes = (hidden, hidden, hidden, params.mlp_hidden)
        self.linear1 = nn.Linear(hidden, 3 * hidden + params.mlp_hidden)
        self.linear2 = nn.Linear(hidden + params.mlp_hidden, hidden)
        self.q_norm = RMSNorm(params.head_dim)
        self.k_norm = RMSNorm(params.head_dim)
        self.pre_norm = plain_norm(hidden)
        self.mlp_act = nn.GELU(approximate="tanh")
        self.modulation = ModulateDiT(hidden, 3)

    def forward(
        self, x: Tensor, vec: Tensor | SampleVectors, rope: Rope, key_mask: Tensor | Segments | None = None
    ) -> Tensor:
        """x [B, L + T, hidden], image tokens first; vec [B, hidden] or [B, L + T, hidden]."""
        shift, scale, gate = self.modulation(vec)
        *qkv, mlp = self.linear1(modulate(self.pre_norm(x), shift, scale)).split(self.split_sizes, dim=-1)
        query, key, value = (in_heads(part, self.num_heads) for part in qkv)
        query, key = rotated(self.q_norm(query), rope), rotated(self.k_norm(key), rope)
        attended = self.scaled_attention(query, key, value, key_mask)
        return torch.addcmul(x, gate, self.linear2(torch.cat((attended, self.mlp_act(mlp)), dim=-1)))

    def packed_context(self, streams: Sequence[Stream], contexts: Sequence[tuple]) -> tuple:
        """See `BlockCall`."""
        vecs, tables, masks = zip(*contexts)
        return vectors(vecs, streams[0]), ropes(tables, streams), segments(streams, masks=masks)


class StreamDenoiser(StreamStackMixin, nn.Module):
    """What these denoisers do with their tokens. A family makes `img_in` and what is special to it, then `build_rows`.
    """

    params: StreamParams
    img_in: nn.Module

    riflex_index = 0
    """see `riflex_frequencies`"""
    told_guidance = True
    """whether an embedded guidance is added, in models that have one"""

    def build_rows(self, params: StreamParams, out_width: int, **further: nn.Module) -> None:
        """The parts that all have, and `further` ones at their place in the files; a token holds `out_width` numbers of
        the result."""
        hidden = params.hidden_size
        self.txt_in = SingleTokenRefiner(params)
        self.time_in = TimestepEmbedder(params.time_embed_dim, hidden)
        for name, module in further.items():
            self.add_module(name, module)
        if params.guidance_embed:
            self.guidance_in = TimestepEmbedder(params.time_embed_dim, hidden)
        self.double_blocks = nn.ModuleList(MMDoubleStreamBlock(params) for _ in range(params.depth))
        self.single_blocks = nn.ModuleList(MMSingleStreamBlock(params) for _ in range(params.depth_single))
        self.final_layer = FinalLayer(hidden, out_width)
        self.rope_tables = DeviceTables()
        self.init_block_stack(num_rows=2)

    @property
    def device(self) -> torch.device:
        return self.final_layer.linear.bias.device

    @property
    def dtype(self) -> torch.dtype:
        """The type that activations enter with. Biases tell it: weights may be stored in 8 bits."""
        return entry_dtype(self, self.final_layer.linear.bias)

    @property
    def feature_width(self) -> int:
        """Width of the tokens that `feature_layer` gives."""
        return self.params.hidden_size

    def rope(self, sizes: tuple[int, ...], device: torch.device) -> Rope:
        """Cosines and sines of the places of a grid, computed once for each size."""
        axes, theta = self.params.rope_dim_list, self.params.rope_theta
        slowed = riflex_frequencies(axes[0], theta, self.riflex_index, sizes[0])
        return self.rope_tables.get((sizes, self.riflex_index), device, lambda: grid_rope(sizes, axes, theta, slowed))

    def with_guidance(self, vec: Tensor, guidance: Tensor | None) -> Tensor:
        """The vector [B, hidden] or [B, L, hidden] with the embedded scale, where the model follows one. ValueError
        when it is not given."""
        if not (self.params.guidance_embed and self.told_guidance):
            return vec
        if guidance is None:
            raise ValueError("guidance is None; a guidance-distilled model needs one scale per sample")
        embedded = self.guidance_in(guidance)
        return vec + (embedded[:, None] if vec.ndim == 3 else embedded)

    def run_streams(
        self, img: Tensor, txt: Tensor, vec: Tensor, rope: Rope, mask: Tensor | None, feature_layer: int | None
    ) -> Course:
        """(what the tokens of the picture hold at the end [B, L, out_width], their state [B, L, hidden] after block
        `feature_layer`, counted from 0 over the double, then the single blocks).

        img [B, L, hidden], txt [B, T, hidden], vec [B, hidden] or [B, L, hidden]; mask [B, T], true for tokens.
        """
        num_image, num_text = img.shape[1], txt.shape[1]
        key_mask = None if mask is None else F.pad(mask, (num_image, 0), value=True)  # [B, L + T]
        features: Tensor | None = None
        double, single = self.offloaders
        for index, block in enumerate(self.double_blocks):
            img, txt = yield BlockCall(self, block, index, double, (img, txt), (vec, rope, key_mask))
            features = img if index == feature_layer else features
        joined = torch.cat((img, txt), dim=1)  # [B, L + T, hidden]
        joined_vec = of_joined_tokens(vec, num_text, text_first=False)
        for index, block in enumerate(self.single_blocks):
            (joined,) = yield BlockCall(self, block, index, single, (joined,), (joined_vec, rope, key_mask))
            features = joined[:, :num_image] if self.params.depth + index == feature_layer else features
        return self.final_layer(joined[:, :num_image], vec), features
