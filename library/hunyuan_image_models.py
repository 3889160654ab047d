"""HunyuanImage 2.1: the denoiser, with a refiner for the text tokens and a projection for those of the glyphs.

Module paths are the key names of the original files; leaf layers are plain nn.Linear and nn.Conv2d, so that adapters
find them by name and class.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from library.attention import (
    DeviceTables,
    FinalLayer,
    modulate,
    never_empty,
    of_joined_tokens,
    of_text,
    per_token,
    plain_norm,
    rope_cos_sin,
    rotate_pairs,
    scaled_attention,
    timestep_embedding,
)
from library.core.lazy_names import homes, lazy_names
from library.custom_offloading_utils import StreamStackMixin

__getattr__, __dir__ = lazy_names(
    __name__, homes("library.compat.hunyuan_image_names", "create_model", "load_hunyuan_image_model")
)

Rope = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class HYImageParams:
    """Hyper-parameters of the denoiser; the defaults are HunyuanImage 2.1. `guidance_embed`: a model distilled to
    follow an embedded guidance; `mean_flow`: one that learned average velocities, from a time to an earlier one."""

    in_channels: int = 64
    hidden_size: int = 3584
    num_heads: int = 28
    depth: int = 20
    depth_single: int = 40
    refiner_depth: int = 2
    mlp_ratio: float = 4.0
    text_dim: int = 3584
    byt5_dim: int = 1472
    byt5_mid: int = 2048
    rope_dim_list: tuple[int, ...] = (64, 64)
    rope_theta: float = 256
    time_embed_dim: int = 256
    guidance_embed: bool = False
    mean_flow: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "rope_dim_list", tuple(self.rope_dim_list))
        if self.hidden_size % self.num_heads:
            raise ValueError(f"num_heads is {self.num_heads}; it must divide hidden_size {self.hidden_size}")
        axes = self.rope_dim_list
        if len(axes) != 2 or sum(axes) != self.head_dim or any(width % 2 for width in axes):
            raise ValueError(
                f"rope_dim_list is {axes}; it needs two even numbers that sum to the head size {self.head_dim}"
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
        full = x.float()
        return (full * torch.rsqrt(full.square().mean(dim=-1, keepdim=True) + 1e-6)).to(x.dtype) * self.weight


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


class ByT5Mapper(nn.Module):
    """Glyph states [B, G, byt5_dim] to tokens [B, G, hidden]."""

    def __init__(self, in_dim: int, middle: int, hidden: int) -> None:
        super().__init__()
        self.layernorm = nn.LayerNorm(in_dim)
        self.fc1 = nn.Linear(in_dim, middle)
        self.fc2 = nn.Linear(middle, middle)
        self.fc3 = nn.Linear(middle, hidden)
        self.act_fn = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(self.act_fn(self.fc2(self.act_fn(self.fc1(self.layernorm(x))))))


class IndividualTokenRefinerBlock(nn.Module):
    """Self-attention and feed-forward over the text, gated by a vector."""

    def __init__(self, params: HYImageParams) -> None:
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
        query, key, value = rearrange(
            self.self_attn_qkv(self.norm1(x)), "b l (three h d) -> three b h l d", three=3, h=self.num_heads
        )
        x = x + attention_gate * self.self_attn_proj(scaled_attention(query, key, value, key_mask))
        return x + mlp_gate * self.mlp(self.norm2(x))


class IndividualTokenRefiner(nn.Module):
    def __init__(self, params: HYImageParams) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(IndividualTokenRefinerBlock(params) for _ in range(params.refiner_depth))


class SingleTokenRefiner(nn.Module):
    """Text states [B, T, text_dim] to tokens [B, T, hidden], refined in view of the time and of the caption as a
    whole."""

    def __init__(self, params: HYImageParams) -> None:
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


class PatchEmbed2D(nn.Module):
    """Latents [B, C, H, W] to tokens [B, H * W, hidden], one for each place."""

    def __init__(self, in_channels: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        return rearrange(self.proj(x), "b c h w -> b (h w) c")


class ModulateDiT(nn.Module):
    """`factor` vectors (shifts, scales, gates) from the conditioning vector."""

    def __init__(self, hidden: int, factor: int) -> None:
        super().__init__()
        self.factor = factor
        self.act = nn.SiLU()
        self.linear = nn.Linear(hidden, factor * hidden)

    def forward(self, vec: Tensor) -> Sequence[Tensor]:
        """vec [B, hidden], or [B, L, hidden] for a vector per token -> each [B, 1 or L, hidden]."""
        return per_token(self.linear(self.act(vec))).chunk(self.factor, dim=-1)


def image_rope(height: int, width: int, axes: Sequence[int], theta: float) -> Rope:
    """Cosines and sines [1, H * W, D/2] of the places (row, column) of an image."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    positions = torch.stack((rows, columns), dim=-1).flatten(0, 1)[None]  # [1, L, 2]
    return rope_cos_sin(positions, axes, theta)


