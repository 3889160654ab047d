"""HunyuanVideo and SkyReels V1: the denoiser of clips. A picture is a clip of one frame.

Module paths are the key names of the original files; leaf layers are plain nn.Linear and nn.Conv3d, so that adapters
find them by name and class.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod

import torch
from einops import rearrange
from torch import Tensor, nn

from library.components.hunyuan_stream_models import StreamDenoiser, StreamParams
from library.core.courses import course


@dataclass(frozen=True, kw_only=True)
class HYVideoParams(StreamParams):
    """Hyper-parameters of the denoiser; the defaults are the released HunyuanVideo. `in_channels` beyond
    `out_channels` are latents that it is shown: those of the first frame. `patch_size`: (frames, rows, columns)."""

    in_channels: int = 16
    out_channels: int = 16
    hidden_size: int = 3072
    num_heads: int = 24
    text_dim: int = 4096
    vec_dim: int = 768
    patch_size: tuple[int, ...] = (1, 2, 2)
    rope_dim_list: tuple[int, ...] = (16, 56, 56)
    guidance_embed: bool = True

    num_axes = 3

    def __post_init__(self) -> None:
        object.__setattr__(self, "patch_size", tuple(self.patch_size))
        super().__post_init__()

    @property
    def shown_channels(self) -> int:
        """Channels of latents that it is shown beside the noisy ones."""
        return self.in_channels - self.out_channels


class PatchEmbed3D(nn.Module):
    """Latents [B, C, F, H, W] to tokens [B, L, hidden], one for each patch."""

    def __init__(self, params: HYVideoParams) -> None:
        super().__init__()
        self.proj = nn.Conv3d(params.in_channels, params.hidden_size, params.patch_size, params.patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return rearrange(self.proj(x), "b c f h w -> b (f h w) c")


class MLPEmbedder(nn.Module):
    """A vector [B, in_dim], the caption as a whole, as one of the hidden size."""

    def __init__(self, in_dim: int, hidden: int) -> None:
        super().__init__()
        self.in_layer = nn.Linear(in_dim, hidden)
        self.silu = nn.SiLU()
        self.out_layer = nn.Linear(hidden, hidden)

    def forward(self, vector: Tensor) -> Tensor:
        return self.out_layer(self.silu(self.in_layer(vector)))


class HYVideoDiffusionTransformer(StreamDenoiser):
    """The rectified-flow transformer of HunyuanVideo: text to video, or with further input channels image to video."""

    params: HYVideoParams
    blocks_that_stay = 1  # as many as the known trainer of it swaps
    embedders_wait = False
    """whether `img_in` and `txt_in` are on the CPU between the forwards"""

    def __init__(self, params: HYVideoParams) -> None:
        super().__init__()
        self.params = params
        self.img_in = PatchEmbed3D(params)
        out_width = prod(params.patch_size) * params.out_channels
        self.build_rows(params, out_width, vector_in=MLPEmbedder(params.vec_dim, params.hidden_size))

    @course
    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        text_states: Tensor,
        encoder_attention_mask: Tensor | None,
        text_vector: Tensor,
        *,
        guidance: Tensor | None = None,
        feature_layer: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Velocity (noise - data) [B, out_channels, F, H, W] of latents [B, in_channels, F, H, W], whose sizes are
        multiples of the patch.

        timestep [B] on the 0..1000 scale, or [B, L] for a time per token; text_states [B, T, text_dim] with a mask [B,
        T], 1 = token (None: all are); text_vector [B, vec_dim]; guidance [B]: the embedded scale times 1000. With
        `feature_layer` the result is (velocity, image tokens [B, L, hidden] after that block, counted from 0 over the
        double, then the single blocks). ValueError when a guidance-distilled model gets no guidance.
        """
        self.prepare_block_swap_before_forward()
        patch = self.params.patch_size
        grid = tuple(size // step for size, step in zip(hidden_states.shape[2:], patch))  # (frames, rows, columns)
        vector = self.vector_in(text_vector.to(self.dtype))
        time = self.time_in(timestep)  # [B, hidden] or [B, L, hidden]
        vec = self.with_guidance(time + (vector[:, None] if time.ndim == 3 else vector), guidance)
        mask = None if encoder_attention_mask is None else encoder_attention_mask.bool()
        with self._embedders_at(hidden_states.device):
            img = self.img_in(hidden_states.to(self.dtype))  # [B, L, hidden]
            txt = self.txt_in(text_states.to(self.dtype), timestep, mask)  # [B, T, hidden]
        rope = self.rope(grid, hidden_states.device)
        velocity, features = yield from self.run_streams(img, txt, vec, rope, mask, feature_layer)
        velocity = rearrange(
            velocity, "b (f h w) (c pf ph pw) -> b c (f pf) (h ph) (w pw)", f=grid[0], h=grid[1], pf=patch[0],
            ph=patch[1], pw=patch[2],
        )  # fmt: skip
        return velocity if feature_layer is None else (velocity, features)

    def text_refiner_parts(self) -> tuple[nn.Module, list[nn.Module]]:
        """(what embeds the caption as a whole, the blocks that refine its tokens)"""
        return self.txt_in.c_embedder, list(self.txt_in.individual_token_refiner.blocks)

    @contextmanager
    def _embedders_at(self, device: torch.device) -> Iterator[None]:
        """Inside, `img_in` and `txt_in` are on the device that computes. They stay there when gradients of their own
        weights are wanted."""
        embedders = (self.img_in, self.txt_in)
        for embedder in embedders:
            embedder.to(device)
        yield
        if self.embedders_wait and not any(weight.requires_grad for part in embedders for weight in part.parameters()):
            for embedder in embedders:
                embedder.to("cpu")
