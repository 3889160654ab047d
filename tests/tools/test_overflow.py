"""Every tool that writes weights: numbers that the written format cannot hold are named and nothing is written;
--clamp_overflow bounds them."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from library.core.registry import import_target
from library.safetensors_utils import read_header
from tests.tiny_sd import build_tiny_sd

LAYER = "lora_unet_double_blocks_0_img_attn_proj"


def adapter(path, size, dtype=torch.float32, alpha=1.0):
    generator = torch.Generator().manual_seed(0)
    up = torch.randn(8, 1, generator=generator)
    up[0, 0] = size
    tensors = {
        f"{LAYER}.lora_down.weight": torch.ones(1, 6, dtype=dtype),
        f"{LAYER}.lora_up.weight": up.to(dtype),
        f"{LAYER}.alpha": torch.tensor(alpha),
    }
    save_file(tensors, path)
    return str(path)


def model(path, size):
    save_file(
        {
            "model.diffusion_model.out.2.weight": torch.full((2, 3), float(size)),
            "model.diffusion_model.out.2.bias": torch.ones(2),
        },
        path,
    )
    return str(path)


def whole_model(folder, size):
    """(a tiny SD checkpoint with one large number, the same without it, its tokenizer)."""
    tiny = build_tiny_sd(folder, "sd1")
    path = tiny.model
    tensors = load_file(path)
    tensors["model.diffusion_model.out.2.weight"].flatten()[0] = size
    save_file(tensors, folder / "large.safetensors", read_header(path)[1])
    return str(folder / "large.safetensors"), str(path), str(tiny.tokenizer)


def resize(folder):
    return [
        "--model",
        adapter(folder / "a.safetensors", 1e5),
        "--new_rank",
        "1",
        "--save_to",
        str(folder / "o.safetensors"),
        "--save_precision",
        "fp16",
    ]


def merge_adapters(folder):
    files = [adapter(folder / f"{n}.safetensors", 4e4 * n) for n in (1, 2)]
    return [
        "--models",
        *files,
        "--save_to",
        str(folder / "o.safetensors"),
        "--save_precision",
        "fp16",
        "--mode",
        "full",
    ]


def average_adapters(folder):
    files = [adapter(folder / f"{n}.safetensors", 8e4 + n) for n in (1, 2)]
    return [*files, "--output_file", str(folder / "o.safetensors"), "--beta", "0.5", "--save_precision", "fp16"]


def average_models(folder):
    files = [model(folder / f"{n}.safetensors", 500 * n) for n in (1, 2)]
    return ["--models", *files, "--output", str(folder / "o.safetensors"), "--saving_precision", "fp8"]


def convert_adapter(folder):
    return [
        adapter(folder / "a.safetensors", 3e4, torch.float16, 16.0),
        str(folder / "o.safetensors"),
        "--to",
        "diffusers",
    ]


def merge_into_model(folder):
    _, base, _ = whole_model(folder, 1.0)
    key = next(key for key in load_file(base) if "input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight" in key)
    name, width = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q", load_file(base)[key].shape
    tensors = {
        "lora_down.weight": torch.ones(1, width[1]),
        "lora_up.weight": torch.full((width[0], 1), 1e5),
        "alpha": torch.tensor(1.0),
    }
    save_file({f"{name}.{key}": tensor for key, tensor in tensors.items()}, folder / "a.safetensors")
    return [
        "--model",
        base,
        "--models",
        str(folder / "a.safetensors"),
        "--save_to",
        str(folder / "o.safetensors"),
        "--save_precision",
        "fp16",
    ]


def extract(folder):
    tuned, base, _ = whole_model(folder, 1e5)
    return [
        "--model_org",
        base,
        "--model_tuned",
        tuned,
        "--kind",
        "full",
        "--save_to",
        str(folder / "o.safetensors"),
        "--save_precision",
        "fp16",
    ]


TOOLS = {
    "resize": ("tools.lora_tools.resize:main", resize),
    "merge adapters": ("tools.lora_tools.merge:main", merge_adapters),
    "average adapters": ("tools.lora_tools.ema:main", average_adapters),
    "average models": ("tools.model_tools.average:main", average_models),
    "convert an adapter": ("tools.lora_tools.convert:main", convert_adapter),
    "merge into a model": ("tools.lora_tools.merge:main", merge_into_model),
    "extract": ("tools.lora_tools.extract:main", extract),
}  # fmt: skip


@pytest.mark.parametrize("name", TOOLS)
def test_named_or_bounded(name, tmp_path, capsys):
    tool, make = TOOLS[name]
    main, words = import_target(tool), make(tmp_path)
    out = tmp_path / "o.safetensors"
    assert main(words) == 2
    message = capsys.readouterr().err
    assert " reaches " in message and "--clamp_overflow" in message and "Traceback" not in message
    assert not out.exists() and not list(tmp_path.glob("*.tmp*"))
    assert main([*words, "--clamp_overflow"]) == 0
    with safe_open(out, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    limit = 448.0 if name == "average models" else 65504.0
    assert all(torch.isfinite(tensor.float()).all() for tensor in tensors.values())
    assert (
        max(
            float(tensor.float().abs().max())
            for key, tensor in tensors.items()
            if tensor.numel() and not key.endswith("position_ids")
        )
        == limit
    )


def test_a_model_in_another_layout(tmp_path, capsys):
    large, _, tokenizer = whole_model(tmp_path, 1e5)
    words = [large, str(tmp_path / "folder"), "--to", "diffusers", "--save_precision", "fp16", "--tokenizer", tokenizer]
    main = import_target("tools.model_tools.convert:main")
    assert main(words) == 2
    assert "conv_out.weight reaches 100000" in capsys.readouterr().err and not (tmp_path / "folder").exists()
    assert main([*words, "--clamp_overflow"]) == 0
    unet = load_file(tmp_path / "folder" / "unet" / "diffusion_pytorch_model.safetensors")
    assert float(unet["conv_out.weight"].abs().max()) == 65504
