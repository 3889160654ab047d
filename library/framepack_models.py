"""FramePack: the transformer of HunyuanVideo that sees earlier frames the more coarsely, the further away they are.

Module paths are the key names of the released files; leaf layers are plain nn.Linear and nn.Conv3d, so that adapters
find them by name and class.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from library.attention import (
    AttentionModule,
    DeviceTables,
    modulate,
    never_empty,
    of_text,
    per_token,
    plain_norm,
    rope_cos_sin,
    timestep_embedding,
)
from library.components.hunyuan_stream_models import RMSNorm, Rope, TextProjection, rotated
from library.components.mixed_models import entry_dtype
from library.custom_offloading_utils import StreamStackMixin

FREQUENCY_WIDTH = 256
"""of the sinusoid of times and guidance, which the first layer of their embedders tells"""


@dataclass(frozen=True, kw_only=True)
class FramePackParams:
    """Hyper-parameters of the denoiser; the defaults are the released model. `patch`: frames, rows and columns of
    latents in a token; earlier frames are seen through patches twice and four times as large."""

    in_channels: int = 16
    num_attention_heads: int = 24
    attention_head_dim: int = 128
    num_layers: int = 20
    num_single_layers: int = 40
    num_refiner_layers: int = 2
    mlp_ratio: float = 4.0
    text_embed_dim: int = 4096
    pooled_projection_dim: int = 768
    image_proj_dim: int = 1152
    patch: tuple[int, int, int] = (1, 2, 2)
    rope_theta: float = 256.0
    rope_axes_dim: tuple[int, ...] = (16, 56, 56)
    time_embed_dim: int = FREQUENCY_WIDTH
    guidance_embeds: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "rope_axes_dim", tuple(self.rope_axes_dim))
        object.__setattr__(self, "patch", tuple(self.patch))
        axes = self.rope_axes_dim
        if len(axes) != 3 or sum(axes) != self.attention_head_dim or any(width % 2 for width in axes):
            raise ValueError(
                f"rope_axes_dim is {axes}; it needs three even numbers (frames, rows, columns) that sum to the head"
                f" size {self.attention_head_dim}"
            )

    @property
    def hidden_size(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def mlp_hidden(self) -> int:
        return int(self.hidden_size * self.mlp_ratio + 1e-6)  # a ratio of shapes may miss its integer by rounding

    def kernel(self, factor: int) -> tuple[int, int, int]:
        """Frames, rows and columns of latents in a token of frames that are seen `factor` times as coarsely."""
        frames, rows, columns = self.patch
        return frames * factor, rows * factor, columns * factor


@dataclass(frozen=True, kw_only=True)
class CleanFrames:
    """Frames that a section is made in view of. Each part: latents [B, C, F, h, w] and their places in time [B, F],
    or None where there is none; the last two are seen twice and four times as coarsely."""

    near: tuple[Tensor, Tensor] | None = None
    middle: tuple[Tensor, Tensor] | None = None
    far: tuple[Tensor, Tensor] | None = None


class BlockCache(Protocol):
    """Stands around the blocks while sampling and may leave them out: `tokens` [B, L, hidden] before them, and the
    function that runs them -> tokens after them."""

    def __call__(self, tokens: Tensor, blocks: Callable[[], Tensor]) -> Tensor: ...


class TimeTextEmbedding(nn.Module):
    """One vector [B, hidden] of time, embedded guidance and a summary of the text. Times may be one per token [B, L]:
    then [B, L, hidden]."""

    def __init__(self, params: FramePackParams, summary_dim: int, *, guidance: bool) -> None:
        super().__init__()
        self.width, hidden = params.time_embed_dim, params.hidden_size
        self.timestep_embedder = TextProjection(self.width, hidden)
        if guidance:
            self.guidance_embedder = TextProjection(self.width, hidden)
        self.text_embedder = TextProjection(summary_dim, hidden)

    def forward(self, timestep: Tensor, summary: Tensor, guidance: Tensor | None = None) -> Tensor:
        kind = self.text_embedder.linear_1.bias.dtype  # weights may be stored in 8 bits
        times = self.timestep_embedder(timestep_embedding(timestep, self.width, 1.0).to(kind))
        rest = self.text_embedder(summary.to(kind))
        if guidance is not None:
            rest = rest + self.guidance_embedder(timestep_embedding(guidance, self.width, 1.0).to(kind))
        return times + (rest[:, None] if times.ndim == 3 else rest)


class Projected(nn.Module):
    """A linear layer and its activation, under the name that diffusers gives it."""

    def __init__(self, in_dim: int, out_dim: int, activation: nn.Module) -> None:
        super().__init__()
        self.proj = nn.Linear(in_dim, out_dim)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.proj(x))


class FeedForward(nn.Module):
    def __init__(self, hidden: int, mlp_hidden: int, activation: nn.Module) -> None:
        super().__init__()
        self.net = nn.Sequential(
            Projected(hidden, mlp_hidden, activation), nn.Identity(), nn.Linear(mlp_hidden, hidden)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Modulation(nn.Module):
    """`factor` vectors (shifts, scales, gates) from the conditioning vector."""

    def __init__(self, hidden: int, factor: int) -> None:
        super().__init__()
        self.factor = factor
        self.linear = nn.Linear(hidden, factor * hidden)

    def forward(self, vec: Tensor) -> Sequence[Tensor]:
        """vec [B, hidden], or [B, L, hidden] for a vector per token -> each [B, 1 or L, hidden]."""
        return per_token(self.linear(F.silu(vec))).chunk(self.factor, dim=-1)


class Attention(nn.Module):
    """Queries, keys and values of a row of tokens, with norms over heads; of the second row of a double block under
    names of their own."""

    def __init__(self, params: FramePackParams, *, normed: bool = True, output: bool = True, added: bool = False):
        super().__init__()
        hidden = params.hidden_size
        self.num_heads = params.num_attention_heads
        names = ["to_q", "to_k", "to_v"] + (["add_q_proj", "add_k_proj", "add_v_proj"] if added else [])
        for name in names:
            self.add_module(name, nn.Linear(hidden, hidden))
        if output:
            self.to_out = nn.ModuleList([nn.Linear(hidden, hidden)])
        if added:
            self.to_add_out = nn.Linear(hidden, hidden)
        if normed:
            for name in ["norm_q", "norm_k"] + (["norm_added_q", "norm_added_k"] if added else []):
                self.add_module(name, RMSNorm(params.attention_head_dim))

    def heads(self, x: Tensor, names: Sequence[str], norms: Sequence[str] = ()) -> list[Tensor]:
        """Query, key and value of tokens [B, L, hidden], each [B, heads, L, D], by the layers of these names."""
        made = [rearrange(getattr(self, name)(x), "b l (h d) -> b h l d", h=self.num_heads) for name in names]
        return [getattr(self, norm)(one) for norm, one in zip(norms, made)] + made[len(norms) :]

    def own(self, x: Tensor) -> list[Tensor]:
        return self.heads(x, ("to_q", "to_k", "to_v"), ("norm_q", "norm_k"))

    def added(self, x: Tensor) -> list[Tensor]:
        return self.heads(x, ("add_q_proj", "add_k_proj", "add_v_proj"), ("norm_added_q", "norm_added_k"))


class RefinerBlock(AttentionModule):
    """Self-attention and feed-forward over the text, gated by a vector."""

    def __init__(self, params: FramePackParams) -> None:
        super().__init__()
        hidden = params.hidden_size
        self.norm1 = nn.LayerNorm(hidden, eps=1e-6)
        self.attn = Attention(params, normed=False)
        self.norm2 = nn.LayerNorm(hidden, eps=1e-6)
        self.ff = FeedForward(hidden, params.mlp_hidden, nn.SiLU())
        self.norm_out = Modulation(hidden, 2)

    def forward(self, x: Tensor, vec: Tensor, key_mask: Tensor | None) -> Tensor:
        attention_gate, mlp_gate = self.norm_out(vec)
        query, key, value = self.attn.heads(self.norm1(x), ("to_q", "to_k", "to_v"))
        x = torch.addcmul(x, attention_gate, self.attn.to_out[0](self.scaled_attention(query, key, value, key_mask)))
        return torch.addcmul(x, mlp_gate, self.ff(self.norm2(x)))


class TokenRefinerBlocks(nn.Module):
    def __init__(self, params: FramePackParams) -> None:
        super().__init__()
        self.refiner_blocks = nn.ModuleList(RefinerBlock(params) for _ in range(params.num_refiner_layers))


class TokenRefiner(nn.Module):
    """Text states [B, T, text_embed_dim] to tokens [B, T, hidden], refined in view of the time and of the caption as a
    whole."""

    def __init__(self, params: FramePackParams) -> None:
        super().__init__()
        self.time_text_embed = TimeTextEmbedding(params, params.text_embed_dim, guidance=False)
        self.proj_in = nn.Linear(params.text_embed_dim, params.hidden_size)
        self.token_refiner = TokenRefinerBlocks(params)

    def forward(self, states: Tensor, timestep: Tensor, mask: Tensor | None) -> Tensor:
        """timestep [B], or [B, L] of the image tokens; mask [B, T], true for tokens, None = all are."""
        valid = states.new_ones((*states.shape[:2], 1)).float() if mask is None else mask[..., None].float()
        caption = (states.float() * valid).sum(dim=1) / valid.sum(dim=1).clamp_min(1)  # [B, text_embed_dim]
        vec = of_text(self.time_text_embed(timestep, caption.to(states.dtype)))
        visible = None if mask is None else never_empty(mask)
        x = self.proj_in(states)
        for block in self.token_refiner.refiner_blocks:
            x = block(x, vec, visible)
        return x


class ImageProjection(nn.Module):
    """States of the image encoder [B, I, image_proj_dim] to tokens [B, I, hidden]."""

    def __init__(self, in_dim: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(in_dim, 3 * hidden)
        self.down = nn.Linear(3 * hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.up(x)))


def padded_to(x: Tensor, kernel: Sequence[int]) -> Tensor:
    """[B, C, F, h, w] with its last frame, row and column repeated up to a multiple of the kernel."""
    more = [-size % wanted for size, wanted in zip(x.shape[2:], kernel)]
    return F.pad(x, (0, more[2], 0, more[1], 0, more[0]), mode="replicate") if any(more) else x


class PatchEmbed(nn.Module):
    """Latents [B, C, F, h, w] to tokens [B, L, hidden], one for each patch."""

    def __init__(self, params: FramePackParams) -> None:
        super().__init__()
        self.proj = patch_layer(params, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class CleanPatchEmbed(nn.Module):
    """Earlier frames to tokens, the further away the coarser."""

    def __init__(self, params: FramePackParams) -> None:
        super().__init__()
        self.proj = patch_layer(params, 1)
        self.proj_2x = patch_layer(params, 2)
        self.proj_4x = patch_layer(params, 4)

    def forward(self, x: Tensor, layer: nn.Conv3d) -> Tensor:
        return layer(padded_to(x, layer.kernel_size)).flatten(2).transpose(1, 2)


def patch_layer(params: FramePackParams, factor: int) -> nn.Conv3d:
    kernel = params.kernel(factor)
    return nn.Conv3d(params.in_channels, params.hidden_size, kernel_size=kernel, stride=kernel)


def frame_rope(
    places: Sequence[int], height: int, width: int, factor: int, params: FramePackParams, scale: float = 1.0
) -> Rope:
    """Cosines and sines [L, D/2] of tokens at these places in time, over height x width patches; of coarse tokens the
    mean over the patches in one, the last ones repeated where they do not come out even. `scale`: of the distances
    between rows and between columns."""
    rows, columns = (torch.arange(size, dtype=torch.float64) * scale for size in (height, width))
    times = torch.tensor(places, dtype=torch.float64)
    positions = torch.stack(torch.meshgrid(times, rows, columns, indexing="ij"), dim=-1)  # [F, h, w, 3]
    tables = rope_cos_sin(positions.flatten(0, 2)[None], params.rope_axes_dim, params.rope_theta)
    if factor == 1:
        return tables[0][0], tables[1][0]
    kernel = (factor,) * 3
    shape = {"f": len(places), "h": height, "w": width}
    grids = [rearrange(table, "b (f h w) d -> b d f h w", **shape) for table in tables]
    pooled = [F.avg_pool3d(padded_to(grid, kernel), kernel) for grid in grids]
    cos, sin = (rearrange(grid, "1 d f h w -> (f h w) d") for grid in pooled)
    return cos, sin


class HunyuanVideoTransformerBlock(AttentionModule):
    """Frames and text with weights of their own and one attention over both."""

    def __init__(self, params: FramePackParams) -> None:
        super().__init__()
        hidden = params.hidden_size
        self.norm1 = Modulation(hidden, 6)
        self.norm1_context = Modulation(hidden, 6)
        self.attn = Attention(params, added=True)
        self.ff = FeedForward(hidden, params.mlp_hidden, nn.GELU(approximate="tanh"))
        self.ff_context = FeedForward(hidden, params.mlp_hidden, nn.GELU(approximate="tanh"))
        self.plain = plain_norm(hidden)

    def forward(
        self, img: Tensor, txt: Tensor, vec: Tensor, rope: Rope, key_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """img [B, L, hidden], txt [B, T, hidden], vec [B, hidden] or [B, L, hidden]; rope over the L tokens of frames,
        key_mask [B, L + T]."""
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = self.norm1(vec)
        c_shift, c_scale, c_gate, c_shift_mlp, c_scale_mlp, c_gate_mlp = self.norm1_context(of_text(vec))
        of_img = self.attn.own(modulate(self.plain(img), shift, scale))
        of_txt = self.attn.added(modulate(self.plain(txt), c_shift, c_scale))
        query, key, value = (torch.cat(pair, dim=2) for pair in zip(of_img, of_txt))  # [B, heads, L + T, D]
        attended = self.scaled_attention(rotated(query, rope), rotated(key, rope), value, key_mask)
        img_attended, txt_attended = attended.split((img.shape[1], txt.shape[1]), dim=1)

        img = torch.addcmul(img, gate, self.attn.to_out[0](img_attended))
        img = torch.addcmul(img, gate_mlp, self.ff(modulate(self.plain(img), shift_mlp, scale_mlp)))
        txt = torch.addcmul(txt, c_gate, self.attn.to_add_out(txt_attended))
        txt = torch.addcmul(txt, c_gate_mlp, self.ff_context(modulate(self.plain(txt), c_shift_mlp, c_scale_mlp)))
        return img, txt


class HunyuanVideoSingleTransformerBlock(AttentionModule):
    """Attention and feed-forward in parallel on the joined tokens."""

    def __init__(self, params: FramePackParams) -> None:
        super().__init__()
        hidden = params.hidden_size
        self.norm = Modulation(hidden, 3)
        self.attn = Attention(params, output=False)
        self.proj_mlp = nn.Linear(hidden, params.mlp_hidden)
        self.act_mlp = nn.GELU(approximate="tanh")
        self.proj_out = nn.Linear(hidden + params.mlp_hidden, hidden)
        self.plain = plain_norm(hidden)

    def forward(self, x: Tensor, vec: Tensor, rope: Rope, key_mask: Tensor | None = None) -> Tensor:
        """x [B, L + T, hidden], tokens of frames first; vec [B, hidden] or [B, L + T, hidden]."""
        shift, scale, gate = self.norm(vec)
        normed = modulate(self.plain(x), shift, scale)
        query, key, value = self.attn.own(normed)
        attended = self.scaled_attention(rotated(query, rope), rotated(key, rope), value, key_mask)
        return torch.addcmul(x, gate, self.proj_out(torch.cat((attended, self.act_mlp(self.proj_mlp(normed))), dim=-1)))


class HunyuanVideoTransformer3DModelPacked(StreamStackMixin, nn.Module):
    """The rectified-flow transformer of FramePack, which makes one section of a clip in view of others."""

    blocks_that_stay = 1  # as many as the known trainer of it swaps

    def __init__(self, params: FramePackParams) -> None:
        super().__init__()
        self.params = params
        hidden = params.hidden_size
        self.x_embedder = PatchEmbed(params)
        self.clean_x_embedder = CleanPatchEmbed(params)
        self.context_embedder = TokenRefiner(params)
        self.image_projection = ImageProjection(params.image_proj_dim, hidden)
        self.time_text_embed = TimeTextEmbedding(params, params.pooled_projection_dim, guidance=params.guidance_embeds)
        self.transformer_blocks = nn.ModuleList(HunyuanVideoTransformerBlock(params) for _ in range(params.num_layers))
        self.single_transformer_blocks = nn.ModuleList(
            HunyuanVideoSingleTransformerBlock(params) for _ in range(params.num_single_layers)
        )
        self.norm_out = Modulation(hidden, 2)
        self.proj_out = nn.Linear(hidden, params.in_channels * params.patch[0] * params.patch[1] * params.patch[2])
        self.plain = plain_norm(hidden)
        self.rope_tables = DeviceTables()
        self.init_block_stack(num_rows=2)

    def text_refiner_parts(self) -> tuple[nn.Module, list[nn.Module]]:
        """(what embeds the caption as a whole, the blocks that refine its tokens)"""
        refiner = self.context_embedder
        return refiner.time_text_embed.text_embedder, list(refiner.token_refiner.refiner_blocks)

    @property
    def double_blocks(self) -> nn.ModuleList:
        return self.transformer_blocks

    @property
    def single_blocks(self) -> nn.ModuleList:
        return self.single_transformer_blocks

    @property
    def device(self) -> torch.device:
        return self.x_embedder.proj.bias.device

    @property
    def dtype(self) -> torch.dtype:
        """The type that activations enter with. Biases tell it: weights may be stored in 8 bits."""
        return entry_dtype(self, self.x_embedder.proj.bias)

    @property
    def feature_width(self) -> int:
        """Width of the tokens that `feature_layer` gives."""
        return self.params.hidden_size

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        text_states: Tensor,
        text_mask: Tensor | None,
        pooled: Tensor,
        image_embeddings: Tensor,
        latent_indices: Tensor,
        clean: CleanFrames = CleanFrames(),
        *,
        guidance: Tensor | None = None,
        rope_scale: float = 1.0,
        block_cache: BlockCache | None = None,
        feature_layer: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Velocity (noise - data) of latents [B, C, F, h, w].

        timestep [B] on the 0..1000 scale, or [B, L] for a time per token of `hidden_states`; text_states
        [B, T, text_embed_dim] with text_mask [B, T], 1 = token, None = all are; pooled [B, pooled_projection_dim];
        image_embeddings [B, I, image_proj_dim]; latent_indices [B, F]: places in time. guidance [B]: the embedded scale
        times 1000. `rope_scale`: of the distances between rows and between columns. With `feature_layer` the result is
        (velocity, tokens [B, L, hidden] of `hidden_states` after that block, counted from 0 over the double, then the
        single blocks). ValueError when a model with embedded guidance gets none.
        """
        if self.params.guidance_embeds and guidance is None:
            raise ValueError("guidance is None; a model with embedded guidance needs one scale per sample")
        self.prepare_block_swap_before_forward()
        vec = self.time_text_embed(timestep, pooled, guidance if self.params.guidance_embeds else None)
        img, rope = self._frame_tokens(hidden_states, latent_indices, clean, rope_scale)
        txt, mask = self._text_tokens(timestep, text_states, text_mask, image_embeddings)
        num_noisy = hidden_states[0, 0].numel() // (self.params.patch[0] * self.params.patch[1] * self.params.patch[2])
        features: list[Tensor] = []

        def blocks() -> Tensor:
            return self._through_blocks(img, txt, vec, rope, mask, num_noisy, feature_layer, features)

        noisy = img[:, -num_noisy:]
        tokens = blocks() if block_cache is None else block_cache(noisy, blocks)  # [B, L, hidden]
        scale, shift = self.norm_out(vec)
        velocity = self._unpatched(self.proj_out(modulate(self.plain(tokens), shift, scale)), hidden_states.shape[2:])
        return velocity if feature_layer is None else (velocity, features[0])

    def _through_blocks(
        self, img: Tensor, txt: Tensor, vec: Tensor, rope: Rope, mask: Tensor | None, num_noisy: int,
        feature_layer: int | None, features: list[Tensor],
    ) -> Tensor:
        """Tokens [B, num_noisy, hidden] of the frames that are made."""  # fmt: skip
        key_mask = None if mask is None else F.pad(mask, (img.shape[1], 0), value=True)  # [B, L + T]
        num_frames = img.shape[1]
        vec = of_all_frames(vec, num_frames)
        double, single = self.offloaders
        for index, block in enumerate(self.transformer_blocks):
            img, txt = self.run_block(block, index, double, (img, txt), (vec, rope, key_mask))
            features += [img[:, -num_noisy:]] if index == feature_layer else []
        joined = torch.cat((img, txt), dim=1)
        joined_vec = vec if vec.ndim == 2 else torch.cat((vec, of_text(vec)[:, None].expand_as(txt)), dim=1)
        for index, block in enumerate(self.single_transformer_blocks):
            (joined,) = self.run_block(block, index, single, (joined,), (joined_vec, rope, key_mask))
            is_wanted = self.params.num_layers + index == feature_layer
            features += [joined[:, num_frames - num_noisy : num_frames]] if is_wanted else []
        return joined[:, num_frames - num_noisy : num_frames]

    def _frame_tokens(
        self, noisy: Tensor, places: Tensor, clean: CleanFrames, rope_scale: float
    ) -> tuple[Tensor, Rope]:
        """Tokens [B, L, hidden] of all frames, the coarsest first and those that are made last, and their rotations."""
        embedder = self.clean_x_embedder
        height, width = noisy.shape[3] // self.params.patch[1], noisy.shape[4] // self.params.patch[2]
        tokens, ropes = [], []
        for part, layer, factor in (
            (clean.far, embedder.proj_4x, 4), (clean.middle, embedder.proj_2x, 2), (clean.near, embedder.proj, 1),
        ):  # fmt: skip
            if part is not None:
                tokens.append(embedder(part[0].to(self.dtype), layer))
                ropes.append(self._rope(part[1], height, width, factor, rope_scale, noisy.device))
        tokens.append(self.x_embedder(noisy.to(self.dtype)))
        ropes.append(self._rope(places, height, width, 1, rope_scale, noisy.device))
        cos, sin = (torch.cat(tables, dim=1) for tables in zip(*of_equal_rows(ropes)))  # [B or 1, L, D/2]
        return torch.cat(tokens, dim=1), (cos, sin)

    def _rope(
        self, places: Tensor, height: int, width: int, factor: int, scale: float, device: torch.device
    ) -> Rope:
        """Rotations of frames at `places` [B, F], one row where all samples have the same: computed once for each."""
        rows = [tuple(row) for row in places.tolist()]
        rows = rows[:1] if len(set(rows)) == 1 else rows
        made = [
            self.rope_tables.get(
                (row, height, width, factor, scale), device,
                lambda row=row: frame_rope(row, height, width, factor, self.params, scale),
            )
            for row in rows
        ]  # fmt: skip
        cos, sin = (torch.stack(tables) for tables in zip(*made))
        return cos, sin

    def _text_tokens(
        self, timestep: Tensor, states: Tensor, mask: Tensor | None, image: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Tokens [B, I + T, hidden] of picture and text, and their mask."""
        mask = None if mask is None else mask.bool()
        txt = self.context_embedder(states.to(self.dtype), timestep, mask)
        pictures = self.image_projection(image.to(self.dtype))
        return (
            torch.cat((pictures, txt), dim=1),
            None if mask is None else F.pad(mask, (pictures.shape[1], 0), value=True),
        )

    def _unpatched(self, tokens: Tensor, size: Sequence[int]) -> Tensor:
        """Tokens [B, L, C * patch] as latents [B, C, F, h, w]."""
        (p, q, r), (frames, height, width) = self.params.patch, size
        return rearrange(
            tokens, "b (f h w) (c p q r) -> b c (f p) (h q) (w r)", f=frames // p, h=height // q, w=width // r,
            p=p, q=q, r=r,
        )  # fmt: skip


def of_all_frames(vec: Tensor, num_frames: int) -> Tensor:
    """The vectors of all tokens of frames, where those that are made have one each [B, L, hidden]: the clean ones,
    which come first, have none and get the mean. One vector for all [B, hidden] stays."""
    if vec.ndim == 2:
        return vec
    clean = of_text(vec)[:, None].expand(-1, num_frames - vec.shape[1], -1)
    return torch.cat((clean, vec), dim=1)


def of_equal_rows(ropes: Sequence[Rope]) -> list[Rope]:
    """Rotations with as many rows each as the one with the most, so that they can be joined."""
    most = max(cos.shape[0] for cos, _ in ropes)
    return [(cos.expand(most, -1, -1), sin.expand(most, -1, -1)) for cos, sin in ropes]
