"""Networks by their constructors, modelspec metadata, tensors renamed while they are read, small calls of
library.utils."""

import base64
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from library import safetensors_utils, sai_model_spec, train_util, utils
from library.core.errors import ConfigError
from library.flux_utils import load_flux
from library.safetensors_utils import MemoryEfficientSafeOpen, read_header, save_file_atomic
from library.sd_utils import load_text_encoder_sd, load_unet_sd
from networks import lora, lora_flux
from tests.tiny import build_tiny_flux, build_tiny_sd


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    tiny = build_tiny_sd(tmp_path_factory.mktemp("sd"), "sd1")
    return load_text_encoder_sd(tiny.model, False, torch.float32, "cpu"), load_unet_sd(tiny.model, torch.float32, "cpu")


def described(network) -> dict[str, tuple]:
    return {module.lora_name: (module.lora_dim, float(module.alpha), module.multiplier) for module in network.loras}


def test_a_network_by_its_constructor_is_that_of_create_network(models):
    own = lora.create_network(0.8, 3, 1.5, None, *models, conv_dim="2", conv_alpha="1", rank_dropout="0.1")
    mine = lora.LoRANetwork(
        *models, multiplier=0.8, lora_dim=3, alpha=1.5, conv_lora_dim=2, conv_alpha=1.0, rank_dropout=0.1
    )
    assert described(mine) == described(own) and len(described(mine)) > 10
    assert mine.loras[0].rank_dropout == 0.1 and isinstance(mine.loras[0], lora.LoRAModule)
    mine.apply_to(models[0], models[1], True, True)
    assert mine.prepare_optimizer_params(1e-4, 1e-4, 1e-4)
    mine.remove_from()


def test_ranks_of_single_layers(models, tmp_path):
    names = list(described(lora.LoRANetwork(*models, conv_lora_dim=1)))
    chosen = {names[0]: 2, names[-1]: 5}
    network = lora.LoRANetwork(*models, modules_dim=chosen, modules_alpha={names[0]: 1.0})
    assert described(network) == {names[0]: (2, 1.0, 1.0), names[-1]: (5, 5.0, 1.0)}
    path = tmp_path / "a.safetensors"
    network.save_weights(str(path), torch.float32, {"k": "v"})
    again, _ = lora.create_network_from_weights(1.0, str(path), None, *models)
    assert described(again) == described(network) and read_header(path)[1]["k"] == "v"


class Own(lora.LoRAModule):
    pass


def test_a_class_of_ones_own(models):
    assert {type(module) for module in lora.LoRANetwork(*models, module_class=Own).loras} == {Own}


def test_flux_networks(tmp_path):
    model = load_flux(build_tiny_flux(tmp_path).flux, torch.float32, "cpu")
    own = lora.create_network(
        1.0, 4, 1.0, None, [], model, train_blocks="double", split_qkv="True", train_double_block_indices="0"
    )
    depth = model.params.depth
    mine = lora_flux.LoRANetwork(
        [], model, train_blocks="double", split_qkv=True, train_double_block_indices=[True] + [False] * (depth - 1)
    )
    assert described(mine) == described(own) and described(mine)
    typed = lora_flux.LoRANetwork([], model, type_dims=[2, 2, 2, 2, 0, 0, 0, 0])
    assert {module.lora_dim for module in typed.loras} == {2}
    assert lora_flux.LoRAModule is lora.LoRAModule


# -- metadata --------------------------------------------------------------------------------------------------------


def test_modelspec_by_switches():
    calls = sai_model_spec
    assert calls.determine_architecture(False, False, False, True, False) == "stable-diffusion-v1/lora"
    assert calls.determine_architecture(True, True, False, False, True) == "stable-diffusion-v2-768-v/textual-inversion"
    assert calls.determine_architecture(False, False, True, False, False) == "stable-diffusion-xl-v1-base"
    assert calls.determine_architecture(False, False, False, True, False, {"flux": "schnell"}) == "flux-1-schnell/lora"
    assert calls.determine_implementation(True, False, False) == "diffusers"
    assert (
        calls.determine_implementation(False, False, False, None, True)
        == "https://github.com/Stability-AI/generative-models"
    )
    assert calls.determine_implementation(True, False, False, {"flux": "dev"}).endswith("black-forest-labs/flux")
    assert [calls.determine_resolution(r) for r in (None, "640", (640, 512), [512, 768])] == [
        "512x512",
        "640x640",
        "640x512",
        "512x768",
    ]
    assert (
        calls.determine_resolution(None, True) == "1024x1024"
        and calls.determine_resolution(None, v2=True, v_parameterization=True) == "768x768"
    )
    with pytest.raises(ConfigError, match="sd33"):
        calls.determine_architecture(False, False, False, True, False, {"sd33": "m"})


