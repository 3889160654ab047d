"""Files that --to comfy writes, through formulas written down here once more as ComfyUI's loader has them: every key
finds its layer and every weight becomes the one that merging gives here, or the log says which layers differ."""

import pytest
import torch

from library.core.errors import CheckpointError
from library.core.registry import import_target
from networks.files.lora_conversion import to_dotted, to_kohya
from networks.files.network_files import by_module
from networks.kinds.registry import bias_change, weight_change
from tests.networks.test_every_adapter import trained
from tests.networks.tiny_denoisers import tiny_denoiser


def lengths(weight, axis):
    return weight.transpose(0, axis).flatten(1).norm(dim=1).view([-1 if n == axis else 1 for n in range(weight.ndim)])


def decomposed(weight, change, scale):
    """Lengths of rows are compared with the original weight, those of columns with the changed one."""
    axis = 0 if scale.shape[0] == weight.shape[0] else 1
    return (weight + change) * (scale / lengths(weight if axis == 0 else weight + change, axis))


def rotations(blocks, alpha):
    skew = blocks - blocks.transpose(-1, -2)
    norm = skew.norm() + 1e-8
    if alpha > 0 and norm > alpha:  # alpha itself is the limit
        skew = skew * alpha / norm
    identity = torch.eye(skew.shape[-1])
    return (identity + skew) @ torch.linalg.inv(identity - skew)


def butterfly(weight, blocks):
    stages, count, size, _ = blocks.shape
    for i in range(stages):
        half = 2**i * size // 2
        x = weight.unflatten(0, (-1, 2, half)).transpose(1, 2).flatten(0, 2).unflatten(0, (count, size))
        weight = (
            torch.einsum("bij,bj...->bi...", blocks[i], x)
            .flatten(0, 1)
            .unflatten(0, (-1, half, 2))
            .transpose(1, 2)
            .flatten(0, 2)
        )
    return weight


def comfy_weight(weight, own, used):
    """The weight with the tensors of one layer, whose names that are read go into `used`."""

    def get(name):
        used.add(name)
        return own[name]

    alpha = float(get("alpha")) if "alpha" in own else None
    if "lora_A.weight" in own:
        down, up = get("lora_A.weight"), get("lora_B.weight")
        if "lora_mid.weight" in own:
            down = torch.einsum("ij...,jk...->ik...", get("lora_mid.weight"), down)
        change = (up.flatten(1) @ down.flatten(1)).reshape(weight.shape) * (
            1.0 if alpha is None else alpha / up.shape[1]
        )
    elif "hada_w1_a" in own:
        a1, b1, a2, b2 = (get(f"hada_{name}") for name in ("w1_a", "w1_b", "w2_a", "w2_b"))
        change = ((a1 @ b1) * (a2 @ b2)).reshape(weight.shape) * (1.0 if alpha is None else alpha / b1.shape[0])
    elif "lokr_w1" in own:
        w1, rank = get("lokr_w1"), None
        if "lokr_w2" in own:
            w2 = get("lokr_w2")
        else:
            w2, rank = get("lokr_w2_a") @ get("lokr_w2_b"), own["lokr_w2_b"].shape[0]
        change = torch.kron(w1, w2).reshape(weight.shape) * (alpha / rank if alpha is not None and rank else 1.0)
    elif "a1.weight" in own:
        a1, a2, b1, b2 = (get(f"{name}.weight") for name in ("a1", "a2", "b1", "b2"))
        change = (weight @ a1 @ a2 + b1 @ b2) * (1.0 if alpha is None else alpha / a2.shape[0])
    elif "oft_blocks" in own and own["oft_blocks"].ndim == 4:
        turned = butterfly(weight, rotations(get("oft_blocks"), alpha or 0))
        return turned * get("rescale") if "rescale" in own else turned
    elif "oft_blocks" in own:
        turn = rotations(get("oft_blocks"), alpha or 0)
        if "rescale" in own:
            get("rescale")  # read, and not used
        return torch.einsum("knm,kn...->km...", turn, weight.unflatten(0, turn.shape[:2])).flatten(0, 1)
    elif "diff" in own:
        change = get("diff")
    elif "w_norm" in own:
        change = get("w_norm")
    else:
        return weight
    return decomposed(weight, change, get("dora_scale")) if "dora_scale" in own else weight + change


def through_comfy(weights, tensors):
    """(name of a tensor of the model, whose `weights` are given -> its new value, keys of the file that load nowhere). Names are the model's own:
    with `diffusion_model.` in front, without an ending `.weight`."""
    places = {
        f"diffusion_model.{key.removesuffix('.weight')}": key for key in weights if not key.endswith(".bias")
    }
    result, used = {}, set()
    for name, key in places.items():
        own = {
            other[len(name) + 1 :]: tensor.float() for other, tensor in tensors.items() if other.startswith(f"{name}.")
        }
        if not own:
            continue
        seen = set()
        result[key] = comfy_weight(weights[key], own, seen)
        bias = key.removesuffix(".weight") + ".bias"
        for change in ("diff_b", "b_norm"):
            if change in own:
                seen.add(change)
                result[bias] = weights[bias] + own[change]
        used |= {f"{name}.{end}" for end in seen}
    return result, set(tensors) - used


