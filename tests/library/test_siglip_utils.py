"""The image encoder of SigLIP against transformers: states, and what is made of pictures; files of every form."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from library.components import siglip_utils
from library.components.siglip_utils import encode_pictures, inspect_siglip, load_siglip, resized_pictures
from library.core.errors import CheckpointError
from tests.runs.families import key_table, write_header_only

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def theirs() -> torch.nn.Module:
    torch.manual_seed(2)
    config = transformers.SiglipVisionConfig(
        hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3, image_size=45, patch_size=14
    )
    model = transformers.SiglipVisionModel(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(scope="module")
def pictures() -> torch.Tensor:
    levels = torch.randint(0, 256, (2, 3, 40, 64), generator=torch.Generator().manual_seed(1))
    return levels.float() / 127.5 - 1


@torch.no_grad()
def test_states_of_every_form_of_file(theirs: torch.nn.Module, pictures: torch.Tensor, tmp_path: Path) -> None:
    """A folder, the same as part of a pipeline, and one file under the names of older versions, which shapes and an
    entry of its metadata describe."""
    theirs.save_pretrained(tmp_path / "pipeline" / "image_encoder")
    bare = {key.removeprefix("vision_model."): tensor for key, tensor in theirs.state_dict().items()}
    file = tmp_path / "model.safetensors"
    old = {f"vision_model.{key}": tensor for key, tensor in bare.items()}
    old["vision_model.embeddings.position_ids"] = torch.arange(9)[None]
    save_file(old, file, {"model_config": '{"num_attention_heads": 3, "image_size": 45}'})
    expected = theirs(resized_pictures(pictures, 45)).last_hidden_state
    for place in (tmp_path / "pipeline", tmp_path / "pipeline" / "image_encoder", file):
        states = encode_pictures(load_siglip(place, torch.float32, "cpu"), pictures)
        assert states.shape == (2, 9, 24)
        assert ((states - expected).norm() / expected.norm()).item() < 1e-5


def test_pictures_are_resized_as_the_encoder_was_trained(pictures: torch.Tensor) -> None:
    """To the byte, as the image processor does."""
    processor = transformers.SiglipImageProcessorPil if hasattr(transformers, "SiglipImageProcessorPil") else None
    processor = (processor or transformers.SiglipImageProcessor)(size={"height": 45, "width": 45})
    whole = ((pictures + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    expected = torch.as_tensor(processor(list(whole), return_tensors="pt")["pixel_values"])
    torch.testing.assert_close(resized_pictures(pictures, 45), expected, rtol=0, atol=1e-5)


def test_the_released_file_and_wrong_ones(tmp_path: Path, theirs: torch.nn.Module) -> None:
    write_header_only(tmp_path / "released.safetensors", key_table("siglip_so400m"))
    params = inspect_siglip(tmp_path / "released.safetensors")
    assert params == siglip_utils.SiglipParams()
    write_header_only(tmp_path / "clip.safetensors", key_table("clip_l"))
    with pytest.raises(CheckpointError, match="holds no SigLIP image encoder"):
        inspect_siglip(tmp_path / "clip.safetensors")
    with pytest.raises(CheckpointError, match="image_size is 60, which has 16 patches of 14 pixels; the file has.* 9"):
        theirs.save_pretrained(tmp_path / "folder")
        inspect_siglip(tmp_path / "folder", {"image_size": 60})
