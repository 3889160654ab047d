"""Adapter files of other programs that hold what ours do not: everything in them acts, or is named. Nothing is lost in
silence."""

from __future__ import annotations

import logging

import pytest
import torch

from library.checkpoints.flux_convert import convert_bfl_sd_to_diffusers
from library.checkpoints.recognition import KeyTable, adapter_family, may_be_for
from library.core.errors import CheckpointError
from library.families.registry import records
from library.flux_utils import load_flux
from library.lora_utils import CheckpointMerge, MergeOnLoad, read_adapter
from library.safetensors_utils import load_safetensors, read_header, save_file_atomic
from networks import lora
from networks.files.lora_conversion import to_diffusers, to_kohya
from networks.files.network_files import by_module, read_adapter_file
from networks.kinds.adapter_family import nothing_fits
from networks.kinds.targets import targets_of_family
from tests.tiny import build_tiny_flux, build_tiny_sd
from tools import check_lora, convert_lora, merge_lora, resize_lora

FLUX = targets_of_family("flux")
DOUBLE, SINGLE = "transformer.transformer_blocks.0.", "transformer.single_transformer_blocks.1."


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    return build_tiny_flux(tmp_path_factory.mktemp("flux")).flux


def drawn(shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.randn(shape, generator=generator) / 4 for key, shape in shapes.items()}


def width_of(path):
    return load_safetensors(path)["double_blocks.0.img_attn.proj.weight"].shape[0]


def kinds_of_parts(width, mlp):
    """Files with adapters on query, key, value ... of fused layers, and the changes that they make, by plain
    formulas."""
    half = width // 2
    lokr = {f"{DOUBLE}attn.{part}.lokr_w1": (2, 2) for part in ("to_q", "to_v")} | {
        f"{DOUBLE}attn.{part}.lokr_w2": (half, half) for part in ("to_q", "to_v")
    }
    yield "lokr", drawn(lokr), lambda t, base: {
        f"transformer_blocks.0.attn.{part}.weight": torch.kron(t[f"{DOUBLE}attn.{part}.lokr_w1"], t[f"{DOUBLE}attn.{part}.lokr_w2"])
        for part in ("to_q", "to_v")
    }  # fmt: skip
    loha = {f"{SINGLE}proj_mlp.hada_w{n}_a": (mlp, 2) for n in (1, 2)} | {
        f"{SINGLE}proj_mlp.hada_w{n}_b": (2, width) for n in (1, 2)
    }
    yield "loha", drawn(loha) | {f"{SINGLE}proj_mlp.alpha": torch.tensor(1.0)}, lambda t, base: {
        "single_transformer_blocks.1.proj_mlp.weight": 0.5
        * (t[f"{SINGLE}proj_mlp.hada_w1_a"] @ t[f"{SINGLE}proj_mlp.hada_w1_b"]) * (t[f"{SINGLE}proj_mlp.hada_w2_a"] @ t[f"{SINGLE}proj_mlp.hada_w2_b"])
    }  # fmt: skip
    key = f"{DOUBLE}attn.add_k_proj"
    dora = drawn({f"{key}.lora_A.weight": (2, width), f"{key}.lora_B.weight": (width, 2)}) | {
        f"{key}.lora_magnitude_vector": torch.full((width,), 0.7)
    }

    def decomposed(t, base):
        name = "transformer_blocks.0.attn.add_k_proj.weight"
        changed = base[name] + t[f"{key}.lora_B.weight"] @ t[f"{key}.lora_A.weight"]
        return {name: 0.7 * changed / changed.norm(dim=1, keepdim=True) - base[name]}

    yield "dora", dora, decomposed


