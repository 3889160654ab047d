"""Sums of models and the one file of Stable Diffusion 3: numbers, names, metadata, and what is refused."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.safetensors_utils import read_header
from tools import merge_models, merge_sd3_safetensors

UNET, TEXT = "model.diffusion_model.out.2.weight", "cond_stage_model.transformer.text_model.final_layer_norm.weight"
IDS = "cond_stage_model.transformer.text_model.embeddings.position_ids"


def model(value, dtype=torch.float32):
    return {
        UNET: torch.full((2, 3), value, dtype=dtype),
        TEXT: torch.full((3,), 10 * value, dtype=dtype),
        IDS: torch.arange(4)[None],
    }


def files(folder, *models):
    for number, tensors in enumerate(models):
        save_file(
            tensors,
            folder / f"{number}.safetensors",
            {"note": f"model {number}", "modelspec.architecture": "x", "modelspec.title": f"m{number}"},
        )
    return [str(folder / f"{number}.safetensors") for number in range(len(models))]


def test_weighted_sum(tmp_path):
    paths = files(tmp_path, model(1.0), model(3.0, torch.float16))
    assert merge_models.main(["--models", *paths, "--ratios", "0.25", "0.75", "--output", str(tmp_path / "out")]) == 0
    merged = load_file(tmp_path / "out.safetensors")
    assert torch.equal(merged[UNET], torch.full((2, 3), 2.5)) and torch.equal(merged[TEXT], torch.full((3,), 25.0))
    assert merged[IDS].dtype == torch.int64 and torch.equal(merged[IDS], torch.arange(4)[None])
    metadata = read_header(tmp_path / "out.safetensors")[1]
    assert (
        metadata["note"] == "model 0"
        and metadata["modelspec.title"] == "out"
        and metadata["modelspec.merged_from"] == "m0, m1"
    )


def test_unet_only_equal_shares_and_precision(tmp_path):
    paths = files(tmp_path, model(1.0), model(2.0), model(6.0))
    words = [
        "--models",
        *paths,
        "--output",
        str(tmp_path / "o.safetensors"),
        "--unet_only",
        "--saving_precision",
        "fp16",
    ]
    assert merge_models.main(words) == 0
    merged = load_file(tmp_path / "o.safetensors")
    assert merged[UNET].dtype == torch.float16 and torch.equal(merged[UNET], torch.full((2, 3), 3.0).half())
    assert torch.equal(merged[TEXT], torch.full((3,), 10.0).half())


def test_old_names_of_the_text_encoder_are_one_tensor(tmp_path):
    old = {key.replace("text_model.", ""): tensor for key, tensor in model(3.0).items()}
    paths = files(tmp_path, model(1.0), old)
    assert merge_models.main(["--models", *paths, "--output", str(tmp_path / "o.safetensors")]) == 0
    assert torch.equal(load_file(tmp_path / "o.safetensors")[TEXT], torch.full((3,), 20.0))


def test_first_models_value_stands_in(tmp_path):
    other = {key: tensor for key, tensor in model(3.0).items() if key != TEXT}
    paths = files(tmp_path, model(1.0), other | {"extra.weight": torch.ones(2)})
    words = ["--models", *paths, "--output", str(tmp_path / "o.safetensors")]
    assert merge_models.main(words) == 2 and not (tmp_path / "o.safetensors").exists()
    assert merge_models.main([*words, "--allow_partial", "--show_skipped"]) == 0
    merged = load_file(tmp_path / "o.safetensors")
    assert set(merged) == set(model(1.0)) and torch.equal(merged[TEXT], torch.full((3,), 10.0))


@pytest.mark.parametrize("what", ["ratios", "sum", "shape", "family", "nan", "same", "missing", "exists"])
def test_bad_input_is_one_message_and_no_file(what, tmp_path, capsys):
    second = model(2.0)
    if what == "shape":
        second[UNET] = torch.ones(2, 4)
    if what == "family":
        second = {"double_blocks.0.img_mod.lin.weight": torch.ones(2)}
    if what == "nan":
        second[UNET] = second[UNET] * float("nan")
    paths, out = files(tmp_path, model(1.0), second), str(tmp_path / "o.safetensors")
    ratios = {"ratios": ["1"], "sum": ["0.5", "0.6"]}.get(what, ["0.5", "0.5"])
    if what == "missing":
        paths[1] = str(tmp_path / "none.safetensors")
    if what == "exists":
        save_file(model(1.0), out)
    if what == "same":
        out = paths[0]
    message = {
        "ratios": "1 values for 2", "sum": "add up to 1.1", "shape": "other shapes", "family": "no tensor in common",
        "nan": "not finite",
        "same": "is an input too", "missing": "does not exist", "exists": "--overwrite",
    }[what]  # fmt: skip
    assert merge_models.main(["--models", *paths, "--ratios", *ratios, "--output", out]) == 2
    assert message in capsys.readouterr().err
    assert what in ("exists", "same") or not (tmp_path / "o.safetensors").exists()
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".")) == []


PARTS = {
    "dit": {"joint_blocks.0.x_block.attn.qkv.weight": torch.ones(2, 2), "x_embedder.proj.weight": torch.ones(2)},
    "vae": {"encoder.conv_in.weight": torch.ones(3), "decoder.conv_in.weight": torch.ones(2)},
    "clip_l": {"text_model.final_layer_norm.weight": torch.ones(4)},
    "t5xxl": {"encoder.block.0.layer.0.SelfAttention.q.weight": torch.ones(5), "shared.weight": torch.ones(2)},
}


def test_parts_of_sd3(tmp_path, capsys):
    words = []
    for name, tensors in PARTS.items():
        if name == "clip_l":  # has its prefix already
            tensors = {f"text_encoders.clip_l.transformer.{key}": tensor for key, tensor in tensors.items()}
        save_file(tensors, tmp_path / f"{name}.safetensors", {"part": name})
        words += [f"--{name}", str(tmp_path / f"{name}.safetensors")]
    out = tmp_path / "sd3.safetensors"
    assert merge_sd3_safetensors.main([*words, "--output", str(out), "--save_precision", "bf16"]) == 0
    packed = load_file(out)
    assert set(packed) == {
        "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight", "model.diffusion_model.x_embedder.proj.weight",
        "first_stage_model.encoder.conv_in.weight", "first_stage_model.decoder.conv_in.weight",
        "text_encoders.clip_l.transformer.text_model.final_layer_norm.weight",
        "text_encoders.t5xxl.transformer.shared.weight",
        "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q.weight",
    }  # fmt: skip
    assert {tensor.dtype for tensor in packed.values()} == {torch.bfloat16} and read_header(out)[1] == {"part": "dit"}
    swapped = ["--dit", str(tmp_path / "vae.safetensors"), "--output", str(tmp_path / "x.safetensors")]
    assert merge_sd3_safetensors.main(swapped) == 2 and "does not hold that part" in capsys.readouterr().err
    assert merge_sd3_safetensors.main(["--output", str(tmp_path / "x.safetensors")]) == 2
