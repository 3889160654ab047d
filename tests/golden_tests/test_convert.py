"""Adapter files rewritten from one naming to another: the recorded layouts of one adapter."""

import pytest
import torch

from library.safetensors_utils import read_header
from networks.files import lora_conversion
from networks.files.network_files import by_module
from networks.lora import lora_delta
from tests.golden_dir import BEHAVIOUR_DIR

FILES = {"flux": "flux", "sd": "sd1", "sdxl": "sdxl", "anima": "anima", "hunyuan_image": "hunyuan_image"}
"""family -> name of its file"""
LAYOUTS = {
    "flux": ("kohya", "diffusers", "comfy", "separate_kohya", "separate_diffusers"),
    "sd": ("kohya", "diffusers", "diffusers_old_with_alpha"),
    "sdxl": ("kohya", "kohya_diffusers_names", "diffusers"),
    "anima": ("kohya", "comfy", "diffusers"),
    "hunyuan_image": ("kohya", "comfy"),
}
WITHOUT_ENCODER = {("flux", "comfy"), ("anima", "diffusers"), ("sdxl", "kohya_diffusers_names")}
FOLDED = {"diffusers", "separate_diffusers"}
"""layouts without alpha"""
REWRITE = {
    "diffusers": lora_conversion.to_diffusers,
    "comfy": lora_conversion.to_dotted,
    "kohya": lora_conversion.to_kohya,
}
OURS = list(FILES)


def layout(family, name):
    from safetensors.torch import load_file

    path = BEHAVIOUR_DIR / f"convert_{FILES[family]}.safetensors"
    if not path.exists():
        pytest.fail(f"reference file {path} is missing")
    return {key.partition("/")[2]: tensor for key, tensor in load_file(path).items() if key.startswith(f"{name}/")}


def test_every_recorded_layout_is_compared():
    found = {path.stem.removeprefix("convert_"): path for path in BEHAVIOUR_DIR.glob("convert_*.safetensors")}
    assert found.keys() == set(FILES.values())
    for family, name in FILES.items():
        layouts = {key.partition("/")[0] for key in read_header(found[name])[0]}
        assert {layout for layout in layouts if not layout.endswith("delta")} == set(LAYOUTS[family])


def is_denoisers(key):
    return key.startswith(("lora_unet_", "diffusion_model.", "transformer.", "unet.", "text_conditioner."))


def cases():
    for family in OURS:
        for source in LAYOUTS[family]:
            for target in LAYOUTS[family]:
                is_alike = source.startswith("separate_") == target.startswith("separate_")
                if is_alike and target.removeprefix("separate_") in REWRITE:
                    yield pytest.param(family, source, target, id=f"{family}-{source}-{target}")


@pytest.mark.parametrize(("family", "source", "target"), list(cases()))
def test_rewritten_file_equals_the_recorded_one(family, source, target):
    rewritten = REWRITE[target.removeprefix("separate_")](family, layout(family, source))
    expected = layout(family, target)
    if (family, source) in WITHOUT_ENCODER or (family, target) in WITHOUT_ENCODER:
        expected = {key: tensor for key, tensor in expected.items() if is_denoisers(key)}
    if (family, target) in WITHOUT_ENCODER:  # the recorded file lacks them; ours keeps them
        rewritten = {key: tensor for key, tensor in rewritten.items() if is_denoisers(key)}
    assert set(rewritten) == set(expected)
    if source in FOLDED and target not in FOLDED:
        return  # alpha was folded away: another file with the same change; the change is compared below
    is_lossy = bool(FOLDED & {source, target})
    for key, tensor in expected.items():
        torch.testing.assert_close(rewritten[key], tensor, rtol=1e-5 if is_lossy else 0, atol=1e-7 if is_lossy else 0)


@pytest.mark.parametrize(("family", "source"), [(family, source) for family in OURS for source in LAYOUTS[family]])
def test_every_layout_gives_the_recorded_change(family, source):
    deltas = layout(family, "separate_delta" if "separate" in source else "delta")
    if (family, source) in WITHOUT_ENCODER:
        deltas = {name: delta for name, delta in deltas.items() if is_denoisers(name)}
    modules = by_module(lora_conversion.to_kohya(family, layout(family, source)))
    assert set(modules) == set(deltas)
    for name, tensors in modules.items():
        down, up = tensors["lora_down.weight"], tensors["lora_up.weight"]
        change = lora_delta(down, up, float(tensors["alpha"]) / down.shape[0])
        torch.testing.assert_close(change, deltas[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", OURS)
def test_a_layer_without_name_is_refused(family):
    from library.core.errors import CheckpointError

    tensors = {
        "lora_unet_nowhere.lora_down.weight": torch.zeros(2, 4),
        "lora_unet_nowhere.lora_up.weight": torch.zeros(4, 2),
    }
    with pytest.raises(CheckpointError, match="lora_unet_nowhere"):
        lora_conversion.to_diffusers(family, tensors)
    assert set(lora_conversion.to_kohya(family, tensors)) == set(tensors)  # the reader reports those
    with pytest.raises(CheckpointError, match="elsewhere.0"):
        lora_conversion.to_kohya(
            family,
            {"unet.elsewhere.0.lora_A.weight": torch.zeros(2, 4), "unet.elsewhere.0.lora_B.weight": torch.zeros(4, 2)},
        )
