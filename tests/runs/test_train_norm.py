"""`train_norm=True` through the command line: norms are trained beside the adapter, and the file gives the same output
again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from networks.files.network_files import by_module
from networks.lora import create_network_from_weights
from tests.networks.adapter_table import Adapter
from tests.runs.test_adapters import family, losses_of, options_of, train  # noqa: F401 - family is a fixture

KINDS = {
    "lora": Adapter("networks.lora", {"train_norm": "True"}),
    "lokr": Adapter("networks.lokr", {"factor": "2", "train_norm": "True"}),
}
CELLS = [("sd", "lora"), ("flux", "lora"), ("sdxl", "lokr"), ("anima", "lora"), ("lumina", "lora")]


@pytest.mark.parametrize(("family", "kind"), CELLS, indirect=["family"])
def test_norms_are_trained_written_read_and_merged(family, kind: str, tmp_path: Path) -> None:  # noqa: F811
    run, batches = train(family, tmp_path, *options_of(KINDS[kind], family[0]))
    network = run.trainable.network
    norms = [module for module in network.loras if hasattr(module, "w_norm")]
    assert norms and len(norms) < len(network.loras)
    assert all(
        bool(parameter.any()) for module in norms for parameter in module.parameters()
    )  # weights and biases learned
    after, few = losses_of(run, batches), batches[:2]
    for module in norms:
        module.enabled = False
    assert abs(sum(losses_of(run, few)) - sum(after[:2])) > 1e-4 * sum(after[:2])  # they do something
    network.set_enabled(False)
    before = losses_of(run, batches)
    assert sum(after) < sum(before)
    for module in network.loras:
        module.remove_from()

    file, encoders = tmp_path / "lora.safetensors", list(run.models.text_encoders)
    again, tensors = create_network_from_weights(
        1.0, str(file), None, encoders, run.models.denoiser, for_inference=True
    )
    parts = by_module(tensors)
    written = {name: set(part) for name, part in parts.items() if "w_norm" in part}
    assert set(written) == {module.lora_name for module in norms}
    for module in norms:
        has_bias = getattr(module.org_module, "bias", None) is not None
        assert written[module.lora_name] == ({"w_norm", "b_norm"} if has_bias else {"w_norm"}), module.lora_name
    again.apply_to(encoders, run.models.denoiser)
    assert again.load_weights(str(file)) == {"missing": [], "unexpected": []}
    assert losses_of(run, few) == pytest.approx(after[:2], rel=1e-6)
    again.remove_from()
    own = [module for module in again.loras if module.lora_name in written]
    originals = [getattr(module.org_module, module.weight_name).clone() for module in own]
    again.merge_to(encoders, run.models.denoiser, tensors)
    assert not any(
        torch.equal(getattr(module.org_module, module.weight_name), weight)
        for module, weight in zip(own, originals, strict=True)
    )
    assert losses_of(run, few) == pytest.approx(after[:2], rel=1e-4)
