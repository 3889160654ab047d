"""ControlNet-LLLite against the reference files: its modules at the real size of SDXL, and what a new one is."""

from __future__ import annotations

import hashlib

import pytest
import torch

from library.checkpoints.loading import build_on_meta
from library.components.lllite_models import STRIDES, LLLite, new_shapes
from library.components.unet_models import UNetParams
from library.sdxl_models import SdxlUNet2DConditionModel
from tests.golden_dir import behaviour, load_golden
from tests.library.test_unet_utils import SDXL


@pytest.fixture(scope="module")
def unet() -> SdxlUNet2DConditionModel:
    """The U-Net of SDXL without its weights."""
    return build_on_meta(lambda: SdxlUNet2DConditionModel(SDXL))


def test_modules_at_the_size_of_the_real_model(unet):
    wanted = behaviour("lllite_modules.json.gz")
    shapes = new_shapes(unet, 32, 64)
    depths = {strides: depth for depth, strides in STRIDES.items()}
    assert [[name, depths[shape.strides], shape.width] for name, shape in shapes.items()] == wanted["modules"]
    with torch.device("meta"):
        net = LLLite(unet, shapes)
    state = net.state_dict()
    assert (len(shapes), len(state)) == (wanted["count"], wanted["keys"])
    assert sum(tensor.numel() for tensor in state.values()) == wanted["values"]
    listed = "".join(f"{key}\n" for key in sorted(state)).encode()
    assert hashlib.sha256(listed).hexdigest() == wanted["key_hash"]
    for depth in (2, 3):
        name = next(name for name, shape in shapes.items() if depths[shape.strides] == depth)
        tensors = {key.partition(".")[2]: list(state[key].shape) for key in state if key.startswith(f"{name}.")}
        assert tensors == wanted["shapes"][f"depth_{depth}"]


def test_depths_of_the_reference_model():
    weights, _, _, config = load_golden("lllite_sdxl")
    sizes = {key: value for key, value in config["unet"].items() if key not in ("latent_hw", "context_len")}
    unet = build_on_meta(lambda: SdxlUNet2DConditionModel(UNetParams(**sizes)))
    shapes = new_shapes(unet, config["cond_emb_dim"], config["mlp_dim"])
    assert {name: shape.strides for name, shape in shapes.items()} == {
        name: STRIDES[depth] for name, depth in config["depths"].items()
    }
    with torch.device("meta"):
        assert LLLite(unet, shapes).state_dict().keys() == {
            key.removeprefix("lllite/") for key in weights if key.startswith("lllite/")
        }
