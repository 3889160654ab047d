"""Bad input to every tool that takes an adapter file: one clear message, an exit code, and nothing written or
changed."""

import pytest
import torch

from library.safetensors_utils import load_safetensors, save_file_atomic
from tests.tiny import build_tiny_flux
from tests.tiny_sd import build_tiny_sd
from tests.tools.test_merge_lora import models_of, write_lora
from tools import check_lora, convert_lora, inspect_lora, lora_post_hoc_ema, merge_lora, resize_lora

TOOLS = {
    "resize": (resize_lora, ["--model", "{bad}", "--save_to", "{out}", "--new_rank", "1"]),
    "split": (resize_lora, ["--model", "{bad}", "--save_to", "{out}", "--split_unit", "1"]),
    "ema": (lora_post_hoc_ema, ["{bad}", "{good}", "--output_file", "{out}"]),
    "merge into a model": (merge_lora, ["--model", "{model}", "--models", "{bad}", "--save_to", "{out}"]),
    "concat": (merge_lora, ["--models", "{bad}", "{good}", "--save_to", "{out}"]),
    "svd": (merge_lora, ["--models", "{bad}", "{good}", "--mode", "svd", "--save_to", "{out}"]),
    "merge_lora ema": (merge_lora, ["--models", "{bad}", "{good}", "--mode", "ema", "--save_to", "{out}"]),
    "check": (check_lora, ["{bad}", "--plot", "{out}"]),
    "inspect": (inspect_lora, ["{bad}"]),
    "convert": (convert_lora, ["{bad}", "{out}", "--to", "comfy"]),
}
NAME = "lora_unet_double_blocks_0_img_attn_qkv"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    flux, sdxl = str(build_tiny_flux(folder / "f").flux), str(build_tiny_sd(folder / "x", "sdxl").model)
    return {
        "model": flux, "good": write_lora(folder / "good.safetensors", *models_of("flux", flux), seed=1),
        "other": write_lora(folder / "other.safetensors", *models_of("sdxl", sdxl), seed=1, metadata={"ss_base_model_version": "sdxl"}),
    }  # fmt: skip


def nan(tensors):
    return {
        key: tensor * float("nan") if key == f"{NAME}.lora_up.weight" else tensor for key, tensor in tensors.items()
    }


def half_a_pair(tensors):
    return {key: tensor for key, tensor in tensors.items() if key != f"{NAME}.lora_up.weight"}


def other_ranks_in_a_pair(tensors):
    return {key: tensor[:1] if key == f"{NAME}.lora_down.weight" else tensor for key, tensor in tensors.items()}


def no_adapter(tensors):
    return {"double_blocks.0.img_attn.qkv.weight": torch.zeros(3, 3)}


def run(tool, words, files, tmp_path, capsys):
    """(exit code, message); the output must not be there."""
    module, argv = TOOLS[tool]
    out = tmp_path / ("out.png" if tool == "check" else "out.safetensors")
    capsys.readouterr()
    code = module.main([word.format(**files, **words, out=str(out)) for word in argv])
    written = [path.name for path in tmp_path.iterdir() if path.name.startswith("out")]
    return code, capsys.readouterr().err, written


def unknown_parameter(tensors):
    return {**tensors, f"{NAME}.lora_up.bias": torch.zeros(192)}


def unknown_layer(tensors):
    return {**tensors, "transformer.transformer_blocks.0.attn.norm_q.weight": torch.zeros(32)}


def rank_of_nothing(tensors):
    cut = {f"{NAME}.lora_down.weight": 0, f"{NAME}.lora_up.weight": 1}
    return {
        key: tensor.narrow(cut[key], 0, 0).contiguous() if key in cut else tensor for key, tensor in tensors.items()
    }


def flat_matrix(tensors):
    return {
        key: tensor[0].contiguous() if key == f"{NAME}.lora_down.weight" else tensor for key, tensor in tensors.items()
    }


def alpha_for_each_row(tensors):
    return {**tensors, f"{NAME}.alpha": torch.ones(3)}


