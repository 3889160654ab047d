"""Layers of Lumina-Image 2.0 that an adapter trains, at real size on the meta device, their names elsewhere, and files
there and back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from library.checkpoints.lumina_convert import to_diffusers as model_to_diffusers
from library.core.errors import CheckpointError
from library.lumina_models import LuminaParams, NextDiT
from networks import lora_lumina
from networks.files.file_names import names_of_family
from networks.files.lora_conversion import to_diffusers, to_kohya
from networks.kinds.selection import fused_rows
from networks.kinds.targets import Layer
from tests.networks.tiny_denoisers import tiny_denoiser
from tools import convert_lora

EMBEDDERS = {"embedder_dims": "[2,3,5]"}


def lumina_models() -> tuple[NextDiT, list[nn.Module]]:
    """The released model with Gemma-2-2B, without data."""
    from transformers import Gemma2Config, Gemma2Model

    with torch.device("meta"):
        return NextDiT(LuminaParams()), [Gemma2Model(Gemma2Config(attn_implementation="eager"))]


@pytest.fixture(scope="module")
def models() -> tuple[NextDiT, list[nn.Module]]:
    return lumina_models()


def network_of(models: tuple[NextDiT, list[nn.Module]], **arguments: str):
    denoiser, encoders = models
    return lora_lumina.create_network(1.0, 4, 1.0, None, encoders, denoiser, **arguments)


@pytest.mark.parametrize(
    ("arguments", "count"),
    [
        ({}, 180), ({"train_blocks": "all"}, 180), ({"train_blocks": "transformer"}, 26 * 6),
        ({"train_blocks": "noise_refiner"}, 12), ({"train_blocks": "context_refiner"}, 10),
        ({"train_blocks": "refiners"}, 22), (EMBEDDERS, 184), ({**EMBEDDERS, "train_blocks": "refiners"}, 26),
        ({"attn_dim": "0"}, 120), ({"mlp_dim": "0"}, 90), ({"mod_dim": "0"}, 151), ({"refiner_dim": "0"}, 158),
        ({"embedder_dims": "[0,0,4]"}, 181),
    ],
)  # fmt: skip
def test_number_of_layers(models, arguments: dict[str, str], count: int) -> None:
    network = network_of(models, **arguments)
    assert (len(network.unet_loras), len(network.text_encoder_loras)) == (count, 182)


def test_shapes_of_layers(models) -> None:
    network = network_of(models, **EMBEDDERS)
    shapes = {lora.lora_name: (lora.lora_down.weight.shape[1], lora.lora_up.weight.shape[0]) for lora in network.loras}
    expected = {
        "layers_0_attention_qkv": (2304, 3840), "layers_25_attention_out": (2304, 2304),
        "layers_0_feed_forward_w1": (2304, 9216), "layers_0_feed_forward_w2": (9216, 2304),
        "layers_0_adaLN_modulation_1": (1024, 9216), "noise_refiner_0_attention_qkv": (2304, 3840),
        "context_refiner_1_attention_out": (2304, 2304), "final_layer_linear": (2304, 64),
        "final_layer_adaLN_modulation_1": (1024, 2304), "x_embedder": (64, 2304), "t_embedder_mlp_0": (256, 1024),
        "t_embedder_mlp_2": (1024, 1024), "cap_embedder_1": (2304, 2304),
    }  # fmt: skip
    assert {name: shapes[f"lora_unet_{name}"] for name in expected} == expected
    assert shapes["lora_te_layers_0_self_attn_q_proj"] == (2304, 2048)
    assert "lora_unet_context_refiner_0_adaLN_modulation_1" not in shapes


def test_the_narrowest_rank_counts(models) -> None:
    arguments = {"attn_dim": "8", "mlp_dim": "16", "mod_dim": "2", "refiner_dim": "32", **EMBEDDERS}
    ranks = {lora.lora_name: lora.lora_dim for lora in network_of(models, **arguments).unet_loras}
    expected = {
        "layers_3_attention_qkv": 8, "layers_3_feed_forward_w3": 16, "layers_3_adaLN_modulation_1": 2,
        "final_layer_adaLN_modulation_1": 2, "final_layer_linear": 4, "noise_refiner_1_attention_out": 32,
        "noise_refiner_1_adaLN_modulation_1": 32, "context_refiner_0_feed_forward_w2": 32, "x_embedder": 2,
        "t_embedder_mlp_0": 3, "cap_embedder_1": 5,
    }  # fmt: skip
    assert {name: ranks[f"lora_unet_{name}"] for name in expected} == expected


def test_every_layer_has_a_name_everywhere(models) -> None:
    """The names in diffusers are modules of its class, of the same sizes together."""
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        theirs = diffusers.Lumina2Transformer2DModel(cap_feat_dim=2304)
    modules, names = dict(theirs.named_modules()), names_of_family("lumina")
    network = network_of(models, **EMBEDDERS)
    for lora in network.loras:
        place = names.find(lora.lora_name)
        assert names.find(place.dotted).kohya == lora.lora_name
        assert bool(place.diffusers) == (place.encoder is None)
        assert all(names.find(name).kohya == lora.lora_name for name in place.diffusers)
    paths = {f"lora_unet_{path.replace('.', '_')}": path for path, _ in models[0].named_modules()}
    for lora in network.unet_loras:
        place, weight = names.find(lora.lora_name), lora.org_module.weight
        assert place.dotted == f"diffusion_model.{paths[lora.lora_name]}"
        parts = [modules[name.removeprefix("transformer.")].weight for name in place.diffusers]
        assert {part.shape[1] for part in parts} == {weight.shape[1]}
        rows = fused_rows(lora_lumina.TARGETS, Layer(lora.lora_name, paths[lora.lora_name], lora.org_module))
        assert [part.shape[0] for part in parts] == list(rows or [weight.shape[0]])


def trained_file(path: Path, **arguments: str) -> tuple[NextDiT, tuple, object]:
    """A tiny model, its inputs, and a network in it with random weights, which is written to `path`."""
    model, inputs = tiny_denoiser("lumina")
    network = lora_lumina.create_network(1.0, 4, 2.0, None, [None], model, **arguments)
    network.apply_to([None], model, False, True)
    generator = torch.Generator().manual_seed(2)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    network.save_weights(str(path), torch.float32, {"ss_base_model_version": "lumina2"})
    return model, inputs, network


@pytest.mark.parametrize("to", ["diffusers", "peft", "comfy", "ai-toolkit", "lycoris"])
@pytest.mark.parametrize("arguments", [EMBEDDERS, {"split_qkv": "true"}])
def test_files_there_and_back(tmp_path: Path, to: str, arguments: dict[str, str]) -> None:
    first, there, back = (str(tmp_path / f"{name}.safetensors") for name in ("first", "there", "back"))
    trained_file(Path(first), **arguments)
    assert convert_lora.main([first, there, "--to", to]) == 0
    assert convert_lora.main([there, back, "--to", "kohya"]) == 0
    before, after = load_file(first), load_file(back)
    assert before.keys() == after.keys() and all(torch.equal(after[key], before[key]) for key in before)
    starts = {"comfy": "diffusion_model.layers.0.attention.qkv.", "lycoris": "lycoris_layers_0_attention_qkv."}
    starts["ai-toolkit"] = starts["comfy"]
    start = starts.get(to, "transformer.layers.0.attn.to_k.")
    assert any(key.startswith(start) for key in load_file(there))


def test_parts_of_a_fused_layer_may_be_missing() -> None:
    """The others have no change; without keys and values nothing tells how many rows they have."""
    name = "transformer.layers.0.attn"
    down, queries, keys = torch.randn(2, 48), torch.randn(48, 2), torch.randn(24, 2)
    found = to_kohya("lumina", {f"{name}.to_k.lora_A.weight": down, f"{name}.to_k.lora_B.weight": keys})
    up = found["lora_unet_layers_0_attention_qkv.lora_up.weight"]
    assert up.shape == (96, 2) and torch.equal(up[48:72], keys) and not up[:48].any() and not up[72:].any()
    with pytest.raises(CheckpointError, match="neither keys nor values"):
        to_kohya("lumina", {f"{name}.to_q.lora_A.weight": down, f"{name}.to_q.lora_B.weight": queries})


@torch.no_grad()
@pytest.mark.parametrize("arguments", [{}, {"split_qkv": "true"}, EMBEDDERS])
def test_a_rewritten_file_gives_the_same_output_in_diffusers(tmp_path: Path, arguments: dict[str, str]) -> None:
    diffusers = pytest.importorskip("diffusers")
    from diffusers.loaders import Lumina2LoraLoaderMixin

    model, (latents, times, states, mask), network = trained_file(tmp_path / "lora.safetensors", **arguments)
    theirs = diffusers.Lumina2Transformer2DModel(
        in_channels=16, hidden_size=48, num_layers=2, num_refiner_layers=1, num_attention_heads=4, num_kv_heads=2,
        multiple_of=16, axes_dim_rope=(4, 4, 4), cap_feat_dim=24,
    ).eval()  # fmt: skip
    with_ours = model(latents, times, states, mask)
    network.remove_from()
    theirs.load_state_dict(model_to_diffusers(model.state_dict()), strict=True)
    plain = theirs(latents, times, states, mask, return_dict=False)[0]
    torch.testing.assert_close(plain, model(latents, times, states, mask), rtol=1e-3, atol=1e-4)
    argv = [str(tmp_path / "lora.safetensors"), str(tmp_path / "rewritten.safetensors"), "--to", "diffusers"]
    assert convert_lora.main(argv) == 0
    state = Lumina2LoraLoaderMixin.lora_state_dict(str(tmp_path), weight_name="rewritten.safetensors")
    Lumina2LoraLoaderMixin.load_lora_into_transformer(state, theirs)
    changed = theirs(latents, times, states, mask, return_dict=False)[0]
    assert (changed - plain).abs().max() > 0.05
    torch.testing.assert_close(changed, with_ours, rtol=1e-3, atol=1e-4)


def test_names_of_comfy_at_real_width_load_in_diffusers_directly() -> None:
    """It splits the rows at fixed sizes, so this needs the real width; one block of each row."""
    pytest.importorskip("diffusers")
    from diffusers.loaders import Lumina2LoraLoaderMixin

    from networks.files.lora_conversion import to_dotted

    with torch.device("meta"):
        model = NextDiT(LuminaParams(n_layers=1, n_refiner_layers=1))
    network = lora_lumina.create_network(1.0, 2, 2.0, None, [None], model, train_blocks="transformer")
    for lora in network.unet_loras:
        nn.init.normal_(lora.lora_up.weight)
    tensors = network.file_state_dict()
    dotted = {key: value for key, value in to_dotted("lumina", tensors, fold="up").items() if not key.endswith("alpha")}
    state = Lumina2LoraLoaderMixin.lora_state_dict(dict(dotted))
    expected = to_diffusers("lumina", tensors)
    assert set(state) == set(expected)
    for key, tensor in expected.items():
        torch.testing.assert_close(state[key], tensor)
