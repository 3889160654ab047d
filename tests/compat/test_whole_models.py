"""Whole models of Stable Diffusion by the known calls: there and back, as files and folders, and the names of their
tensors."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from library import model_util, sdxl_model_util, sdxl_train_util, train_util
from library.checkpoints.open_clip_convert import hf_to_open_clip
from library.dataset import bucket
from library.safetensors_utils import read_header
from library.sd_utils import load_unet_sd
from library.sdxl_train_utils import get_size_embeddings
from library.sdxl_utils import load_text_encoders_sdxl, load_unet_sdxl
from tests.tiny import build_tiny_sd


def equal(model, other, unused: str = "-") -> bool:
    state = other.state_dict()
    return all(
        torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items() if not key.startswith(unused)
    )


def part(path, prefix: str) -> dict[str, torch.Tensor]:
    return {key.removeprefix(prefix): tensor for key, tensor in load_file(path).items() if key.startswith(prefix)}


@pytest.mark.parametrize("v2", [False, True])
def test_stable_diffusion_there_and_back(tmp_path, v2):
    tiny = build_tiny_sd(tmp_path / "base", "sd2" if v2 else "sd1")
    text_encoder, vae, unet = model_util.load_models_from_stable_diffusion_checkpoint(
        v2, str(tiny.model), "cpu", torch.float32
    )
    assert equal(unet, load_unet_sd(tiny.model, torch.float32, "cpu"))
    again, metadata = tmp_path / "again.safetensors", read_header(tiny.model)[1]
    count = model_util.save_stable_diffusion_checkpoint(
        v2, str(again), text_encoder, unet, str(tiny.model), 2, 30, metadata, torch.float32
    )
    infos, written = read_header(again)
    assert len(infos) == count and (written["epoch"], written["global_step"]) == ("2", "30")
    before, after = load_file(tiny.model), load_file(again)
    assert all(torch.equal(tensor.float(), after[key]) for key, tensor in before.items())
    folder = tmp_path / "folder"
    model_util.save_diffusers_checkpoint(v2, str(folder), text_encoder, unet, str(tiny.model), use_safetensors=True)
    assert sorted(p.name for p in folder.iterdir()) == [
        "model_index.json",
        "scheduler",
        "text_encoder",
        "tokenizer",
        "unet",
        "vae",
    ]
    others = model_util.load_models_from_stable_diffusion_checkpoint(v2, str(folder), "cpu", torch.float32)
    unused = "text_projection" if v2 else "-"  # a folder of version 2 has no place for it
    assert all(equal(model, other, unused) for model, other in zip((text_encoder, vae, unet), others))
    options = SimpleNamespace(v2=v2, pretrained_model_name_or_path=str(tiny.model), vae=str(folder / "vae"))
    loaded = train_util.load_target_model(options, torch.float32, None)
    assert equal(loaded[2], unet) and equal(loaded[1], vae) and loaded[3] is True
    assert (
        train_util.load_target_model(SimpleNamespace(v2=v2, pretrained_model_name_or_path=str(folder)), None, None)[3]
        is False
    )
    assert equal(model_util.load_vae(str(folder / "vae"), torch.float32), vae)


@pytest.mark.parametrize("v2", [False, True])
def test_names_of_stable_diffusion(tmp_path, v2):
    tiny = build_tiny_sd(tmp_path, "sd2" if v2 else "sd1")
    state = load_file(tiny.model)
    text_encoder, vae, unet = model_util.load_models_from_stable_diffusion_checkpoint(v2, str(tiny.model))
    names = model_util.convert_ldm_unet_checkpoint(v2, state, None)
    assert set(names) == set(unet.state_dict())
    assert set(model_util.convert_unet_state_dict_to_sd(v2, names)) == set(part(tiny.model, "model.diffusion_model."))
    vae_names = model_util.convert_ldm_vae_checkpoint(state, None)
    back = model_util.convert_vae_state_dict(vae_names)
    own = part(tiny.model, "first_stage_model.")
    assert set(back) == set(own) and all(torch.equal(back[key], own[key]) for key in own)
    if v2:
        found = model_util.convert_ldm_clip_checkpoint_v2(state, 77)
        expected = {key: tensor for key, tensor in text_encoder.state_dict().items() if key.startswith("text_model.")}
        assert set(found) == set(expected) and all(
            torch.equal(found[key], tensor.to(found[key])) for key, tensor in expected.items()
        )
        written = model_util.convert_text_encoder_state_dict_to_sd_v2(found, make_dummy_weights=True)
        assert set(written) == {
            key for key in part(tiny.model, "cond_stage_model.model.") if key not in ("logit_scale", "text_projection")
        }
        assert not any(
            key.startswith("transformer.resblocks.2.")
            for key in model_util.convert_text_encoder_state_dict_to_sd_v2(found)
        )
    else:
        found = model_util.convert_ldm_clip_checkpoint_v1(state)
        assert set(found) == {
            key
            for key in text_encoder.state_dict()
            if key.startswith("text_model.") and not key.endswith("position_ids")
        }


def test_sdxl_there_and_back(tmp_path):
    tiny = build_tiny_sd(tmp_path / "base", "sdxl")
    version = sdxl_model_util.MODEL_VERSION_SDXL_BASE_V1_0
    first, second, vae, unet, logit_scale, trained = sdxl_model_util.load_models_from_sdxl_checkpoint(
        version, str(tiny.model), "cpu", torch.float32
    )
    assert trained is None and float(logit_scale) == pytest.approx(4.6, abs=0.01)
    assert equal(unet, load_unet_sdxl(tiny.model, torch.float32, "cpu")) and equal(
        second, load_text_encoders_sdxl(tiny.model, torch.float32, "cpu")[1]
    )
    again, metadata = tmp_path / "again.safetensors", read_header(tiny.model)[1]
    count = sdxl_model_util.save_stable_diffusion_checkpoint(
        str(again), first, second, unet, 1, 10, (2, 20), vae, torch.tensor(3.5), metadata, torch.float32
    )
    state = load_file(again)
    assert len(state) == count and float(state["conditioner.embedders.1.model.logit_scale"]) == 3.5
    loaded = sdxl_model_util.load_models_from_sdxl_checkpoint(version, str(again), "cpu", torch.float32)
    assert all(equal(model, other) for model, other in zip((first, second, vae, unet), loaded)) and loaded[5] == (3, 30)
    folder = tmp_path / "folder"
    sdxl_model_util.save_diffusers_checkpoint(
        str(folder), first, second, unet, str(tiny.model), save_dtype=torch.float32
    )
    options = SimpleNamespace(pretrained_model_name_or_path=str(folder), vae=None)
    one_file, *models, _, _ = sdxl_train_util.load_target_model(options, None, version, torch.float32)
    assert one_file is False and all(equal(model, other) for model, other in zip((first, second, vae, unet), models))


def test_names_of_sdxl(tmp_path):
    tiny = build_tiny_sd(tmp_path, "sdxl")
    own = part(tiny.model, "model.diffusion_model.")
    names = sdxl_model_util.convert_sdxl_unet_state_dict_to_diffusers(own)
    assert "down_blocks.0.resnets.0.conv1.weight" in names
    assert set(sdxl_model_util.convert_diffusers_unet_state_dict_to_sdxl(names)) == set(own)
    text = part(tiny.model, "conditioner.embedders.1.model.")
    state, logit_scale = sdxl_model_util.convert_sdxl_text_encoder_2_checkpoint(
        {f"conditioner.embedders.1.model.{key}": tensor for key, tensor in text.items()}, 77
    )
    back = sdxl_model_util.convert_text_encoder_2_state_dict_to_sdxl(state, logit_scale)
    assert set(back) == set(text) and all(torch.equal(back[key], text[key]) for key in text)
    assert set(sdxl_model_util.convert_text_encoder_2_state_dict_to_sdxl(state, None)) == set(hf_to_open_clip(state))


def test_size_embeddings():
    sizes = [
        torch.tensor([[512, 768], [640, 640]]),
        torch.tensor([[0, 8], [16, 0]]),
        torch.tensor([[512, 512], [640, 576]]),
    ]
    embedded = sdxl_train_util.get_size_embeddings(*sizes, torch.device("cpu"))
    assert torch.equal(embedded, get_size_embeddings(*sizes)) and embedded.shape == (2, 1536)
    parts = [sdxl_train_util.get_timestep_embedding(size, 256) for size in sizes]
    torch.testing.assert_close(torch.cat(parts, dim=1), embedded)
    with pytest.raises(ValueError, match=r"\[B, n\]"):
        sdxl_train_util.get_timestep_embedding(torch.ones(3), 256)


def test_sdxl_options_and_tokenizers(tmp_path):
    import argparse

    parser = argparse.ArgumentParser()
    sdxl_train_util.add_sdxl_training_arguments(parser)
    options = parser.parse_args(["--cache_text_encoder_outputs_to_disk"])
    sdxl_train_util.verify_sdxl_training_args(options)
    assert options.cache_text_encoder_outputs and not options.disable_mmap_load_safetensors
    with pytest.raises(Exception, match="--v2"):
        sdxl_train_util.verify_sdxl_training_args(SimpleNamespace(v2=True))
    first, second = sdxl_train_util.load_tokenizers(SimpleNamespace(tokenizer_cache_dir=None))
    assert first("a cat").input_ids == second("a cat").input_ids and second.pad_token == "!"


def test_small_calls(tmp_path):
    assert model_util.make_bucket_resolutions((512, 512), 256, 768) == bucket.make_bucket_resolutions(
        (512, 512), 256, 768, 64
    )
    assert (512, 512) in model_util.make_bucket_resolutions((512, 512))
    assert [model_util.get_model_version_str_for_sd1_sd2(*flags) for flags in ((False, False), (True, True))] == [
        "sd_v1",
        "sd_v2_v",
    ]
    assert model_util.is_safetensors("a.SAFETENSORS") and not model_util.is_safetensors("a.ckpt")
