"""Denoiser and autoencoder of HunyuanImage 2.1 against the classes of diffusers, whose random weights they are
given."""

from __future__ import annotations

import pytest
import torch

from library.checkpoints import layout_rules
from library.checkpoints.hunyuan_image_convert import NAMES, autoencoder_rules, autoencoder_to_original
from library.components.ldm_models import AutoEncoderParams
from library.hunyuan_image_models import HYImageDiffusionTransformer, HYImageParams
from library.hunyuan_image_utils import denoiser_state
from library.hunyuan_image_vae import TILES, HunyuanVAE2D

diffusers = pytest.importorskip("diffusers")

def relative(result: torch.Tensor, expected: torch.Tensor) -> float:
    return ((result - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize(("guidance", "mean_flow", "depths", "size"), [
    (False, False, (2, 3), (3, 5)), (True, True, (1, 2), (1, 7)), (True, False, (3, 1), (4, 4)),
])  # fmt: skip
def test_denoiser(guidance: bool, mean_flow: bool, depths: tuple[int, int], size: tuple[int, int]) -> None:
    torch.manual_seed(3)
    theirs = diffusers.HunyuanImageTransformer2DModel(
        in_channels=8, out_channels=8, num_attention_heads=3, attention_head_dim=24, num_layers=depths[0],
        num_single_layers=depths[1],
        guidance_embeds=guidance, use_meanflow=mean_flow, text_embed_dim=20, text_embed_2_dim=12,
        rope_axes_dim=(12, 12),
    ).eval()  # fmt: skip
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.12)
    params = HYImageParams(
        in_channels=8, hidden_size=72, num_heads=3, depth=depths[0], depth_single=depths[1], text_dim=20, byt5_dim=12,
        rope_dim_list=(12, 12), guidance_embed=guidance, mean_flow=mean_flow,
    )  # fmt: skip
    ours = HYImageDiffusionTransformer(params)
    ours.load_state_dict(denoiser_state(theirs.state_dict()))
    again = NAMES.to_diffusers(ours.state_dict())
    assert again.keys() == theirs.state_dict().keys()
    assert all(torch.equal(tensor, again[key]) for key, tensor in theirs.state_dict().items())
    generator = torch.Generator().manual_seed(5)
    x, txt, byt5 = (torch.randn(3, *shape, generator=generator) for shape in ((8, *size), (7, 20), (4, 12)))
    text_mask = torch.tensor([[1] * 7, [1] * 3 + [0] * 4, [1] + [0] * 6])
    glyph_mask = torch.tensor([[1, 1, 0, 0], [0] * 4, [1] * 4])
    times, earlier = torch.tensor([130.0, 999.0, 612.5]), torch.tensor([110.0, 950.0, 0.0])
    more = {"guidance": torch.tensor([3250.0, 1000.0, 0.0])} if guidance else {}
    more |= {"timestep_r": earlier} if mean_flow else {}
    with torch.no_grad():
        expected = theirs(
            x,
            times,
            txt,
            text_mask,
            encoder_hidden_states_2=byt5,
            encoder_attention_mask_2=glyph_mask,
            return_dict=False,
            **more,
        )
        result = ours(x, times, txt, text_mask, byt5, glyph_mask, **more)
    assert relative(result, expected[0]) < 1e-5


@pytest.mark.parametrize(("size", "blocks"), [((32, 64), 1), ((96, 32), 2)])
def test_autoencoder(size: tuple[int, int], blocks: int) -> None:
    torch.manual_seed(4)
    widths = (32, 32, 64, 64, 128, 128)
    theirs = diffusers.AutoencoderKLHunyuanImage(
        in_channels=3, out_channels=3, latent_channels=16, block_out_channels=widths, layers_per_block=blocks,
        spatial_compression_ratio=32,
        sample_size=64, scaling_factor=0.75,
    ).eval()  # fmt: skip
    ours = HunyuanVAE2D(
        AutoEncoderParams(
            ch=32, ch_mult=(1, 1, 2, 2, 4, 4), num_res_blocks=blocks, z_channels=16, scaling_factor=0.75, shift_factor=0
        )
    )
    state = theirs.state_dict()
    rules = list(autoencoder_rules(state))
    ours.load_state_dict(layout_rules.to_original(state, rules))
    again = layout_rules.from_original(ours.state_dict(), autoencoder_rules(ours.state_dict()))
    assert again.keys() == state.keys() and all(torch.equal(again[key], tensor) for key, tensor in state.items())
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        posterior = theirs.encode(images).latent_dist
        mean, logvar = ours.encode_moments(images)
        assert relative(mean, posterior.mean) < 1e-5 and relative(logvar, posterior.logvar) < 1e-5
        assert relative(ours.decode(ours.scale(mean)), theirs.decode(mean).sample) < 1e-5


def test_tiles_of_the_autoencoder() -> None:
    """Two tiles in a row are decoded as by diffusers, which begins a third one behind them, of the latents that the
    second has already; what is no larger than a tile is what it is without."""
    torch.manual_seed(4)
    sizes = {"block_out_channels": (32,) * 6, "layers_per_block": 1, "latent_channels": 16}
    theirs = diffusers.AutoencoderKLHunyuanImage(
        in_channels=3, out_channels=3, spatial_compression_ratio=32, sample_size=384, scaling_factor=0.75, **sizes
    ).eval()  # fmt: skip
    ours = HunyuanVAE2D(
        AutoEncoderParams(
            ch=32, ch_mult=(1,) * 6, num_res_blocks=1, z_channels=16, scaling_factor=0.75, shift_factor=0
        )
    )
    ours.load_state_dict(autoencoder_to_original(theirs.state_dict()))
    latents = torch.randn(1, 16, 1, 21, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole, small = ours.decode(latents), ours.decode(latents[..., :12])
        ours.tiles = TILES
        theirs.enable_tiling()
        tiled = ours.decode(latents)
        before_third = theirs.decode(latents / 0.75).sample[..., : 18 * 32]
        assert relative(tiled[..., : 18 * 32], before_third) < 1e-5
        assert 1e-4 < relative(tiled, whole) < 0.5
        assert torch.equal(ours.decode(latents[..., :12]), small)
        mean, logvar = ours.encode_moments(tiled)
        assert mean.shape == logvar.shape == latents.shape and logvar.min() >= -30
