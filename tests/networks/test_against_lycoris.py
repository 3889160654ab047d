"""Layers of the LyCORIS package and ours: the same output of the forward pass, from the tensors that it would write."""

import pytest
import torch
from torch import nn

from library.core.registry import import_target
from networks.kinds.factorization import factorization, power_of_two_blocks
from networks.kinds.network_args import NetworkSettings
from networks.kinds.network_base import module_from_tensors
from networks.kinds.registry import known_kind_of, weight_change
from networks.kinds.targets import Layer

pytest.importorskip("lycoris")
functional = (
    import_target("lycoris.functional.general:factorization"),
    import_target("lycoris.functional.general:power2factorization"),
)

MODULES = {
    "lora": "lycoris.modules.locon:LoConModule",
    "loha": "lycoris.modules.loha:LohaModule",
    "lokr": "lycoris.modules.lokr:LokrModule",
    "glora": "lycoris.modules.glora:GLoRAModule",
    "diag_oft": "lycoris.modules.diag_oft:DiagOFTModule",
    "boft": "lycoris.modules.boft:ButterflyOFTModule",
}
LAYERS = {
    "linear": lambda: nn.Linear(48, 64),
    "odd": lambda: nn.Linear(35, 21, bias=False),
    "prime": lambda: nn.Linear(13, 17),
    "conv1x1": lambda: nn.Conv2d(12, 20, 1),
    "conv3x3": lambda: nn.Conv2d(12, 20, 3, stride=2, padding=1),
    "conv5x3": lambda: nn.Conv2d(9, 15, (5, 3), padding=(2, 0), dilation=2),
}
WAYS = {
    "lora": ({}, {"use_tucker": True}, {"rs_lora": True}, {"use_scalar": True}, {"weight_decompose": True}),
    "loha": ({}, {"use_tucker": True}, {"rs_lora": True}, {"use_scalar": True}, {"weight_decompose": True, "wd_on_out": False}),
    "lokr": (
        {}, {"factor": 8}, {"factor": 4, "use_tucker": True}, {"decompose_both": True}, {"full_matrix": True},
        {"use_scalar": True},
        {"unbalanced_factorization": True, "factor": 2}, {"factor": 5, "weight_decompose": True},
        {"rs_lora": True, "factor": 2},
    ),
    "glora": ({}, {"use_scalar": True}),
    "diag_oft": ({}, {"constraint": 0.01}, {"rescaled": True}),
    "boft": ({}, {"constraint": 0.01}, {"rescaled": True}),
}  # fmt: skip

UNDEFINED = {("boft", "odd"), ("boft", "prime"), ("boft", "conv5x3"), ("diag_oft", "prime")}
"""rows that are no even number times a power of two, or that only blocks of one row divide"""


def cells():
    for name, ways in WAYS.items():
        for number, way in enumerate(ways):
            for layer in LAYERS:
                if (name, layer) not in UNDEFINED:
                    yield pytest.param(name, way, layer, id=f"{name}-{number}-{layer}")


def their_module(name, way, layer, generator):
    """A module of LyCORIS with random values, whose forward is ready to be called."""
    rank = {"lokr": 1, "boft": 20}.get(name, 3)
    module = import_target(MODULES[name])("name", layer, 1.0, rank, 1.7, **way)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(parameter + 0.3 * torch.randn(parameter.shape, generator=generator))
        if way.get("use_scalar"):
            module.scalar.fill_(0.8)
    module.apply_to()
    return module.eval()


@pytest.mark.parametrize(("name", "way", "layer_name"), list(cells()))
def test_forward_is_that_of_lycoris(name, way, layer_name):
    torch.manual_seed(11)
    generator = torch.Generator().manual_seed(5)
    layer = LAYERS[layer_name]()
    weight = layer.weight.detach().clone()
    shape = (3, 4, layer.in_features) if isinstance(layer, nn.Linear) else (2, layer.in_channels, 12, 9)
    x = torch.randn(shape, generator=generator)
    with torch.no_grad():
        plain = layer(x)
        theirs = their_module(name, way, layer, generator)
        expected = theirs.forward(x)
        layer.forward = theirs.org_forward
        written = theirs.custom_state_dict() if hasattr(theirs, "custom_state_dict") else theirs.state_dict()
        tensors = {
            key: tensor.detach().clone()
            for key, tensor in (written or theirs.state_dict()).items()
            if "org_" not in key
        }
        assert not torch.allclose(plain, expected, atol=1e-3)

        kind = known_kind_of(tensors, "name")
        ours = module_from_tensors(tensors, Layer("name", "name", layer), None, 1.0, NetworkSettings())
        ours.load_file_tensors(tensors)
        ours.eval().apply_to()
        tolerance = {"rtol": 1e-4, "atol": 1e-4 * float(expected.abs().max())}
        torch.testing.assert_close(layer(x), expected, **tolerance)
        ours.remove_from()
        layer.weight.copy_(weight + weight_change(tensors, weight, 1.0))
        torch.testing.assert_close(layer(x), expected, **tolerance)
        assert set(ours.file_tensors()) == set(tensors), kind.name


