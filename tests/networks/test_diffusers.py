"""Our LoRA files in diffusers: the same change of the output."""

import pytest
import torch
from torch import nn

from library.checkpoints.flux_convert import convert_diffusers_sd_to_bfl
from library.flux_models import Flux, FluxParams
from library.flux_utils import prepare_img_ids
from networks.files.lora_conversion import to_diffusers
from networks.lora import create_network

diffusers = pytest.importorskip("diffusers")


def twin_models(width=32, heads=2, depth=2):
    """The same random FLUX as diffusers' class and as ours."""
    torch.manual_seed(0)
    theirs = diffusers.FluxTransformer2DModel(
        in_channels=16, num_layers=depth, num_single_layers=depth, attention_head_dim=width // heads,
        num_attention_heads=heads,
        joint_attention_dim=24, pooled_projection_dim=20, guidance_embeds=True,
        axes_dims_rope=(width // heads - 12, 6, 6),
    ).eval()
    ours = Flux(FluxParams(
        in_channels=16, vec_in_dim=20, context_in_dim=24, hidden_size=width, num_heads=heads, depth=depth,
        depth_single_blocks=depth, axes_dim=(width // heads - 12, 6, 6),
    )).eval()
    ours.load_state_dict(convert_diffusers_sd_to_bfl(theirs.state_dict()))
    return theirs, ours


def outputs(theirs, ours):
    """Predictions of both for the same inputs."""
    generator = torch.Generator().manual_seed(1)
    img, txt = torch.randn(2, 6, 16, generator=generator), torch.randn(2, 3, 24, generator=generator)
    pooled, times = torch.randn(2, 20, generator=generator), torch.tensor([0.2, 0.9])
    img_ids, guidance = prepare_img_ids(2, 2, 3), torch.full((2,), 3.5)
    with torch.no_grad():
        mine = ours(
            img=img,
            img_ids=img_ids,
            txt=txt,
            txt_ids=torch.zeros(2, 3, 3),
            timesteps=times,
            y=pooled,
            guidance=guidance,
        )
        other = theirs(
            hidden_states=img, encoder_hidden_states=txt, pooled_projections=pooled, timestep=times, guidance=guidance,
            img_ids=img_ids[0], txt_ids=torch.zeros(3, 3), return_dict=False,
        )[0]
    return other, mine


@pytest.mark.parametrize("pairs", [{}, {"split_qkv": "true"}, {"in_dims": "[2,2,2,2,2]"}])
def test_rewritten_file_changes_the_output_as_our_own_forward(pairs):
    theirs, ours = twin_models()
    plain_theirs, plain_ours = outputs(theirs, ours)
    torch.testing.assert_close(plain_theirs, plain_ours, rtol=1e-4, atol=1e-4)
    network = create_network(1.0, 4, 2.0, None, [None, None], ours, **pairs)
    for lora in network.unet_loras:
        for up in lora.lora_up.parameters():
            nn.init.normal_(up, std=0.5)
    network.apply_to([None, None], ours, True, True)
    rewritten = to_diffusers("flux", network.file_state_dict())
    theirs.load_lora_adapter(rewritten, prefix="transformer")
    with_theirs, with_ours = outputs(theirs, ours)
    assert (with_ours - plain_ours).abs().max() > 0.1
    torch.testing.assert_close(with_theirs, with_ours, rtol=1e-4, atol=1e-4)
    loaded = {name for name, _ in theirs.named_parameters() if "lora_A" in name}
    assert len(loaded) == sum(key.endswith("lora_A.weight") for key in rewritten)


def test_kohya_keys_at_real_width_load_directly():
    """diffusers splits the rows of linear1 at fixed sizes, so this needs the real width; one block of each kind."""
    from diffusers.loaders import FluxLoraLoaderMixin

    with torch.device("meta"):
        denoiser = Flux(FluxParams(depth=1, depth_single_blocks=1))
        theirs = diffusers.FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True)
    network = create_network(1.0, 2, 1.0, None, [None, None], denoiser)
    for lora in network.unet_loras:
        nn.init.normal_(lora.lora_up.weight)
    tensors = network.file_state_dict()
    state, alphas = FluxLoraLoaderMixin.lora_state_dict(dict(tensors), return_alphas=True)
    expected = to_diffusers("flux", tensors)
    assert set(state) == set(expected)
    for key in (key for key in expected if key.endswith("lora_A.weight")):
        ours = expected[key.replace("lora_A", "lora_B")] @ expected[key]
        change = state[key.replace("lora_A", "lora_B")] @ state[key]
        torch.testing.assert_close(change[:64], ours[:64], rtol=1e-4, atol=1e-5)
    theirs.load_lora_adapter(state, prefix="transformer", network_alphas=alphas or None, low_cpu_mem_usage=True)
    assert sum("lora_A" in name for name, _ in theirs.named_parameters()) == len(expected) // 2
