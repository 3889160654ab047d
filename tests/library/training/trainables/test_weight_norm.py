"""Norms of adapter weights stay below the limit and reach the log."""

from types import SimpleNamespace

import pytest
import torch

from library.training.hooks.losses import LossReader
from library.training.trainables.weight_norm import WeightNormHook
from networks import lora_flux
from tests.library.test_flux_train_utils import tiny_denoiser
from tests.library.training.hooks.small_run import small_run


def network_with_large_weights():
    network = lora_flux.create_network(1.0, 4, 4.0, None, [None, None], tiny_denoiser())
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.fill_(2.0)
        for lora in network.loras:
            for parameter in lora.parameters():
                parameter.fill_(2.0)
    return network


def test_large_weights_are_scaled_and_the_norms_are_logged():
    network = network_with_large_weights()
    hook = WeightNormHook(SimpleNamespace(network=network), max_norm=1.0)
    run = small_run([LossReader(), hook])
    hook.on_post_optimizer_step(run)
    logs = hook.extra_step_logs(run)
    assert logs["max_norm/keys_scaled"] == len(network.loras)
    assert float(logs["max_norm/max_key_norm"]) == pytest.approx(1.0, rel=1e-4)
    assert float(logs["norm/avg_key_norm"]) <= 1.0 + 1e-4
    kept = [parameter.detach().clone() for parameter in network.parameters()]
    hook.on_post_optimizer_step(run)  # as far as rounding tells, nothing is above the limit
    for before, after in zip(kept, network.parameters(), strict=True):
        torch.testing.assert_close(after, before, rtol=1e-5, atol=0)


def test_a_network_without_norms_of_its_own_logs_nothing():
    hook = WeightNormHook(SimpleNamespace(network=network_with_large_weights()), max_norm=None)
    run = small_run([hook])
    hook.on_gradients_ready(run)
    hook.on_post_optimizer_step(run)
    assert hook.extra_step_logs(run) == {}
