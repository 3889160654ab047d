"""Stable Diffusion and SDXL checkpoints: key tables of the real files, layouts, prefixes, refusals, and the way
back."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from library import sd_utils, sdxl_utils
from library.checkpoints.loading import build_on_meta
from library.checkpoints.unet_convert import diffusers_to_original, original_to_diffusers
from library.components.ldm_models import AutoEncoder
from library.components.text_encoder_utils import CLIP_G, CLIP_H, CLIP_L, _clip_config, inspect_clip
from library.components.unet_models import UNetParams
from library.core.errors import CheckpointError
from library.safetensors_utils import read_header
from library.sd_models import UNet2DConditionModel
from library.sdxl_models import SdxlUNet2DConditionModel
from tests.library.test_flux_utils import empty_checkpoint
from tests.tiny_sd import KINDS, build_tiny_sd

KEY_TABLES = Path(__file__).parents[1] / "golden" / "checkpoints"
SDXL = UNetParams(
    channels=(320, 640, 1280), attention_levels=(False, True, True), transformer_depth=(0, 2, 10), middle_depth=10,
    heads=(5, 10, 20),
    context_dim=2048, use_linear_projection=True, adm_in_channels=2816,
)  # fmt: skip
SD2 = UNetParams(heads=(5, 10, 20, 20), context_dim=1024, use_linear_projection=True, upcast_attention=True)


def key_table(name: str) -> dict[str, list[int]]:
    with gzip.open(KEY_TABLES / f"{name}.json.gz", "rt") as file:
        return json.load(file)


def meta_clip(path: Path, slot):
    from transformers import CLIPTextModelWithProjection

    values = inspect_clip(path, slot).values
    return build_on_meta(lambda: CLIPTextModelWithProjection(_clip_config(values)))


def shapes_of(state: dict[str, torch.Tensor]) -> dict[str, list[int]]:
    return {key: list(tensor.shape) for key, tensor in state.items()}


@pytest.mark.parametrize(("name", "params"), [("sd15_checkpoint", UNetParams()), ("sd21_checkpoint", SD2)])
def test_real_stable_diffusion_is_recognised_and_written_with_the_real_keys(
    tmp_path, name: str, params: UNetParams
) -> None:
    table = key_table(name)
    path = empty_checkpoint(tmp_path / "x.safetensors", table, "F16", 2)
    info = sd_utils.inspect_sd_unet(path)
    assert info.params == params and info.is_v2 is (params == SD2)
    unet = build_on_meta(lambda: UNet2DConditionModel(info.params))
    vae = build_on_meta(lambda: AutoEncoder(sd_utils.inspect_vae_sd(path).params))
    encoder = meta_clip(path, CLIP_H if info.is_v2 else CLIP_L)
    assert encoder.config.num_hidden_layers == (23 if info.is_v2 else 12)
    assert shapes_of(sd_utils.checkpoint_state(unet, encoder, vae, info.is_v2)) == table


def test_real_sdxl_is_recognised_and_written_with_the_real_keys(tmp_path) -> None:
    table = key_table("sdxl_checkpoint")
    path = empty_checkpoint(tmp_path / "x.safetensors", table, "F16", 2)
    info = sdxl_utils.inspect_sdxl_unet(path)
    assert info.params == SDXL
    unet = build_on_meta(lambda: SdxlUNet2DConditionModel(info.params))
    vae = build_on_meta(lambda: AutoEncoder(sdxl_utils.inspect_vae_sdxl(path).params))
    encoders = [meta_clip(path, slot) for slot in (CLIP_L, CLIP_G)]
    assert shapes_of(sdxl_utils.checkpoint_state(unet, encoders, vae)) == table


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_checkpoint_holds_the_tensors_it_was_loaded_from(tmp_path, kind: str) -> None:
    tiny = build_tiny_sd(tmp_path, kind)
    again = tmp_path / "again.safetensors"
    if kind == "sdxl":
        unet = sdxl_utils.load_unet_sdxl(tiny.model, None, "cpu")
        encoders = sdxl_utils.load_text_encoders_sdxl(tiny.model, None, "cpu")
        sdxl_utils.save_checkpoint_sdxl(
            again, unet, encoders, sdxl_utils.load_vae_sdxl(tiny.model, None, "cpu"), marks=("v_pred",)
        )
    else:
        unet = sd_utils.load_unet_sd(tiny.model, None, "cpu")
        encoder = sd_utils.load_text_encoder_sd(tiny.model, kind == "sd2", None, "cpu")
        vae = sd_utils.load_vae_sd(tiny.model, None, "cpu")
        sd_utils.save_checkpoint_sd(again, unet, encoder, vae, is_v2=kind == "sd2")
    before, after = load_file(tiny.model), load_file(again)
    assert set(after) - set(before) <= {"v_pred", *(key for key in after if key.endswith("position_ids"))}
    assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())
    if kind == "sdxl":
        assert sdxl_utils.inspect_sdxl_unet(again, read_model_config(tiny.model)).prediction_type == "v"


def read_model_config(path: Path) -> dict:
    return json.loads(read_header(path)[1]["model_config"])


@pytest.mark.parametrize("kind", KINDS)
def test_names_there_and_back(tmp_path, kind: str) -> None:
    state = {
        k.removeprefix("model.diffusion_model."): v
        for k, v in load_file(build_tiny_sd(tmp_path, kind).model).items()
        if "diffusion" in k
    }
    assert list(diffusers_to_original(original_to_diffusers(state))) == list(state)


def test_a_ckpt_with_old_names_and_further_entries(tmp_path) -> None:
    tiny = build_tiny_sd(tmp_path, "sd1")
    state = {
        key.replace("transformer.text_model.", "transformer."): tensor for key, tensor in load_file(tiny.model).items()
    }
    state |= {"betas": torch.zeros(4), "model_ema.diffusion_modelout2weight": torch.zeros(2)}
    torch.save({"state_dict": state}, tmp_path / "old.ckpt")
    config = read_model_config(tiny.model)
    text = sd_utils.load_text_encoder_sd(tmp_path / "old.ckpt", False, None, "cpu", config=config["clip_l"])
    reference = sd_utils.load_text_encoder_sd(tiny.model, False, None, "cpu")
    assert all(torch.equal(tensor, reference.state_dict()[key]) for key, tensor in text.state_dict().items())
    assert sd_utils.load_unet_sd(tmp_path / "old.ckpt", None, "cpu", config=config).params == tiny.params


def test_projections_of_either_shape_are_taken(tmp_path) -> None:
    tiny = build_tiny_sd(tmp_path, "sd2")
    state = load_file(tiny.model)
    for key in list(state):
        if key.endswith(("proj_in.weight", "proj_out.weight")):
            state[key] = state[key][:, :, None, None].contiguous() if state[key].ndim == 2 else state[key]
    save_file(state, tmp_path / "conv.safetensors", metadata=read_header(tiny.model)[1])
    ours, other = (sd_utils.load_unet_sd(path, None, "cpu") for path in (tiny.model, tmp_path / "conv.safetensors"))
    assert all(torch.equal(tensor, other.state_dict()[key]) for key, tensor in ours.state_dict().items())


@pytest.mark.parametrize(("channels", "name"), [(9, "inpainting"), (8, "editing")])
def test_models_of_other_tasks_are_named(tmp_path, channels: int, name: str) -> None:
    table = key_table("sd15_checkpoint")
    table["model.diffusion_model.input_blocks.0.0.weight"][1] = channels
    with pytest.raises(CheckpointError, match=name):
        sd_utils.inspect_sd_unet(empty_checkpoint(tmp_path / "x.safetensors", table))


def test_each_family_names_the_others(tmp_path) -> None:
    with pytest.raises(CheckpointError, match="SDXL"):
        sd_utils.inspect_sd_unet(build_tiny_sd(tmp_path / "a", "sdxl").model)
    with pytest.raises(CheckpointError, match="Stable Diffusion 1"):
        sdxl_utils.inspect_sdxl_unet(build_tiny_sd(tmp_path / "b", "sd1").model)
