"""The merge tool through its command line: into models of every family, into one adapter, and what it refuses."""

import json

import pytest
import torch
from safetensors import safe_open

from library.anima_utils import load_anima
from library.components.gemma_encoder_utils import load_gemma2
from library.flux_utils import load_flux
from library.hunyuan_image_utils import load_hunyuan_image
from library.lumina_utils import load_lumina
from library.safetensors_utils import load_safetensors, save_file_atomic
from library.sd_utils import load_text_encoder_sd, load_unet_sd
from library.sdxl_utils import load_text_encoders_sdxl, load_unet_sdxl
from library.tiny_models.hunyuan_image_tiny import build_tiny_hunyuan_image
from library.tiny_models.lumina_tiny import build_tiny_lumina
from networks.files.network_files import by_module
from networks.kinds.block_weights import parse_block_weights, slot_of
from networks.kinds.registry import weight_change
from networks.lora import create_network, create_network_from_weights
from tests.tiny import build_tiny_flux
from tests.tiny_anima import build_tiny_anima
from tests.tiny_sd import build_tiny_sd
from tools.lora_tools.merge import main

HOW = (torch.float32, "cpu")


def models_of(family, path):
    """(denoiser, text encoders) of a model file."""
    if family == "flux":
        return load_flux(path, *HOW), []
    if family == "anima":
        return load_anima(path, *HOW), []
    if family == "hunyuan_image":
        return load_hunyuan_image(path, *HOW), []
    if family == "lumina":
        return load_lumina(path, *HOW), [load_gemma2(path, *HOW)]
    if family == "sdxl":
        return load_unet_sdxl(path, *HOW), load_text_encoders_sdxl(path, *HOW)
    return load_unet_sd(path, *HOW), [load_text_encoder_sd(path, family == "sd2", *HOW)]


def build(family, folder):
    if family == "flux":
        return build_tiny_flux(folder).flux
    if family == "hunyuan_image":
        return build_tiny_hunyuan_image(folder).denoiser
    if family == "lumina":
        return build_tiny_lumina(folder, whole=True).lumina
    return build_tiny_anima(folder).anima if family == "anima" else build_tiny_sd(folder, family).model


def write_lora(path, denoiser, encoders, seed, rank=2, metadata=None):
    network = create_network(1.0, rank, 1.5, None, encoders, denoiser)
    network.apply_to(encoders, denoiser, bool(encoders), True)
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    network.save_weights(str(path), torch.float32, metadata or {"ss_base_model_version": "x"})
    return str(path)


