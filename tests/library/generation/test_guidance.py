"""Forms of guidance: schedules, CFG-Zero*, perpendicular negative prompts, against computations by hand in numpy."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from library.core.errors import ConfigError
from library.generation import sdxl_inference
from library.generation.flow_pipeline import FlowPipeline
from library.generation.guidance_options import (
    GuidanceOptions,
    idle_guidance,
    request_guidance_problems,
    scheduled_scales,
    step_scales,
)
from library.generation.requests import PictureRequest
from library.generation.video_pipeline import VideoPipeline
from library.generation.video_requests import VideoRequest
from library.tiny_models import build_tiny

TEXTS = {"prompt": 1.0, "negative": -0.7, "neutral": 0.2}
STEPS = 5


class _Denoiser:
    device = torch.device("cpu")


def toy_velocity(latents: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:
    """Of a text that is one number: not linear in it, so that each form of guidance shows."""
    size = latents.shape[2:]
    wave = torch.arange(latents[0, 0].numel(), dtype=torch.float32).view(size).sin()
    strength = strength.view(-1, *([1] * (latents.ndim - 1)))
    return latents * strength + (wave + strength).cos() + strength


class ToyPictures(FlowPipeline):
    family = "flux"
    request_class = PictureRequest

    def latent_shape(self, request):
        return (2, 3, 4)

    def velocity(self, latents, times, conditioning, request, **how):
        return toy_velocity(latents, conditioning["text"])


class ToyClips(ToyPictures, VideoPipeline):
    request_class = VideoRequest

    def latent_shape(self, request):
        return (2, 3, 2, 4)


def text(name: str) -> dict[str, torch.Tensor]:
    return {"text": torch.tensor([TEXTS[name]])}


def made(pipeline_class, **settings) -> np.ndarray:
    pipeline = pipeline_class(_Denoiser(), None)
    request = pipeline_class.request_class(
        **{"prompt": "", "width": 32, "height": 32, "steps": STEPS, "seed": 3, "cfg_scale": 3.0, **settings}
    )
    pipeline.further = {name: text(name) for name in request.further_texts}
    negative = None if request.negative_text is None else text("negative")
    return pipeline.latents(request, text("prompt"), negative).double().numpy()


def by_hand(pipeline_class, guide) -> np.ndarray:
    """Euler steps in float64; `guide(step from 1 on, positive, negative, neutral)` gives the velocity."""
    shape = pipeline_class(_Denoiser(), None).latent_shape(None)
    x = torch.randn((1, *shape), generator=torch.Generator().manual_seed(3)).double().numpy()
    wave = np.sin(np.arange(np.prod(shape[1:]), dtype=np.float64)).reshape(shape[1:])
    for step in range(STEPS):
        forwards = [x * c + np.cos(wave + c) + c for c in TEXTS.values()]
        x = x - guide(step + 1, *forwards) / STEPS
    return x


def plain(scale):
    return lambda step, positive, negative, neutral: negative + scale * (positive - negative)


def zero_star(step, positive, negative, neutral):
    p, n = positive.ravel(), negative.ravel()
    best = float(p @ n) / (float(n @ n) + 1e-8)
    return best * negative + 3.0 * (positive - best * negative)


def perpendicular(step, positive, negative, neutral):
    p, n = (positive - neutral).ravel(), (negative - neutral).ravel()
    unit = p / np.linalg.norm(p)
    rest = (n - (n @ unit) * unit).reshape(positive.shape)
    return neutral + 3.0 * (positive - neutral - 1.5 * rest)


def scheduled(step, positive, negative, neutral):  # e~2:6,1-2,!2 of five steps
    return {1: plain(3.0), 4: plain(6.0)}.get(step, plain(1.0))(step, positive, negative, neutral)


def held(step, *forwards):
    return plain(3.0)(step, *forwards) * (0.25 if step <= 2 else 1.0)


CASES = {
    "plain": ({}, plain(3.0)),
    "zero star": ({"cfgzerostar_scaling": True}, zero_star),
    "perpendicular": ({"perp_neg": 1.5}, perpendicular),
    "schedule": ({"cfg_schedule": "e~2:6,1-2,!2"}, scheduled),
    "scale of the schedule alone": ({"cfg_schedule": "1-5:4", "cfg_scale": 1.0}, plain(4.0)),
    "first steps": ({"cfgzerostar_init_steps": 2, "cfgzerostar_multiplier": 0.25}, held),
    "no first step": (
        {"cfgzerostar_init_steps": 1}, lambda step, *given: plain(3.0)(step, *given) * (step > 1)
    ),
    "two forms": (
        {"cfg_schedule": "1-3", "perp_neg": 1.5},
        lambda step, *given: perpendicular(step, *given) if step < 4 else given[0],
    ),
}  # fmt: skip


@pytest.mark.parametrize("pipeline_class", [ToyPictures, ToyClips])
@pytest.mark.parametrize("case", CASES)
def test_each_form_is_what_is_computed_by_hand(pipeline_class, case):
    settings, guide = CASES[case]
    np.testing.assert_allclose(made(pipeline_class, **settings), by_hand(pipeline_class, guide), rtol=2e-5, atol=2e-5)


def test_samples_of_a_batch_do_not_know_of_each_other():
    from library.generation.guidance import perpendicular, zero_star

    draws = torch.Generator().manual_seed(0)
    negative, positive, neutral = (torch.randn(3, 2, 2, 3, 4, generator=draws) for _ in range(3))
    for form in (
        lambda n, p, e: zero_star(n, p, 4.0), lambda n, p, e: perpendicular(n, p, e, 4.0, 2.0),
    ):  # fmt: skip
        rows = [form(*(part[i : i + 1] for part in (negative, positive, neutral))) for i in range(3)]
        torch.testing.assert_close(form(negative, positive, neutral), torch.cat(rows), rtol=1e-5, atol=1e-5)
    still = perpendicular(negative, neutral, neutral, 4.0, 2.0)  # nothing to be perpendicular to
    assert torch.isfinite(still).all()


def test_a_clip_that_skips_steps_is_guided_where_its_schedule_says():
    skipping = {"cfg_skip_mode": "late", "cfg_apply_ratio": 0.4}
    first_two = made(ToyClips, **skipping)
    assert np.array_equal(first_two, made(ToyClips, cfg_schedule="1-2"))
    assert np.array_equal(made(ToyClips, cfg_schedule="4-5", **skipping), made(ToyClips, cfg_schedule="4-5"))


def test_schedules_are_read(caplog):
    assert scheduled_scales("e~2:6.4, 1-4, 9-10, !3, !9", 10) == {
        1: None, 2: None, 4: None, 6: 6.4, 8: 6.4, 10: None
    }  # fmt: skip
    assert scheduled_scales("!2, 1-3", 3, 5.0) == {1: 5.0, 3: 5.0}
    assert scheduled_scales("2:-1.5", 2) == {2: -1.5}
    for wrong in ("", "a", "0", "3-2", "e~0", "1 - 3", "-1", "1-", "!2:3", "1,,2", "1:x"):
        with pytest.raises(ConfigError, match="cfg_schedule has"):
            scheduled_scales(wrong, 10)
    with pytest.raises(ConfigError, match="names step 11; there are 10 steps"):
        scheduled_scales("1-11", 10)
    # a table of noise levels made five of the six steps
    assert step_scales("e~2:3, 4-6", 5) == [1.0, 3.0, 1.0, None, None]
    assert "--cfg_schedule names step 6; 5 steps are made" in caplog.text


def test_what_fights_is_refused_and_what_has_no_use_is_told():
    with pytest.raises(ConfigError) as told:
        GuidanceOptions(cfg_schedule="5-1, x", perp_neg=1.0, cfgzerostar_scaling=True)
    assert len(told.value.problems) == 3
    request = PictureRequest(prompt="", width=8, height=8, steps=4, cfg_schedule="1-5", cfg_scale=3.0)
    assert request_guidance_problems(request) == ["--cfg_schedule names step 5; there are 4 steps, numbered from 1 on"]
    clip = VideoRequest(prompt="", width=8, height=8, steps=4, cfg_schedule="1-3", video_path="a.mp4", strength=0.5)
    assert "there are 2 steps" in request_guidance_problems(clip)[0]
    unguided = dataclasses.replace(request, cfg_scale=1.0, perp_neg=1.0)
    told = idle_guidance(unguided, {"cfg_schedule", "perp_neg", "cfgzerostar_multiplier"})
    assert [line.split()[0] for line in told] == ["--cfgzerostar_multiplier", "--cfg_schedule", "--perp_neg"]


def test_sdxl_is_guided_by_the_same_forms(tmp_path):
    tiny = build_tiny("sdxl", tmp_path / "tiny")
    ways = {
        "plain": [], "schedule": ["--cfg_schedule=1"], "zero": ["--cfgzerostar_scaling"],
        "first": ["--cfgzerostar_init_steps=1"], "perp": ["--perp_neg=1.5"], "unguided": ["--cfg_scale=1"],
        "none": ["--cfg_schedule=!1-3"], "all": ["--cfg_schedule=1-3", "--cfg_scale=5"],
    }  # fmt: skip
    made = {}
    for name, words in ways.items():
        given = [
            f"--ckpt_path={tiny.model}", f"--clip_tokenizer={tiny.tokenizer}",
            "--prompt=a red cat", "--negative_prompt=the dog", "--seed=5", "--dtype=float32",
            "--width=64", "--height=64", "--steps=3", "--cfg_scale=5", f"--output_dir={tmp_path / name}", *words,
        ]  # fmt: skip
        (path,) = sdxl_inference.run(given)
        made[name] = Image.open(path).tobytes()
    assert made["none"] == made["unguided"] and made["all"] == made["plain"]
    assert len(set(made.values())) == len(made) - 2