def rotated(states: Tensor, rope: Rope) -> Tensor:
    """Query or key [B, heads, L + T, D] with its first L places, those of the image, turned."""
    places = rope[0].shape[1]
    return torch.cat((rotate_pairs(states[:, :, :places], rope).to(states.dtype), states[:, :, places:]), dim=2)


class MMDoubleStreamBlock(nn.Module):
    """Image and text with weights of their own and one attention over both."""

    def __init__(self, params: HYImageParams) -> None:
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
        self, img: Tensor, txt: Tensor, vec: Tensor, rope: Rope, key_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """img [B, L, hidden], txt [B, T, hidden], vec [B, hidden] or [B, L, hidden]; rope over the L image tokens,
        key_mask [B, L + T]."""
        img_shift1, img_scale1, img_gate1, img_shift2, img_scale2, img_gate2 = self.img_mod(vec)
        txt_shift1, txt_scale1, txt_gate1, txt_shift2, txt_scale2, txt_gate2 = self.txt_mod(of_text(vec))
        img_qkv = self._heads(self.img_attn_qkv(modulate(self.img_norm1(img), img_shift1, img_scale1)))
        txt_qkv = self._heads(self.txt_attn_qkv(modulate(self.txt_norm1(txt), txt_shift1, txt_scale1)))
        query = torch.cat(
            (self.img_attn_q_norm(img_qkv[0]), self.txt_attn_q_norm(txt_qkv[0])), dim=2
        )  # [B, heads, L + T, D]
        key = torch.cat((self.img_attn_k_norm(img_qkv[1]), self.txt_attn_k_norm(txt_qkv[1])), dim=2)
        value = torch.cat((img_qkv[2], txt_qkv[2]), dim=2)
        attended = scaled_attention(rotated(query, rope), rotated(key, rope), value, key_mask)
        img_attended, txt_attended = attended.split((img.shape[1], txt.shape[1]), dim=1)

        img = img + img_gate1 * self.img_attn_proj(img_attended)
        img = img + img_gate2 * self.img_mlp(modulate(self.img_norm2(img), img_shift2, img_scale2))
        txt = txt + txt_gate1 * self.txt_attn_proj(txt_attended)
        txt = txt + txt_gate2 * self.txt_mlp(modulate(self.txt_norm2(txt), txt_shift2, txt_scale2))
        return img, txt

    def _heads(self, qkv: Tensor) -> Tensor:
        return rearrange(qkv, "b l (three h d) -> three b h l d", three=3, h=self.num_heads)


class MMSingleStreamBlock(nn.Module):
    """Attention and feed-forward in parallel on the joined tokens, with fused input and output projections."""

    def __init__(self, params: HYImageParams) -> None:
        super().__init__()
        hidden = params.hidden_size
        self.num_heads = params.num_heads
        self.split_sizes = (3 * hidden, params.mlp_hidden)
        self.linear1 = nn.Linear(hidden, 3 * hidden + params.mlp_hidden)
        self.linear2 = nn.Linear(hidden + params.mlp_hidden, hidden)
        self.q_norm = RMSNorm(params.head_dim)
        self.k_norm = RMSNorm(params.head_dim)
        self.pre_norm = plain_norm(hidden)
        self.mlp_act = nn.GELU(approximate="tanh")
        self.modulation = ModulateDiT(hidden, 3)

    def forward(self, x: Tensor, vec: Tensor, rope: Rope, key_mask: Tensor | None = None) -> Tensor:
        """x [B, L + T, hidden], image tokens first; vec [B, hidden] or [B, L + T, hidden]."""
        shift, scale, gate = self.modulation(vec)
        qkv, mlp = self.linear1(modulate(self.pre_norm(x), shift, scale)).split(self.split_sizes, dim=-1)
        query, key, value = rearrange(qkv, "b l (three h d) -> three b h l d", three=3, h=self.num_heads)
        attended = scaled_attention(rotated(self.q_norm(query), rope), rotated(self.k_norm(key), rope), value, key_mask)
        return x + gate * self.linear2(torch.cat((attended, self.mlp_act(mlp)), dim=-1))


