"""The average of saved files: weights by formula, what must be equal, the newest file's metadata."""

import os

import pytest
import torch
from safetensors import safe_open

from library.safetensors_utils import load_safetensors, save_file_atomic
from networks.operations.post_hoc_ema import Averaging, gamma_of
from tools.lora_tools.ema import main
from tools.lora_tools.merge import main as merge

NAME = "lora_unet_double_blocks_0_img_attn_qkv"


@pytest.fixture
def files(tmp_path):
    paths = []
    for i in range(4):
        generator = torch.Generator().manual_seed(i)
        tensors = {
            f"{NAME}.lora_down.weight": torch.randn(4, 6, generator=generator).half(),
            f"{NAME}.lora_up.weight": torch.randn(8, 4, generator=generator),
            f"{NAME}.alpha": torch.tensor(2.0),
        }  # fmt: skip
        path = tmp_path / f"{9 - i}.safetensors"  # names fall, times rise
        save_file_atomic(tensors, path, {"ss_steps": str(i), "modelspec.title": "x", "ss_base_model_version": "flux1"})
        os.utime(path, (1000 + i, 1000 + i))
        paths.append(str(path))
    return paths


def by_hand(paths, shares):
    state = {key: tensor.double() for key, tensor in load_safetensors(paths[0]).items()}
    for path, share in zip(paths[1:], shares, strict=True):
        state = {
            key: state[key] * share + tensor.double() * (1 - share) for key, tensor in load_safetensors(path).items()
        }
    return state


@pytest.mark.parametrize(("words", "shares"), [
    ([], [0.95] * 3), (["--beta", "0.5"], [0.5] * 3), (["--beta", "0.8", "--beta2", "0.6"], [0.8, 0.7, 0.6]),
    (["--sigma_rel", "0.2"], [(1 - 1 / t) ** (gamma_of(0.2) + 1) for t in (1, 2, 3)]),
])  # fmt: skip
def test_average(files, tmp_path, words, shares):
    out = tmp_path / "new" / "ema.safetensors"
    assert main([files[2], files[0], files[3], files[1], "--output_file", str(out), *words]) == 0
    found, wanted = load_safetensors(out), by_hand(files, shares)
    for key, tensor in found.items():
        torch.testing.assert_close(
            tensor.double(),
            wanted[key],
            rtol=1e-3 if tensor.dtype == torch.float16 else 1e-6,
            atol=1e-3 if tensor.dtype == torch.float16 else 1e-6,
        )
    assert found[f"{NAME}.lora_down.weight"].dtype == torch.float16 and float(found[f"{NAME}.alpha"]) == 2
    with safe_open(out, "pt") as file:
        metadata = file.metadata()
    assert (
        metadata["ss_steps"] == "3" and metadata["modelspec.title"] == "ema" and len(metadata["sshs_model_hash"]) == 64
    )
    again = tmp_path / "again.safetensors"
    assert merge(["--models", *files, "--mode", "ema", "--save_to", str(again), *words]) == 0
    assert all(torch.equal(tensor, load_safetensors(again)[key]) for key, tensor in found.items())


def test_order_of_the_command_line(files, tmp_path):
    out, reverse = tmp_path / "ema.safetensors", list(reversed(files))
    assert main(["--models", *reverse, "--save_to", str(out), "--no_sort", "--beta", "0.5"]) == 0
    key = f"{NAME}.lora_up.weight"
    torch.testing.assert_close(
        load_safetensors(out)[key].double(), by_hand(reverse, [0.5] * 3)[key], rtol=1e-6, atol=1e-6
    )


def test_power_function():
    gamma = gamma_of(0.1)
    assert (gamma + 1) ** 0.5 / (gamma + 2) / (gamma + 3) ** 0.5 == pytest.approx(0.1)
    assert Averaging(sigma_rel=0.1).shares(2)[0] == 0


def test_what_does_not_belong_together(files, tmp_path, capsys):
    out = str(tmp_path / "out.safetensors")
    original = load_safetensors(files[1])
    for change, told in (
        ({f"{NAME}.alpha": torch.tensor(3.0)}, "other alphas"),
        ({f"{NAME}.lora_up.weight": torch.zeros(9, 4)}, "the same ranks"),
        ({"lora_unet_x.lora_up.weight": torch.zeros(2, 4), "lora_unet_x.lora_down.weight": torch.zeros(4, 2)}, "files of one run"),
        ({f"{NAME}.lora_up.weight": original[f"{NAME}.lora_up.weight"] * float("nan")}, "not finite"),
    ):  # fmt: skip
        save_file_atomic({**original, **change}, files[1])
        assert main([*files, "--output_file", out]) != 0
        assert told in capsys.readouterr().err
    for words, told in (
        ([files[0], "--output_file", out], "two or more"), ([*files, "--output_file", files[0]], "is an input too"),
        (files, "--output_file is missing"),
        ([*files, "--output_file", out, "--beta", "1"], "below 1"),
        ([*files, "--output_file", out, "--sigma_rel", "0.3"], "0.2887"),
        ([*files, "--output_file", out, "--sigma_rel", "0.1", "--beta2", "0.9"], "leave one out"),
    ):  # fmt: skip
        assert main(words) != 0
        assert told in capsys.readouterr().err
    assert merge(["--models", *files, "--save_to", out, "--beta", "0.5"]) == 2
    assert merge(["--models", *files, "--save_to", out, "--mode", "ema", "--ratios", "1", "1", "1", "1"]) == 2
    assert not os.path.exists(out)
