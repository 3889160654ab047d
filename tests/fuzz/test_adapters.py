"""Damaged and strange adapter files in every tool, and as what a training begins with: a message or success, and in
time."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from library.safetensors_utils import save_file_atomic
from networks.files.network_files import read_adapter_file
from networks.kinds.targets import targets_of_family
from tests.fuzz.mutations import changed_safetensors
from tests.fuzz.running import corpus, generator
from tests.tiny import build_tiny_flux
from tools import check_lora, convert_lora, inspect_lora, lora_post_hoc_ema, merge_lora, resize_lora, show_metadata

BLOCK = "lora_unet_double_blocks_0_img_attn_proj"
OTHER = "lora_unet_double_blocks_0_txt_attn_proj"


def kinds() -> dict[str, dict[str, torch.Tensor]]:
    """Small files of several kinds and layouts; widths as in the tiny model."""
    width, rank = 32, 2
    pair = {
        f"{name}.{part}": torch.randn(shape)
        for name in (BLOCK, OTHER)
        for part, shape in (("lora_down.weight", (rank, width)), ("lora_up.weight", (width, rank)))
    }
    return {
        "lora": {**pair, f"{BLOCK}.alpha": torch.tensor(1.0), f"{OTHER}.alpha": torch.tensor(2.0)},
        "dora": {**pair, f"{BLOCK}.dora_scale": torch.randn(width, 1)},
        "loha": {f"{BLOCK}.hada_{name}": torch.randn(shape) for name, shape in (("w1_a", (width, rank)), ("w1_b", (rank, width)), ("w2_a", (width, rank)), ("w2_b", (rank, width)))},
        "lokr": {f"{BLOCK}.lokr_w1": torch.randn(4, 4), f"{BLOCK}.lokr_w2": torch.randn(8, 8), f"{BLOCK}.alpha": torch.tensor(1.0)},
        "peft": {
            f"transformer.transformer_blocks.0.attn.to_out.0.lora_{part}.weight": torch.randn(shape) for part,
            shape in (("A", (rank, width)), ("B", (width, rank)))
        },
        "full": {f"{BLOCK}.diff": torch.randn(width, width), f"{BLOCK}.diff_b": torch.randn(width)},
        "oft": {f"{BLOCK}.oft_blocks": torch.randn(4, 8, 8), f"{BLOCK}.alpha": torch.tensor(0.1)},
    }  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    torch.manual_seed(0)
    shutil.copyfile(build_tiny_flux(folder / "f").flux, folder / "model.safetensors")
    for name, tensors in kinds().items():
        save_file_atomic(
            tensors,
            folder / f"{name}.safetensors",
            {"ss_base_model_version": "flux1", "ss_network_dim": "2", "ss_network_module": "networks.lora"},
        )
    return folder


def uses(folder: Path) -> dict[str, Callable[[str], object]]:
    """What is done with a file. Nothing but `out` is written."""
    good, out, model = (
        str(folder / "lora.safetensors"),
        str(folder / "out.safetensors"),
        str(folder / "model.safetensors"),
    )
    save = ["--save_to", out, "--overwrite"]
    return {
        "read": lambda path: read_adapter_file(path, targets_of_family("flux")),
        "inspect": lambda path: inspect_lora.main([path]),
        "check": lambda path: check_lora.main([path]),
        "metadata": lambda path: show_metadata.main(["--model", path, "--decode"]),
        "resize": lambda path: resize_lora.main(["--model", path, "--new_rank", "1", *save]),
        "convert": lambda path: convert_lora.main([path, out, "--to", "diffusers", "--family", "flux", "--overwrite"]),
        "merge": lambda path: merge_lora.main(["--models", good, path, *save]),
        "svd": lambda path: merge_lora.main(["--models", path, good, "--mode", "svd", *save]),
        "into a model": lambda path: merge_lora.main(["--model", model, "--models", path, *save]),
        "ema": lambda path: lora_post_hoc_ema.main([path, good, "--output_file", out, "--overwrite"]),
    }  # fmt: skip


def test_the_uses_work(files, capsys):
    for name, use in uses(files).items():
        assert use(str(files / "lora.safetensors")) in (0, None) or name in ("read", "ema", "merge"), (
            name,
            capsys.readouterr().err,
        )


def test_adapters(files, cases, finds, capsys):
    tools, names = uses(files), list(kinds())
    path = files / "bad.safetensors"
    whole = {name: (files / f"{name}.safetensors").read_bytes() for name in names}
    for number in cases(500):
        draw = generator("adapters", number)
        kind, use = names[number % len(names)], list(tools)[draw.randrange(len(tools))]
        path.write_bytes(changed_safetensors(whole[kind], draw))
        finds.run(f"case {number} ({kind}, {use})", lambda: tools[use](str(path)))
    for kept in corpus("adapters"):
        for use in tools:
            finds.run(f"{kept.name}, {use}", lambda: tools[use](str(kept)))
    capsys.readouterr()
    finds.assert_none()
