"""HunyuanVideo: files and their sizes, the denoiser beside diffusers' class, memory savers."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from library import hunyuan_video_utils
from library.checkpoints.hunyuan_video_convert import NAMES
from library.checkpoints.loading import build_on_meta
from library.components.hunyuan_stream_utils import DENOISER_PREFIXES
from library.core.errors import CheckpointError
from library.hunyuan_video_models import HYVideoDiffusionTransformer, HYVideoParams
from library.hunyuan_video_utils import load_hunyuan_video
from library.safetensors_utils import save_file_atomic
from tests.library.test_flux_utils import empty_checkpoint, key_table
from tests.library.test_hunyuan_image_utils import comfy_names
from tests.tiny import random_state

PARAMS = HYVideoParams(
    in_channels=4, out_channels=4, hidden_size=64, num_heads=2, depth=2, depth_single=3, refiner_depth=1, mlp_ratio=2.0,
    text_dim=20, vec_dim=12, rope_dim_list=(4, 14, 14),
)  # fmt: skip


def new_state(params: HYVideoParams = PARAMS) -> dict[str, torch.Tensor]:
    return random_state(build_on_meta(lambda: HYVideoDiffusionTransformer(params)), torch.Generator().manual_seed(1))


def new_model(params: HYVideoParams = PARAMS) -> HYVideoDiffusionTransformer:
    model = HYVideoDiffusionTransformer(params)
    model.load_state_dict(new_state(params))
    return model.requires_grad_(False)


def inputs(channels: int = 4, size: tuple[int, int, int] = (3, 4, 6), text: int = 5) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        "hidden_states": torch.randn(2, channels, *size, generator=generator),
        "timestep": torch.tensor([130.0, 870.5]), "text_states": torch.randn(2, text, 20, generator=generator),
        "encoder_attention_mask": torch.tensor([[1] * text, [1] * (text - 3) + [0] * 3]),
        "text_vector": torch.randn(2, 12, generator=generator), "guidance": torch.tensor([6000.0, 1000.0]),
    }  # fmt: skip


def run(model: torch.nn.Module, **given) -> torch.Tensor:
    with torch.no_grad():
        return model(**given)


def relative(result: torch.Tensor, expected: torch.Tensor) -> float:
    return ((result - expected).norm() / expected.norm()).item()


# -- files -------------------------------------------------------------------------------------------------------------


def test_the_real_denoiser_is_recognised_and_has_the_real_keys(tmp_path: Path) -> None:
    shapes = key_table("hunyuan_video")
    for prefix in ("", "model.diffusion_model."):
        path = empty_checkpoint(tmp_path / "x.safetensors", {prefix + key: shape for key, shape in shapes.items()})
        info = hunyuan_video_utils.inspect_hunyuan_video(path)
        assert info.params == HYVideoParams() and info.dtypes == {torch.bfloat16}
    model = build_on_meta(lambda: HYVideoDiffusionTransformer(info.params))
    assert {key: list(tensor.shape) for key, tensor in model.state_dict().items()} == shapes
    meta = {"device": "meta", "dtype": torch.bfloat16}
    given = (
        torch.empty(1, 16, 33, 68, 120, **meta), torch.empty(1, **meta), torch.empty(1, 256, 4096, **meta),
        torch.empty(1, 256, **meta), torch.empty(1, 768, **meta),
    )  # fmt: skip
    with torch.no_grad():
        velocity = model.to(torch.bfloat16)(*given, guidance=torch.empty(1, **meta))
    assert velocity.shape == given[0].shape


@pytest.mark.parametrize("channels", [(32, 16), (33, 16)])
def test_models_that_are_shown_a_picture(tmp_path: Path, channels: tuple[int, int]) -> None:
    """SkyReels has twice the channels; the model with a mask beside them is another one and refused by name."""
    shapes = {**key_table("hunyuan_video"), "img_in.proj.weight": [3072, channels[0], 1, 2, 2]}
    path = empty_checkpoint(tmp_path / "x.safetensors", shapes)
    if channels[0] == 32:
        params = hunyuan_video_utils.inspect_hunyuan_video(path).params
        assert (params.in_channels, params.out_channels, params.shown_channels) == (32, 16, 16)
    else:
        with pytest.raises(CheckpointError, match=r"shown its picture in another way \(33 input channels"):
            hunyuan_video_utils.inspect_hunyuan_video(path)


def test_a_folder_says_that_a_picture_is_shown_in_another_way(tmp_path: Path) -> None:
    save_file_atomic(NAMES.to_diffusers(new_state()), tmp_path / "diffusion_pytorch_model.safetensors")
    config = hunyuan_video_utils.LAYOUTS.config(PARAMS)
    for manner in (None, "token_replace"):
        (tmp_path / "config.json").write_text(json.dumps({**config, "image_condition_type": manner}))
        if manner is None:
            assert hunyuan_video_utils.inspect_hunyuan_video(tmp_path).params == PARAMS
        else:
            with pytest.raises(CheckpointError, match=r"in another way \(token_replace\)"):
                hunyuan_video_utils.inspect_hunyuan_video(tmp_path)


@pytest.mark.parametrize("prefix", ["", *DENOISER_PREFIXES])
def test_a_denoiser_under_every_prefix(tmp_path: Path, prefix: str) -> None:
    save_file_atomic({prefix + key: tensor for key, tensor in new_state().items()}, tmp_path / "x.safetensors")
    model = load_hunyuan_video(tmp_path / "x.safetensors", torch.float32, "cpu")
    assert model.params == PARAMS and torch.equal(run(model, **inputs()), run(new_model(), **inputs()))


@pytest.mark.parametrize("entry", ["module", "state_dict"])
def test_a_pytorch_file_holds_it_under_an_entry(tmp_path: Path, entry: str) -> None:
    torch.save({entry: new_state(), "step": 3}, tmp_path / "x.pt")
    model = load_hunyuan_video(tmp_path / "x.pt", torch.float32, "cpu")
    assert torch.equal(run(model, **inputs()), run(new_model(), **inputs()))


def test_every_layout_gives_the_same_model(tmp_path: Path) -> None:
    """Names of diffusers, whole and as a folder, and those inside of ComfyUI, in full and in 8 bits."""
    params = replace(PARAMS, rope_theta=300, rope_dim_list=(8, 12, 12))
    state = new_state(params)
    folder = tmp_path / "pipeline" / "transformer"
    folder.mkdir(parents=True)
    save_file_atomic(NAMES.to_diffusers(state), folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps(hunyuan_video_utils.LAYOUTS.config(params)))
    config = {"model_config": json.dumps(asdict(params))}
    save_file_atomic(state, tmp_path / "x.safetensors", config)
    comfy = {f"model.diffusion_model.{key}": tensor for key, tensor in comfy_names(state).items()}
    assert comfy.keys().isdisjoint(f"model.diffusion_model.{key}" for key in state if "_attn_qkv" in key)
    save_file_atomic(comfy, tmp_path / "comfy.safetensors", config)
    for how in ({}, {"form": "fp8_scaled"}):
        expected = load_hunyuan_video(tmp_path / "x.safetensors", torch.float32, "cpu", **how)
        assert expected.params == params
        assert (expected.double_blocks[0].img_attn_qkv.weight.dtype == torch.float8_e4m3fn) == bool(how)
        for path in (tmp_path / "pipeline", folder, tmp_path / "comfy.safetensors"):
            model = load_hunyuan_video(path, torch.float32, "cpu", **how)
            assert model.params == params and torch.equal(run(model, **inputs()), run(expected, **inputs()))
    assert hunyuan_video_utils.denoiser_state(comfy).keys() == state.keys()


def test_eight_bits_without_scales_and_a_saved_file(tmp_path: Path) -> None:
    model = new_model(replace(PARAMS, guidance_embed=False))
    hunyuan_video_utils.save_hunyuan_video(model, tmp_path / "x.safetensors", torch.float32, {"title": "t"})
    again = load_hunyuan_video(tmp_path / "x.safetensors", None, "cpu")
    given = {name: tensor for name, tensor in inputs().items() if name != "guidance"}
    assert again.params == model.params and torch.equal(run(again, **given), run(model, **given))
    plain = load_hunyuan_video(tmp_path / "x.safetensors", torch.float8_e4m3fn, "cpu")
    assert plain.single_blocks[0].linear1.weight.dtype == torch.float8_e4m3fn
    with torch.autocast("cpu", torch.bfloat16):
        assert relative(run(plain, **given).float(), run(model, **given)) < 0.2


@pytest.mark.parametrize(("change", "message"), [
    ({"vector_in.in_layer.weight": None}, "holds no HunyuanVideo denoiser"),
    ({"time_in.mlp.2.bias": None}, "1 keys are missing: time_in.mlp.2.bias"),
    ({"vector_in.more": torch.zeros(1)}, "1 keys are unknown: vector_in.more"),
    ({"img_in.proj.weight": torch.zeros(64)}, "too few dimensions"),
])  # fmt: skip
def test_files_that_do_not_fit(tmp_path: Path, change: dict[str, torch.Tensor | None], message: str) -> None:
    state = {key: tensor for key, tensor in {**new_state(), **change}.items() if tensor is not None}
    save_file_atomic(state, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=message):
        load_hunyuan_video(tmp_path / "x.safetensors", torch.float32, "cpu")


# -- the denoiser ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("guidance", "channels", "size"), [
    (True, 4, (3, 4, 6)), (False, 8, (1, 2, 8)), (True, 8, (2, 6, 2)),
])  # fmt: skip
def test_it_computes_what_diffusers_does(guidance: bool, channels: int, size: tuple[int, int, int]) -> None:
    diffusers = pytest.importorskip("diffusers")
    params = replace(PARAMS, in_channels=channels, guidance_embed=guidance, mlp_ratio=4.0)
    theirs = diffusers.HunyuanVideoTransformer3DModel.from_config(hunyuan_video_utils.LAYOUTS.config(params)).eval()
    ours = new_model(params)
    theirs.load_state_dict(NAMES.to_diffusers(ours.state_dict()))
    given = inputs(channels, size)
    given = given if guidance else {name: tensor for name, tensor in given.items() if name != "guidance"}
    expected = run(
        theirs, hidden_states=given["hidden_states"], timestep=given["timestep"],
        encoder_hidden_states=given["text_states"], encoder_attention_mask=given["encoder_attention_mask"],
        pooled_projections=given["text_vector"], guidance=given.get("guidance"), return_dict=False,
    )[0]  # fmt: skip
    assert relative(run(ours, **given), expected) < 1e-5


def test_texts_of_different_lengths_in_a_batch_are_what_they_are_alone() -> None:
    model, given = new_model(), inputs()
    together = run(model, **given)
    for row, length in ((0, 5), (1, 2)):
        alone = {name: tensor[row : row + 1] for name, tensor in given.items()}
        alone["text_states"], alone["encoder_attention_mask"] = alone["text_states"][:, :length], None
        assert relative(run(model, **alone)[0], together[row]) < 1e-5


def test_times_may_differ_by_token_and_features_are_given() -> None:
    model, given = new_model(), inputs()
    tokens = 3 * 2 * 3
    same = {**given, "timestep": given["timestep"][:, None].expand(2, tokens)}
    assert relative(run(model, **same), run(model, **given)) < 1e-5
    other = same["timestep"].clone()
    other[:, -1] = 500
    assert relative(run(model, **{**same, "timestep": other}), run(model, **given)) > 1e-3
    for layer in (0, 4):
        result, tokens_there = run(model, **given, feature_layer=layer)
        assert torch.equal(result, run(model, **given)) and tokens_there.shape == (2, tokens, 64)


def test_memory_savers_change_no_result(monkeypatch) -> None:
    """Checkpoints, swapped blocks (moved by hand, as a CPU has nowhere to move them), embedders that wait."""
    given = inputs()
    model = new_model(replace(PARAMS, depth=4, depth_single=6))
    expected = run(model, **given)
    model.enable_block_swap(2, torch.device("cpu"))
    model.embedders_wait = True
    moves = []
    monkeypatch.setattr(model.img_in, "to", lambda device: moves.append(torch.device(device).type))
    assert torch.equal(run(model, **given), expected) and moves == ["cpu", "cpu"]
    with pytest.raises(ValueError, match="allows at most 4"):
        model.enable_block_swap(9, torch.device("cpu"))

    def gradient(checkpointing: bool) -> torch.Tensor:
        model = new_model().train()
        weight = model.double_blocks[0].img_attn_proj.weight.requires_grad_(True)
        if checkpointing:
            model.enable_gradient_checkpointing()
        model(**given).square().mean().backward()
        return weight.grad

    assert torch.equal(gradient(True), gradient(False))
