"""HunyuanImage 2.1: the denoiser, with a refiner for the text tokens and a projection for those of the glyphs.

Module paths are the key names of the original files; leaf layers are plain nn.Linear and nn.Conv2d, so that adapters
find them by name and class.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn

from library.components.hunyuan_stream_models import StreamDenoiser, StreamParams, TimestepEmbedder
from library.core.courses import course
from library.core.lazy_names import homes, lazy_names

__getattr__, __dir__ = lazy_names(
    __name__, homes("library.compat.hunyuan_image_names", "create_model", "load_hunyuan_image_model")
)


@dataclass(frozen=True, kw_only=True)
class HYImageParams(StreamParams):
    """Hyper-parameters of the denoiser; the defaults are HunyuanImage 2.1. `mean_flow`: a model that learned average
    velocities, from a time to an earlier one."""

    in_channels: int = 64
    hidden_size: int = 3584
    num_heads: int = 28
    text_dim: int = 3584
    byt5_dim: int = 1472
    byt5_mid: int = 2048
    rope_dim_list: tuple[int, ...] = (64, 64)
    mean_flow: bool = False


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


class PatchEmbed2D(nn.Module):
    """Latents [B, C, H, W] to tokens [B, H * W, hidden], one for each place."""

    def __init__(self, in_channels: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        return rearrange(self.proj(x), "b c h w -> b (h w) c")


class HYImageDiffusionTransformer(StreamDenoiser):
    """The rectified-flow transformer of HunyuanImage 2.1, plain or distilled (`guidance_in`, `time_r_in`)."""

    params: HYImageParams

    def __init__(self, params: HYImageParams) -> None:
        super().__init__()
        self.params = params
        hidden = params.hidden_size
        self.byt5_in = ByT5Mapper(params.byt5_dim, params.byt5_mid, hidden)
        self.img_in = PatchEmbed2D(params.in_channels, hidden)
        later = {"time_r_in": TimestepEmbedder(params.time_embed_dim, hidden)} if params.mean_flow else {}
        self.build_rows(params, params.in_channels, **later)

    @course
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
        img = self.img_in(hidden_states.to(self.dtype))  # [B, L, hidden]
        txt, mask = self._text_tokens(timestep, text_states, encoder_attention_mask, byt5_text_states, byt5_text_mask)
        rope = self.rope((height, width), hidden_states.device)
        velocity, features = yield from self.run_streams(img, txt, vec, rope, mask, feature_layer)
        velocity = rearrange(velocity, "b (h w) c -> b c h w", h=height)
        return velocity if feature_layer is None else (velocity, features)

    def _conditioning_vector(self, timestep: Tensor, timestep_r: Tensor | None, guidance: Tensor | None) -> Tensor:
        vec = self.time_in(timestep)
        if self.params.mean_flow:
            vec = (vec + self.time_r_in(timestep if timestep_r is None else timestep_r)) / 2
        return self.with_guidance(vec, guidance)

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
