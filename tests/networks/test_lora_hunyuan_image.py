"""Adapters of HunyuanImage 2.1: the layers that they train, their names in files of other programs, the tools."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from library.checkpoints.loading import build_on_meta
from library.core.registry import import_target
from library.generation.adapter_files import AdapterFile
from library.generation.adapters import merging
from library.hunyuan_image_models import HYImageDiffusionTransformer, HYImageParams
from library.hunyuan_image_utils import denoiser_state, load_hunyuan_image
from library.safetensors_utils import save_file_atomic
from networks.files.file_names import names_of_family
from networks.files.lora_conversion import to_diffusers, to_dotted, to_kohya
from networks.lora import create_network
from tests.library.test_hunyuan_image_utils import comfy_names

diffusers = pytest.importorskip("diffusers")

DOUBLE = {
    "attn_qkv": (3584, 10752), "attn_proj": (3584, 3584), "mlp_fc1": (3584, 14336), "mlp_fc2": (14336, 3584),
    "mod_linear": (3584, 21504),
}  # fmt: skip
SINGLE = {"linear1": (3584, 25088), "linear2": (17920, 3584), "modulation_linear": (3584, 10752)}
"""of a block: inputs and outputs"""


def hooked(denoiser: nn.Module, **pairs: str) -> nn.Module:
    """An adapter with random weights, at work in a denoiser."""
    network = create_network(1.0, 4, 1.5, None, [], denoiser, **pairs)
    network.apply_to([], denoiser, False, True)
    generator = torch.Generator().manual_seed(9)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2, generator=generator)
    return network


def test_the_layers_of_the_real_model() -> None:
    network = create_network(1.0, 4, 2.0, None, [], build_on_meta(lambda: HYImageDiffusionTransformer(HYImageParams())))
    expected = {
        f"lora_unet_double_blocks_{i}_{side}_{name}": sizes
        for i in range(20) for side in ("img", "txt") for name, sizes in DOUBLE.items()
    }  # fmt: skip
    expected |= {f"lora_unet_single_blocks_{i}_{name}": sizes for i in range(40) for name, sizes in SINGLE.items()}
    found = {lora.lora_name: (lora.lora_down.in_features, lora.lora_up.out_features) for lora in network.unet_loras}
    assert found == expected and len(found) == 320


@pytest.mark.parametrize(("pairs", "left"), [
    ({"network_reg_dims": "_mod_=0,modulation_=0"}, 8 + 4), ({"network_reg_dims": r"double_blocks\.0\.txt.*=0"}, 5 + 6),
    ({"network_reg_lrs": "single_blocks=0"}, 10),
])  # fmt: skip
def test_ranks_and_rates_by_pattern(pairs: dict[str, str], left: int) -> None:
    """Searched in the name with underscores and in the dotted path; rank 0 or rate 0 leaves a layer out."""
    params = HYImageParams(
        hidden_size=32, num_heads=2, depth=1, depth_single=2, rope_dim_list=(8, 8), text_dim=8, byt5_dim=8
    )
    network = create_network(1.0, 4, 2.0, None, [], HYImageDiffusionTransformer(params), **pairs)
    groups, _ = network.prepare_optimizer_params_with_multiple_te_lrs(None, 1e-3, 1e-3)
    learning = {id(parameter) for group in groups for parameter in group["params"] if group.get("lr", 1) != 0}
    assert sum(id(lora.lora_up.weight) in learning for lora in network.unet_loras) == left


@pytest.mark.parametrize("kind", ["oft", "diag_oft", "boft"])
def test_rotations_turn_attention_layers_alone(kind: str) -> None:
    params = HYImageParams(
        hidden_size=32, num_heads=2, depth=1, depth_single=1, rope_dim_list=(8, 8), text_dim=8, byt5_dim=8
    )
    make = import_target(f"networks.{kind}:create_network")

    def layers(**pairs: str) -> set[str]:
        network = make(1.0, 16, 0.0, None, [], HYImageDiffusionTransformer(params), **pairs)
        return {lora.lora_name.partition("_blocks_")[2] for lora in network.unet_loras}

    assert layers() == {f"0_{side}_attn_{name}" for side in ("img", "txt") for name in ("qkv", "proj")}
    assert len(layers(enable_all_linear="true")) == 13


def twin_models() -> tuple[nn.Module, HYImageDiffusionTransformer]:
    """The same random model as diffusers' class and as ours."""
    torch.manual_seed(0)
    theirs = diffusers.HunyuanImageTransformer2DModel(
        in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=16, num_layers=2, num_single_layers=2,
        text_embed_dim=12, text_embed_2_dim=10, rope_axes_dim=(8, 8),
    ).eval()  # fmt: skip
    ours = HYImageDiffusionTransformer(HYImageParams(
        in_channels=8, hidden_size=32, num_heads=2, depth=2, depth_single=2, text_dim=12, byt5_dim=10,
        rope_dim_list=(8, 8),
    ))  # fmt: skip
    ours.load_state_dict(denoiser_state(theirs.state_dict()))
    return theirs, ours.eval()


