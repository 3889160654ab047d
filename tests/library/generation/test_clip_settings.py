"""Settings of clips: where V2V begins, extra noise, slowed frequencies of time, guidance inside the attention; by
hand."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from library.attention import riflex_frequencies, rope_cos_sin
from library.core.keyed_random import key_seed
from library.generation.sampling_utils import start_noise
from library.generation.video_requests import VideoRequest
from library.wan_models import AttentionGuidance, WanCrossAttention, WanImageCrossAttention, WanModel, WanParams
from tests.library.generation.test_guidance import ToyClips, _Denoiser
from tests.library.test_hunyuan_video_inference import run as run_hunyuan
from tests.library.test_hunyuan_video_inference import tiny as hunyuan  # noqa: F401
from tests.library.test_wan_inference import i2v, latent, picture, run, tiny  # noqa: F401

SHIFT = 3.0


class ClipOfOnes(ToyClips):
    def starting_clip(self, request):
        return torch.ones(1, *self.latent_shape(request))

    def shift(self, request):
        return SHIFT


def request(**settings) -> VideoRequest:
    return VideoRequest(
        prompt="", width=32, height=32, steps=10, seed=3, video_path="a.mp4", **{"strength": 0.55, **settings}
    )


def test_where_a_clip_that_starts_from_another_one_begins():
    pipeline = ClipOfOnes(_Denoiser(), None)
    times = np.linspace(1, 0, 11)
    levels = SHIFT * times / (1 + (SHIFT - 1) * times)
    noise = start_noise(3, *pipeline.latent_shape(None))
    for settings, first in (
        ({}, 5), ({"strength": 0.0}, 10), ({"strength": 1.0}, 0),
        ({"noise_mode": "direct"}, 7), ({"noise_mode": "direct", "strength": 1.0}, 0),
        ({"noise_mode": "direct", "strength": 0.0}, 10),
    ):  # fmt: skip
        asked = request(**settings)
        sigmas = pipeline.sigmas(asked)
        assert settings.get("noise_mode") != "direct" or abs(levels - asked.strength).argmin() == first
        np.testing.assert_allclose(sigmas.numpy(), levels[first:], rtol=1e-6, atol=1e-7)
        for extra in (0.0, 0.25):
            start = pipeline.start(dataclasses.replace(asked, v2_extra_noise=extra), sigmas)
            more = extra if first < 10 else 0.0
            expected = (levels[first] * noise + (1 - levels[first]) + more * noise).float()
            torch.testing.assert_close(start, expected, rtol=1e-5, atol=1e-6)


def test_extra_noise_is_on_the_latents_of_pictures_alone(i2v, picture, tmp_path):  # noqa: F811
    from library.generation import wan_pipeline

    seen = []
    usual = wan_pipeline.predict_velocity

    def noting(*args, **how):
        seen.append(how["y"][:1].float().clone())
        return usual(*args, **how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wan_pipeline, "predict_velocity", noting)
        for number, extra in enumerate(("0", "0.5")):
            run(i2v, tmp_path / str(number), f"--image_path={picture}", f"--i2_extra_noise={extra}", "--infer_steps=1")
    plain, noisy = seen[0], seen[-1]
    assert torch.equal(plain[:, :-16], noisy[:, :-16])
    noise = start_noise(key_seed(7, "noise on the first frame"), *plain[:, -16:].shape[1:])
    torch.testing.assert_close(noisy[:, -16:], plain[:, -16:] + 0.5 * noise)


# -- slowed frequencies ------------------------------------------------------------------------------------------------


def test_a_slowed_frequency_does_not_come_round_in_the_clip():
    frames, width, theta, index = 21, 16, 256.0, 4
    slowed = riflex_frequencies(width, theta, index, frames)
    frequencies = [theta ** (-2 * i / width) for i in range(width // 2)]
    frequencies[index - 1] = 0.9 * 2 * math.pi / frames
    positions = torch.tensor([[[t, r, 0] for t in range(frames) for r in range(2)]])
    cos, sin = rope_cos_sin(positions, (width, 4, 4), theta, slowed)
    usual_cos, _ = rope_cos_sin(positions, (width, 4, 4), theta)
    angles = positions[0, :, 0].double().numpy()[:, None] * np.array(frequencies)
    np.testing.assert_allclose(cos[0, :, : width // 2].numpy(), np.cos(angles), atol=1e-6)
    np.testing.assert_allclose(sin[0, :, : width // 2].numpy(), np.sin(angles), atol=1e-6)
    assert torch.equal(cos[..., width // 2 :], usual_cos[..., width // 2 :])
    assert riflex_frequencies(width, theta, 0, frames) is None
    with pytest.raises(ValueError, match="riflex_index is 9; the model has 8"):
        riflex_frequencies(width, theta, 9, frames)


def test_scripts_slow_a_frequency_down_and_know_how_many_there_are(tiny, hunyuan, tmp_path):  # noqa: F811
    plain = latent(tiny, tmp_path / "a")
    assert not torch.equal(plain, latent(tiny, tmp_path / "b", "--riflex_index=1"))
    assert torch.equal(plain, latent(tiny, tmp_path / "c", "--riflex_index=0"))
    for script, base in ((run, tiny), (run_hunyuan, hunyuan)):
        with pytest.raises(Exception, match="--riflex_index is 100; the model has [0-9]+ frequencies of time"):
            script(base, tmp_path / "d", "--riflex_index=100")


# -- guidance inside the attention -------------------------------------------------------------------------------------


def nag(positive: np.ndarray, negative: np.ndarray, scale: float, tau: float, alpha: float) -> np.ndarray:
    made = np.empty_like(positive)
    for place in np.ndindex(positive.shape[:2]):
        z, other = positive[place], negative[place]
        away = scale * z - (scale - 1) * other
        ratio = np.abs(away).sum() / np.abs(z).sum()
        made[place] = alpha * away * min(ratio, tau) / ratio + (1 - alpha) * z
    return made


@pytest.mark.parametrize(("scale", "tau", "alpha"), [(3.0, 3.5, 0.5), (8.0, 1.2, 0.25), (1.0, 2.5, 0.7)])
def test_normalised_attention_guidance(scale, tau, alpha):
    draws = torch.Generator().manual_seed(1)
    positive, negative = (torch.randn(2, 5, 12, generator=draws, dtype=torch.float64) for _ in range(2))
    found = AttentionGuidance(negative, scale, tau, alpha).of(positive, negative)
    np.testing.assert_allclose(found.numpy(), nag(positive.numpy(), negative.numpy(), scale, tau, alpha), rtol=1e-10)
    still = AttentionGuidance(negative, scale, tau, alpha).of(torch.zeros(1, 1, 4), torch.zeros(1, 1, 4))
    assert torch.equal(still, torch.zeros(1, 1, 4))


@pytest.mark.parametrize("kind", [WanCrossAttention, WanImageCrossAttention])
def test_the_attention_to_the_text_is_guided_and_that_to_pictures_is_not(kind):
    torch.manual_seed(0)
    params = WanParams(dim=24, ffn_dim=24, num_heads=2, num_layers=1, text_dim=8, img_dim=8)
    module = kind(params)
    x, text, other, image = (torch.randn(2, n, 24) for n in (5, 7, 7, 3))
    module.guidance = AttentionGuidance(other[:1], 3.0)

    def attended(key_layer, value_layer, norm, states):
        parts = (module.norm_q(module.q(x)), norm(key_layer(states)), value_layer(states))
        heads = [part.unflatten(-1, (2, 12)).transpose(1, 2) for part in parts]
        return F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)

    to_text = [attended(module.k, module.v, module.norm_k, states) for states in (text, other[:1].expand(2, -1, -1))]
    expected = torch.from_numpy(nag(*(part.detach().numpy() for part in to_text), 3.0, 3.5, 0.5))
    if kind is WanImageCrossAttention:
        expected = expected + attended(module.k_img, module.v_img, module.norm_k_img, image)
    torch.testing.assert_close(module(x, text, image), module.o(expected), rtol=1e-4, atol=1e-5)


def test_a_model_is_guided_for_one_forward():
    torch.manual_seed(0)
    model = WanModel(WanParams(dim=24, ffn_dim=24, num_heads=2, num_layers=2, text_dim=8, text_len=6)).eval()
    x, text, other = torch.randn(1, 16, 2, 4, 4), torch.randn(1, 5, 8), torch.randn(1, 4, 8)
    with torch.no_grad():
        torch.nn.init.normal_(model.head.head.weight)
        plain = model(x, torch.tensor([500.0]), text)
        same = model(x, torch.tensor([500.0]), text, attention_guidance=AttentionGuidance(other, 1.0))
        guided = model(x, torch.tensor([500.0]), text, attention_guidance=AttentionGuidance(other, 4.0))
        assert torch.equal(plain, model(x, torch.tensor([500.0]), text))
        stop = model.blocks[0].register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(x, torch.tensor([500.0]), text, attention_guidance=AttentionGuidance(other, 4.0))
        stop.remove()
        assert torch.equal(plain, model(x, torch.tensor([500.0]), text)), "a forward that failed guides the next one"
    torch.testing.assert_close(same, plain, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(guided, plain, atol=1e-3)


def test_the_wan_script_guides_attention_and_all_other_forms(tiny, picture, tmp_path, caplog):  # noqa: F811
    ways = {
        "plain": [], "nag": ["--nag_scale=3"], "text": ["--nag_scale=3", "--nag_prompt=a dog"],
        "alone": ["--nag_scale=3", "--guidance_scale=1"], "unguided": ["--guidance_scale=1"],
        "together": ["--nag_scale=5", "--no-split_uncond"], "zero": ["--cfgzerostar_scaling"],
        "first": ["--cfgzerostar_init_steps=1"], "perp": ["--perp_neg=1.5"], "schedule": ["--cfg_schedule=1"],
        "sampler": ["--sample_solver=dpmpp_3m_sde"], "table": ["--sigma_table=karras"], "lcm": ["--sample_solver=lcm"],
        "start": [f"--i2i_path={picture}", "--denoise_strength=0.5"],
        "noise": [f"--i2i_path={picture}", "--denoise_strength=0.5", "--v2v_extra_noise=0.1"],
        "direct": [f"--i2i_path={picture}", "--denoise_strength=0.5", "--v2v_noise_mode=direct", "--sigma_table=beta"],
    }  # fmt: skip
    made = [latent(tiny, tmp_path / name, *words) for name, words in ways.items()]
    assert all(torch.isfinite(one).all() for one in made)
    assert all(not torch.equal(a, b) for n, a in enumerate(made) for b in made[:n])
    assert "has no effect" not in caplog.text
    latent(tiny, tmp_path / "idle", "--nag_tau=2", "--guidance_scale=1", "--perp_neg=1", "--noise_mode=direct")
    for told in ("--nag_tau has no effect without --nag_scale", "--noise_mode has no effect without --video_path",
                 "--perp_neg has no effect: nothing is guided"):  # fmt: skip
        assert told in caplog.text
