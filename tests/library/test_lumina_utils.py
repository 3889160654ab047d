"""The denoiser of Lumina-Image 2.0: sizes from shapes, the key table, layouts, ragged captions, and the model of
diffusers."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from library import lumina_utils
from library.checkpoints.loading import build_on_meta
from library.checkpoints.lumina_convert import UNUSED, to_diffusers, to_original
from library.core.errors import CheckpointError
from library.lumina_models import LuminaParams, NextDiT
from library.safetensors_utils import read_header, save_file_atomic
from tests.tiny import random_state

KEY_TABLES = Path(__file__).parents[1] / "golden" / "checkpoints"
PARAMS = LuminaParams(
    in_channels=4, dim=48, n_layers=3, n_refiner_layers=1, n_heads=4, n_kv_heads=2, ffn_hidden=64, axes_dims=(4, 4, 4),
    axes_lens=(300, 512, 512), cap_feat_dim=20, time_dim=48,
)  # fmt: skip


def tiny_state(params: LuminaParams = PARAMS, seed: int = 1) -> dict[str, torch.Tensor]:
    return random_state(build_on_meta(lambda: NextDiT(params)), torch.Generator().manual_seed(seed))


def tiny_model(params: LuminaParams = PARAMS) -> NextDiT:
    model = NextDiT(params)
    model.load_state_dict(tiny_state(params))
    return model.eval().requires_grad_(False)


def example(height: int = 6, width: int = 10) -> tuple[torch.Tensor, ...]:
    """Latents, times, states and the mask of ragged captions."""
    generator = torch.Generator().manual_seed(4)
    mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0, 0]])
    latents = torch.randn(2, PARAMS.in_channels, height, width, generator=generator)
    return latents, torch.tensor([0.2, 0.9]), torch.randn(2, 7, PARAMS.cap_feat_dim, generator=generator), mask


def relative(result: torch.Tensor, expected: torch.Tensor) -> float:
    return ((result - expected).norm() / expected.norm()).item()


def test_full_size_model_has_the_keys_and_shapes_of_the_real_file() -> None:
    with gzip.open(KEY_TABLES / "lumina2.json.gz", "rt") as file:
        table = json.load(file)
    model = build_on_meta(lambda: NextDiT(LuminaParams()))
    assert {key: list(tensor.shape) for key, tensor in model.state_dict().items()} == table


def test_full_size_model_has_the_keys_and_shapes_of_diffusers() -> None:
    diffusers = pytest.importorskip("diffusers")
    theirs = build_on_meta(lambda: diffusers.Lumina2Transformer2DModel(cap_feat_dim=2304)).state_dict()
    ours = to_diffusers(build_on_meta(lambda: NextDiT(LuminaParams())).state_dict())
    assert {key: tensor.shape for key, tensor in ours.items()} == {key: tensor.shape for key, tensor in theirs.items()}


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model.", "model."])
def test_every_prefix_loads_and_sizes_come_from_shapes(tmp_path: Path, prefix: str) -> None:
    path = tmp_path / "a.safetensors"
    save_file_atomic({prefix + key: tensor for key, tensor in tiny_state().items()}, path)
    model = lumina_utils.load_lumina(path, None, "cpu")
    assert model.params == PARAMS and not any(parameter.is_meta for parameter in model.parameters())
    latents, times, states, mask = example()
    assert torch.equal(model(latents, times, states, mask), tiny_model()(latents, times, states, mask))


def test_saving_writes_the_names_of_the_file_and_what_shapes_do_not_tell(tmp_path: Path) -> None:
    lumina_utils.save_lumina(tiny_model(), tmp_path / "a.safetensors", torch.bfloat16)
    infos, metadata = read_header(tmp_path / "a.safetensors")
    assert set(infos) == set(tiny_state()) and "model_config" not in metadata
    odd = replace(PARAMS, axes_dims=(8, 2, 2))
    lumina_utils.save_lumina(tiny_model(odd), tmp_path / "b.safetensors")
    assert lumina_utils.load_lumina(tmp_path / "b.safetensors", None, "cpu").params == odd


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("missing", "are missing"), ("norms", "2 keys are missing"), ("extra", "are unknown"),
        ("shape", "shapes do not fit"),
    ],
)  # fmt: skip
def test_a_file_that_does_not_fit_is_an_error(tmp_path: Path, change: str, words: str) -> None:
    state = tiny_state()
    if change == "missing":
        del state["layers.1.feed_forward.w2.weight"]
    elif change == "norms":  # the last one is made up where it is lacking, in the size of the first
        del state["noise_refiner.0.ffn_norm1.weight"], state["norm_final.weight"]
    elif change == "extra":
        state["layers.1.feed_forward.w4.weight"] = torch.zeros(2)
    else:
        state["layers.2.feed_forward.w2.weight"] = torch.zeros(48, 7)
    save_file_atomic(state, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=words):
        lumina_utils.load_lumina(tmp_path / "a.safetensors", torch.float32, "cpu")


def diffusers_model(layers: int = 2, refiners: int = 2) -> torch.nn.Module:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(3)
    model = diffusers.Lumina2Transformer2DModel(
        in_channels=4, hidden_size=48, num_layers=layers, num_refiner_layers=refiners, num_attention_heads=4,
        num_kv_heads=2, multiple_of=16, axes_dim_rope=(4, 4, 4), axes_lens=(40, 30, 30), cap_feat_dim=20,
    )  # fmt: skip
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if parameter.ndim == 1 else 0.0, std=0.15)
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("mask", [[7, 7], [5, 2], [1, 1]])
@pytest.mark.parametrize("size", [(6, 10), (2, 4)])
def test_a_sharded_folder_agrees_with_diffusers(tmp_path: Path, mask: list[int], size: tuple[int, int]) -> None:
    """Ragged captions, and those of one token."""
    reference = diffusers_model()
    reference.save_pretrained(tmp_path / "transformer", max_shard_size="60KB")
    assert len(list((tmp_path / "transformer").glob("*-of-*.safetensors"))) > 1
    model = lumina_utils.load_lumina(tmp_path, torch.float32, "cpu", config={"qk_norm_eps": 1e-5})
    assert model.params.axes_lens == (40, 30, 30)
    latents, times, states, _ = example(*size)
    valid = (torch.arange(7) < torch.tensor(mask)[:, None]).long()
    theirs = reference(latents, times, states, valid, return_dict=False)[0]
    assert relative(model(latents, times, states, valid), theirs) < 1e-5


@torch.no_grad()
def test_our_weights_in_their_class() -> None:
    params = replace(PARAMS, n_layers=1, ffn_hidden=192, axes_lens=(40, 30, 30), qk_norm_eps=1e-5)
    model, reference = tiny_model(params), diffusers_model(1, 1)
    state = model.state_dict()
    reference.load_state_dict(to_diffusers(state), strict=True)
    latents, times, states, mask = example()
    theirs = reference(latents, times, states, mask, return_dict=False)[0]
    assert relative(model(latents, times, states, mask), theirs) < 1e-5
    again = to_original(to_diffusers(state))
    assert again.keys() == state.keys() - {UNUSED} and all(torch.equal(again[key], state[key]) for key in again)


@torch.no_grad()
def test_padding_and_batch_mates_change_nothing() -> None:
    model, (latents, times, states, mask) = tiny_model(), example()
    together = model(latents, times, states, mask)
    alone = model(latents[1:], times[1:], states[1:, :2])
    torch.testing.assert_close(together[1:], alone)
    states[mask == 0] = 100.0
    torch.testing.assert_close(model(latents, times, states, mask), together)


@torch.no_grad()
def test_a_caption_without_tokens_gives_numbers() -> None:
    latents, times, states, mask = example()
    model = tiny_model()
    none = model(latents, times, states, mask * 0)
    assert none.isfinite().all()
    states[:] = 7.0
    torch.testing.assert_close(model(latents, times, states, mask * 0), none)


@torch.no_grad()
@pytest.mark.parametrize("size", [(5, 8), (6, 7), (3, 3)])
def test_odd_latents_are_filled_up_and_cut_off(size: tuple[int, int]) -> None:
    latents, times, states, mask = example(*size)
    model = tiny_model()
    whole = torch.nn.functional.pad(latents, (0, size[1] % 2, 0, size[0] % 2), mode="circular")
    result = model(latents, times, states, mask)
    assert result.shape == latents.shape
    assert torch.equal(result, model(whole, times, states, mask)[..., : size[0], : size[1]])


def test_more_text_or_patches_than_there_are_positions() -> None:
    model = tiny_model(replace(PARAMS, axes_lens=(7, 3, 5)))
    latents, times, states, mask = example()
    with pytest.raises(ValueError, match="7 tokens; the model has positions for 6"):
        model(latents, times, states, mask)
    with pytest.raises(ValueError, match="4 x 5 patches; the model has positions for 3 x 5"):
        model(torch.zeros(2, 4, 8, 10), times, states[:, :6], mask[:, :6])


@torch.no_grad()
def test_a_time_for_each_patch_and_side_outputs() -> None:
    model, (latents, times, states, mask) = tiny_model(), example()
    plain = model(latents, times, states, mask)
    same, features = model(latents, times[:, None].expand(-1, 15), states, mask, feature_layer=1)
    torch.testing.assert_close(same, plain)
    assert features.shape == (2, 15, model.feature_width)
    varied = model(latents, torch.rand(2, 15), states, mask)
    assert relative(varied, plain) > 1e-3


@torch.no_grad()
def test_the_time_is_not_rounded_in_half_precision() -> None:
    model = tiny_model().bfloat16()
    latents, _, states, mask = example()
    near = [model(latents.bfloat16(), torch.full((2,), time), states, mask) for time in (0.9375, 0.9385)]
    assert not torch.equal(*near)  # one number in bfloat16
    exact = tiny_model()(latents, torch.full((2,), 0.9375), states, mask)
    assert relative(near[0].float(), exact) < 0.05


def test_checkpointing_changes_no_gradient_and_two_layers_stay() -> None:
    model, (latents, times, states, mask) = tiny_model().requires_grad_(True), example()
    grads = []
    for checkpointed in (False, True):
        model.zero_grad()
        if checkpointed:
            model.train()
            model.enable_gradient_checkpointing()
        model(latents, times, states, mask).square().mean().backward()
        weights = (model.layers[0].attention.qkv.weight, model.context_refiner[0].attention.out.weight)
        grads.append([weight.grad.clone() for weight in weights])
    torch.testing.assert_close(*grads)
    model.enable_block_swap(1, torch.device("cpu"))
    with pytest.raises(ValueError, match="at most 1 can be swapped"):
        model.enable_block_swap(2, torch.device("cpu"))


@torch.no_grad()
def test_eight_bit_storage_and_scaled_files(tmp_path: Path) -> None:
    latents, times, states, mask = example()
    expected = tiny_model()(latents, times, states, mask)
    save_file_atomic(tiny_state(), tmp_path / "wide.safetensors")
    model = lumina_utils.load_lumina(tmp_path / "wide.safetensors", torch.float8_e4m3fn, "cpu")
    kinds = {name: weight.dtype for name, weight in model.named_parameters()}
    assert kinds["layers.0.attention.qkv.weight"] == torch.float8_e4m3fn
    assert {kinds[name] for name in kinds if "norm" in name or name.endswith(".bias")} == {torch.bfloat16}
    assert relative(model(latents, times, states, mask).float(), expected) < 0.2

    scaled = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}
    for key, tensor in tiny_state().items():
        if tensor.ndim == 2:
            scale = tensor.abs().max() / 448
            scaled[key] = (tensor / scale).to(torch.float8_e4m3fn)
            scaled[f"{key.removesuffix('weight')}scale_weight"] = scale[None]
        else:
            scaled[key] = tensor
    named = {f"model.diffusion_model.{key}": tensor for key, tensor in scaled.items()}
    save_file_atomic(named, tmp_path / "s.safetensors")
    model = lumina_utils.load_lumina(tmp_path / "s.safetensors", torch.float32, "cpu")
    assert relative(model(latents, times, states, mask), expected) < 0.1
