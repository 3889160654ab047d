"""Chroma: the blocks of FLUX.1 without modulation layers. One small network, the approximator, makes the shifts, scales
and gates of all blocks; text is masked; nothing is known of a pooled caption or of a guidance scale."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from library.attention import timestep_embedding
from library.core.courses import course
from library.flux_models import (
    BlockVectors,
    DoubleStreamBlock,
    LastLayer,
    MLPEmbedder,
    RMSNorm,
    SingleStreamBlock,
    StreamParams,
    StreamTransformer,
)

DOUBLE_VECTORS, SINGLE_VECTORS, LAST_VECTORS = 6, 3, 2
"""shifts, scales and gates of one stream of a double block, of a single block, of the last layer"""
KEPT_PADDING = 1
"""text tokens behind the caption that are attended to"""


@dataclass(frozen=True, kw_only=True)
class ChromaParams(StreamParams):
    """Hyper-parameters of the denoiser; the defaults are those of the released files."""

    approximator_in_dim: int = 64
    approximator_hidden_size: int = 5120
    approximator_depth: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.approximator_in_dim % 8:
            raise ValueError(f"approximator_in_dim is {self.approximator_in_dim}; it needs a multiple of 8")

    @property
    def num_vectors(self) -> int:
        """Vectors that modulate the blocks."""
        return SINGLE_VECTORS * self.depth_single_blocks + 2 * DOUBLE_VECTORS * self.depth + LAST_VECTORS


class Approximator(nn.Module):
    """Residual layers that stand for the modulation layers of every block."""

    def __init__(self, in_dim: int, out_dim: int, hidden_dim: int, depth: int) -> None:
        super().__init__()
        self.in_proj = nn.Linear(in_dim, hidden_dim)
        self.layers = nn.ModuleList(MLPEmbedder(hidden_dim, hidden_dim) for _ in range(depth))
        self.norms = nn.ModuleList(RMSNorm(hidden_dim) for _ in range(depth))
        self.out_proj = nn.Linear(hidden_dim, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.in_proj(x)
        for layer, norm in zip(self.layers, self.norms):
            x = x + layer(norm(x))
        return self.out_proj(x)


class Chroma(StreamTransformer):
    """The rectified-flow transformer of Chroma."""

    params: ChromaParams

    def __init__(self, params: ChromaParams) -> None:
        super().__init__(params)
        hidden = params.hidden_size
        self.img_in = nn.Linear(params.in_channels, hidden)
        self.txt_in = nn.Linear(params.context_in_dim, hidden)
        self.double_blocks = nn.ModuleList(DoubleStreamBlock(params, modulates=False) for _ in range(params.depth))
        self.single_blocks = nn.ModuleList(
            SingleStreamBlock(params, modulates=False) for _ in range(params.depth_single_blocks)
        )
        self.final_layer = LastLayer(hidden, params.in_channels, modulates=False)
        self.distilled_guidance_layer = Approximator(
            params.approximator_in_dim, hidden, params.approximator_hidden_size, params.approximator_depth
        )

    @course
    def forward(
        self, img: Tensor, img_ids: Tensor, txt: Tensor, txt_ids: Tensor, timesteps: Tensor, txt_attention_mask: Tensor,
        feature_layer: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Velocity (noise - data) [B, L, 4C] of packed latents.

        img [B, L, 4C], img_ids [B or 1, L, 3] = (0, row, column), txt [B, T, context], txt_ids [B or 1, T, 3] = 0, both
        best on the CPU; timesteps [B] in 0..1; txt_attention_mask [B, T], 1 = a token of the caption. With
        `feature_layer` the result is (velocity, image tokens [B, L, hidden] after that block, counted over the double,
        then the single blocks).
        """
        self.prepare_block_swap_before_forward()
        vectors = self._block_vectors(self.modulation_vectors(timesteps))
        attended = attended_tokens(txt_attention_mask)
        return (yield from self.run_streams(img, img_ids, txt, txt_ids, vectors, attended, feature_layer))

    def modulation_vectors(self, timesteps: Tensor) -> Tensor:
        """[B] in 0..1 -> [B, vectors, hidden]: of the single blocks, of image and of text of the double blocks, of the
        last layer."""
        width, device = self.params.approximator_in_dim, timesteps.device
        number = torch.arange(self.params.num_vectors, dtype=torch.float32, device=device)
        of_time = timestep_embedding(timesteps, width // 4)  # [B, width / 4]
        no_guidance = timestep_embedding(
            torch.zeros_like(timesteps, dtype=torch.float32), width // 4
        )  # an input that is always 0
        of_all = torch.cat((of_time, no_guidance), dim=-1)[:, None].expand(
            -1, len(number), -1
        )  # [B, vectors, width / 2]
        of_each = timestep_embedding(number, width // 2).expand(len(timesteps), -1, -1)  # [B, vectors, width / 2]
        return self.distilled_guidance_layer(torch.cat((of_all, of_each), dim=-1).to(self.dtype))

    def _block_vectors(self, vectors: Tensor) -> BlockVectors:
        depth, num_single = self.params.depth, self.params.depth_single_blocks
        sizes = [SINGLE_VECTORS] * num_single + [DOUBLE_VECTORS] * (2 * depth) + [LAST_VECTORS]
        *pieces, last = vectors.split(sizes, dim=1)
        single, of_img, of_txt = (
            pieces[:num_single],
            pieces[num_single : num_single + depth],
            pieces[num_single + depth :],
        )
        return BlockVectors(list(zip(of_img, of_txt)), single, last)


def attended_tokens(txt_attention_mask: Tensor) -> Tensor:
    """[B, T] true where text is attended to: the caption's tokens and one more, as the model was trained. The last ones
    are padding."""
    lengths = txt_attention_mask.long().sum(dim=1, keepdim=True)  # [B, 1]
    return torch.arange(txt_attention_mask.shape[1], device=txt_attention_mask.device) < lengths + KEPT_PADDING