SAME = {
    "lora": ("lora", {}), "dora of columns": ("lora", {"dora_wd": "True", "wd_on_output": "False"}),
    "loha": ("loha", {}),
    "loha of columns": ("loha", {"dora_wd": "True", "wd_on_output": "False"}),
    "lokr": ("lokr", {"factor": "4"}),
    "lokr of columns": ("lokr", {"factor": "2", "dora_wd": "True", "wd_on_output": "False"}),
    "glora": ("glora", {}), "oft": ("oft", {}), "oft of all layers": ("oft", {"enable_all_linear": "True"}),
    "diag_oft": ("diag_oft", {}),
    "boft": ("boft", {"rescaled": "True"}), "full": ("full", {}), "norm": ("norm", {}),
    "lora and norms": ("lora", {"train_norm": "True"}),
}  # fmt: skip
DIFFERENT = {
    "dora of rows": ("lora", {"dora_wd": "True"}),
    "rescaled": ("diag_oft", {"rescaled": "True"}),
    "ia3": ("ia3", {}),
}
DIMS = {"oft": 4, "diag_oft": 4, "boft": 16}


def file_of(kind, pairs, model, alpha=0.01):
    network = import_target(f"networks.{kind}:create_network")(
        1.0, DIMS.get(kind, 2), alpha if kind in DIMS else 1.5, None, None, model, **pairs
    )
    network.apply_to(None, model, False, True)
    trained(network)
    network.remove_from()
    return {key: tensor.clone() for key, tensor in network.file_state_dict().items()}


def merged_here(weights, family, tensors):
    """The same by this project's formulas."""
    names = {
        key.removesuffix(".weight").removesuffix(".scale").replace(".", "_"): key
        for key in weights
        if not key.endswith(".bias")
    }
    result = {}
    for name, own in by_module(to_kohya(family, tensors)).items():
        key = names[name.replace("oft_unet_", "").replace("lora_unet_", "")]
        weight = weights[key].float()
        result[key] = weight + weight_change(own, weight)
        bias = bias_change(own)
        if bias is not None:
            name_of_bias = key.removesuffix(".weight") + ".bias"
            result[name_of_bias] = weights[name_of_bias] + bias
    return result


@pytest.mark.parametrize("family", ["flux", "sdxl", "anima"])
@pytest.mark.parametrize("name", SAME)
def test_every_key_loads_with_the_same_result(name, family, caplog):
    model, _ = tiny_denoiser(family)
    weights = model.state_dict()
    kind, pairs = SAME[name]
    tensors = file_of(kind, pairs, model)
    dotted = to_dotted(family, tensors)
    found, nowhere = through_comfy(weights, dotted)
    assert not nowhere
    assert "another result" not in caplog.text
    expected = merged_here(weights, family, tensors)
    assert found.keys() == expected.keys()
    for key, weight in expected.items():
        torch.testing.assert_close(found[key], weight, rtol=1e-4, atol=1e-5, msg=key)
        assert not torch.equal(weight, weights[key])
    again = merged_here(weights, family, dotted)  # and the file loads here
    for key, weight in expected.items():
        torch.testing.assert_close(again[key], weight, rtol=1e-4, atol=1e-5, msg=key)


@pytest.mark.parametrize("family", ["flux", "sdxl", "anima"])
@pytest.mark.parametrize("name", DIFFERENT)
def test_what_differs_is_told(name, family, caplog):
    model, _ = tiny_denoiser(family)
    weights = model.state_dict()
    kind, pairs = DIFFERENT[name]
    tensors = file_of(kind, pairs, model)
    dotted = to_dotted(family, tensors)
    assert "ComfyUI gives another result for" in caplog.text
    found, nowhere = through_comfy(weights, dotted)
    expected = merged_here(weights, family, tensors)
    assert nowhere or any(
        not torch.allclose(found[key], weight, rtol=1e-2, atol=1e-3) for key, weight in expected.items()
    )


def test_the_limit_is_worked_in():
    """An alpha that limits strongly: left in the file, ComfyUI would read it as a limit of its own."""
    model, _ = tiny_denoiser("anima")
    weights = model.state_dict()
    tensors = file_of("oft", {}, model, alpha=0.002)
    dotted = to_dotted("anima", tensors)
    assert not any(key.endswith(".alpha") for key in dotted)
    kept = {**dotted, **{key.replace(".oft_blocks", ".alpha"): torch.tensor(0.002) for key in dotted}}
    expected = merged_here(weights, "anima", tensors)
    key = next(iter(expected))
    torch.testing.assert_close(through_comfy(weights, dotted)[0][key], expected[key], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(through_comfy(weights, kept)[0][key], expected[key], rtol=1e-3, atol=1e-4)


def test_parts_that_cannot_be_one_tensor():
    name = "oft_unet_single_blocks_0_linear1"
    tensors = {f"{name}.oft_blocks.{i}": torch.zeros(3, 4 if i < 3 else 16, 4 if i < 3 else 16) for i in range(4)}
    with pytest.raises(CheckpointError, match="cannot be one tensor of equal blocks"):
        to_dotted("flux", tensors)