class HYImageDiffusionTransformer(StreamStackMixin, nn.Module):
    """The rectified-flow transformer of HunyuanImage 2.1, plain or distilled (`guidance_in`, `time_r_in`)."""

    def __init__(self, params: HYImageParams) -> None:
        super().__init__()
        self.params = params
        hidden = params.hidden_size
        self.byt5_in = ByT5Mapper(params.byt5_dim, params.byt5_mid, hidden)
        self.img_in = PatchEmbed2D(params.in_channels, hidden)
        self.txt_in = SingleTokenRefiner(params)
        self.time_in = TimestepEmbedder(params.time_embed_dim, hidden)
        if params.mean_flow:
            self.time_r_in = TimestepEmbedder(params.time_embed_dim, hidden)
        if params.guidance_embed:
            self.guidance_in = TimestepEmbedder(params.time_embed_dim, hidden)
        self.double_blocks = nn.ModuleList(MMDoubleStreamBlock(params) for _ in range(params.depth))
        self.single_blocks = nn.ModuleList(MMSingleStreamBlock(params) for _ in range(params.depth_single))
        self.final_layer = FinalLayer(hidden, params.in_channels)
        self.rope_tables = DeviceTables()
        self.init_block_stack(num_rows=2)

    @property
    def device(self) -> torch.device:
        return self.img_in.proj.bias.device

    @property
    def dtype(self) -> torch.dtype:
        """The type that activations enter with. Biases tell it: weights may be stored in 8 bits."""
        return self.img_in.proj.bias.dtype

    @property
    def feature_width(self) -> int:
        """Width of the tokens that `feature_layer` gives."""
        return self.params.hidden_size

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        text_states: Tensor,
        encoder_attention_mask: Tensor | None = None,
        byt5_text_states: Tensor | None = None,
        byt5_text_mask: Tensor | None = None,
        *,
        timestep_r: Tensor | None = None,
        guidance: Tensor | None = None,
        feature_layer: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Velocity (noise - data) of latents [B, C, H, W].

        timestep [B] on the 0..1000 scale, or [B, H * W] for a time per token; text_states [B, T, text_dim] and
        byt5_text_states [B, G, byt5_dim] with masks [B, T] and [B, G], 1 = token; without a mask all are, and without
        glyphs their states are None.
        timestep_r: the earlier time that a mean-flow model steps to (None = `timestep`); guidance [B]: the embedded
        scale times 1000. With `feature_layer` the result is (velocity, image tokens [B, H * W, hidden] after that
        block, counted from 0 over the double, then the single blocks). ValueError when a guidance-distilled model gets
        no guidance.
        """
        self.prepare_block_swap_before_forward()
        height, width = hidden_states.shape[-2:]
        vec = self._conditioning_vector(timestep, timestep_r, guidance)  # [B, hidden] or [B, L, hidden]
        rope = self._rope(height, width, hidden_states.device)  # [1, L, D/2] each
        img = self.img_in(hidden_states.to(self.dtype))  # [B, L, hidden]
        txt, mask = self._text_tokens(timestep, text_states, encoder_attention_mask, byt5_text_states, byt5_text_mask)
        key_mask = None if mask is None else F.pad(mask, (img.shape[1], 0), value=True)  # [B, L + T]

        features: list[Tensor] = []
        double, single = self.offloaders
        for index, block in enumerate(self.double_blocks):
            img, txt = self.run_block(block, index, double, (img, txt), (vec, rope, key_mask))
            features += [img] if index == feature_layer else []
        num_image = img.shape[1]
        joined = torch.cat((img, txt), dim=1)  # [B, L + T, hidden]
        joined_vec = of_joined_tokens(vec, txt.shape[1], text_first=False)
        for index, block in enumerate(self.single_blocks):
            (joined,) = self.run_block(block, index, single, (joined,), (joined_vec, rope, key_mask))
            features += [joined[:, :num_image]] if self.params.depth + index == feature_layer else []
        velocity = self.final_layer(joined[:, :num_image], vec)
        velocity = rearrange(velocity, "b (h w) c -> b c h w", h=height)
        return velocity if feature_layer is None else (velocity, features[0])

    def _conditioning_vector(self, timestep: Tensor, timestep_r: Tensor | None, guidance: Tensor | None) -> Tensor:
        vec = self.time_in(timestep)
        if self.params.mean_flow:
            vec = (vec + self.time_r_in(timestep if timestep_r is None else timestep_r)) / 2
        if self.params.guidance_embed:
            if guidance is None:
                raise ValueError("guidance is None; a guidance-distilled model needs one scale per sample")
            embedded = self.guidance_in(guidance)
            vec = vec + (embedded[:, None] if vec.ndim == 3 else embedded)
        return vec

    def _text_tokens(
        self, timestep: Tensor, states: Tensor, mask: Tensor | None, glyphs: Tensor | None, glyph_mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Tokens [B, G + T, hidden] of glyphs and text, and their mask. Without positions their order does not
        matter."""
        txt = self.txt_in(states.to(self.dtype), timestep, None if mask is None else mask.bool())
        if glyphs is None:
            return txt, None if mask is None else mask.bool()
        tokens = torch.cat((self.byt5_in(glyphs.to(self.dtype)), txt), dim=1)
        if mask is None and glyph_mask is None:
            return tokens, None
        given = ((glyph_mask, glyphs), (mask, states))
        masks = [one.new_ones(one.shape[:2], dtype=torch.bool) if part is None else part.bool() for part, one in given]
        return tokens, torch.cat(masks, dim=1)

    def _rope(self, height: int, width: int, device: torch.device) -> Rope:
        """Cosines and sines of the places of an image, computed once for each size."""
        axes, theta = self.params.rope_dim_list, self.params.rope_theta
        return self.rope_tables.get((height, width), device, lambda: image_rope(height, width, axes, theta))
