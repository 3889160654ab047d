"""U-Nets, autoencoder and encoders against diffusers and transformers, from folders that those write."""

from __future__ import annotations

import pytest
import torch

from library import sd_utils, sdxl_utils
from library.components.text_encoder_utils import CLIP_G, load_clip

diffusers = pytest.importorskip("diffusers")


def relative(result: torch.Tensor, expected: torch.Tensor) -> float:
    return ((result - expected).norm() / expected.norm()).item()


def unet(kind: str) -> torch.nn.Module:
    torch.manual_seed(3)
    common = {"block_out_channels": (16, 32), "layers_per_block": 2, "norm_num_groups": 8, "sample_size": 8}
    if kind == "sdxl":
        return diffusers.UNet2DConditionModel(
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2), attention_head_dim=(2, 4), cross_attention_dim=24,
            use_linear_projection=True,
            addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=12 + 48,
            **common,
        ).eval()  # fmt: skip
    return diffusers.UNet2DConditionModel(
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=4, cross_attention_dim=24, use_linear_projection=kind == "sd2", **common,
    ).eval()  # fmt: skip


@pytest.mark.parametrize("kind", ["sd1", "sd2"])
@pytest.mark.parametrize("size", [(8, 12), (7, 9)])
def test_unet_of_stable_diffusion(tmp_path, kind: str, size: tuple[int, int]) -> None:
    reference = unet(kind)
    reference.save_pretrained(tmp_path / "unet")
    model = sd_utils.load_unet_sd(tmp_path, torch.float32, "cpu")
    latents, times, states = torch.randn(2, 4, *size), torch.tensor([1, 940]), torch.randn(2, 5, 24)
    with torch.no_grad():
        assert relative(model(latents, times, states), reference(latents, times, states).sample) < 1e-5


def test_unet_of_sdxl(tmp_path) -> None:
    reference = unet("sdxl")
    reference.save_pretrained(tmp_path / "unet")
    model = sdxl_utils.load_unet_sdxl(tmp_path, torch.float32, "cpu")
    latents, times, states = torch.randn(2, 4, 8, 12), torch.tensor([1, 940]), torch.randn(2, 5, 24)
    pooled, sizes = torch.randn(2, 12), torch.tensor([[800.0, 1200, 0, 16, 832, 1216], [64, 64, 0, 0, 64, 64]])
    from library.sdxl_train_utils import predict_noise

    with torch.no_grad():
        given = {"text_embeds": pooled, "time_ids": sizes}
        theirs = reference(latents, times, states, added_cond_kwargs=given).sample
        parts = {"hidden_state1": states[..., :10], "hidden_state2": states[..., 10:], "pool2": pooled}
        ours = predict_noise(model, latents, times, parts, (sizes[:, :2], sizes[:, 2:4], sizes[:, 4:]))
        assert relative(ours, theirs) < 1e-5


def test_autoencoder(tmp_path) -> None:
    torch.manual_seed(4)
    reference = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 16, 32),
        layers_per_block=1, latent_channels=4, norm_num_groups=8, scaling_factor=0.2,
    ).eval()  # fmt: skip
    reference.save_pretrained(tmp_path / "vae")
    vae = sd_utils.load_vae_sd(tmp_path, torch.float32, "cpu")
    images, latents = torch.rand(2, 3, 28, 20) * 2 - 1, torch.randn(2, 4, 7, 5)
    with torch.no_grad():
        assert relative(vae.encode(images), reference.encode(images).latent_dist.mean * 0.2) < 1e-5
        assert relative(vae.decode(latents), reference.decode(latents / 0.2).sample) < 1e-5


def test_second_encoder_of_a_folder(tmp_path) -> None:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    torch.manual_seed(5)
    config = CLIPTextConfig(
        vocab_size=60, hidden_size=32, intermediate_size=64, projection_dim=32, num_hidden_layers=3,
        num_attention_heads=4,
        hidden_act="gelu", bos_token_id=58, eos_token_id=59, pad_token_id=0,
    )  # fmt: skip
    reference = CLIPTextModelWithProjection(config).eval()
    reference.save_pretrained(tmp_path / "text_encoder_2")
    model = load_clip(tmp_path, CLIP_G, torch.float32, "cpu")
    ids = torch.randint(0, 58, (2, 77))
    ids[:, 20:] = 59
    with torch.no_grad():
        ours, theirs = model(ids, output_hidden_states=True), reference(ids, output_hidden_states=True)
    assert relative(ours.hidden_states[-2], theirs.hidden_states[-2]) < 1e-6
    assert relative(ours.text_embeds, theirs.text_embeds) < 1e-6