@pytest.fixture(scope="module", params=["flux", "sd1", "sd2", "sdxl", "anima", "lumina", "hunyuan_image"])
def case(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    model = build(request.param, folder)
    parts = models_of(request.param, model)
    return (
        request.param,
        folder,
        str(model),
        [write_lora(folder / f"{i}.safetensors", *parts, seed=i, rank=2 + i) for i in (0, 1)],
    )


def test_into_a_model(case, tmp_path):
    """The merged file loads, and is the model into which the loaded network is merged."""
    family, _, model, loras = case
    out = tmp_path / "new" / "merged.safetensors"
    assert main(["--model", model, "--models", *loras, "--ratios", "0.8", "-0.5", "--save_to", str(out)]) == 0
    denoiser, encoders = models_of(family, model)
    for path, ratio in zip(loras, (0.8, -0.5), strict=True):
        network, tensors = create_network_from_weights(ratio, path, None, encoders, denoiser, for_inference=True)
        network.merge_to(encoders, denoiser, tensors)
    merged, merged_encoders = models_of(family, out)
    for wanted, found in zip([denoiser, *encoders], [merged, *merged_encoders], strict=True):
        weights = found.state_dict()
        for key, tensor in wanted.state_dict().items():
            torch.testing.assert_close(weights[key], tensor, rtol=1e-5, atol=1e-5)
    before, after = load_safetensors(model), load_safetensors(out)
    assert before.keys() == after.keys()
    untouched = [key for key in before if torch.equal(before[key], after[key])]
    assert 0 < len(untouched) < len(before)
    assert main(["--model", model, "--models", *loras, "--save_to", str(out)]) == 2
    assert load_safetensors(out).keys() == after.keys()


@pytest.mark.parametrize("mode", ["concat", "svd", "full"])
def test_into_one_adapter(case, tmp_path, mode):
    """The change of the result is the sum of the changes, for every layer."""
    _, _, _, loras = case
    out = tmp_path / "sum.safetensors"
    more = ["--new_rank", "5"] if mode == "svd" else ["--shuffle"] if mode == "concat" else []
    assert main(["--models", *loras, "--ratios", "0.8", "-0.5", "--save_to", str(out), "--mode", mode, *more]) == 0
    parts = [by_module(load_safetensors(path)) for path in (*loras, out)]
    assert parts[0].keys() == parts[2].keys()
    for name, (first, second, result) in {name: [part[name] for part in parts] for name in parts[0]}.items():
        shape = (first["lora_up.weight"].shape[0], *first["lora_down.weight"].shape[1:])
        weight = torch.zeros(shape)
        wanted = weight_change(first, weight, 0.8) + weight_change(second, weight, -0.5)
        if mode == "full":
            torch.testing.assert_close(result["diff"].view(shape), wanted, rtol=1e-5, atol=1e-5)
            continue
        torch.testing.assert_close(weight_change(result, weight), wanted, rtol=1e-4, atol=1e-5, msg=name)
        assert mode == "svd" or float(result["alpha"]) == result["lora_down.weight"].shape[0] == 5
    with safe_open(out, "pt") as file:
        metadata = file.metadata()
    assert metadata["modelspec.merged_from"] == "0, 1" and metadata["modelspec.title"] == "sum"
    assert len(metadata["sshs_model_hash"]) == 64


def test_ranks_by_rule(case, tmp_path):
    """--mode svd with a rule keeps as many directions of the sum as the rule asks."""
    _, _, _, loras = case
    out = tmp_path / "sum.safetensors"
    words = [
        "--models",
        *loras,
        "--save_to",
        str(out),
        "--mode",
        "svd",
        "--new_rank",
        "5",
        "--dynamic_method",
        "sv_fro",
        "--dynamic_param",
        "0.8",
    ]
    assert main(words) == 0
    first, second, result = (by_module(load_safetensors(path)) for path in (*loras, out))
    for name, part in result.items():
        weight = torch.zeros(first[name]["lora_up.weight"].shape[0], *first[name]["lora_down.weight"].shape[1:])
        values = torch.linalg.svdvals(
            (weight_change(first[name], weight) + weight_change(second[name], weight)).flatten(1).double()
        )
        shares = values.square().cumsum(0).sqrt() / values.norm()
        assert part["lora_down.weight"].shape[0] == min(5, int((shares < 0.8).sum()) + 1)
    assert (
        main(["--models", *loras, "--save_to", str(out), "--dynamic_method", "sv_fro", "--dynamic_param", "0.8"]) == 2
    )
    assert main([*words[:-2], "--overwrite"]) == 2


def test_precision_of_the_result(case, tmp_path):
    _, _, model, loras = case
    out = tmp_path / "half.safetensors"
    assert main(["--model", model, "--models", loras[0], "--save_to", str(out), "--save_precision", "bf16"]) == 0
    assert {tensor.dtype for tensor in load_safetensors(out).values() if tensor.is_floating_point()} == {torch.bfloat16}
    assert main(["--models", *loras, "--save_to", str(tmp_path / "l.safetensors"), "--precision", "fp16"]) == 0
    kinds = {
        key.endswith(".alpha"): tensor.dtype for key, tensor in load_safetensors(tmp_path / "l.safetensors").items()
    }
    assert kinds == {True: torch.float32, False: torch.float16}


def test_block_weights():
    weights = parse_block_weights(json.dumps([float(i) for i in range(12)]), "sdxl")
    assert (
        weights[0] == 0
        and weights[1 + 4] == 1
        and weights[1 + 8] == 4
        and weights[13] == 5
        and weights[14] == 6
        and weights[14 + 5] == 11
    )
    assert weights[1] == weights[14 + 6] == 1.0
    names = {
        "lora_te1_text_model_encoder_layers_0_mlp_fc1": 0, "lora_unet_input_blocks_4_1_proj_in": 5,
        "lora_unet_middle_block_1_proj_in": 13,
        "lora_unet_output_blocks_0_1_proj_in": 14, "lora_unet_label_emb_0_0": 1, "lora_unet_out_2": 23,
    }  # fmt: skip
    assert {name: slot_of("sdxl", name) for name in names} == names
    names = {
        "lora_te_text_model_encoder_layers_0_mlp_fc1": 0, "lora_unet_down_blocks_1_attentions_1_proj_in": 6,
        "lora_unet_down_blocks_0_downsamplers_0_conv": 4, "lora_unet_mid_block_attentions_0_proj_in": 13,
        "lora_unet_up_blocks_3_attentions_2_proj_in": 25, "lora_unet_up_blocks_0_upsamplers_0_conv": 16,
    }  # fmt: skip
    assert {name: slot_of("sd", name) for name in names} == names


def test_block_weights_scale_each_adapter_once(tmp_path):
    model = build_tiny_sd(tmp_path, "sdxl").model
    lora = write_lora(tmp_path / "l.safetensors", *models_of("sdxl", model), seed=1)
    lists = json.dumps([0.0] + [0.5] * 25)
    out = tmp_path / "out.safetensors"
    assert main(["--models", lora, "--ratios", "0.5", "--lbws", lists, "--save_to", str(out)]) == 0
    before, after = by_module(load_safetensors(lora)), by_module(load_safetensors(out))
    for name, part in after.items():
        shape = (part["lora_up.weight"].shape[0], *part["lora_down.weight"].shape[1:])
        wanted = weight_change(before[name], torch.zeros(shape), 0.25 if name.startswith("lora_unet") else 0.0)
        torch.testing.assert_close(weight_change(part, torch.zeros(shape)), wanted)


def message(capsys, *arguments):
    """The one error message of a call that must fail."""
    capsys.readouterr()
    assert main(list(map(str, arguments))) != 0
    return capsys.readouterr().err


def test_bad_input(tmp_path, capsys):
    flux, sdxl = build_tiny_flux(tmp_path / "f").flux, build_tiny_sd(tmp_path / "x", "sdxl").model
    lora = write_lora(tmp_path / "flux.safetensors", *models_of("flux", flux), seed=1)
    other = write_lora(tmp_path / "sdxl.safetensors", *models_of("sdxl", sdxl), seed=1)
    out = tmp_path / "out.safetensors"
    told = message(capsys, "--model", sdxl, "--models", lora, "--save_to", out)
    assert "is an adapter for FLUX.1" in told and "flux.safetensors" in told
    assert "different families" in message(capsys, "--models", lora, other, "--save_to", out)
    assert "is an input too" in message(capsys, "--model", flux, "--models", lora, "--save_to", flux)
    assert "is an input too" in message(capsys, "--models", lora, "--save_to", lora)
    assert "2 values for 1 --models" in message(capsys, "--models", lora, "--ratios", 1, 2, "--save_to", out)
    assert "--models is missing" in message(capsys, "--save_to", out)
    assert "--save_to is missing" in message(capsys, "--models", lora)
    assert "exists" in message(capsys, "--models", lora, "--save_to", other)
    assert "there are no block weights for flux" in message(capsys, "--models", lora, "--lbws", "[1]", "--save_to", out)
    for ignored in (
        ["--new_rank", 8],
        ["--new_conv_rank", 8, "--mode", "full"],
        ["--seed", 3],
        ["--mode", "svd", "--model", flux],
    ):
        assert "leave" in message(capsys, "--models", lora, "--save_to", out, *ignored)
    assert "known: float" in message(capsys, "--models", lora, "--save_to", out, "--precision", "int4")
    tensors = load_safetensors(lora)
    part = {key: tensor for key, tensor in tensors.items() if "img_mod" not in key}
    renamed = {key.replace("img_mod", "img_nod"): tensor for key, tensor in tensors.items()}
    save_file_atomic(renamed, tmp_path / "half.safetensors")
    assert "layers are not in this model" in message(
        capsys, "--model", flux, "--models", tmp_path / "half.safetensors", "--save_to", out
    )
    assert (
        main(
            [
                "--model",
                str(flux),
                "--models",
                str(tmp_path / "half.safetensors"),
                "--save_to",
                str(out),
                "--allow_partial",
            ]
        )
        == 0
    )
    out.unlink()
    save_file_atomic(
        {key: tensor for key, tensor in part.items() if not key.endswith("alpha")}, tmp_path / "no_alpha.safetensors"
    )
    assert main(["--model", str(flux), "--models", str(tmp_path / "no_alpha.safetensors"), "--save_to", str(out)]) == 0
    out.unlink()
    save_file_atomic(
        {key: tensor * float("inf") if "lora_up" in key else tensor for key, tensor in part.items()},
        tmp_path / "inf.safetensors",
    )
    assert "not finite" in message(capsys, "--model", flux, "--models", tmp_path / "inf.safetensors", "--save_to", out)
    half = {key: tensor for key, tensor in part.items() if not key.endswith("lora_up.weight")}
    save_file_atomic(half, tmp_path / "ups.safetensors")
    assert "incomplete" in message(capsys, "--models", tmp_path / "ups.safetensors", "--save_to", out)
    assert not out.exists() and main(["--models", lora, "--save_to", str(out), "--dry_run"]) == 0 and not out.exists()
