"""Merging while a file is read: the same numbers as merging into the loaded model, for every family and layout of the
file."""

import pytest
import torch

from library.anima_utils import load_anima
from library.checkpoints.flux_convert import convert_bfl_sd_to_diffusers
from library.checkpoints.lumina_convert import UNUSED, to_diffusers
from library.checkpoints.unet_convert import original_to_diffusers
from library.components.gemma_encoder_utils import load_gemma2
from library.components.llm_encoder_utils import load_qwen3
from library.components.text_encoder_utils import load_clip_l, load_t5xxl
from library.core.errors import CheckpointError
from library.flux_utils import load_flux
from library.lora_utils import CheckpointMerge, MergeOnLoad, load_safetensors_with_lora_and_fp8, read_adapter
from library.lumina_utils import load_lumina
from library.safetensors_utils import load_safetensors, read_header, save_file_atomic
from library.sd_utils import load_text_encoder_sd, load_unet_sd
from library.sdxl_utils import load_text_encoders_sdxl, load_unet_sdxl
from library.tiny_models.lumina_tiny import build_tiny_lumina
from networks.kinds.targets import targets_of_family
from networks.lora import create_network, create_network_from_weights
from tests.tiny import build_tiny_flux
from tests.tiny_anima import build_tiny_anima
from tests.tiny_sd import build_tiny_sd

HOW = (torch.float32, "cpu")


def flux_parts(folder):
    model = build_tiny_flux(folder)
    path = folder / "diffusers.safetensors"
    state = convert_bfl_sd_to_diffusers(load_safetensors(model.flux))
    save_file_atomic({key: tensor.contiguous() for key, tensor in state.items()}, path, read_header(model.flux)[1])
    loaders = {
        "denoiser": lambda **how: load_flux(model.flux, *HOW, **how),
        "clip_l": lambda **how: load_clip_l(model.clip_l, *HOW, **how),
        "t5": lambda **how: load_t5xxl(model.t5xxl, *HOW, **how),
    }
    return loaders, {"denoiser": lambda **how: load_flux(path, *HOW, **how)}


def sd_parts(folder, kind):
    model = build_tiny_sd(folder, kind).model
    part = {
        k.removeprefix("model.diffusion_model."): v
        for k, v in load_safetensors(model).items()
        if k.startswith("model.diffusion_model.")
    }
    path = folder / "diffusers.safetensors"
    save_file_atomic(original_to_diffusers(part), path, read_header(model)[1])
    if kind == "sdxl":
        encoders = {
            f"encoder {i}": lambda i=i, **how: load_text_encoders_sdxl(model, *HOW, **how)[i] for i in (0, 1)
        }
        return (
            {"denoiser": lambda **how: load_unet_sdxl(model, *HOW, **how), **encoders},
            {"denoiser": lambda **how: load_unet_sdxl(path, *HOW, **how)},
        )
    is_v2 = kind == "sd2"
    loaders = {
        "denoiser": lambda **how: load_unet_sd(model, *HOW, **how),
        "encoder": lambda **how: load_text_encoder_sd(model, is_v2, *HOW, **how),
    }
    return loaders, {} if is_v2 else {"denoiser": lambda **how: load_unet_sd(path, *HOW, **how)}


def anima_parts(folder):
    model = build_tiny_anima(folder)
    loaders = {
        "denoiser": lambda **how: load_anima(model.anima, *HOW, **how),
        "qwen3": lambda **how: load_qwen3(model.qwen3, *HOW, **how),
    }
    return loaders, {}


def lumina_parts(folder):
    """The denoiser in the layout of diffusers too."""
    model = build_tiny_lumina(folder)
    path = folder / "transformer.safetensors"
    whole = load_safetensors(model.lumina)
    state = to_diffusers(whole) | {UNUSED: whole[UNUSED]}  # which diffusers leaves out
    save_file_atomic({key: tensor.contiguous() for key, tensor in state.items()}, path)
    loaders = {
        "denoiser": lambda **how: load_lumina(model.lumina, *HOW, **how),
        "gemma2": lambda **how: load_gemma2(model.gemma2, *HOW, **how),
    }
    return loaders, {"denoiser": lambda **how: load_lumina(path, *HOW, **how)}


