"""A resized file in PEFT's naming acts in diffusers as it does here, with ranks that differ by layer."""

import json

import pytest
import torch
from safetensors import safe_open

from library.safetensors_utils import load_safetensors, save_file_atomic
from networks.files.lora_conversion import to_diffusers
from networks.lora import create_network, create_network_from_weights
from tests.networks.test_diffusers import outputs, twin_models
from tools.lora_tools.resize import main

pytest.importorskip("peft")


@pytest.mark.parametrize("with_settings", [False, True])
def test_same_output(tmp_path, with_settings):
    theirs, ours = twin_models()
    network = create_network(1.0, 6, 3.0, None, [None, None], ours)
    generator = torch.Generator().manual_seed(3)
    for parameter in (parameter for lora in network.unet_loras for parameter in lora.parameters()):
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    tensors = to_diffusers("flux", network.file_state_dict())
    metadata = {}
    if with_settings:  # a file that diffusers wrote: the scale is in its settings
        settings = {
            "r": 6,
            "lora_alpha": 3,
            "target_modules": sorted({key.partition(".")[2].rpartition(".lora_")[0] for key in tensors}),
        }
        metadata = {
            "lora_adapter_metadata": json.dumps({f"transformer.{key}": value for key, value in settings.items()})
        }
    source, out = str(tmp_path / "in.safetensors"), tmp_path / "out.safetensors"
    save_file_atomic(tensors, source, metadata)
    assert (
        main(
            [
                "--model",
                source,
                "--save_to",
                str(out),
                "--new_rank",
                "6",
                "--dynamic_method",
                "sv_fro",
                "--dynamic_param",
                "0.8",
            ]
        )
        == 0
    )
    found = load_safetensors(out)
    assert len({tensor.shape[0] for key, tensor in found.items() if "lora_A" in key}) > 1 and not any(
        "alpha" in key for key in found
    )
    network, _ = create_network_from_weights(1.0, str(out), None, [None, None], ours, for_inference=True)
    plain, _ = outputs(theirs, ours)
    network.apply_to([None, None], ours, True, True)
    network.load_weights(str(out))
    with safe_open(out, "pt") as file:
        written = json.loads(file.metadata()["lora_adapter_metadata"])
    theirs.load_lora_adapter(dict(found), prefix="transformer", metadata=written)
    with_theirs, with_ours = outputs(theirs, ours)
    assert (with_theirs - plain).abs().max() > 0.05
    torch.testing.assert_close(with_theirs, with_ours, rtol=1e-4, atol=1e-4)
