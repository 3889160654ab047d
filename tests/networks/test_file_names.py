"""Names of adapter files at real size: number of layers, their names in other programs, and every spelling of a
layer."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch

from library.core.errors import CheckpointError
from networks import lora
from networks.files.file_names import names_of_family
from networks.files.lora_conversion import to_diffusers, to_kohya
from networks.files.network_files import read_adapter_file
from networks.kinds.targets import targets_of_family
from tests.golden_tests.test_lora_names import anima_models, clip, sd_models, sdxl_models

KEY_TABLES = Path(__file__).parents[1] / "golden" / "checkpoints"
CONVS = {"conv_dim": "2", "conv_alpha": "1"}


def sd2_models():
    """Stable Diffusion 2 with the layers of its text encoder that are used, without data."""
    from library.sd_models import UNet2DConditionModel
    from tests.library.test_unet_utils import SD2

    with torch.device("meta"):
        return UNet2DConditionModel(SD2), [clip(1024, 23, 16)]


MODELS = {"sd1": sd_models, "sd2": sd2_models, "sdxl": sdxl_models, "anima": anima_models}
FAMILY = {"sd1": "sd", "sd2": "sd", "sdxl": "sdxl", "anima": "anima"}


@pytest.fixture(scope="module")
def network():
    """A function (model, network arguments) -> network of that model at real size."""
    made = {}

    def of(kind: str, **arguments: str):
        denoiser, text_encoders = made.setdefault(kind, MODELS[kind]())
        return lora.create_network(1.0, 4, 1.0, None, text_encoders, denoiser, **arguments)

    return of


@pytest.mark.parametrize(
    ("kind", "arguments", "count"),
    [
        ("sd1", {}, (192, 72)), ("sd1", CONVS, (278, 72)), ("sd2", {}, (192, 138)), ("sd2", CONVS, (278, 138)),
        ("sdxl", {}, (722, 264)), ("sdxl", CONVS, (788, 264)), ("anima", {}, (280, 196)),
        ("anima", {"train_llm_adapter": "true"}, (340, 196)),
        ("anima", {"train_llm_adapter": "true", "include_patterns": "['.*']"}, (514, 196)),
    ],
)  # fmt: skip
def test_number_of_layers(network, kind, arguments, count) -> None:
    made = network(kind, **arguments)
    assert (len(made.unet_loras), len(made.text_encoder_loras)) == count


def diffusers_unet(kind: str) -> torch.nn.Module:
    diffusers = pytest.importorskip("diffusers")
    plain, cross, up, cross_up = "DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"
    sizes = {"attention_head_dim": 8, "cross_attention_dim": 768}
    if kind == "sd2":
        sizes = {"attention_head_dim": (5, 10, 20, 20), "cross_attention_dim": 1024, "use_linear_projection": True}
    if kind == "sdxl":
        sizes = {
            "block_out_channels": (320, 640, 1280), "down_block_types": (plain, cross, cross),
            "up_block_types": (cross_up, cross_up, up),
            "cross_attention_dim": 2048, "transformer_layers_per_block": (1, 2, 10), "attention_head_dim": (5, 10, 20),
            "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        }  # fmt: skip
    with torch.device("meta"):
        return diffusers.UNet2DConditionModel(**sizes)


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_names_are_those_of_diffusers_and_of_original_files(network, kind) -> None:
    """For every layer of the network with convolutions: the module in diffusers has the same shape, the original name
    is a key of the checkpoint, and every spelling leads back."""
    with gzip.open(KEY_TABLES / f"{dict(sd1='sd15', sd2='sd21', sdxl='sdxl')[kind]}_unet.json.gz", "rt") as file:
        originals = json.load(file)
    theirs = {name: module for name, module in diffusers_unet(kind).named_modules() if hasattr(module, "weight")}
    names = names_of_family(FAMILY[kind])
    loras = network(kind, **CONVS).unet_loras
    for module in loras:
        place = names.find(module.lora_name)
        (foreign,) = place.diffusers
        assert theirs[foreign.removeprefix("unet.")].weight.shape == module.org_module.weight.shape
        original = place.dotted.removeprefix("diffusion_model.")
        assert any(key.endswith(f"{original}.weight") for key in originals)
        underscored = [
            f"{prefix}{path.replace('.', '_')}"
            for prefix in ("lora_unet_", "lycoris_")
            for path in (original, foreign[5:])
        ]
        for spelling in (foreign, foreign[5:], place.dotted, original, f"base_model.model.{foreign[5:]}", *underscored):
            assert names.find(spelling).kohya == module.lora_name, spelling
    assert len({names.find(module.lora_name).diffusers for module in loras}) == len(loras)


def test_every_layer_of_anima_has_a_name_everywhere(network) -> None:
    names = names_of_family("anima")
    made = network("anima", train_llm_adapter="true", include_patterns="['.*']")
    for module in made.loras:
        place = names.find(module.lora_name)
        assert names.find(place.dotted).kohya == module.lora_name
        assert bool(place.diffusers) == (place.encoder is None)
        assert all(names.find(name).kohya == module.lora_name for name in place.diffusers)
    tree = {f"lora_unet_{path.replace('.', '_')}": path for path, _ in MODELS["anima"]()[0].named_modules()}
    for module in made.unet_loras:
        assert names.find(module.lora_name).dotted == f"diffusion_model.{tree[module.lora_name]}"


def pair(name: str, down: str = "lora_A.weight", up: str = "lora_B.weight") -> dict[str, torch.Tensor]:
    return {f"{name}.{down}": torch.ones(2, 4), f"{name}.{up}": torch.ones(6, 2)}


Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
KOHYA = ("lora_down.weight", "lora_up.weight")
TEXT = "text_model.encoder.layers.3.self_attn"


@pytest.mark.parametrize(
    ("family", "tensors", "name"),
    [
        ("sd", pair(f"unet.{Q}.to_q"), "lora_unet_{Q}_to_q"),
        ("sd", pair(f"unet.{Q}.to_q", "lora.down.weight", "lora.up.weight"), "lora_unet_{Q}_to_q"),
        ("sd", pair(f"unet.{Q}.processor.to_q_lora", "down.weight", "up.weight"), "lora_unet_{Q}_to_q"),
        ("sd", pair(f"{Q}.processor.to_out_lora", "down.weight", "up.weight"), "lora_unet_{Q}_to_out_0"),
        ("sd", pair(f"base_model.model.{Q}.to_out.0", "lora_A.default.weight", "lora_B.default.weight"), "lora_unet_{Q}_to_out_0"),
        ("sd", pair(f"unet.base_model.model.{Q}.to_v"), "lora_unet_{Q}_to_v"),
        ("sd", pair("lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q", "lora_down.weight", "lora_up.weight"), "lora_unet_{Q}_to_q"),
        ("sd", pair("diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q"), "lora_unet_{Q}_to_q"),
        ("sd", pair(f"text_encoder.{TEXT}.q_proj.lora_linear_layer", "down.weight", "up.weight"), "lora_te_{TEXT}_q_proj"),
        ("sd", pair(f"text_encoder.{TEXT}.to_out_lora", "down.weight", "up.weight"), "lora_te_{TEXT}_out_proj"),
        ("sd", pair("text_encoder.encoder.layers.3.self_attn.k_proj"), "lora_te_{TEXT}_k_proj"),
        ("sd", pair(f"base_model.model.{TEXT}.k_proj"), "lora_te_{TEXT}_k_proj"),
        ("sd", pair("lora_te1_text_model_encoder_layers_3_self_attn_k_proj", "lora_down.weight", "lora_up.weight"), "lora_te_{TEXT}_k_proj"),
        ("sd", pair("lora_te_encoder_layers_3_self_attn_k_proj", "lora_down.weight", "lora_up.weight"), "lora_te_{TEXT}_k_proj"),
        ("sdxl", pair(f"text_encoder_2.{TEXT}.k_proj"), "lora_te2_{TEXT}_k_proj"),
        ("anima", pair("diffusion_model.blocks.12.adaln_modulation_cross_attn.2"), "lora_unet_blocks_12_adaln_modulation_cross_attn_2"),
        ("anima", pair("blocks.12.self_attn.q_proj"), "lora_unet_blocks_12_self_attn_q_proj"),
        ("anima", pair("lora_te1_layers_3_mlp_up_proj", "lora_down.weight", "lora_up.weight"), "lora_te_layers_3_mlp_up_proj"),
        ("anima", pair("text_conditioner.blocks.1.mlp.2"), "lora_unet_llm_adapter_blocks_1_mlp_2"),
        ("flux", pair("base_model.model.transformer_blocks.3.attn.to_out.0"), "lora_unet_double_blocks_3_img_attn_proj"),
        ("flux", pair("lora_transformer_transformer_blocks_3_ff_net_0_proj", *KOHYA), "lora_unet_double_blocks_3_img_mlp_0"),
        ("flux", pair("lora_transformer_single_transformer_blocks_12_proj_out", *KOHYA), "lora_unet_single_blocks_12_linear2"),
        ("flux", pair("lora_transformer_proj_out", *KOHYA), "lora_unet_final_layer_linear"),
        ("flux", pair("transformer.double_blocks.3.txt_attn.proj"), "lora_unet_double_blocks_3_txt_attn_proj"),
        ("flux", pair("lora_unet_double_blocks_3_img_mlp_0_", *KOHYA), "lora_unet_double_blocks_3_img_mlp_0"),
        ("sdxl", pair("unet.input_blocks.4.1.proj_in"), "lora_unet_input_blocks_4_1_proj_in"),
        ("sdxl", pair("unet.output_blocks.2.1.transformer_blocks.9.ff.net.2"), "lora_unet_output_blocks_2_1_transformer_blocks_9_ff_net_2"),
        ("sdxl", pair("lora_te2_text_model_encoder_layers_3_self_attn_k_proj_", *KOHYA), "lora_te2_{TEXT}_k_proj"),
    ],
)  # fmt: skip
def test_spellings(family, tensors, name) -> None:
    name = name.replace("{Q}", Q.replace(".", "_")).replace("{TEXT}", TEXT.replace(".", "_"))
    rewritten = to_kohya(family, tensors)
    assert {key.removesuffix(".alpha") for key in rewritten} - {
        f"{name}.lora_down.weight",
        f"{name}.lora_up.weight",
    } <= {name}
    assert rewritten[f"{name}.lora_down.weight"].shape == (2, 4) and rewritten[f"{name}.lora_up.weight"].shape == (6, 2)


def test_a_path_that_two_encoders_have_is_refused() -> None:
    with pytest.raises(CheckpointError, match="layers.3.self_attn.k_proj"):
        to_kohya("sdxl", pair(f"base_model.model.{TEXT}.k_proj"))


@pytest.mark.parametrize("kind", ["hada", "lokr"])
def test_other_kinds_keep_their_parameters(kind) -> None:
    keys = {
        "hada": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "alpha"),
        "lokr": ("lokr_w1", "lokr_w2", "alpha"),
    }[kind]
    shapes = {"alpha": ()}
    tensors = {
        f"lora_unet_input_blocks_4_1_proj_in.{key}": torch.full(shapes.get(key, (2, 2)), float(i))
        for i, key in enumerate(keys)
    }
    there = to_diffusers("sdxl", tensors)
    assert set(there) == {f"unet.down_blocks.1.attentions.0.proj_in.{key}" for key in keys}
    again = to_kohya("sdxl", there)
    assert again.keys() == tensors.keys() and all(torch.equal(again[key], tensor) for key, tensor in tensors.items())
    fused = {f"lora_unet_double_blocks_0_img_attn_qkv.{key}": torch.zeros(shapes.get(key, (2, 2))) for key in keys}
    with pytest.raises(CheckpointError, match="which only LoRA can be"):
        to_diffusers("flux", fused)


def test_a_tucker_convolution_becomes_an_ordinary_one() -> None:
    generator = torch.Generator().manual_seed(0)
    down, mid, up = (torch.randn(shape, generator=generator) for shape in ((2, 5, 1, 1), (2, 2, 3, 3), (7, 2, 1, 1)))
    name = "lora_unet_down_blocks_0_resnets_0_conv1"
    tensors = {
        f"{name}.lora_down.weight": down,
        f"{name}.lora_mid.weight": mid,
        f"{name}.lora_up.weight": up,
        f"{name}.alpha": torch.tensor(1.0),
    }
    there = to_diffusers("sd", tensors)
    key = "unet.down_blocks.0.resnets.0.conv1.lora_{}.weight"
    change = lora.lora_delta(there[key.format("A")], there[key.format("B")], 1.0)
    torch.testing.assert_close(change, lora.lora_delta(down, up, 0.5, mid))


def test_strength_that_stands_in_a_configuration(tmp_path) -> None:
    """alpha of diffusers' metadata and of PEFT's file, by pattern, and of rank-stabilised adapters."""
    from library.safetensors_utils import save_file_atomic

    tensors = (
        pair(f"unet.{Q}.to_q") | pair(f"unet.{Q}.to_k") | pair(f"text_encoder.{TEXT}.q_proj") | pair("unet.conv_in")
    )
    config = {
        "unet.r": 2, "unet.lora_alpha": 8, "unet.alpha_pattern": {f"{Q}.to_k": 3, "conv_in": 5},
        "text_encoder.lora_alpha": 4,
        "text_encoder.use_rslora": True,
    }  # fmt: skip
    path = tmp_path / "lora.safetensors"
    save_file_atomic(tensors, path, {"lora_adapter_metadata": json.dumps(config)})
    found = {
        key: float(tensor)
        for key, tensor in read_adapter_file(path, targets_of_family("sd")).items()
        if key.endswith(".alpha")
    }
    place = Q.replace(".", "_")
    assert found == {
        f"lora_unet_{place}_to_q.alpha": 8, f"lora_unet_{place}_to_k.alpha": 3, "lora_unet_conv_in.alpha": 5,
        f"lora_te_{TEXT.replace('.', '_')}_q_proj.alpha": pytest.approx(4 * 2**0.5),
    }  # fmt: skip
    folder = tmp_path / "adapter_model.safetensors"
    save_file_atomic(pair(f"base_model.model.{Q}.to_q"), folder)
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"lora_alpha": 6, "alpha_pattern": {}, "use_rslora": False})
    )
    assert float(read_adapter_file(folder, targets_of_family("sd"))[f"lora_unet_{place}_to_q.alpha"]) == 6
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="adapter_config.json is not valid JSON"):
        read_adapter_file(folder, targets_of_family("sd"))


@pytest.mark.parametrize(("kind", "is_linear"), [("sd1", False), ("sd2", True)])
def test_projections_of_both_shapes_load(kind, is_linear) -> None:
    """Files of Stable Diffusion 2 hold proj_in and proj_out as matrices or as 1x1 convolutions."""
    from library.sd_models import UNet2DConditionModel
    from tests.tiny_sd import tiny_params

    torch.manual_seed(0)
    unet = UNet2DConditionModel(tiny_params(kind))
    source = lora.create_network(1.0, 2, 1.0, None, [None], unet)
    for module in source.unet_loras:
        torch.nn.init.normal_(module.lora_up.weight)
    held = source.file_state_dict()
    other = {
        key: _other_shape(tensor, is_linear) if "_proj_in." in key or "_proj_out." in key else tensor
        for key, tensor in held.items()
    }
    changed = [key for key in held if held[key].shape != other[key].shape]
    assert len(changed) == 2 * 2 * sum("proj_in.alpha" in key for key in held)
    built, _ = lora.create_network_from_weights(1.0, None, None, [None], unet, weights_sd=other)
    assert built.load_tensors(other) == {"missing": [], "unexpected": []}
    for key, tensor in built.file_state_dict().items():
        assert torch.equal(tensor, held[key]), key


def _other_shape(tensor: torch.Tensor, is_linear: bool) -> torch.Tensor:
    if tensor.ndim == 0:
        return tensor
    return tensor[:, :, None, None] if is_linear else tensor[:, :, 0, 0]


def test_a_record_that_would_unpack_to_gigabytes(monkeypatch, caplog):
    """It is left aside before it fills the memory."""
    import base64
    import zlib

    from networks.files import conversion_record
    from networks.files.lora_layouts import AdapterFile

    monkeypatch.setattr(conversion_record, "MOST_UNPACKED", 1 << 16, raising=False)
    packed = base64.b64encode(zlib.compress(b'{"content": "' + bytes(1 << 17) + b'"}')).decode()
    file = AdapterFile({"a": torch.zeros(1)}, {conversion_record.KEY: packed})
    assert conversion_record.restored("flux", file)[1] is False and "would unpack to more than" in caplog.text
