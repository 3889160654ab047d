"""Flow denoisers take a time per token and give the tokens after a block; equal times are the plain model."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from library import anima_train_utils, flux_train_utils, lumina_train_utils
from library.anima_models import Anima, AnimaParams
from library.tiny_models.weights import random_state
from tests.library.test_flux_train_utils import conditioning_of, tiny_denoiser
from tests.networks import tiny_denoisers

LATENTS = torch.randn(2, 16, 4, 6, generator=torch.Generator().manual_seed(3))
TOKENS = 6  # patches of 2 x 2


def anima() -> Anima:
    model = Anima(
        AnimaParams(model_channels=48, num_blocks=2, num_heads=2, mlp_ratio=2.0, context_dim=24, adaln_lora_dim=8)
    )
    model.load_state_dict(random_state(model, torch.Generator().manual_seed(0)))
    return model.eval().requires_grad_(False)


def of_flux() -> Callable:
    model, given = tiny_denoiser(), conditioning_of(2)
    return lambda times, **more: flux_train_utils.predict_velocity(model, LATENTS, times, given, guidance=3.0, **more)


def of_anima() -> Callable:
    states = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(1))
    ones = torch.ones(2, 5, dtype=torch.long)
    given, model = {"prompt_embeds": states, "attn_mask": ones, "t5_input_ids": ones, "t5_attn_mask": ones}, anima()
    return lambda times, **more: anima_train_utils.predict_velocity(model, LATENTS, times, given, **more)


def of_lumina() -> Callable:
    model, (_, _, states, mask) = tiny_denoisers.tiny_denoiser("lumina")
    given = {"hidden_state": states, "attention_mask": mask}
    return lambda times, **more: lumina_train_utils.predict_velocity(model, LATENTS, times, given, **more)


FAMILIES = pytest.mark.parametrize("make", [of_flux, of_anima, of_lumina])


@FAMILIES
def test_equal_times_of_all_tokens_are_the_plain_model(make: Callable) -> None:
    predict, times = make(), torch.tensor([300.0, 700.0])
    torch.testing.assert_close(predict(times[:, None].expand(-1, TOKENS)), predict(times), rtol=1e-4, atol=2e-6)


@FAMILIES
def test_a_time_belongs_to_its_token_and_sample(make: Callable) -> None:
    predict = make()
    times = torch.full((2, TOKENS), 300.0)
    plain = predict(times)
    times[1, 4] = 900.0  # row 1, column 1 of 2 x 3 patches
    changed = (predict(times) - plain).abs()
    assert changed[0].max() == 0
    patch = changed[1, :, 2:4, 2:4].mean()
    assert patch > 5 * changed[1, :, 0:2, 0:2].mean() and patch > 1e-3


@FAMILIES
@pytest.mark.parametrize("layer", [0, 1])
def test_features_come_beside_the_same_velocity(make: Callable, layer: int) -> None:
    predict, times = make(), torch.tensor([300.0, 700.0])
    velocity, features = predict(times, feature_layer=layer)
    assert torch.equal(velocity, predict(times))
    assert features.shape[:2] == (2, TOKENS) and not torch.equal(features, predict(times, feature_layer=1 - layer)[1])
