"""Names and shapes of the layers that a network trains, at real size, on the meta device."""

import importlib

import pytest
import torch

from library.families.registry import FAMILIES
from networks.kinds.targets import targets_of_family
from tests.golden_dir import behaviour, behaviour_cases


def flux_models():
    """FLUX.1 dev, CLIP-L and T5 v1.1 XXL without data."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    from library.flux_models import Flux, FluxParams

    with torch.device("meta"):
        clip = CLIPTextModelWithProjection(CLIPTextConfig(
            hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, projection_dim=768
        ))
        t5xxl = T5EncoderModel(T5Config(
            vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64,
            feed_forward_proj="gated-gelu"
        ))
        return Flux(FluxParams()), [clip, t5xxl]


def anima_models():
    """Anima with its LLM adapter and Qwen3 0.6B, without data."""
    from transformers import Qwen3Config, Qwen3Model

    from library.anima_models import AdapterParams, Anima, AnimaParams

    with torch.device("meta"):
        qwen3 = Qwen3Model(Qwen3Config(
            vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16,
            num_key_value_heads=8, head_dim=128,
        ))
        return Anima(AnimaParams(adapter=AdapterParams())), [qwen3]


def clip(width: int, layers: int, heads: int):
    """A CLIP text encoder without data."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    return CLIPTextModelWithProjection(CLIPTextConfig(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=heads,
        projection_dim=width
    ))


def sd_models():
    """Stable Diffusion 1.5 with CLIP-L, without data."""
    from library.components.unet_models import UNetParams
    from library.sd_models import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel(UNetParams()), [clip(768, 12, 12)]


def sdxl_models():
    """SDXL with CLIP-L and bigG, without data."""
    from library.sdxl_models import SdxlUNet2DConditionModel
    from tests.library.test_unet_utils import SDXL

    with torch.device("meta"):
        return SdxlUNet2DConditionModel(SDXL), [clip(768, 12, 12), clip(1280, 32, 20)]


MODELS = {"flux": flux_models, "anima": anima_models, "sd1": sd_models, "sdxl": sdxl_models}


@pytest.fixture(scope="module")
def models():
    made = {}
    return lambda family: made.setdefault(family, MODELS[family]())


@pytest.mark.parametrize("case", behaviour_cases("lora_names.json.gz"))
def test_names_and_shapes_of_a_network(case, models):
    denoiser, text_encoders = models(case["family"])
    module = importlib.import_module(case["network_module"])
    rank = behaviour("lora_names.json.gz")["rank"]
    network = module.create_network(1.0, rank, 1.0, None, text_encoders, denoiser, **case["network_args"])
    network.apply_to(text_encoders, denoiser, True, True)
    try:
        assert [len(network.unet_loras), len(network.text_encoder_loras)] == case["count"]
        tensors = network.file_state_dict()
        shapes = {
            lora.lora_name: [list(tensors[f"{lora.lora_name}.{key}.weight"].shape) for key in ("lora_down", "lora_up")]
            for lora in network.loras
        }
        assert shapes == case["modules"]
        assert all(float(lora.alpha) == 1.0 for lora in network.loras)
        assert set(tensors) == {f"{n}.{k}" for n in shapes for k in ("lora_down.weight", "lora_up.weight", "alpha")}
    finally:
        network.remove_from()


@pytest.mark.parametrize(
    "case", behaviour_cases("lora_names.json.gz", "adapters", where=lambda case: case["kind"] == "lora")
)
def test_keys_of_one_layer(case):
    """The file keys of an adapter depend on the layer's shape alone, whatever the family."""
    from networks.lora import LoRAModule

    out_features, in_features, *kernel = case["weight_shape"]
    layer = torch.nn.Conv2d(in_features, out_features, kernel) if kernel else torch.nn.Linear(in_features, out_features)
    adapter = LoRAModule(case["name"], layer, lora_dim=case["network_dim"])
    assert {f"{case['name']}.{name}": list(t.shape) for name, t in adapter.file_tensors().items()} == case["keys"]


def test_every_family_has_a_table():
    for family in FAMILIES:
        assert targets_of_family(family).family == family