FAMILIES = {
    "flux": ("flux", flux_parts), "sd1": ("sd", lambda folder: sd_parts(folder, "sd1")),
    "sd2": ("sd", lambda folder: sd_parts(folder, "sd2")),
    "sdxl": ("sdxl", lambda folder: sd_parts(folder, "sdxl")), "anima": ("anima", anima_parts),
    "lumina": ("lumina", lumina_parts),
}  # fmt: skip


@pytest.fixture(scope="module", params=FAMILIES)
def case(request, tmp_path_factory):
    """(family, loaders of the parts, loaders of other layouts, LoRA file with random weights for every part)."""
    folder = tmp_path_factory.mktemp(request.param)
    family, make = FAMILIES[request.param]
    loaders, others = make(folder)
    models = {name: load() for name, load in loaders.items()}
    encoders = [model for name, model in models.items() if name != "denoiser"]
    more = {"train_t5xxl": "True"} if family == "flux" else {"conv_dim": "3"} if family.startswith("sd") else {}
    network = create_network(1.0, 2, 1.0, None, encoders, models["denoiser"], **more)
    network.apply_to(encoders, models["denoiser"])
    generator = torch.Generator().manual_seed(5)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    network.save_weights(str(folder / "lora.safetensors"), torch.float32, {})
    return family, loaders, others, folder / "lora.safetensors"


def test_merged_on_load_equals_merged_after(case):
    family, loaders, others, lora = case
    targets = targets_of_family(family)
    models = {name: load() for name, load in loaders.items()}
    plain = {name: {k: v.clone() for k, v in model.state_dict().items()} for name, model in models.items()}
    encoders = [model for name, model in models.items() if name != "denoiser"]
    network, tensors = create_network_from_weights(
        -0.7, str(lora), None, encoders, models["denoiser"], for_inference=True
    )
    network.merge_to(encoders, models["denoiser"], tensors)
    transform = MergeOnLoad(targets, [read_adapter(lora, targets, -0.7)])
    for name, load in [*loaders.items(), *others.items()]:
        merged, changed = load(transform=transform).state_dict(), 0
        for key, tensor in models[name].state_dict().items():
            torch.testing.assert_close(merged[key], tensor, rtol=1e-6, atol=1e-6)
            changed += not torch.equal(plain[name][key], tensor)
        assert changed == len([m for m in network.loras if is_part(targets, m.lora_name, name, list(loaders))])


def is_part(targets, lora_name, name, names):
    encoder = targets.encoder_of(lora_name)
    return names[0 if encoder is None else encoder + 1] == name


def test_several_adapters_add_up_and_8_bits_are_rounded_once(tmp_path):
    model = build_tiny_flux(tmp_path).flux
    targets = targets_of_family("flux")
    network = create_network(1.0, 2, 1.0, None, [], load_flux(model, *HOW))
    network.apply_to([], load_flux(model, *HOW), False, True)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    tensors = network.file_state_dict()
    state = load_safetensors(model)
    key = "double_blocks.0.img_attn.qkv.weight"
    twice = load_safetensors_with_lora_and_fp8(str(model), [tensors, tensors], [0.5, 2.0], targets=targets)
    once = load_safetensors_with_lora_and_fp8(str(model), [tensors], [2.5], targets=targets)
    torch.testing.assert_close(twice[key], once[key], rtol=1e-6, atol=1e-6)
    assert not torch.equal(once[key], state[key]) and torch.equal(once["img_in.weight"], state["img_in.weight"])
    small = load_safetensors_with_lora_and_fp8(
        str(model), [tensors], [2.5], targets=targets, fp8_optimization=True, target_keys=("blocks",),
        exclude_keys=("mod",)
    )
    assert torch.equal(small[key].float(), once[key].to(torch.float8_e4m3fn).float())
    assert (
        small["img_in.weight"].dtype == torch.float32
        and small["double_blocks.0.img_mod.lin.weight"].dtype == torch.float32
    )
    model_in_8_bits = load_flux(
        model, torch.float8_e4m3fn, "cpu", transform=MergeOnLoad(targets, [read_adapter_of(tensors, tmp_path)])
    )
    torch.testing.assert_close(
        dict(model_in_8_bits.named_parameters())[key].float(),
        (state[key] + (once[key] - state[key]) / 2.5).to(torch.float8_e4m3fn).float(),
    )


