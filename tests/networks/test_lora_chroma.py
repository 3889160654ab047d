"""Adapters of Chroma: the layers that they train, their names in files of other programs, the tools."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from library.checkpoints.flux_convert import convert_bfl_sd_to_diffusers, convert_diffusers_sd_to_bfl
from library.checkpoints.loading import build_on_meta
from library.chroma_models import Chroma, ChromaParams
from library.chroma_utils import load_chroma
from library.core.errors import ConfigError
from library.flux_utils import prepare_img_ids
from library.safetensors_utils import load_safetensors, save_file_atomic
from library.tiny_models.chroma_tiny import build_tiny_chroma
from networks.files.lora_conversion import to_diffusers
from networks.files.network_files import by_module
from networks.kinds.registry import weight_change
from networks.lora import check_network_args, create_network
from tools.lora_tools.convert import main as convert
from tools.lora_tools.extract import main as extract
from tools.lora_tools.merge import main as merge
from tools.lora_tools.resize import main as resize

diffusers = pytest.importorskip("diffusers")

LAYERS = {
    "img_attn_proj": (3072, 3072), "img_attn_qkv": (3072, 9216), "img_mlp_0": (3072, 12288), "img_mlp_2": (12288, 3072),
    "txt_attn_proj": (3072, 3072), "txt_attn_qkv": (3072, 9216), "txt_mlp_0": (3072, 12288), "txt_mlp_2": (12288, 3072),
}  # fmt: skip
"""of a double block: inputs and outputs"""


def hooked(denoiser: Chroma, rank: int, **pairs: str) -> nn.Module:
    """An adapter with random weights, at work in a denoiser."""
    network = create_network(1.0, rank, 1.5, None, [None], denoiser, **pairs)
    network.apply_to([None], denoiser, False, True)
    generator = torch.Generator().manual_seed(9)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2, generator=generator)
    return network


def test_the_layers_of_the_real_model() -> None:
    denoiser = build_on_meta(lambda: Chroma(ChromaParams()))
    network = create_network(1.0, 4, 2.0, None, [None], denoiser)
    expected = {f"lora_unet_double_blocks_{i}_{name}": sizes for i in range(19) for name, sizes in LAYERS.items()}
    expected |= {f"lora_unet_single_blocks_{i}_linear1": (3072, 21504) for i in range(38)}
    expected |= {f"lora_unet_single_blocks_{i}_linear2": (15360, 3072) for i in range(38)}
    found = {lora.lora_name: (lora.lora_down.in_features, lora.lora_up.out_features) for lora in network.unet_loras}
    assert found == expected and len(found) == 228
    entries = create_network(1.0, 4, 2.0, None, [None], denoiser, in_dims="[2,2,2,2,2]").unet_loras
    assert {lora.lora_name for lora in entries} - set(found) == {"lora_unet_img_in", "lora_unet_txt_in"}


def test_arguments_of_layers_that_it_lacks_are_refused() -> None:
    check_network_args({"img_attn_dim": "2", "in_dims": "[4,0,0,0,4]", "train_t5xxl": "True"}, "chroma", {})
    with pytest.raises(ConfigError, match="img_mod_dim"):
        check_network_args({"img_mod_dim": "2"}, "chroma", {})


def twin_models() -> tuple[nn.Module, Chroma]:
    """The same random model as diffusers' class and as ours."""
    torch.manual_seed(0)
    theirs = diffusers.ChromaTransformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=24, axes_dims_rope=(4, 6, 6), approximator_num_channels=32, approximator_hidden_dim=24,
        approximator_layers=2,
    ).eval()  # fmt: skip
    ours = Chroma(ChromaParams(
        in_channels=16, context_in_dim=24, hidden_size=32, num_heads=2, depth=2, depth_single_blocks=2,
        axes_dim=(4, 6, 6), approximator_in_dim=32, approximator_hidden_size=24, approximator_depth=2,
    )).eval()  # fmt: skip
    ours.load_state_dict(convert_diffusers_sd_to_bfl(theirs.state_dict()))
    return theirs, ours


@torch.no_grad()
def outputs(theirs: nn.Module, ours: Chroma) -> tuple[torch.Tensor, torch.Tensor]:
    """Predictions of both for the same inputs; every text token takes part."""
    generator = torch.Generator().manual_seed(1)
    img, txt = torch.randn(2, 6, 16, generator=generator), torch.randn(2, 3, 24, generator=generator)
    ids, times = prepare_img_ids(1, 2, 3), torch.tensor([0.2, 0.9])
    mine = ours(img, ids, txt, torch.zeros(1, 3, 3), times, torch.ones(2, 3))
    other = theirs(
        hidden_states=img, encoder_hidden_states=txt, timestep=times, img_ids=ids[0], txt_ids=torch.zeros(3, 3),
        return_dict=False,
    )[0]  # fmt: skip
    return other, mine