@pytest.mark.parametrize(("change", "told"), [
    (nan, "not finite"), (half_a_pair, "lora_up"), (other_ranks_in_a_pair, "different ranks"), (no_adapter, "adapter"),
    (unknown_parameter, "lora_up.bias, which LoRA does not know"), (unknown_layer, "attn.norm_q.weight"),
    (rank_of_nothing, "rank 0"),
    (flat_matrix, "two axes"), (alpha_for_each_row, "alpha is a tensor of shape [3]"),
])  # fmt: skip
@pytest.mark.parametrize("tool", TOOLS)
def test_a_damaged_file(tool, change, told, files, tmp_path, capsys):
    bad = tmp_path / "bad.safetensors"
    save_file_atomic(change(load_safetensors(files["good"])), bad, {"ss_base_model_version": "flux1"})
    before = bad.read_bytes()
    code, error, written = run(tool, {"bad": str(bad)}, files, tmp_path, capsys)
    assert code in (1, 2) and told in error and "Traceback" not in error and error.count("error:") == 1
    assert not written or tool == "check", written  # what is wrong is drawn too
    assert bad.read_bytes() == before


@pytest.mark.parametrize(
    "tool", [name for name in TOOLS if name not in ("check", "inspect", "resize", "split", "convert")]
)
def test_a_file_of_another_family(tool, files, tmp_path, capsys):
    code, error, written = run(tool, {"bad": files["other"]}, files, tmp_path, capsys)
    assert code in (1, 2) and error.count("error:") == 1 and "other.safetensors" in error and not written


@pytest.mark.parametrize("tool", TOOLS)
def test_no_file_and_no_safetensors_file(tool, files, tmp_path, capsys):
    page = tmp_path / "page.safetensors"
    page.write_text("<html>not found</html>", encoding="utf-8")
    for path, told in ((tmp_path / "none.safetensors", "no such file"), (page, "web page")):
        code, error, written = run(tool, {"bad": str(path)}, files, tmp_path, capsys)
        assert code in (1, 2) and error.count("error:") == 1 and not written
        assert told in error or "does not exist" in error or "cannot be looked at" in error


@pytest.mark.parametrize("tool", [name for name in TOOLS if name not in ("check", "inspect", "split")])
def test_an_output_that_is_an_input(tool, files, tmp_path, capsys):
    module, argv = TOOLS[tool]
    before = open(files["good"], "rb").read()
    assert (
        module.main([word.format(**files, bad=files["good"], out=files["good"]) for word in argv] + ["--overwrite"])
        == 2
    )
    assert "is an input too" in capsys.readouterr().err and open(files["good"], "rb").read() == before


@pytest.mark.parametrize("tool", [name for name in TOOLS if "merge_lora" not in name and name != "ema"])
def test_missing_alphas_and_mixed_ranks_work(tool, files, tmp_path, capsys):
    """No alpha means alpha = rank; every layer has its own rank."""
    tensors = {key: tensor for key, tensor in load_safetensors(files["good"]).items() if not key.endswith("alpha")}
    for half, axis in (("down", 0), ("up", 1)):
        key = f"{NAME}.lora_{half}.weight"
        tensors[key] = tensors[key].narrow(axis, 0, 1).contiguous()
    bad = tmp_path / "bad.safetensors"
    save_file_atomic(tensors, bad, {"ss_base_model_version": "flux1"})
    code, error, _ = run(tool, {"bad": str(bad)}, files, tmp_path, capsys)
    assert code == 0, error


def test_half_of_the_layers_known(files, tmp_path, capsys):
    tensors = {key.replace("img_mod", "img_nod"): tensor for key, tensor in load_safetensors(files["good"]).items()}
    bad = tmp_path / "bad.safetensors"
    save_file_atomic(tensors, bad, {"ss_base_model_version": "flux1"})
    for tool, told in (
        ("merge into a model", "are not in this model"),
        ("check", "are in no flux model"),
        ("inspect", "are in no flux model"),
    ):
        code, error, _ = run(tool, {"bad": str(bad)}, files, tmp_path, capsys)
        assert code in (1, 2) and told in error


@pytest.mark.parametrize("tool", ["resize", "merge into a model", "concat", "check", "convert"])
def test_missing_alphas_are_told_in_one_sentence(tool, files, tmp_path, capsys):
    tensors = {key: tensor for key, tensor in load_safetensors(files["good"]).items() if key != f"{NAME}.alpha"}
    bad = tmp_path / "bad.safetensors"
    save_file_atomic(tensors, bad, {"ss_base_model_version": "flux1"})
    module, argv = TOOLS[tool]
    capsys.readouterr()
    assert (
        module.main(
            [
                word.format(
                    **files,
                    bad=str(bad),
                    out=str(tmp_path / "out.png" if tool == "check" else tmp_path / "out.safetensors"),
                )
                for word in argv
            ]
        )
        == 0
    )
    told = capsys.readouterr()
    assert f"1 layers have no alpha, which means alpha = rank (first: {NAME})" in told.out + told.err