@pytest.mark.parametrize("number", range(3))
def test_parts_of_fused_layers_keep_their_kind(number, flux, tmp_path):
    """Merged into the original layout, hooked, and by hand into the layout where the parts are layers of their own: the
    same."""
    state = load_safetensors(flux)
    base = convert_bfl_sd_to_diffusers(state)
    kind, tensors, formula = list(
        kinds_of_parts(width_of(flux), len(base["single_transformer_blocks.1.proj_mlp.weight"]))
    )[number]
    path = tmp_path / f"{kind}.safetensors"
    save_file_atomic(tensors, path)
    wanted = {**base, **{name: base[name] + change for name, change in formula(tensors, base).items()}}
    merge = CheckpointMerge(
        FLUX, {key: tuple(tensor.shape) for key, tensor in state.items()}, [read_adapter(path, FLUX)]
    )
    merged = dict(merge.stream({key: tensor.clone() for key, tensor in state.items()}.items()))
    for key, tensor in convert_bfl_sd_to_diffusers(merged).items():
        torch.testing.assert_close(tensor, wanted[key], rtol=1e-5, atol=1e-6)
    transformer = load_flux(flux, torch.float32, "cpu", transform=MergeOnLoad(FLUX, [read_adapter(path, FLUX)]))
    hooked = load_flux(flux, torch.float32, "cpu")
    network, _ = lora.create_network_from_weights(1.0, str(path), None, [], hooked, for_inference=True)
    network.apply_to([], hooked, True, True)
    network.load_weights(str(path))
    place = network.unet_loras[0].lora_name
    path_of = {name.replace(".", "_"): name for name, _ in hooked.named_modules()}[place.removeprefix("lora_unet_")]
    layers = [model.get_submodule(path_of) for model in (transformer, hooked)]
    x = torch.randn(3, layers[0].in_features, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(*(layer(x) for layer in layers), rtol=1e-4, atol=1e-4)
    back = to_diffusers("flux", to_kohya("flux", tensors))
    names = {key.replace(".lora_magnitude_vector", ".dora_scale") for key in tensors}
    assert {key.replace(".lora_magnitude_vector", ".dora_scale") for key in back} == names
    with pytest.raises(CheckpointError, match="on its parts, which cannot be trained on"):
        lora.create_network_from_weights(1.0, str(path), None, [], hooked)
    assert convert_lora.main([str(path), str(tmp_path / "out.safetensors"), "--to", "kohya", "--family", "flux"]) != 0


def test_the_last_layer_has_its_halves_the_other_way_round(flux):
    """diffusers keeps scale and shift in the order in which the original does not."""
    state = load_safetensors(flux)
    width = width_of(flux)
    pair = drawn(
        {
            "lora_transformer_norm_out_linear.lora_up.weight": (2 * width, 2),
            "lora_transformer_norm_out_linear.lora_down.weight": (2, width),
        }
    )
    ours = by_module(to_kohya("flux", pair))["lora_unet_final_layer_adaLN_modulation_1"]
    key = "final_layer.adaLN_modulation.1.weight"
    changed = convert_bfl_sd_to_diffusers(
        {**state, key: state[key] + ours["lora_up.weight"] @ ours["lora_down.weight"]}
    )
    up, down = pair.values()
    torch.testing.assert_close(
        changed["norm_out.linear.weight"], convert_bfl_sd_to_diffusers(state)["norm_out.linear.weight"] + up @ down
    )
    back = to_diffusers(
        "flux", {f"lora_unet_final_layer_adaLN_modulation_1.{name}": tensor for name, tensor in ours.items()}
    )
    torch.testing.assert_close(back["transformer.norm_out.linear.lora_B.weight"], up)


def plain(width, name="lora_unet_double_blocks_0_img_attn_proj", ups=("lora_down.weight", "lora_up.weight")):
    return drawn({f"{name}.{ups[0]}": (2, width), f"{name}.{ups[1]}": (width, 2)})


def test_embeddings_beside_the_layers_are_named_and_carried(flux, tmp_path, caplog):
    tensors = plain(width_of(flux)) | {"bundle_emb.zorbit.clip_l": torch.ones(2, 8)}
    path = tmp_path / "bundle.safetensors"
    save_file_atomic(tensors, path, {"ss_base_model_version": "flux1"})
    with caplog.at_level(logging.INFO):
        assert not any(key.startswith("bundle_emb") for key in read_adapter_file(path, FLUX))
    assert "vectors of words (zorbit)" in caplog.text and "merging into a model leaves them out" in caplog.text
    other = tmp_path / "other.safetensors"
    keys = ("clip_l", "t5xxl")
    words = {f"bundle_emb.{word}.{key}": torch.zeros(1, 8) for word in ("zorbit", "frob") for key in keys}
    save_file_atomic(plain(width_of(flux)) | words, other, {"ss_base_model_version": "flux1"})
    for number, command in enumerate((
        [resize_lora, "--model", str(path), "--new_rank", "1", "--save_to"],
        [convert_lora, str(path), "--to", "diffusers", "--output"],
        [convert_lora, str(path), "--to", "peft", "--output"],
        [merge_lora, "--models", str(path), str(other), "--ratios", "0.5", "0.5", "--save_to"],
    )):  # fmt: skip
        out = tmp_path / f"{number}.safetensors"
        assert command[0].main([*command[1:], str(out)]) == 0
        assert torch.equal(load_safetensors(out)["bundle_emb.zorbit.clip_l"], torch.ones(2, 8))
    assert caplog.text.count("the word 'zorbit' is in") == 1 and "bundle_emb.zorbit.t5xxl" not in load_safetensors(out)
    assert "bundle_emb.frob.clip_l" in load_safetensors(out)
    assert check_lora.main([str(path)]) == 0


def test_a_layer_under_two_names_is_refused(flux):
    width = width_of(flux)
    with pytest.raises(CheckpointError, match="one layer"):
        to_kohya("flux", plain(width) | plain(width, "lycoris_double_blocks_0_img_attn_proj"))
    with pytest.raises(CheckpointError, match="one layer"):
        to_kohya(
            "flux",
            plain(width, "lora_unet_single_blocks_0_linear1")
            | plain(width, "lycoris_single_transformer_blocks_0_attn_to_q"),
        )


def test_matrices_of_a_layer_that_was_trained_in_parts(flux):
    """One pair for each of query, key and value under one name is one pair with the same change."""
    width, name = width_of(flux), "lora_unet_double_blocks_0_img_attn_qkv"
    tensors = drawn(
        {
            f"{name}.lora_{side}.{i}.weight": (2, width) if side == "down" else (width, 2)
            for i in range(3)
            for side in ("down", "up")
        }
    )
    ours = by_module(to_kohya("flux", tensors | {f"{name}.alpha": torch.tensor(1.0)}))[name]
    change = (
        ours["lora_up.weight"] @ ours["lora_down.weight"] * float(ours["alpha"]) / ours["lora_down.weight"].shape[0]
    )
    parts = [tensors[f"{name}.lora_up.{i}.weight"] @ tensors[f"{name}.lora_down.{i}.weight"] / 2 for i in range(3)]
    torch.testing.assert_close(change, torch.cat(parts))


def test_an_adapter_of_the_tiny_sdxl_model(tmp_path, capsys):
    """Its U-Net has one residual block a level, so that blocks have other numbers than in released models."""
    from library.sdxl_utils import load_unet_sdxl

    tiny = build_tiny_sd(tmp_path / "sdxl", "sdxl")
    network = lora.create_network(
        1.0, 2, 1.0, None, [], load_unet_sdxl(tiny.model, torch.float32, "cpu"), conv_dim="2", conv_alpha="1"
    )
    path, there, back = (str(tmp_path / f"{name}.safetensors") for name in ("lora", "there", "back"))
    network.save_weights(path, None, {"ss_base_model_version": "sdxl_base_v1-0"})
    assert check_lora.main([path]) == 0, capsys.readouterr().err
    assert convert_lora.main([path, there, "--to", "diffusers"]) == 0
    assert all(key.startswith("unet.") for key in load_safetensors(there))
    assert convert_lora.main([there, back, "--to", "kohya"]) == 0
    ours, again = load_safetensors(path), load_safetensors(back)
    assert ours.keys() == again.keys() and all(torch.equal(tensor, again[key]) for key, tensor in ours.items())
    assert read_header(path)[1]["ss_base_model_version"] == "sdxl_base_v1-0"


def test_another_family_is_named_only_where_it_is_known():
    parts = {"lora_unet_single_blocks_0_linear2": {"lora_down.weight": torch.ones(2, 4)}}
    assert "an adapter for FLUX.1" in nothing_fits("x", parts, "sd")
    assert "in no sd model that is known" in nothing_fits(
        "x", {"lora_unet_something": parts["lora_unet_single_blocks_0_linear2"]}, "sd"
    )

    cross = "input_blocks{0}1{0}1{0}transformer_blocks{0}0{0}attn2{0}to_k"
    for start, dot in (("lora_unet_", "_"), ("diffusion_model.", "."), ("unet.", ".")):
        for width, told in ((768, "Stable Diffusion 1 or 2"), (2048, "SDXL")):
            assert adapter_family(KeyTable({f"{start}{cross.format(dot)}.lora_down.weight": (4, width)})) == told


@pytest.mark.parametrize(
    ("names", "inputs", "for_flux", "for_hunyuan"),
    [
        (("double_blocks_0_img_attn_qkv",), 3072, True, False),
        (("double_blocks_0_img_attn_qkv",), 3584, False, True),
        (("double_blocks_0_img_attn_qkv",), 32, True, True),  # called so in both, as wide as neither
        (("double_blocks_0_img_attn_qkv", "double_blocks_0_img_mlp_fc1"), 32, False, True),
        (("double_blocks_0_img_attn_qkv", "double_blocks_0_img_mlp_fc1"), 3072, False, True),  # HunyuanVideo
        (("joint_blocks_0_x_block_attn_qkv",), 32, False, False),
    ],
)
def test_names_that_two_families_have_are_told_by_width_or_not_at_all(names, inputs, for_flux, for_hunyuan):
    table = KeyTable({f"lora_unet_{name}.lora_down.weight": (4, inputs) for name in names})
    owners = (records()[family].adapters.title for family in ("flux", "hunyuan_image"))
    assert [may_be_for(table, owner) for owner in owners] == [for_flux, for_hunyuan]
