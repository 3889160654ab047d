"""Denoiser and autoencoder of HunyuanImage 2.1 against the classes of diffusers, whose random weights they are
given."""

from __future__ import annotations

import re

import pytest
import torch

from library.components.ldm_models import AutoEncoderParams
from library.hunyuan_image_models import HYImageDiffusionTransformer, HYImageParams
from library.hunyuan_image_vae import HunyuanVAE2D

diffusers = pytest.importorskip("diffusers")

RENAMED = {
    "context_embedder.proj_in": "txt_in.input_embedder",
    "context_embedder.token_refiner.refiner_blocks": "txt_in.individual_token_refiner.blocks",
    "context_embedder.time_text_embed.timestep_embedder.linear_1": "txt_in.t_embedder.mlp.0",
    "context_embedder.time_text_embed.timestep_embedder.linear_2": "txt_in.t_embedder.mlp.2",
    "context_embedder.time_text_embed.text_embedder": "txt_in.c_embedder",
    "context_embedder_2.norm": "byt5_in.layernorm",
    "context_embedder_2.linear_": "byt5_in.fc", "x_embedder": "img_in",
    "time_guidance_embed.timestep_embedder_r.linear_1": "time_r_in.mlp.0",
    "time_guidance_embed.timestep_embedder_r.linear_2": "time_r_in.mlp.2",
    "time_guidance_embed.timestep_embedder.linear_1": "time_in.mlp.0",
    "time_guidance_embed.timestep_embedder.linear_2": "time_in.mlp.2",
    "time_guidance_embed.guidance_embedder.linear_1": "guidance_in.mlp.0",
    "time_guidance_embed.guidance_embedder.linear_2": "guidance_in.mlp.2", "single_transformer_blocks": "single_blocks",
    "transformer_blocks": "double_blocks", "norm1_context.linear": "txt_mod.linear", "norm1.linear": "img_mod.linear",
    "attn.norm_added_q": "txt_attn_q_norm", "attn.norm_added_k": "txt_attn_k_norm", "attn.to_add_out": "txt_attn_proj",
    "ff_context.net.0.proj": "txt_mlp.fc1", "ff_context.net.2": "txt_mlp.fc2",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}  # fmt: skip
"""beginnings and parts of names in diffusers -> ours"""
INSIDE = {
    "txt_in.": {
        "attn.to_out.0": "self_attn_proj", "ff.net.0.proj": "mlp.fc1", "ff.net.2": "mlp.fc2",
        "norm_out.linear": "adaLN_modulation.1",
    },
    "double_blocks.": {
        "attn.norm_q": "img_attn_q_norm", "attn.norm_k": "img_attn_k_norm", "attn.to_out.0": "img_attn_proj",
        "ff.net.0.proj": "img_mlp.fc1",
        "ff.net.2": "img_mlp.fc2",
    },
    "single_blocks.": {
        "attn.norm_q": "q_norm", "attn.norm_k": "k_norm", "norm.linear": "modulation.linear", "proj_out": "linear2",
    },
}  # fmt: skip
JOINED = {
    ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"): "linear1",
    ("attn.to_q", "attn.to_k", "attn.to_v"): "img_attn_qkv",
    ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"): "txt_attn_qkv",
}  # fmt: skip


def our_name(key: str) -> str:
    for theirs, ours in RENAMED.items():
        own_out = theirs in ("proj_out", "norm_out.linear") and not key.startswith(theirs)
        key = key if own_out or theirs not in key else key.replace(theirs, ours, 1)
    for start, names in INSIDE.items():
        for theirs, ours in names.items():
            key = key.replace(theirs, ours, 1) if key.startswith(start) else key
    return key


def our_state(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    state, found = {our_name(key): tensor for key, tensor in state.items()}, {}
    for key in list(state):
        block = re.match(r"(.*blocks\.\d+\.)", key)
        for parts, fused in JOINED.items():
            names = [f"{block[1]}{part}" for part in parts] if block else []
            fused = "self_attn_qkv" if block and block[1].startswith("txt_in.") else fused
            for end in (".weight", ".bias"):
                if names and all(name + end in state for name in names):
                    found[f"{block[1]}{fused}{end}"] = torch.cat([state.pop(name + end) for name in names])
    for key in [key for key in state if "adaLN_modulation" in key and key.startswith("final_layer")]:
        scale, shift = state[key].chunk(2)
        state[key] = torch.cat((shift, scale))
    return state | found


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
    ours.load_state_dict(our_state(theirs.state_dict()))
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


@pytest.mark.parametrize("size", [(32, 64), (96, 32)])
def test_autoencoder(size: tuple[int, int]) -> None:
    torch.manual_seed(4)
    widths = (32, 32, 64, 64, 128, 128)
    theirs = diffusers.AutoencoderKLHunyuanImage(
        in_channels=3, out_channels=3, latent_channels=16, block_out_channels=widths, layers_per_block=1,
        spatial_compression_ratio=32,
        sample_size=64, scaling_factor=0.75,
    ).eval()  # fmt: skip
    ours = HunyuanVAE2D(
        AutoEncoderParams(
            ch=32, ch_mult=(1, 1, 2, 2, 4, 4), num_res_blocks=1, z_channels=16, scaling_factor=0.75, shift_factor=0
        )
    )
    state = {}
    for key, tensor in theirs.state_dict().items():
        key = (
            key.replace("mid_block.resnets.0", "mid.block_1")
            .replace("mid_block.resnets.1", "mid.block_2")
            .replace("mid_block.attentions.0", "mid.attn_1")
        )
        key = re.sub(r"attn_1\.(to_([qkv])|proj)\.", lambda found: f"attn_1.{found[2] or 'proj_out'}.", key).replace(
            "conv_shortcut", "nin_shortcut"
        )
        for theirs_name, ours_name, sampler, blocks in (
            ("down_blocks", "down", "downsample", 1),
            ("up_blocks", "up", "upsample", 2),
        ):
            found = re.match(rf"(encoder|decoder)\.{theirs_name}\.(\d+)\.(.*)", key)
            if found:
                level, place = divmod(int(found[2]), blocks + 1)
                middle = f"{sampler}" if place == blocks else f"block.{place}"
                key = f"{found[1]}.{ours_name}.{level}.{middle}.{found[3]}"
        state[key] = tensor
    ours.load_state_dict(state)
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        posterior = theirs.encode(images).latent_dist
        mean, logvar = ours.encode_moments(images)
        assert relative(mean, posterior.mean) < 1e-5 and relative(logvar, posterior.logvar) < 1e-5
        assert relative(ours.decode(ours.scale(mean)), theirs.decode(mean).sample) < 1e-5
