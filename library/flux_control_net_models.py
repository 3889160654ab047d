"""The ControlNet of FLUX.1: some double stream blocks that also see a picture, and give what is added to the image
tokens of the denoiser. Its module tree carries the names of files."""

from __future__ import annotations

from einops import rearrange
from torch import Tensor, nn

from library.attention import of_text
from library.flux_models import FluxInputs, FluxParams, joined_key_mask

HINT_WIDTH = 16
HINT_STRIDES = (1, 1, 2, 1, 2, 1, 2, 1)
DEPTH = 2
"""double blocks of a new net"""


def hint_convolutions(width: int, out_width: int) -> nn.Sequential:
    """A picture [B, 3, H, W] becomes features [B, out_width, H / 8, W / 8]."""
    widths = [3, *[width] * (len(HINT_STRIDES) - 1), out_width]
    layers: list[nn.Module] = []
    for inputs, outputs, stride in zip(widths[:-1], widths[1:], HINT_STRIDES):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1, stride=stride), nn.SiLU()]
    return nn.Sequential(*layers[:-1])


class FluxControlNet(FluxInputs):
    """`params`: those of the denoiser that it guides, with its own number of double blocks and no single ones."""

    def __init__(self, params: FluxParams, hint_width: int = HINT_WIDTH) -> None:
        super().__init__(params)
        hidden = params.hidden_size
        self.single_blocks = nn.ModuleList()
        self.controlnet_blocks = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(params.depth))
        self.pos_embed_input = nn.Linear(params.in_channels, hidden)
        self.input_hint_block = hint_convolutions(hint_width, params.in_channels // 4)

    def forward(
        self, picture: Tensor, img: Tensor, img_ids: Tensor, txt: Tensor, txt_ids: Tensor, timesteps: Tensor,
        y: Tensor, guidance: Tensor | None = None, txt_attention_mask: Tensor | None = None,
    ) -> list[Tensor]:
        """picture [B, 3, 16 rows, 16 columns] in -1..1 beside the inputs of the denoiser; one residual [B, L, hidden]
        for each double block."""
        hint = self.input_hint_block(picture.to(self.dtype))  # [B, C, 2 rows, 2 columns]
        hint = rearrange(hint, "b c (h ph) (w pw) -> b (h w) (c ph pw)", ph=2, pw=2)  # [B, L, 4C]
        vec = self.conditioning_vector(timesteps, y, guidance)  # [B, hidden] or [B, L, hidden]
        rope, key_mask = self.rope_of(txt_ids, img_ids, img.device), joined_key_mask(txt_attention_mask, img.shape[1])
        img = self.img_in(img.to(self.dtype)) + self.pos_embed_input(hint)  # [B, L, hidden]
        txt = self.txt_in(txt.to(self.dtype))  # [B, T, hidden]
        residuals = []
        for index, (block, zero) in enumerate(zip(self.double_blocks, self.controlnet_blocks)):
            img, txt = self.run_block(block, index, None, (img, txt), (vec, of_text(vec), rope, key_mask))
            residuals.append(zero(img))
        return residuals