@pytest.mark.parametrize("factor", [-1, 1, 2, 3, 4, 7, 8, 16, 64, 1000])
def test_factors_are_those_of_lycoris(factor):
    for size in (*range(1, 130), 320, 640, 1280, 2304, 3072, 9216, 12288, 15360, 21504):
        if size > 1:
            assert factorization(size, factor) == functional[0](size, factor), size
        if factor > 1:
            theirs = functional[1](size, factor)
            assert power_of_two_blocks(size, factor) == (theirs if theirs[1] else None), size


NETWORKS = (
    {"algo": "lora", "use_tucker": "True"}, {"algo": "loha", "use_tucker": "True"}, {"algo": "loha", "dora_wd": "True"},
    {"algo": "lokr", "factor": "4", "decompose_both": "True"},
    {"algo": "lokr", "use_tucker": "True", "use_scalar": "True"},
    {"algo": "glora"}, {"algo": "diag-oft", "constraint": "0.01", "rescaled": "True"}, {"algo": "boft"},
)  # fmt: skip


@pytest.mark.parametrize("family", ["sd", "sdxl"])
@pytest.mark.parametrize("pairs", NETWORKS, ids=lambda pairs: "-".join(pairs.values()))
def test_files_that_lycoris_trained_load(family, pairs, tmp_path):
    """Layers that LyCORIS trains and we would not (conv_in, the time embedding, ...) are loaded all the same."""
    import lycoris.kohya

    from networks.lora import create_network_from_weights
    from tests.networks.tiny_denoisers import tiny_denoiser

    model, inputs = tiny_denoiser(family)
    torch.manual_seed(3)
    theirs = lycoris.kohya.create_network(1.0, 4, 1.0, None, [], model, conv_dim="4", conv_alpha="2", **pairs)
    theirs.apply_to([], model, False, True)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
        theirs.eval()
        expected = model(*inputs)
        theirs.save_weights(str(tmp_path / "theirs.safetensors"), torch.float32, {})
        for module in theirs.loras:
            module.org_module[0].forward = module.org_forward
        plain = model(*inputs)
        assert not torch.allclose(plain, expected, atol=1e-3)
        ours, tensors = create_network_from_weights(
            1.0, str(tmp_path / "theirs.safetensors"), None, [None, None], model
        )
        assert len(ours.unet_loras) == len(theirs.unet_loras)
        names = {module.lora_name for module in ours.unet_loras}
        assert (
            family == "sdxl"
            or {"lora_unet_conv_in", "lora_unet_conv_out", "lora_unet_time_embedding_linear_1"} <= names
        )
        ours.load_tensors(tensors)
        ours.apply_to(None, model, False, True)
        ours.eval()
        torch.testing.assert_close(model(*inputs), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", ["sd", "sdxl"])
@pytest.mark.parametrize("algo", ["lora", "loha"])
def test_norms_that_lycoris_trained_load_and_merge(family, algo, tmp_path):
    """Norms beside other layers in one file: LyCORIS adds w_norm and b_norm to the weight and bias of a norm."""
    import lycoris.kohya

    from networks.files.network_files import by_module
    from networks.lora import create_network_from_weights
    from tests.networks.tiny_denoisers import tiny_denoiser

    model, inputs = tiny_denoiser(family)
    torch.manual_seed(3)
    theirs = lycoris.kohya.create_network(1.0, 4, 1.0, None, [], model, algo=algo, train_norm="True")
    theirs.apply_to([], model, False, True)
    generator = torch.Generator().manual_seed(9)
    path = str(tmp_path / "theirs.safetensors")
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.add_((0.3 if "norm" in name else 0.02) * torch.randn(parameter.shape, generator=generator))
        theirs.eval()
        expected = model(*inputs)
        theirs.save_weights(path, torch.float32, {})
        for module in theirs.loras:
            module.org_module[0].forward = module.org_forward
        ours, tensors = create_network_from_weights(1.0, path, None, [None, None], model)
        parts = by_module(tensors)
        norms = {name for name, part in parts.items() if "w_norm" in part}
        assert norms and len(norms) < len(parts) and len(ours.unet_loras) == len(theirs.loras)
        ours.load_tensors(tensors)
        ours.apply_to(None, model, False, True)
        ours.eval()
        torch.testing.assert_close(model(*inputs), expected, rtol=1e-3, atol=1e-4)
        assert {module.lora_name for module in ours.unet_loras if hasattr(module, "w_norm")} == norms
        for module in ours.unet_loras:
            module.enabled = module.lora_name not in norms
        assert not torch.allclose(model(*inputs), expected, rtol=1e-2, atol=1e-3)
        ours.remove_from()
        ours.merge_to(None, model, tensors)
        torch.testing.assert_close(model(*inputs), expected, rtol=1e-3, atol=1e-4)