@pytest.mark.parametrize("pairs", [{}, {"split_qkv": "true"}, {"in_dims": "[2,0,0,0,2]"}])
def test_a_file_in_the_names_of_diffusers_does_the_same_there(pairs: dict[str, str]) -> None:
    theirs, ours = twin_models()
    plain_theirs, plain_ours = outputs(theirs, ours)
    torch.testing.assert_close(plain_theirs, plain_ours, rtol=1e-4, atol=1e-4)
    rewritten = to_diffusers("flux", hooked(ours, 4, **pairs).file_state_dict())
    theirs.load_lora_adapter(rewritten, prefix="transformer")
    with_theirs, with_ours = outputs(theirs, ours)
    assert (with_ours - plain_ours).abs().max() > 0.1
    torch.testing.assert_close(with_theirs, with_ours, rtol=1e-4, atol=1e-4)
    loaded = [name for name, _ in theirs.named_parameters() if "lora_A" in name]
    assert len(loaded) == sum(key.endswith("lora_A.weight") for key in rewritten)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> tuple[Path, Path]:
    """(model, LoRA with the metadata of a training)."""
    folder = tmp_path_factory.mktemp("chroma")
    tiny = build_tiny_chroma(folder)
    network = hooked(load_chroma(tiny.chroma, torch.float32, "cpu"), 3)
    metadata = {"ss_base_model_version": "chroma", "modelspec.architecture": "chroma/lora"}
    network.save_weights(str(folder / "lora.safetensors"), torch.float32, metadata)
    return tiny.chroma, folder / "lora.safetensors"


@pytest.mark.parametrize("layout", ["diffusers", "comfy", "peft"])
def test_names_there_and_back_are_exact(files: tuple[Path, Path], tmp_path: Path, layout: str) -> None:
    lora, there, back = str(files[1]), str(tmp_path / "there.safetensors"), str(tmp_path / "back.safetensors")
    assert convert([lora, there, "--to", layout]) == 0 and convert([there, back, "--to", "kohya"]) == 0
    first, second = load_safetensors(lora), load_safetensors(back)
    assert first.keys() == second.keys() and all(torch.equal(second[key], tensor) for key, tensor in first.items())
    with safe_open(there, "pt") as file:
        assert any("to_q" in key for key in file.keys()) is (layout != "comfy")


@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_merged_into_a_file_is_the_hooked_adapter(files: tuple[Path, Path], tmp_path: Path, layout: str) -> None:
    model, lora = files
    if layout == "diffusers":
        with safe_open(model, "pt") as file:
            metadata = file.metadata()
        state = convert_bfl_sd_to_diffusers(load_safetensors(model))
        model = tmp_path / "diffusers.safetensors"
        save_file_atomic({key: tensor.contiguous() for key, tensor in state.items()}, model, metadata)
    out = str(tmp_path / "merged.safetensors")
    assert merge(["--model", str(model), "--models", str(lora), "--save_to", out]) == 0
    before, after = (load_chroma(path, torch.float32, "cpu").state_dict() for path in (model, out))
    changes = by_module(load_safetensors(lora))
    for key, tensor in before.items():
        part = changes.get("lora_unet_" + key.removesuffix(".weight").replace(".", "_"), None)
        wanted = tensor if part is None or not key.endswith(".weight") else tensor + weight_change(part, tensor)
        torch.testing.assert_close(after[key], wanted, rtol=1e-4, atol=1e-4, msg=key)


def test_extracted_and_resized(files: tuple[Path, Path], tmp_path: Path) -> None:
    model, lora = (str(path) for path in files)
    tuned, found, small = (str(tmp_path / f"{name}.safetensors") for name in ("tuned", "found", "small"))
    assert merge(["--model", model, "--models", lora, "--save_to", tuned]) == 0
    assert extract(["--model_org", model, "--model_tuned", tuned, "--save_to", found, "--dim", "3"]) == 0
    wanted, got = by_module(load_safetensors(lora)), by_module(load_safetensors(found))
    assert wanted.keys() == got.keys()
    for name, part in got.items():
        zero = torch.zeros(part["lora_up.weight"].shape[0], part["lora_down.weight"].shape[1])
        torch.testing.assert_close(weight_change(part, zero), weight_change(wanted[name], zero), rtol=1e-4, atol=1e-4)
    with safe_open(found, "pt") as file:
        metadata = file.metadata()
    assert metadata["ss_base_model_version"] == "chroma" and metadata["modelspec.architecture"] == "chroma/lora"
    assert resize(["--model", found, "--save_to", small, "--new_rank", "2"]) == 0
    assert {part["lora_down.weight"].shape[0] for part in by_module(load_safetensors(small)).values()} == {2}
