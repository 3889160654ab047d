"""The Wan 2.1 / Qwen-Image autoencoder: both namings, key tables, and the classes of diffusers."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch

from library.checkpoints.loading import build_on_meta
from library.components import wan_vae_utils
from library.components.wan_vae_models import Stream, WanVAE, WanVAEParams
from library.core.errors import CheckpointError
from library.safetensors_utils import save_file_atomic
from tests.tiny import random_state

KEY_TABLES = Path(__file__).parents[1] / "golden" / "checkpoints"
PARAMS = WanVAEParams(dim=4, dim_mult=(1, 2, 2, 2), num_res_blocks=1)


def key_table(name: str) -> dict[str, list[int]]:
    with gzip.open(KEY_TABLES / f"{name}.json.gz", "rt") as file:
        return json.load(file)


def tiny() -> WanVAE:
    vae = WanVAE(PARAMS).eval().requires_grad_(False)
    vae.load_state_dict(random_state(vae, torch.Generator().manual_seed(2)))
    return vae


def pixels(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(3)) * 2 - 1


@pytest.mark.parametrize("name", ["vae_wan", "vae_qwen_image_diffusers"])
def test_full_size_model_has_the_keys_and_shapes_of_the_real_files(name: str) -> None:
    shapes = {key: torch.empty(shape, device="meta") for key, shape in key_table(name).items()}
    if name.endswith("diffusers"):
        shapes = wan_vae_utils.convert_diffusers_vae_to_wan(shapes)
    model = build_on_meta(lambda: WanVAE(WanVAEParams()))
    assert {key: tensor.shape for key, tensor in shapes.items()} == {
        key: tensor.shape for key, tensor in model.state_dict().items()
    }


@pytest.mark.parametrize("class_name", ["AutoencoderKLWan", "AutoencoderKLQwenImage"])
def test_folders_of_diffusers_load_and_agree(tmp_path: Path, class_name: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(1)
    reference = getattr(diffusers, class_name)(base_dim=4, z_dim=16, dim_mult=[1, 2, 2, 2], num_res_blocks=1).eval()
    for parameter in reference.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    reference.save_pretrained(tmp_path / "vae")
    vae = wan_vae_utils.load_wan_vae(tmp_path, torch.float32, "cpu")
    assert vae.params == PARAMS
    for video in (pixels(1, 3, 1, 16, 24), pixels(1, 3, 9, 16, 16)):
        with torch.no_grad():
            expected = reference.encode(video).latent_dist.mode()
            latents = vae.encode_mean(video)
            torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(
                vae.decode(vae.normalize(latents)), reference.decode(expected).sample, rtol=1e-3, atol=1e-4
            )


def test_an_image_is_the_first_frame_of_a_video() -> None:
    vae, video = tiny(), pixels(1, 3, 5, 16, 16)
    torch.testing.assert_close(vae.encode(video)[:, :, 0], vae.encode(video[:, :, 0]))
    latents = vae.encode(video)
    torch.testing.assert_close(vae.decode(latents)[:, :, 0], vae.decode(latents[:, :, 0]))


@pytest.mark.parametrize("rows", [2, 4, 64])
def test_computing_row_by_row_gives_equal_results(rows: int) -> None:
    vae, image = tiny(), pixels(2, 3, 32, 24)
    whole = vae.encode(image)
    decoded = vae.decode(whole)
    vae.set_chunk_rows(rows)
    torch.testing.assert_close(vae.encode(image), whole)
    torch.testing.assert_close(vae.decode(whole), decoded)


def test_what_is_remembered_can_wait_on_the_cpu(monkeypatch) -> None:
    """It is stored there and read where the autoencoder computes; the numbers stay."""
    vae, video = tiny(), pixels(1, 3, 9, 16, 16)
    expected = vae.encode(video)
    decoded = vae.decode(expected)
    vae.cache_on_cpu = True
    assert torch.equal(vae.encode(video), expected) and torch.equal(vae.decode(expected), decoded)
    moves, to = [], torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda self, place: moves.append(str(place)) or to(self, "cpu"))
    module, stream = torch.nn.Identity(), Stream(torch.device("cuda"))
    stream.remember(module, torch.ones(1, 1, 1, 2, 2))
    stream.remember(module, torch.ones(1, 1, 1, 2, 2))
    assert stream.before(module).shape[2] == 2 and moves == ["cpu", "cuda", "cpu", "cuda"]


def test_a_length_that_makes_no_whole_pieces_is_an_error() -> None:
    with pytest.raises(ValueError, match="7 frames"):
        tiny().encode_mean(pixels(1, 3, 7, 16, 16))


def test_unknown_number_of_channels_needs_statistics(tmp_path: Path) -> None:
    params = WanVAEParams(
        dim=4, z_dim=2, dim_mult=(1, 2, 2, 2), num_res_blocks=1, latents_mean=(0.0, 1.0), latents_std=(1.0, 2.0)
    )
    state = random_state(build_on_meta(lambda: WanVAE(params)), torch.Generator().manual_seed(2))
    save_file_atomic(state, tmp_path / "v.safetensors")
    with pytest.raises(CheckpointError, match="latents_mean"):
        wan_vae_utils.load_wan_vae(tmp_path / "v.safetensors", None, "cpu")
    save_file_atomic(
        state, tmp_path / "v.safetensors", {"model_config": json.dumps({"latents_mean": [0, 1], "latents_std": [1, 2]})}
    )
    assert wan_vae_utils.load_wan_vae(tmp_path / "v.safetensors", None, "cpu").params == params


def test_another_autoencoder_is_named(tmp_path: Path) -> None:
    save_file_atomic({"encoder.down.0.block.0.norm1.weight": torch.zeros(2)}, tmp_path / "v.safetensors")
    with pytest.raises(CheckpointError, match="holds no Wan 2.1 / Qwen-Image autoencoder"):
        wan_vae_utils.inspect_wan_vae(tmp_path / "v.safetensors")
