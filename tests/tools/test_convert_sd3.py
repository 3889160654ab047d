"""SD3 between one file and a diffusers folder: diffusers loads what is written and gives our output; the way back is
exact."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.safetensors_utils import read_header
from library.sd3_utils import load_clip_g, load_clip_l, load_sd3, load_t5xxl, load_vae_sd3
from library.tiny_models.sd3_tiny import build_tiny_sd3
from tools import convert_model

HOW = (torch.float32, "cpu")


@pytest.fixture(scope="module", params=["medium", "5-medium", "5-large"])
def case(request, tmp_path_factory):
    root = tmp_path_factory.mktemp(request.param)
    tiny = build_tiny_sd3(root, variant=request.param, with_whole=True)
    words = [str(tiny.whole), str(root / "folder"), "--to", "diffusers", "--tokenizer", str(tiny.tokenizer)]
    assert convert_model.main(words) == 0
    return tiny, root / "folder"


def test_diffusers_loads_the_folder_and_agrees(case) -> None:
    import diffusers

    tiny, folder = case
    pipeline = diffusers.StableDiffusion3Pipeline.from_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(1, 16, 8, 12, generator=generator), torch.randn(1, 40, generator=generator)
    context, times = torch.randn(1, 7, 48, generator=generator), torch.tensor([500.0])
    ids = torch.randint(0, 50, (1, 77), generator=generator)
    with torch.no_grad():
        mine = load_sd3(tiny.whole, *HOW)(x, times, y, context)
        for own in (folder, tiny.whole):
            torch.testing.assert_close(load_sd3(own, *HOW)(x, times, y, context), mine, rtol=1e-5, atol=1e-5)
        other = pipeline.transformer(x, context, y, times, return_dict=False)[0]
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)
        decoded = load_vae_sd3(tiny.whole, *HOW).decode(x)
        raw = x / pipeline.vae.config.scaling_factor + pipeline.vae.config.shift_factor
        torch.testing.assert_close(decoded, pipeline.vae.decode(raw).sample, rtol=1e-3, atol=1e-3)
        theirs = (pipeline.text_encoder, pipeline.text_encoder_2)
        for load, encoder in zip((load_clip_l, load_clip_g), theirs):
            own, foreign = (model.eval()(ids, output_hidden_states=True) for model in (load(tiny.whole, *HOW), encoder))
            torch.testing.assert_close(own.hidden_states[-2], foreign.hidden_states[-2], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(own.text_embeds, foreign.text_embeds, rtol=1e-4, atol=1e-4)
        own, foreign = (
            model.eval()(ids).last_hidden_state for model in (load_t5xxl(tiny.whole, *HOW), pipeline.text_encoder_3)
        )
        torch.testing.assert_close(own, foreign, rtol=1e-4, atol=1e-4)
    assert pipeline.tokenizer_2.pad_token == "!" and pipeline.tokenizer_3("a cat").input_ids[-1] == 1


def test_the_way_back_is_exact(case, tmp_path) -> None:
    tiny, folder = case
    assert convert_model.main([str(folder), str(tmp_path / "back.safetensors"), "--to", "single"]) == 0
    one, other = load_file(tiny.whole), load_file(tmp_path / "back.safetensors")
    assert one.keys() == other.keys() and all(torch.equal(tensor, other[key]) for key, tensor in one.items())
    assert read_header(tmp_path / "back.safetensors")[1] == read_header(tiny.whole)[1]


def test_a_file_without_text_encoders(tmp_path) -> None:
    tiny = build_tiny_sd3(tmp_path / "tiny")
    assert convert_model.main([str(tiny.model), str(tmp_path / "folder"), "--to", "diffusers"]) == 0
    index = json.loads((tmp_path / "folder" / "model_index.json").read_text(encoding="utf-8"))
    assert index["text_encoder"] == index["tokenizer_3"] == [None, None] and index["vae"][1] == "AutoencoderKL"
    assert convert_model.main([str(tmp_path / "folder"), str(tmp_path / "back.safetensors"), "--to", "single"]) == 0
    assert load_file(tmp_path / "back.safetensors").keys() == load_file(tiny.model).keys()
    shard = next((tmp_path / "folder" / "transformer").glob("*.safetensors"))
    assert (
        convert_model.main([str(shard), str(tmp_path / "d.safetensors"), "--to", "single", "--save_precision", "bf16"])
        == 0
    )
    state = load_file(tmp_path / "d.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}
    assert all(key.startswith("model.diffusion_model.") for key in state)


def test_what_is_refused(tmp_path, capsys) -> None:
    tiny = build_tiny_sd3(tmp_path / "tiny")
    assert convert_model.main([str(tiny.model), str(tmp_path / "x.safetensors"), "--to", "single"]) == 2
    assert "in the original layout already" in capsys.readouterr().err
    assert convert_model.main([str(tiny.model), str(tmp_path / "folder"), "--to", "diffusers"]) == 0
    assert convert_model.main([str(tmp_path / "folder"), str(tmp_path / "again"), "--to", "diffusers"]) == 2
    assert "is a folder; --to diffusers takes one file" in capsys.readouterr().err


def test_scaled_8_bit_numbers_of_every_part_are_multiplied_out(tmp_path) -> None:
    tiny = build_tiny_sd3(tmp_path / "tiny", with_whole=True)
    denoiser = "model.diffusion_model.joint_blocks.0.x_block.mlp.fc1"
    t5 = "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q"
    clip = "text_encoders.clip_g.transformer.text_model.encoder.layers.0.mlp.fc1"
    state, metadata = load_file(tiny.whole), read_header(tiny.whole)[1]
    wide = {name: state[f"{name}.weight"] for name in (denoiser, t5, clip)}
    for name, weight in wide.items():
        scale = weight.abs().max() / 448
        state |= {f"{name}.weight": (weight / scale).to(torch.float8_e4m3fn), f"{name}.scale_weight": scale.reshape(1)}
    state["text_encoders.t5xxl.transformer.scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    save_file(state, tmp_path / "scaled.safetensors", metadata)
    words = [str(tmp_path / "scaled.safetensors"), str(tmp_path / "folder"), "--to", "diffusers"]
    assert convert_model.main([*words, "--tokenizer", str(tiny.tokenizer)]) == 0
    assert convert_model.main([str(tmp_path / "folder"), str(tmp_path / "back.safetensors"), "--to", "single"]) == 0
    written = load_file(tmp_path / "back.safetensors")
    assert written.keys() == load_file(tiny.whole).keys()
    for name, weight in wide.items():
        assert written[f"{name}.weight"].dtype == torch.bfloat16
        torch.testing.assert_close(written[f"{name}.weight"].float(), weight, rtol=0.1, atol=weight.abs().max() / 448)
