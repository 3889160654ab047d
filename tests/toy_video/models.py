"""Its models, made from fixed seeds: nothing is read from files."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from library.attention import timestep_embedding

CHANNELS, SPATIAL, TEMPORAL, PATCH, WIDTH = 4, 8, 2, 2, 16
MAX_LENGTH, VOCABULARY = 8, 97
FRAMES, SIDE = 8, 8
"""most frames and patches of a side that there are positions for"""


def seeded(module: nn.Module, seed: int) -> nn.Module:
    """All parameters drawn from one seed, in the order of the module."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        nn.init.normal_(
            parameter, std=0.2 if parameter.ndim == 1 else parameter[0].numel() ** -0.5, generator=generator
        )
    return module.requires_grad_(False).eval()


class ToyVideoVae(nn.Module):
    """The first frame alone (seen twice), then two and two: linear both ways."""

    def __init__(self) -> None:
        super().__init__()
        stride = (TEMPORAL, SPATIAL, SPATIAL)
        self.encoder = nn.Conv3d(3, CHANNELS, stride, stride)
        self.decoder = nn.ConvTranspose3d(CHANNELS, 3, stride, stride)

    @property
    def device(self) -> torch.device:
        return self.encoder.weight.device

    def encode(self, clips: Tensor, seeds: list[int]) -> Tensor:
        """Clips [B, 3, F, H, W] -> a posterior draw [B, C, 1 + (F - 1) / 2, h, w]."""
        mean = self.encoder(torch.cat([clips[:, :, :1]] * (TEMPORAL - 1) + [clips], dim=2))
        noise = [torch.randn(mean.shape[1:], generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return mean + 0.1 * torch.stack(noise).to(mean)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, C, F, h, w] -> clips, of pictures [B, C, h, w] -> pictures."""
        if latents.ndim == 4:
            return self.decode(latents[:, :, None])[:, :, 0]
        return self.decoder(latents)[:, :, TEMPORAL - 1 :]


class ToyTextEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding

    def forward(self, ids: Tensor) -> Tensor:
        return self.embedding(ids)


class ToyVideoBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, tokens: Tensor, shift: Tensor, num_text: int) -> Tensor:
        q, k, v = self.qkv(tokens + shift).chunk(3, dim=-1)
        tokens = tokens + self.out(nn.functional.scaled_dot_product_attention(q, k, v))
        return tokens + self.mlp(tokens + shift)


class ToyVideoDit(nn.Module):
    """Tokens are patches of all frames behind those of the text; the first frame's latents are further channels, zero
    in the other frames."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_in = nn.Linear(2 * CHANNELS * PATCH**2, WIDTH)
        self.patch_out = nn.Linear(WIDTH, CHANNELS * PATCH**2)
        self.positions = nn.Parameter(torch.zeros(FRAMES, SIDE, SIDE, WIDTH))
        self.toy_blocks = nn.ModuleList(ToyVideoBlock() for _ in range(2))

    @property
    def device(self) -> torch.device:
        return self.positions.device

    def enable_gradient_checkpointing(self, cpu_offload: bool = False) -> None: ...

    def repeated_blocks(self) -> list[nn.Module]:
        return list(self.toy_blocks)

    def forward(
        self, latents: Tensor, first: Tensor, times: Tensor, states: Tensor, skip_layers: Sequence[int] = ()
    ) -> Tensor:
        """latents [B, C, F, h, w], first [B, C, h, w], times [B] or [B, F] in 0..1, states [B, L, D] -> [B, C, F, h,
        w]."""
        batch, channels, frames, height, width = latents.shape
        given = torch.zeros_like(latents)
        given[:, :, 0] = first
        rows, columns = height // PATCH, width // PATCH
        cells = torch.cat([latents, given], dim=1).reshape(batch, 2 * channels, frames, rows, PATCH, columns, PATCH)
        cells = cells.permute(0, 2, 3, 5, 1, 4, 6).flatten(4)  # [B, F, rows, columns, 2 C P P]
        tokens = self.patch_in(cells) + self.positions[:frames, :rows, :columns]
        each = times[:, None].expand(batch, frames) if times.ndim == 1 else times
        shift = timestep_embedding(each.flatten(), WIDTH).to(tokens).view(batch, frames, 1, 1, WIDTH).expand_as(tokens)
        tokens, shift = tokens.flatten(1, 3), shift.flatten(1, 3)
        length = states.shape[1]
        tokens, shift = (
            torch.cat([states.to(tokens), tokens], dim=1),
            torch.cat([torch.zeros_like(states, dtype=tokens.dtype), shift], dim=1),
        )
        for number, block in enumerate(self.toy_blocks):
            tokens = tokens if number in skip_layers else block(tokens, shift, length)
        cells = self.patch_out(tokens[:, length:]).view(batch, frames, rows, columns, channels, PATCH, PATCH)
        return cells.permute(0, 4, 1, 2, 5, 3, 6).reshape(batch, channels, frames, height, width)