def test_metadata_as_texts_and_as_a_record():
    how = dict(
        title="t", reso="512,768", author="me", timesteps=(10, 900), clip_skip=2, optional_metadata={"usage_hint": "so"}
    )
    texts = sai_model_spec.build_metadata(None, False, False, False, True, False, 1_700_000_000.0, **how)
    expected = {"architecture": "stable-diffusion-v1/lora", "title": "t", "resolution": "512x768", "author": "me", "usage_hint": "so",
                "timestep_range": "10,900", "encoder_layer": "2", "prediction_type": "epsilon",
                "sai_model_spec": "1.0.1"}  # fmt: skip
    assert {key: texts[f"modelspec.{key}"] for key in expected} == expected
    record = sai_model_spec.build_metadata_dataclass(None, False, False, False, True, False, 1_700_000_000.0, **how)
    assert (
        isinstance(record, sai_model_spec.ModelSpecMetadata)
        and record.author == "me"
        and record.to_metadata_dict() == texts
    )
    record.additional_fields["mine"] = "x"
    assert record.to_metadata_dict()["modelspec.mine"] == "x"


def test_metadata_of_options(tmp_path):
    options = SimpleNamespace(output_name="out", v2=False, v_parameterization=False, resolution="64,64", min_timestep=None, max_timestep=500,
                              metadata_author="me", clip_skip=None)  # fmt: skip
    texts = train_util.get_sai_model_spec(None, options, False, True, False, flux="dev")
    assert (
        texts["modelspec.architecture"] == "flux-1-dev/lora"
        and texts["modelspec.title"] == "out"
        and texts["modelspec.author"] == "me"
    )
    assert texts["modelspec.timestep_range"] == "0,500"
    assert (
        train_util.get_sai_model_spec_dataclass(None, options, True, True, False).architecture
        == "stable-diffusion-xl-v1-base/lora"
    )
    picture = tmp_path / "p.png"
    Image.new("RGB", (2, 2)).save(picture)
    assert (
        sai_model_spec.file_to_data_url(str(picture))
        == "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()
    )


# -- files and small calls -------------------------------------------------------------------------------------------


def test_tensors_renamed_split_and_joined(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file_atomic(
        {
            "qkv": torch.arange(6.0).reshape(6, 1),
            "up": torch.ones(1, 2),
            "down": torch.zeros(1, 2),
            "old.w": torch.ones(1),
        },
        path,
    )

    def split(key, tensors):
        names = ["q", "k", "v"] if key == "qkv" else None
        return names, None if names is None or tensors is None else dict(zip(names, tensors[key].chunk(3)))

    def join(key, tensors):
        return ("both" if key in ("up", "down") else None), None if tensors is None else torch.cat(
            [tensors["up"], tensors["down"]]
        )

    hooks = safetensors_utils.WeightTransformHooks(split, join, lambda key: key.replace("old", "new"))
    with MemoryEfficientSafeOpen(filename=path) as file:
        adapted = safetensors_utils.TensorWeightAdapter(hooks, file)
        assert sorted(adapted.keys()) == ["both", "k", "new.w", "q", "v"]
        assert adapted.get_tensor("k").flatten().tolist() == [2.0, 3.0] and adapted.get_tensor("both").shape == (2, 2)
        assert adapted.get_tensor("new.w", dtype=torch.float16).dtype == torch.float16
    safetensors_utils.mem_eff_save_file({"x": torch.ones(1)}, str(tmp_path / "b.safetensors"), {"k": "v"})
    assert safetensors_utils.load_split_weights(file_path=str(tmp_path / "b.safetensors"))["x"].item() == 1
    assert safetensors_utils.find_key(safetensors_file=str(path), starts_with="old") == "old.w"
    assert safetensors_utils.get_split_weight_filenames(file_path=str(path)) is None


def test_small_calls():
    image = np.random.RandomState(0).randint(0, 255, (8, 6, 3), dtype=np.uint8)
    assert utils.pil_resize(image, (3, 4)).shape == (4, 3, 3)
    assert np.array_equal(
        utils.pil_resize(image, (3, 4), Image.Resampling.NEAREST), np.asarray(Image.fromarray(image).resize((3, 4), 0))
    )
    assert utils.resize_image(image, 6, 8, 3, 4, "area").shape == (4, 3, 3)
    assert utils.validate_interpolation_fn(interpolation_str="lanczos") and not utils.validate_interpolation_fn("x")
    assert utils.str_to_dtype(s="bf16") == torch.bfloat16
    done: list[int] = []
    utils.fire_in_thread(done.append, 3).join()
    assert done == [3]
