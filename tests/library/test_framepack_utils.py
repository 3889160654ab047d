"""FramePack: files and their sizes, memory savers, captions that are padded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from library.checkpoints.loading import build_on_meta
from library.core.errors import CheckpointError
from library.framepack_models import CleanFrames, FramePackParams, HunyuanVideoTransformer3DModelPacked
from library.framepack_utils import (
    DENOISER_PREFIXES,
    denoiser_state,
    inspect_framepack,
    load_framepack,
    save_framepack,
)
from library.safetensors_utils import save_file_atomic
from tests.library.test_flux_utils import empty_checkpoint, key_table
from tests.tiny import random_state

PARAMS = FramePackParams(
    num_attention_heads=2, attention_head_dim=32, num_layers=2, num_single_layers=3, num_refiner_layers=1,
    mlp_ratio=2.0, text_embed_dim=20, pooled_projection_dim=12, image_proj_dim=10, rope_axes_dim=(4, 14, 14),
)  # fmt: skip


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    made = build_on_meta(lambda: HunyuanVideoTransformer3DModelPacked(PARAMS))
    return random_state(made, torch.Generator().manual_seed(1))


def inputs(rows: int = 1) -> dict:
    draws = torch.Generator().manual_seed(3)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(1, *shape, generator=draws).repeat(rows, *[1] * len(shape))

    places = {name: torch.tensor([row]).repeat(rows, 1) for name, row in (
        ("noisy", [1, 2]), ("near", [0, 3]), ("middle", [4, 5]), ("far", [6, 7, 8, 9]),
    )}  # fmt: skip
    frames = {name: (drawn(16, row.shape[1], 4, 6), row) for name, row in places.items()}
    noisy, indices = frames.pop("noisy")
    return {
        "hidden_states": noisy, "latent_indices": indices, "clean": CleanFrames(**frames),
        "timestep": torch.tensor([130.0]).repeat(rows), "text_states": drawn(7, 20), "text_mask": None,
        "pooled": drawn(12), "image_embeddings": drawn(5, 10), "guidance": torch.tensor([1000.0]).repeat(rows),
    }  # fmt: skip


@torch.no_grad()
def run(model: torch.nn.Module, **changed: object) -> torch.Tensor:
    return model(**{**inputs(), **changed})


@pytest.fixture(scope="module")
def file(state, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("framepack") / "model.safetensors"
    save_file_atomic(state, path)
    return path


def test_the_real_denoiser_is_recognised_and_has_the_real_keys(tmp_path: Path) -> None:
    shapes = key_table("framepack")
    info = inspect_framepack(empty_checkpoint(tmp_path / "x.safetensors", shapes))
    assert info.params == FramePackParams() and info.dtypes == {torch.bfloat16}
    model = build_on_meta(lambda: HunyuanVideoTransformer3DModelPacked(info.params))
    assert {key: list(tensor.shape) for key, tensor in model.state_dict().items()} == shapes


def test_a_denoiser_under_every_prefix_in_folders_and_written_again(state, file: Path, tmp_path: Path) -> None:
    def check(place: Path) -> None:
        read = load_framepack(place, torch.float32, "cpu").state_dict()
        assert read.keys() == state.keys() and all(torch.equal(read[key], tensor) for key, tensor in state.items())

    for prefix in DENOISER_PREFIXES:
        prefixed = {prefix + key: tensor for key, tensor in state.items()}
        save_file_atomic(prefixed, tmp_path / "x.safetensors")
        check(tmp_path / "x.safetensors")
        assert denoiser_state(prefixed).keys() == state.keys()
    folder = tmp_path / "pipeline" / "transformer"
    folder.mkdir(parents=True)
    save_framepack(load_framepack(file, torch.float32, "cpu"), folder / "diffusion_pytorch_model.safetensors")
    check(folder)
    check(folder.parent)


def test_files_that_do_not_fit(state, tmp_path: Path) -> None:
    save_file_atomic({key: tensor for key, tensor in state.items() if "proj_2x" not in key}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="no FramePack denoiser .it lacks clean_x_embedder.proj_2x.weight"):
        inspect_framepack(tmp_path / "a.safetensors")
    save_file_atomic({**state, "proj_out.more": torch.ones(2)}, tmp_path / "b.safetensors")
    with pytest.raises(CheckpointError, match="1 keys are unknown: proj_out.more"):
        inspect_framepack(tmp_path / "b.safetensors")
    save_file_atomic(state, tmp_path / "c.safetensors")
    with pytest.raises(CheckpointError, match="rope_axes_dim is .4, 4, 4.; it needs three even numbers"):
        inspect_framepack(tmp_path / "c.safetensors", {"rope_axes_dim": (4, 4, 4)})


def test_a_row_of_a_batch_is_what_it_is_alone_whatever_pads_its_caption(file: Path) -> None:
    model, given = load_framepack(file, torch.float32, "cpu"), inputs(2)
    alone = run(model)
    given["text_states"] = torch.cat((given["text_states"], torch.full((2, 3, 20), 9.0)), dim=1)
    given["text_mask"] = torch.tensor([[1] * 7 + [0] * 3] * 2)
    with torch.no_grad():
        both = model(**given)
    for row in both:
        torch.testing.assert_close(row[None], alone, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="needs one scale per sample"):
        run(model, guidance=None)


def test_weights_in_8_bits_stay_close(file: Path) -> None:
    expected = run(load_framepack(file, torch.float32, "cpu"))
    scaled = load_framepack(file, torch.float32, "cpu", form="fp8_scaled")
    small = {name for name, weight in scaled.named_parameters() if weight.dtype == torch.float8_e4m3fn}
    assert len(small) == 2 * 12 + 3 * 5 and not any("norm" in name for name in small)
    assert 1e-4 < ((run(scaled) - expected).norm() / expected.norm()).item() < 0.05


def test_blocks_that_wait_and_activations_that_are_made_again(file: Path) -> None:
    """On a CPU nothing moves, and gradients are the same with checkpoints."""
    gradients = []
    for is_checkpointed in (False, True):
        model = load_framepack(file, torch.float32, "cpu").train().requires_grad_(True)
        if is_checkpointed:
            model.enable_gradient_checkpointing()
            model.enable_block_swap(0, torch.device("cpu"))
        model(**inputs()).square().sum().backward()
        gradients.append({name: weight.grad for name, weight in model.named_parameters()})
    assert all(torch.equal(gradients[0][name], grad) for name, grad in gradients[1].items())
    assert len(model.repeated_blocks()) == 5
    with pytest.raises(ValueError, match="with 2 double and 3 single blocks allows at most 2"):
        model.enable_block_swap(3, torch.device("cpu"))