def read_adapter_of(tensors, folder):
    save_file_atomic(tensors, folder / "a.safetensors")
    return read_adapter(folder / "a.safetensors", targets_of_family("flux"))


def test_bad_adapters(tmp_path):
    model = build_tiny_flux(tmp_path).flux
    targets = targets_of_family("flux")
    shapes = {key: tuple(tensor.shape) for key, tensor in load_safetensors(model).items()}
    down, up = torch.ones(2, 64), torch.ones(192, 2)
    good = {
        "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": down,
        "lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight": up,
    }

    def merge(tensors):
        save_file_atomic(tensors, tmp_path / "x.safetensors")
        return CheckpointMerge(targets, shapes, [read_adapter(tmp_path / "x.safetensors", targets)])

    merge(good).check()
    with pytest.raises(CheckpointError, match="not finite"):
        merge({key: tensor * float("nan") for key, tensor in good.items()})
    foreign = {
        "lora_unet_input_blocks_4_1_proj_in.lora_down.weight": down,
        "lora_unet_input_blocks_4_1_proj_in.lora_up.weight": up,
    }
    with pytest.raises(CheckpointError, match="is an adapter for SDXL"):
        merge(foreign).check()
    with pytest.raises(CheckpointError, match="1 layers are not in this model"):
        merge({**good, **foreign}).check()
    merge({**good, **foreign}).check(allow_partial=True)
    with pytest.raises(CheckpointError, match="no lora_up.weight"):
        merge({"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": down})
    wrong = merge({**good, "lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight": torch.ones(9, 2)})
    with pytest.raises(CheckpointError, match="do not fit"):
        list(wrong.stream(load_safetensors(model).items()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_dora", [False, True])
def test_rows_at_a_time_give_what_the_whole_gives(dtype, is_dora, monkeypatch):
    """A block of rows has its own part of the up matrix and of the magnitude, and its own norm."""
    from library import lora_utils
    from networks.files.checkpoint_layers import LayerParameter, Piece

    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(37, 12, generator=generator).to(dtype)
    sources = []
    for rank in (3, 5):
        tensors = {
            "lora_down.weight": torch.randn(rank, 12, generator=generator),
            "lora_up.weight": torch.randn(37, rank, generator=generator),
        }
        tensors["alpha"] = torch.tensor(2.0)
        if is_dora:
            tensors["dora_scale"] = torch.rand(37, 1, generator=generator) + 0.5
        sources.append((tensors, 0.7))
    change = lora_utils._Change(LayerParameter("x", "x", "weight", (Piece("k", 0, 37),)), tuple(sources))
    group = lora_utils._Group({"k"}, [change])
    expected = lora_utils._merge_group(group, {"k": weight.float().clone()})["k"].to(dtype)
    monkeypatch.setattr(lora_utils, "ROW_BLOCK", 60)
    merged = lora_utils._merge_rows(change, weight.clone(), dtype)
    assert merged.dtype == dtype
    torch.testing.assert_close(merged, expected, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-5)


def test_merged_layers_are_told_once_for_all_parts(case, caplog):
    family, loaders, _, lora = case
    targets = targets_of_family(family)
    transform = MergeOnLoad(targets, [read_adapter(lora, targets, 1.0)])
    with caplog.at_level("INFO", logger="library.lora_utils"):
        for load in loaders.values():
            load(transform=transform)
        transform.finish()
    told = [record.getMessage() for record in caplog.records if "merged" in record.getMessage()]
    names = {key.partition(".")[0] for key in load_safetensors(lora)}
    assert told == [f"adapters are merged into {len(names)} layers"]
