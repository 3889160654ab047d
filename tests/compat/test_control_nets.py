"""ControlNets by their known names: tensors in both layouts, datasets with conditioning images."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from library import model_util, train_util
from library.core.errors import ConfigError
from tests.compat.test_datasets import SIZE
from tests.runs.conftest import draw_pictures
from tests.tiny import build_tiny_sd


@pytest.fixture(scope="module")
def state(tmp_path_factory) -> dict[str, torch.Tensor]:
    """A ControlNet's file: the way down of its U-Net, and what it has beside that."""
    prefix = "model.diffusion_model."
    file = load_file(build_tiny_sd(tmp_path_factory.mktemp("sd"), "sd1").model)
    unet = {key.removeprefix(prefix): tensor for key, tensor in file.items() if key.startswith(prefix)}
    parts = {key: tensor for key, tensor in unet.items() if key.startswith(("input_blocks.", "middle_block.", "time_embed."))}
    blocks = len({key.split(".")[1] for key in parts if key.startswith("input_blocks.")})
    own = [f"zero_convs.{number}.0" for number in range(blocks)] + ["middle_block_out.0"]
    own += [f"input_hint_block.{number}" for number in range(0, 15, 2)]
    return parts | {f"{name}.{kind}": torch.randn(2) for name in own for kind in ("weight", "bias")}


def test_names_of_a_control_net_there_and_back(state):
    names = model_util.convert_controlnet_state_dict_to_diffusers({f"control_model.{key}": t for key, t in state.items()})
    expected = {
        "controlnet_cond_embedding.conv_in.weight": "input_hint_block.0.weight",
        "controlnet_cond_embedding.blocks.0.bias": "input_hint_block.2.bias",
        "controlnet_cond_embedding.blocks.5.bias": "input_hint_block.12.bias",
        "controlnet_cond_embedding.conv_out.weight": "input_hint_block.14.weight",
        "controlnet_down_blocks.3.weight": "zero_convs.3.0.weight", "controlnet_mid_block.bias": "middle_block_out.0.bias",
        "conv_in.weight": "input_blocks.0.0.weight",
        "down_blocks.0.resnets.0.norm1.weight": "input_blocks.1.0.in_layers.0.weight",
        "time_embedding.linear_1.weight": "time_embed.0.weight",
    }
    assert all(names[name] is state[original] for name, original in expected.items())
    back = model_util.convert_controlnet_state_dict_to_sd(names)
    assert set(back) == set(state) and all(back[key] is tensor for key, tensor in state.items())
    assert model_util.convert_controlnet_state_dict_to_diffusers(names).keys() == names.keys()


def test_a_dataset_by_hand_has_its_conditioning_images(tmp_path):
    images, masks = draw_pictures(tmp_path / "images", 2), tmp_path / "masks"
    masks.mkdir()
    for path in images.glob("*.png"):
        Image.fromarray(np.full((64, 64, 3), 255, np.uint8)).save(masks / path.name)
    subset = train_util.ControlNetSubset(str(images), str(masks), ".txt", num_repeats=3)
    dataset = train_util.ControlNetDataset([subset], batch_size=2, **SIZE)
    group = train_util.DatasetGroup([dataset])
    assert group.num_train_images == 6 and len(group) == 3
    batch = group[0]
    assert batch["conditioning_images"].shape == batch["images"].shape and float(batch["conditioning_images"].min()) == 1
    next(iter(masks.iterdir())).unlink()
    with pytest.raises(ConfigError, match="has no image named"):
        train_util.ControlNetDataset([subset], batch_size=2, **SIZE)
