"""Denoiser and autoencoder against the classes of diffusers, on random weights that go through our conversion."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from library import flux_utils
from library.checkpoints.flux_convert import convert_bfl_sd_to_diffusers, convert_diffusers_sd_to_bfl
from library.flux_models import Flux, FluxParams
from tests.tiny import random_state

diffusers = pytest.importorskip("diffusers")


def relative(result: torch.Tensor, expected: torch.Tensor) -> float:
    return ((result - expected).norm() / expected.norm()).item()


def diffusers_transformer(guidance: bool) -> torch.nn.Module:
    torch.manual_seed(3)
    model = diffusers.FluxTransformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=3, attention_head_dim=32, num_attention_heads=3,
        joint_attention_dim=20, pooled_projection_dim=12, guidance_embeds=guidance, axes_dims_rope=(8, 12, 12),
    )  # fmt: skip
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return model.eval()


def both_outputs(model: Flux, reference: torch.nn.Module, guidance: bool) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    height, width = 3, 5
    img = torch.randn(2, height * width, 16, generator=generator)
    txt = torch.randn(2, 7, 20, generator=generator)
    pooled = torch.randn(2, 12, generator=generator)
    times = torch.tensor([0.13, 0.92])
    scale = torch.tensor([3.5, 1.0]) if guidance else None
    ids = flux_utils.prepare_img_ids(2, height, width)
    with torch.no_grad():
        ours = model(img, ids, txt, torch.zeros(2, 7, 3), times, pooled, scale)
        theirs = reference(
            hidden_states=img, encoder_hidden_states=txt, pooled_projections=pooled, timestep=times, img_ids=ids[0],
            txt_ids=torch.zeros(7, 3), guidance=scale, return_dict=False,
        )[0]  # fmt: skip
    return ours, theirs


@pytest.mark.parametrize("guidance", [True, False])
def test_denoiser_from_a_sharded_folder(tmp_path, guidance: bool) -> None:
    reference = diffusers_transformer(guidance)
    reference.save_pretrained(tmp_path / "transformer", max_shard_size="200KB")
    assert len(list((tmp_path / "transformer").glob("*-of-*.safetensors"))) > 1
    model = flux_utils.load_flux(tmp_path, torch.float32, "cpu")
    assert model.params.guidance_embed is guidance
    assert relative(*both_outputs(model, reference, guidance)) < 1e-5
    state = flux_utils.analyze_checkpoint_state(tmp_path / "transformer")
    assert (state.is_diffusers, state.is_schnell, state.num_blocks) == (True, not guidance, (2, 3))
    assert all(path.endswith(".safetensors") for path in state.paths)


def test_denoiser_from_a_single_file_in_diffusers_names(tmp_path) -> None:
    reference = diffusers_transformer(True)
    path = tmp_path / "transformer.safetensors"
    save_file({f"model.diffusion_model.{key}": tensor for key, tensor in reference.state_dict().items()}, path)
    model = flux_utils.load_flux(path, torch.float32, "cpu", config={"axes_dim": [8, 12, 12]})
    assert relative(*both_outputs(model, reference, True)) < 1e-5


def test_our_weights_in_their_class() -> None:
    params = FluxParams(
        in_channels=16, vec_in_dim=12, context_in_dim=20, hidden_size=96, num_heads=3, depth=2, depth_single_blocks=3,
        axes_dim=(8, 12, 12),
    )  # fmt: skip
    model = Flux(params)
    model.load_state_dict(random_state(model, torch.Generator().manual_seed(0)))
    reference = diffusers_transformer(True)
    reference.load_state_dict(convert_bfl_sd_to_diffusers(model.state_dict()), strict=True)
    assert relative(*both_outputs(model.eval(), reference, True)) < 1e-5


def test_conversion_there_and_back_is_exact() -> None:
    state = diffusers_transformer(True).state_dict()
    again = convert_bfl_sd_to_diffusers(convert_diffusers_sd_to_bfl(state))
    assert again.keys() == state.keys()
    assert all(torch.equal(again[key], tensor) for key, tensor in state.items())


def diffusers_autoencoder() -> torch.nn.Module:
    torch.manual_seed(4)
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 16, 32),
        layers_per_block=1, latent_channels=16, norm_num_groups=8, scaling_factor=0.3611, shift_factor=0.1159,
        use_quant_conv=False, use_post_quant_conv=False,
    ).eval()  # fmt: skip


@pytest.mark.parametrize("old_names", [False, True])
def test_autoencoder_from_a_folder(tmp_path, old_names: bool) -> None:
    reference = diffusers_autoencoder()
    reference.save_pretrained(tmp_path / "vae")
    if old_names:
        renames = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
        state = dict(reference.state_dict())
        for new, old in renames.items():
            state = {key.replace(new, old): tensor.contiguous() for key, tensor in state.items()}
        save_file(state, tmp_path / "vae" / "diffusion_pytorch_model.safetensors")
    vae = flux_utils.load_ae(tmp_path, torch.float32, "cpu")
    images = torch.rand(2, 3, 28, 20, generator=torch.Generator().manual_seed(6)) * 2 - 1
    latents = torch.randn(2, 16, 7, 5, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        posterior = reference.encode(images).latent_dist
        mean, logvar = vae.encode_moments(images)
        assert relative(mean, posterior.mean) < 1e-5 and relative(logvar, posterior.logvar) < 1e-5
        assert relative(vae.encode(images), (posterior.mean - 0.1159) * 0.3611) < 1e-5
        assert relative(vae.decode(latents), reference.decode(latents / 0.3611 + 0.1159).sample) < 1e-5


def test_autoencoder_in_a_single_file_of_diffusers_names_needs_its_groups(tmp_path) -> None:
    reference = diffusers_autoencoder()
    path = tmp_path / "vae.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in reference.state_dict().items()}, path)
    with pytest.raises(flux_utils.CheckpointError, match="norm_groups"):
        flux_utils.load_ae(path, torch.float32, "cpu")
    assert flux_utils.load_ae(path, torch.float32, "cpu", config={"norm_groups": 8}).params.norm_groups == 8


def test_folder_with_a_missing_shard_names_it(tmp_path) -> None:
    diffusers_transformer(False).save_pretrained(tmp_path, max_shard_size="200KB")
    index = json.loads((tmp_path / "diffusion_pytorch_model.safetensors.index.json").read_text())
    victim = sorted(set(index["weight_map"].values()))[1]
    (tmp_path / victim).unlink()
    with pytest.raises(flux_utils.CheckpointError, match=victim):
        flux_utils.load_flux(tmp_path, torch.float32, "cpu")
