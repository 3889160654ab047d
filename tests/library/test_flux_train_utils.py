"""Schedules, the shared forward and the making of one image, with a real denoiser of a few thousand weights."""

import math

import pytest
import torch

from library.flux_models import AutoEncoder, AutoEncoderParams, Flux, FluxParams
from library.flux_train_utils import (
    compute_density_for_timestep_sampling,
    compute_loss_weighting_for_sd3,
    denoise,
    get_lin_function,
    get_schedule,
    predict_velocity,
    time_shift,
)
from library.flux_utils import pack_latents, prepare_img_ids, unpack_latents
from library.generation.flux_options import FluxRequest
from library.generation.flux_pipeline import FluxPipeline
from library.generation.sampling_utils import decode_to_image, start_noise
from tests.tiny import random_state

TOKENS = 6


def tiny_denoiser(guidance: bool = True, seed: int = 0) -> Flux:
    params = FluxParams(
        in_channels=64, vec_in_dim=8, context_in_dim=12, hidden_size=32, mlp_ratio=2.0, num_heads=2, depth=1,
        depth_single_blocks=1, axes_dim=(4, 6, 6), guidance_embed=guidance,
    )
    model = Flux(params)
    model.load_state_dict(random_state(model, torch.Generator().manual_seed(seed)))
    return model.eval().requires_grad_(False)


