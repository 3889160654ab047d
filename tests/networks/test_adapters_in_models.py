"""Every adapter in a denoiser of every family: made, trained, saved, and made again from the file with the same
output."""

import importlib

import pytest
import torch

from networks.kinds.targets import targets_of_family
from networks.lora import create_network_from_weights as create_any_from_weights
from tests.networks.adapter_table import ADAPTERS
from tests.networks.tiny_denoisers import DENOISERS, tiny_denoiser
from tests.pairwise import Each, denoiser

STEPS = 2
RATE = 2e-4
"""small enough for kinds that change every weight by it in one step of AdamW"""


def no_encoders(family):
    return [None] * len(targets_of_family(family).text_encoders)


def trained_network(name, family, model, inputs, **more):
    """A network of the table's adapter after a few steps, applied and in eval mode; and the plain output."""
    adapter, encoders = ADAPTERS[name], no_encoders(family)
    module = importlib.import_module(adapter.module)
    network = module.create_network(1.0, adapter.rank, adapter.alpha, None, encoders, model, **adapter.pairs, **more)
    network.initialize(7)
    with torch.no_grad():
        plain = model(*inputs)
    network.apply_to(encoders, model, False, True)
    network.prepare_grad_etc()
    torch.testing.assert_close(model(*inputs), plain, rtol=1e-4, atol=1e-4)
    optimizer = torch.optim.AdamW(network.prepare_optimizer_params(None, RATE, RATE)[0])
    network.train()
    losses = []
    for _ in range(STEPS):
        loss = (model(*inputs) - plain * 0.5).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    return network.eval(), plain


CELLS = [
    (name, family) for name,
    adapter in ADAPTERS.items() for family in DENOISERS if not adapter.pairs or family == "flux"
]  # variants of an adapter meet one family: what they change happens inside a layer


@pytest.mark.cross_product("name", denoiser("family"), Each("family"))
@pytest.mark.parametrize(("name", "family"), CELLS)
def test_trained_saved_and_loaded(name, family, tmp_path):
    model, inputs = tiny_denoiser(family)
    network, plain = trained_network(name, family, model, inputs)
    path = str(tmp_path / "adapter.safetensors")
    network.save_weights(path, torch.float32, {"ss_a": "1"})
    with torch.no_grad():
        hooked = model(*inputs)
        network.remove_from()
        assert not torch.allclose(hooked, plain, atol=1e-4)
        encoders = no_encoders(family)
        for create in (
            importlib.import_module(ADAPTERS[name].module).create_network_from_weights,
            create_any_from_weights,
        ):
            again, tensors = create(1.0, path, None, encoders, model)
            assert again.load_weights(path) == {"missing": [], "unexpected": []}
            again.apply_to(encoders, model, False, True)
            again.eval()
            torch.testing.assert_close(model(*inputs), hooked, rtol=1e-5, atol=1e-5)
            again.remove_from()
            assert {key.partition(".")[2] for key in again.file_state_dict()} == {
                key.partition(".")[2] for key in tensors
            }
        merged, tensors = create_any_from_weights(1.0, path, None, encoders, model, for_inference=True)
        merged.merge_to(encoders, model, tensors)
        torch.testing.assert_close(model(*inputs), hooked, rtol=1e-3, atol=1e-4)