@torch.no_grad()
def outputs(theirs: nn.Module, ours: HYImageDiffusionTransformer) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, txt, byt5 = (torch.randn(2, *shape, generator=generator) for shape in ((8, 2, 3), (5, 12), (4, 10)))
    mask, glyph_mask = torch.tensor([[1] * 5, [1, 1, 0, 0, 0]]), torch.tensor([[1, 1, 1, 0], [0] * 4])
    times = torch.tensor([200.0, 900.0])
    other = theirs(
        x, times, txt, mask, encoder_hidden_states_2=byt5, encoder_attention_mask_2=glyph_mask, return_dict=False
    )
    return other[0], ours(x, times, txt, mask, byt5, glyph_mask)


@pytest.mark.parametrize("pairs", [{}, {"split_qkv": "true"}])
def test_a_file_in_the_names_of_diffusers_does_the_same_there(pairs: dict[str, str]) -> None:
    theirs, ours = twin_models()
    plain_theirs, plain_ours = outputs(theirs, ours)
    torch.testing.assert_close(plain_theirs, plain_ours, rtol=1e-4, atol=1e-4)
    rewritten = to_diffusers("hunyuan_image", hooked(ours, **pairs).file_state_dict())
    theirs.load_lora_adapter(rewritten, prefix="transformer")
    with_theirs, with_ours = outputs(theirs, ours)
    assert (with_ours - plain_ours).abs().max() > 0.1
    torch.testing.assert_close(with_theirs, with_ours, rtol=1e-4, atol=1e-4)
    loaded = [name for name, _ in theirs.named_parameters() if "lora_A" in name]
    assert len(loaded) == sum(key.endswith("lora_A.weight") for key in rewritten) > 0


def test_every_layer_has_a_name_in_every_program() -> None:
    """Of the real model: kohya names lead to the names of ComfyUI and diffusers, and these back."""
    names = names_of_family("hunyuan_image")
    denoiser = build_on_meta(lambda: HYImageDiffusionTransformer(HYImageParams()))
    for lora in create_network(1.0, 4, 2.0, None, [], denoiser).unet_loras:
        place = names.find(lora.lora_name)
        assert place is not None and place.kohya == lora.lora_name
        for spelling in (place.original_kohya, place.dotted, *place.diffusers):
            assert names.find(spelling).kohya == lora.lora_name, spelling
    for block in denoiser.double_blocks[:1] + denoiser.single_blocks[:1]:
        assert all(type(layer).__name__ == "Linear" for layer in block.modules() if isinstance(layer, nn.Linear))


def test_comfy_reads_names_of_its_own_module_tree() -> None:
    _, ours = twin_models()
    tensors = to_dotted("hunyuan_image", hooked(ours).file_state_dict())
    names = {key.partition(".")[0] for key in tensors}
    assert "lora_unet_double_blocks_1_txt_mlp_2" in names and "lora_unet_single_blocks_0_modulation_lin" in names
    assert len(names) == 2 * 10 + 2 * 3


def test_adapters_and_models_under_the_names_inside_of_comfy_ui(tmp_path: Path) -> None:
    """An adapter file is read by them, norms too, and merged into a model file that has them."""
    _, ours = twin_models()
    network = hooked(ours)
    kohya = network.file_state_dict()
    names = names_of_family("hunyuan_image")
    dotted = {}
    for key, tensor in kohya.items():
        name, _, rest = key.partition(".")
        words = {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight"}
        dotted[f"{names.find(name).dotted}.{words.get(rest, rest)}"] = tensor
    assert "diffusion_model.double_blocks.1.txt_attn.qkv.lora_A.weight" in dotted
    back = to_kohya("hunyuan_image", dotted)
    assert back.keys() == kohya.keys() and all(torch.equal(back[key], tensor) for key, tensor in kohya.items())
    norm = names.find("diffusion_model.single_blocks.1.norm.query_norm.scale")
    assert norm.kohya == "lora_unet_single_blocks_1_q_norm"
    assert names.find("diffusion_model.double_blocks.0.img_attn.norm.key_norm").kohya.endswith("0_img_attn_k_norm")

    state = {key: tensor for key, tensor in twin_models()[1].state_dict().items()}
    save_file_atomic(state, tmp_path / "x.safetensors")
    save_file_atomic({f"model.model.{key}": t for key, t in comfy_names(state).items()}, tmp_path / "comfy.safetensors")
    save_file_atomic(dotted, tmp_path / "lora.safetensors")
    adapters = [AdapterFile(str(tmp_path / "lora.safetensors"), 0.7)]
    loaded = []
    for name in ("x", "comfy"):
        merge = merging("hunyuan_image", adapters)
        loaded.append(load_hunyuan_image(tmp_path / f"{name}.safetensors", torch.float32, "cpu", transform=merge))
        merge.finish()
    network.set_multiplier(0.7)
    with_adapter = outputs(twin_models()[0], ours)[1]
    for model in loaded:
        torch.testing.assert_close(outputs(twin_models()[0], model)[1], with_adapter, rtol=1e-4, atol=1e-4)