def conditioning_of(batch_size: int, seed: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(batch_size, TOKENS, dtype=torch.long)
    mask[:, 4:] = 0
    return {
        "l_pooled": torch.randn(batch_size, 8, generator=generator),
        "t5_out": torch.randn(batch_size, TOKENS, 12, generator=generator),
        "t5_attn_mask": mask,
    }  # fmt: skip


def noisy_latents(batch_size: int = 2) -> torch.Tensor:
    return torch.randn(batch_size, 16, 4, 6, generator=torch.Generator().manual_seed(2))


def request_of(**changes) -> FluxRequest:
    return FluxRequest(**{"prompt": "", "height": 32, "width": 48, "steps": 3, "seed": 7, **changes})


def test_prediction_is_the_packed_forward_in_the_layout_of_the_latents():
    model, latents, conditioning = tiny_denoiser(), noisy_latents(), conditioning_of(2)
    times = torch.tensor([123.456, 900.0])
    velocity = predict_velocity(model, latents, times, conditioning, guidance=2.5)
    direct = model(
        pack_latents(latents), prepare_img_ids(2, 2, 3), conditioning["t5_out"], torch.zeros(2, TOKENS, 3),
        times / 1000, conditioning["l_pooled"],
        torch.tensor([2.5, 2.5]),
    )
    assert velocity.shape == latents.shape
    torch.testing.assert_close(velocity, unpack_latents(direct, 2, 3))


def test_guidance_and_time_reach_the_model():
    model, latents, conditioning = tiny_denoiser(), noisy_latents(), conditioning_of(2)
    plain = predict_velocity(model, latents, torch.tensor([500.0, 500.0]), conditioning, guidance=1.0)
    assert not torch.allclose(
        plain, predict_velocity(model, latents, torch.tensor([500.0, 500.0]), conditioning, guidance=4.0)
    )
    moved = predict_velocity(model, latents, torch.tensor([500.0, 501.0]), conditioning, guidance=1.0)
    torch.testing.assert_close(moved[0], plain[0])
    assert not torch.allclose(moved[1], plain[1])


def test_a_model_without_guidance_ignores_it():
    model, latents, conditioning = tiny_denoiser(guidance=False), noisy_latents(), conditioning_of(2)
    times = torch.tensor([500.0, 500.0])
    one = predict_velocity(model, latents, times, conditioning, guidance=1.0)
    torch.testing.assert_close(one, predict_velocity(model, latents, times, conditioning, guidance=9.0), rtol=0, atol=0)


def test_padding_counts_only_without_the_mask():
    model, latents, times = tiny_denoiser(), noisy_latents(), torch.tensor([500.0, 500.0])
    conditioning, other = conditioning_of(2), conditioning_of(2)
    other["t5_out"] = other["t5_out"].clone()
    other["t5_out"][:, 4:] += 1.0
    with_mask = [
        predict_velocity(model, latents, times, c, guidance=1.0, use_t5_mask=True) for c in (conditioning, other)
    ]
    without = [predict_velocity(model, latents, times, c, guidance=1.0) for c in (conditioning, other)]
    torch.testing.assert_close(with_mask[0], with_mask[1])
    assert not torch.allclose(without[0], without[1])


def test_schedule():
    assert get_schedule(4, 1024, shift=False) == pytest.approx([1.0, 0.75, 0.5, 0.25, 0.0])
    shifted = get_schedule(2, 4096)
    assert shifted == pytest.approx([1.0, math.exp(1.15) / (math.exp(1.15) + 1), 0.0])
    assert get_lin_function()(1024) == pytest.approx(0.63)
    assert float(time_shift(0.0, 1.0, torch.tensor(0.3))) == pytest.approx(0.3)


def test_names_that_other_code_calls():
    weights = compute_loss_weighting_for_sd3("sigma_sqrt", torch.tensor([0.5, 0.25]))
    torch.testing.assert_close(weights, torch.tensor([4.0, 16.0]))
    density = compute_density_for_timestep_sampling("uniform", 5, 0.0, 1.0, 1.29)
    assert density.shape == (5,) and float(density.min()) >= 0 and float(density.max()) <= 1


def test_an_image_depends_on_its_seed_alone():
    pipeline, conditioning = FluxPipeline(tiny_denoiser(), None), conditioning_of(1)
    one = pipeline.latents(request_of(), conditioning, None)
    torch.manual_seed(99)
    torch.testing.assert_close(one, pipeline.latents(request_of(), conditioning, None), rtol=0, atol=0)
    assert one.shape == (1, 16, 4, 6)
    assert not torch.allclose(one, pipeline.latents(request_of(seed=8), conditioning, None))


def test_sampling_is_euler_along_the_schedule():
    model, conditioning = tiny_denoiser(), conditioning_of(1)
    made = FluxPipeline(model, None).latents(request_of(guidance=2.0), conditioning, None)
    packed = denoise(
        model, pack_latents(start_noise(7, 16, 4, 6)), prepare_img_ids(1, 2, 3), conditioning["t5_out"],
        torch.zeros(1, TOKENS, 3),
        conditioning["l_pooled"], get_schedule(3, 6), guidance=2.0,
    )
    torch.testing.assert_close(made, unpack_latents(packed, 2, 3), rtol=1e-4, atol=1e-5)


def test_cfg_goes_from_the_negative_past_the_positive_prompt():
    model, positive, negative = tiny_denoiser(), conditioning_of(1), conditioning_of(1, seed=5)
    latents, sigma = noisy_latents(1), torch.tensor(0.6)
    alone = [
        predict_velocity(model, latents, torch.tensor([600.0]), c, guidance=3.5) for c in (negative, positive)
    ]
    pipeline = FluxPipeline(model, None)
    combined = pipeline.guided(request_of(cfg_scale=4.0), positive, negative)(latents, sigma)
    torch.testing.assert_close(combined, alone[0] + 4.0 * (alone[1] - alone[0]), rtol=1e-4, atol=1e-5)
    for cfg_scale, other in ((1.0, negative), (4.0, None)):
        velocity = pipeline.guided(request_of(cfg_scale=cfg_scale), positive, other)(latents, sigma)
        torch.testing.assert_close(velocity, alone[1])


def test_decoding_clamps_and_leaves_the_vae_where_it_was():
    params = AutoEncoderParams(ch=8, ch_mult=(1, 1, 2, 2), num_res_blocks=1, norm_groups=4)
    vae = AutoEncoder(params)
    vae.load_state_dict(random_state(vae, torch.Generator().manual_seed(0)))
    latents = 100 * noisy_latents(1)
    image = decode_to_image(vae.eval(), latents)
    with torch.no_grad():
        pixels = ((vae.decode(latents)[0].clamp(-1, 1) + 1) * 127.5).round()
    assert image.size == (48, 32) and image.mode == "RGB"
    assert image.getpixel((5, 3)) == tuple(int(v) for v in pixels[:, 3, 5])
    assert vae.device.type == "cpu"
