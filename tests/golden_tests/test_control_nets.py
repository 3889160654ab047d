"""New ControlNets against the reference files: what a fresh one is made of, the keys of files, parts with own rates."""

from __future__ import annotations

import hashlib

import pytest
import torch

from library.checkpoints.control_net_convert import control_net_to_original
from library.checkpoints.loading import build_on_meta
from library.components.control_nets import control_nets_of
from library.components.unet_control_net_models import UNetControlNet
from library.components.unet_models import UNetParams
from library.flux_control_net_models import FluxControlNet
from library.flux_models import FluxParams
from library.flux_utils import inspect_flow_model
from library.safetensors_utils import save_file_atomic
from library.sd_utils import inspect_sd_unet
from library.sdxl_utils import inspect_sdxl_unet
from tests.golden_dir import behaviour, load_golden

V2 = {"context_dim": 1024, "heads": (5, 10, 20, 20), "use_linear_projection": True}
XL = {
    "channels": (320, 640, 1280),
    "attention_levels": (False, True, True),
    "transformer_depth": (0, 2, 10),
    "middle_depth": 10,
    "heads": (5, 10, 20),
    "context_dim": 2048,
    "use_linear_projection": True,
    "adm_in_channels": 2816,
}


def unet_net(**params: object) -> torch.nn.Module:
    return build_on_meta(lambda: UNetControlNet(UNetParams(**params)))


REAL = {
    "control_net_sd1": ("sd", unet_net),
    "control_net_sd2": ("sd", lambda: unet_net(**V2)),
    "control_net_sdxl": ("sdxl", lambda: unet_net(**XL)),
    "control_net_flux": (
        "flux",
        lambda: build_on_meta(lambda: FluxControlNet(FluxParams(depth=2, depth_single_blocks=0))),
    ),
}


@pytest.mark.parametrize(
    ("name", "family", "part", "inspect"),
    [
        ("control_net_sd1", "sd", "unet", inspect_sd_unet),
        ("control_net_sdxl", "sdxl", "unet", inspect_sdxl_unet),
        ("control_net_flux", "flux", "flux", inspect_flow_model),
    ],
)
def test_a_new_net_is_made_of_the_base(tmp_path, name, family, part, inspect):
    weights, inputs, _, config = load_golden(name)
    base = {key.removeprefix(f"{part}/"): value for key, value in weights.items() if key.startswith(f"{part}/")}
    save_file_atomic(base, tmp_path / "base.safetensors")
    nets = control_nets_of(family)
    info = inspect(tmp_path / "base.safetensors", config[part])
    net = nets.made_from(info, torch.Generator().manual_seed(1), torch.float32, "cpu")
    state, expected = nets.file_state(net), config["init_from_base"]
    assert set(state) == {*expected["copied"], *expected["zero"], *expected["random"]}
    named = {**base, **nets.base_state(info, net.state_dict(), torch.float32, False)}  # SDXL: files have other names
    assert all(torch.equal(state[key], named[key]) for key in expected["copied"])
    assert not any(state[key].any() for key in expected["zero"])
    assert all(state[key].std() > 0 for key in expected["random"])
    given = dict(inputs)
    picture = given.pop("conditioning_image")
    assert not any(residual.any() for residual in net(picture, **given))


@pytest.mark.parametrize("name", REAL)
def test_files_have_the_known_keys(name):
    layout, (family, build) = behaviour("diffusers_layouts.json")["layouts"][name], REAL[name]
    net, nets = build(), control_nets_of(family)
    original = dict(net.state_dict()) if family == "flux" else control_net_to_original(net.state_dict())
    found = {"original_names": original, "diffusers_names": nets.diffusers_state(net)}
    for naming, state in found.items():
        keys = sorted(state)
        digest = hashlib.sha256("".join(f"{key}\n" for key in keys).encode()).hexdigest()
        assert (len(keys), digest) == (layout[naming]["count"], layout[naming]["hash"]), naming
    assert set(nets.file_state(net)) == set(found[layout["saved_by_peer"]])
    assert sum(tensor.numel() for tensor in net.state_dict().values()) == layout["values"]


def test_new_layers_are_those_with_a_rate_of_their_own():
    expected = behaviour("param_groups.json")["sdxl_control_net_rates"]
    parameters, new = REAL["control_net_sdxl"][1]().named_parameters(), control_nets_of("sdxl").new_layers
    parts = {True: [0, 0], False: [0, 0]}
    for name, parameter in parameters:
        counts = parts[name.startswith(new)]
        counts[0], counts[1] = counts[0] + 1, counts[1] + parameter.numel()
    assert parts == {True: expected["control_net_lr"]["counts"], False: expected["learning_rate"]["counts"]}
