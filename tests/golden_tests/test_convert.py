"""LoRA files rewritten from one naming to another: the recorded layouts of one adapter."""

import pytest
import torch

from library.family_table import FAMILIES
from networks import lora_conversion
from networks.lora import lora_delta
from networks.network_files import by_module
from tests.golden_dir import BEHAVIOUR_DIR

FILES = {"flux": "convert_flux.safetensors"}
PAIRS = [
    ("kohya", "diffusers"), ("diffusers", "kohya"), ("kohya", "comfy"), ("comfy", "kohya"),
    ("separate_kohya", "separate_diffusers"), ("separate_diffusers", "separate_kohya"),
]  # fmt: skip
REWRITE = {"diffusers": lora_conversion.to_diffusers, "comfy": lora_conversion.to_dotted, "kohya": lora_conversion.to_kohya}


def layout(family, name):
    from safetensors.torch import load_file

    path = BEHAVIOUR_DIR / FILES[family]
    if not path.exists():
        pytest.fail(f"reference file {path} is missing")
    return {key.partition("/")[2]: tensor for key, tensor in load_file(path).items() if key.startswith(f"{name}/")}


def cases():
    return [pytest.param(family, *pair, id=f"{family}-{pair[0]}-{pair[1]}") for family in FILES if family in FAMILIES for pair in PAIRS]


@pytest.mark.parametrize(("family", "source", "target"), cases())
def test_rewritten_file_equals_the_recorded_one(family, source, target):
    rewritten = REWRITE[target.removeprefix("separate_")](family, layout(family, source))
    expected = layout(family, target)
    if source == "comfy":  # that layout has no text encoder
        expected = {key: tensor for key, tensor in expected.items() if not key.startswith("lora_te")}
    assert set(rewritten) == set(expected)
    if "kohya" in target:
        return  # several files give the same change; the change is compared below
    for key, tensor in expected.items():
        torch.testing.assert_close(rewritten[key], tensor, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("family", [family for family in FILES if family in FAMILIES])
@pytest.mark.parametrize("source", ["kohya", "diffusers", "comfy", "separate_kohya", "separate_diffusers"])
def test_every_layout_gives_the_recorded_change(family, source):
    deltas = layout(family, "separate_delta" if "separate" in source else "delta")
    if source == "comfy":
        deltas = {name: delta for name, delta in deltas.items() if not name.startswith("lora_te")}
    modules = by_module(lora_conversion.to_kohya(family, layout(family, source)))
    assert set(modules) == set(deltas)
    for name, tensors in modules.items():
        down, up = tensors["lora_down.weight"], tensors["lora_up.weight"]
        change = lora_delta(down, up, float(tensors["alpha"]) / down.shape[0])
        torch.testing.assert_close(change, deltas[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", [family for family in FILES if family in FAMILIES])
def test_a_layer_without_name_is_refused(family):
    from library.errors import CheckpointError

    tensors = {"lora_unet_nowhere.lora_down.weight": torch.zeros(2, 4), "lora_unet_nowhere.lora_up.weight": torch.zeros(4, 2)}
    with pytest.raises(CheckpointError, match="lora_unet_nowhere"):
        lora_conversion.to_diffusers(family, tensors)
