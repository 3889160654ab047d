"""The resize tool through its command line: errors are the optimum that the singular values give, ranks those of a
plain count."""

import json
import math

import pytest
import torch
from safetensors import safe_open

from library.safetensors_utils import load_safetensors, save_file_atomic
from networks.files.network_files import by_module
from networks.kinds.registry import weight_change
from networks.lora import lora_delta
from networks.operations.rank_rules import RankRule, quantile_of_size
from tools.lora_tools.resize import main

SHAPES = {
    "lora_unet_double_blocks_0_img_attn_qkv": (24, 10), "lora_unet_double_blocks_0_img_mlp_0": (5, 40),
    "lora_unet_single_blocks_0_linear1": (40, 6), "lora_te1_text_model_encoder_layers_0_mlp_fc1": (12, 12),
    "lora_unet_down_blocks_0_resnets_0_conv1": (14, 6, 3, 3),
    "lora_unet_down_blocks_0_attentions_0_proj_in": (20, 18, 1, 1),
}  # fmt: skip
RANK = 8
RULES = (
    (None, None), ("sv_ratio", 3.0), ("sv_ratio", 1.0), ("sv_fro", 0.8), ("sv_fro", 1.0), ("sv_cumulative", 0.7),
    ("sv_quantile", 0.5),
    ("sv_threshold", 2.0),
)  # fmt: skip


def lora(names=SHAPES, rank=RANK, alpha=5.0):
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for name, (out, *inputs) in {name: SHAPES[name] for name in names}.items():
        tensors[f"{name}.lora_down.weight"] = torch.randn(rank, *inputs, generator=generator) / 2
        tensors[f"{name}.lora_up.weight"] = torch.randn(out, rank, *[1] * (len(inputs) - 1), generator=generator) / 2
        if alpha is not None:
            tensors[f"{name}.alpha"] = torch.tensor(alpha)
    return tensors


def product(part):
    """up @ down without a scale, as a matrix, from the file's tensors."""
    return part["lora_up.weight"].flatten(1).double() @ part["lora_down.weight"].flatten(1).double()


def counted_rank(values, sides, most, method, parameter):
    """The rank by a plain count over all singular values."""
    values = [float(value) for value in values]
    share = {"sv_fro": lambda s: math.sqrt(sum(v * v for v in s)), "sv_cumulative": sum, "sv_quantile": sum}
    if method is None:
        wanted = most
    elif method in share:
        size = share[method]
        wanted = next(
            k for k in range(1, len(values) + 1) if size(values[:k]) >= parameter * size(values) * (1 - 1e-12)
        )
    else:
        wanted = sum(value > (values[0] / parameter if method == "sv_ratio" else parameter) for value in values)
    return max(1, min(wanted, most, *sides))


@pytest.mark.parametrize(("method", "parameter"), RULES)
@pytest.mark.parametrize("rank", [1, 3, 8, 13, 100])
def test_error_is_the_optimum_and_rank_is_counted(tmp_path, method, parameter, rank):
    source, out = str(tmp_path / "in.safetensors"), str(tmp_path / "out.safetensors")
    save_file_atomic(
        lora(), source, {"ss_network_dim": "8", "ss_network_args": json.dumps({"conv_dim": "8", "conv_alpha": "5"})}
    )
    dynamic = ["--dynamic_method", method, "--dynamic_param", str(parameter)] if method else []
    assert main(["--model", source, "--save_to", out, "--new_rank", str(rank), "--new_conv_rank", "2", *dynamic]) == 0
    before, after = by_module(lora()), by_module(load_safetensors(out))
    assert before.keys() == after.keys()
    for name, part in after.items():
        matrix = product(before[name])
        values = torch.linalg.svdvals(matrix)[:RANK]  # the others are rounding
        most = 2 if SHAPES[name][2:] == (3, 3) else rank
        found = part["lora_down.weight"].shape[0]
        assert found == counted_rank(values, matrix.shape, most, method, parameter), name
        assert part["lora_up.weight"].shape == (SHAPES[name][0], found, *[1] * (len(SHAPES[name]) - 2))
        assert part["lora_down.weight"].shape[1:] == SHAPES[name][1:]
        error = float((product(part) - matrix).norm())
        assert error == pytest.approx(float(values[found:].norm()), abs=1e-4 * float(values[0]))
        assert float(part["alpha"]) == pytest.approx(5.0 / RANK * found)
        down = part["lora_down.weight"].flatten(1)
        torch.testing.assert_close(down @ down.t(), torch.eye(found), rtol=0, atol=1e-5)


def test_metadata_tells_what_was_done(tmp_path):
    source, out = str(tmp_path / "in.safetensors"), str(tmp_path / "out.safetensors")
    pairs = {"conv_dim": "8", "conv_alpha": "5"}
    save_file_atomic(
        lora(),
        source,
        {"ss_network_dim": "8", "ss_training_comment": "mine", "ss_network_args": json.dumps(pairs), "other": "x"},
    )
    assert (
        main(
            ["--model", source, "--save_to", out, "--new_rank", "4", "--new_conv_rank", "2", "--save_precision", "fp16"]
        )
        == 0
    )
    with safe_open(out, "pt") as file:
        metadata = file.metadata()
    assert metadata["ss_training_comment"] == "dimension is resized from 8 to 4 (conv: 2); mine"
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"], metadata["other"]) == ("4", "2.5", "x")
    assert (
        json.loads(metadata["ss_network_args"]) == {"conv_dim": "2", "conv_alpha": "1.25"}
        and len(metadata["sshs_model_hash"]) == 64
    )
    kinds = {key.endswith("alpha"): tensor.dtype for key, tensor in load_safetensors(out).items()}
    assert kinds == {True: torch.float32, False: torch.float16}
    assert (
        main(
            ["--model", source, "--save_to", out, "--overwrite", "--dynamic_method", "sv_fro", "--dynamic_param", "0.9"]
        )
        == 0
    )
    with safe_open(out, "pt") as file:
        metadata = file.metadata()
    assert metadata["ss_training_comment"] == "Dynamic resize with sv_fro: 0.9 from 8; mine"
    assert metadata["ss_network_dim"] == metadata["ss_network_alpha"] == "Dynamic"


@pytest.mark.parametrize("with_settings", [True, False])
def test_peft_files_stay_peft(tmp_path, with_settings):
    """No alpha is added; the scale that the settings gave is in lora_B, and the settings say the new ranks."""
    source, out = str(tmp_path / "in.safetensors"), str(tmp_path / "out.safetensors")
    generator = torch.Generator().manual_seed(2)
    tensors = {}
    for name, (out_size, in_size) in {"transformer.a": (6, 30), "transformer.b": (20, 30)}.items():
        tensors[f"{name}.lora_A.weight"] = torch.randn(8, in_size, generator=generator)
        tensors[f"{name}.lora_B.weight"] = torch.randn(out_size, 8, generator=generator)
    settings = {"transformer.r": 8, "transformer.lora_alpha": 4, "transformer.lora_bias": False}
    save_file_atomic(tensors, source, {"lora_adapter_metadata": json.dumps(settings)} if with_settings else None)
    assert main(["--model", source, "--save_to", out, "--new_rank", "7"]) == 0
    found = load_safetensors(out)
    assert found.keys() == tensors.keys()
    scale = 0.5 if with_settings else 1.0
    for name, rank in (("transformer.a", 6), ("transformer.b", 7)):
        assert found[f"{name}.lora_A.weight"].shape[0] == rank
        matrix = scale * tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"]
        error = (found[f"{name}.lora_B.weight"] @ found[f"{name}.lora_A.weight"] - matrix).norm()
        assert float(error) == pytest.approx(float(torch.linalg.svdvals(matrix)[rank:].norm()), abs=1e-3)
    with safe_open(out, "pt") as file:
        written = json.loads(file.metadata()["lora_adapter_metadata"])
    ranks = {"a": 6, "b": 7}
    most = written["transformer.r"]
    assert {name: written["transformer.rank_pattern"].get(name, most) for name in ranks} == ranks
    assert {
        name: written["transformer.alpha_pattern"].get(name, written["transformer.lora_alpha"]) for name in ranks
    } == ranks
    assert with_settings == ("transformer.lora_bias" in written)


def test_tucker_and_other_kinds_become_lora(tmp_path):
    source, out = str(tmp_path / "in.safetensors"), str(tmp_path / "out.safetensors")
    generator = torch.Generator().manual_seed(3)
    drawn = {"tucker": {
        "lora_down.weight": torch.randn(3, 6, 1, 1, generator=generator),
        "lora_up.weight": torch.randn(8, 3, 1, 1, generator=generator),
        "lora_mid.weight": torch.randn(3, 3, 3, 3, generator=generator), "alpha": torch.tensor(1.5),
    }, "lokr": {"lokr_w1": torch.randn(2, 3, generator=generator), "lokr_w2": torch.randn(5, 4, generator=generator)},
    "loha": {f"hada_{name}": torch.randn(*shape, generator=generator) for name, shape in
             {"w1_a": (10, 2), "w1_b": (2, 12), "w2_a": (10, 2), "w2_b": (2, 12)}.items()},
    "full": {"diff": torch.randn(10, 12, generator=generator), "diff_b": torch.randn(10, generator=generator)}}  # fmt: skip
    tensors = {f"lora_unet_{name}.{key}": tensor for name, part in drawn.items() for key, tensor in part.items()}
    save_file_atomic(tensors, source, {"ss_network_module": "networks.lokr"})
    assert main(["--model", source, "--save_to", out, "--new_rank", "12"]) == 0
    after = by_module(load_safetensors(out))
    for name, part in drawn.items():
        found = after[f"lora_unet_{name}"]
        shape = (8, 6, 3, 3) if name == "tucker" else (10, 12)
        bias = found.pop("diff_b", None)
        assert (bias is None) == (name != "full") and "lora_mid.weight" not in found
        torch.testing.assert_close(
            weight_change(found, torch.zeros(shape)), weight_change(part, torch.zeros(shape)), rtol=1e-4, atol=1e-4
        )
    with safe_open(out, "pt") as file:
        assert file.metadata()["ss_network_module"] == "networks.lora"
        assert "rewritten as LoRA" in file.metadata()["ss_training_comment"]


def test_dora_is_resized_only_without_loss(tmp_path, capsys):
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    tensors = {**lora([name]), f"{name}.dora_scale": torch.ones(24, 1)}
    source, out = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    save_file_atomic(tensors, source)
    assert main(["--model", str(source), "--save_to", str(out), "--new_rank", "4"]) != 0
    assert "DoRA" in capsys.readouterr().err and not out.exists()
    assert main(["--model", str(source), "--save_to", str(out), "--new_rank", "9"]) == 0
    before, after = by_module(tensors)[name], by_module(load_safetensors(out))[name]
    weight = torch.randn(24, 10, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(weight_change(after, weight), weight_change(before, weight), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("unit", [1, 3, 8, 20])
def test_parts_of_dylora_act_as_in_training(tmp_path, unit):
    """Training: the first k of R ranks act at alpha / R * sqrt(R / k)."""
    source, out = str(tmp_path / "in.safetensors"), tmp_path / "part.safetensors"
    save_file_atomic(
        lora(), source, {"ss_network_args": json.dumps({"unit": "1", "x": "y"}), "ss_training_comment": "c"}
    )
    assert main(["--model", source, "--save_to", str(out), "--split_unit", str(unit)]) == 0
    ranks = [*range(unit, RANK, unit), RANK]
    assert sorted(path.name for path in tmp_path.glob("part-*")) == [f"part-{rank:04d}.safetensors" for rank in ranks]
    hashes = set()
    for rank in ranks:
        path = tmp_path / f"part-{rank:04d}.safetensors"
        before, after = by_module(lora()), by_module(load_safetensors(path))
        for name, part in after.items():
            down, up = before[name]["lora_down.weight"][:rank], before[name]["lora_up.weight"][:, :rank]
            wanted = lora_delta(down, up, 5.0 / RANK * math.sqrt(RANK / rank))
            torch.testing.assert_close(weight_change(part, torch.zeros(SHAPES[name])), wanted)
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        assert metadata["ss_training_comment"] == f"split from DyLoRA, rank {RANK} to {rank}; c" and metadata[
            "ss_network_dim"
        ] == str(rank)
        assert json.loads(metadata["ss_network_args"]) == {"x": "y"}
        hashes.add(metadata["sshs_model_hash"])
    assert len(hashes) == len(ranks)


def test_rules_refuse_bad_numbers(tmp_path, capsys):
    source, out = tmp_path / "in.safetensors", str(tmp_path / "out.safetensors")
    save_file_atomic(lora(), source)
    for words, told in (
        (["--dynamic_method", "sv_fro"], "needs --dynamic_param"),
        (["--dynamic_param", "0.5"], "without --dynamic_method"),
        (["--dynamic_method", "sv_ratio", "--dynamic_param", "0.5"], "1 or more"),
        (["--new_rank", "0"], "--new_rank is 0; needed: a whole number from 1"),
        (["--dynamic_method", "sv_cumulative", "--dynamic_param", "2"], "up to 1"),
        (["--split_unit", "0"], "1 or more"),
        (["--split_unit", "2", "--new_rank", "3"], "has no meaning"), (["--save_precision", "int4"], "known: float"),
    ):  # fmt: skip
        assert main(["--model", str(source), "--save_to", out, *words]) == 2
        assert told in capsys.readouterr().err
    assert main(["--model", str(source), "--save_to", str(tmp_path / "x.txt")]) == 2


def test_quantile_by_selection():
    tensors = [torch.randn(40, 30, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    everything = torch.cat([tensor.abs().flatten() for tensor in tensors])
    for quantile in (0.0, 0.123, 0.5, 0.99, 1.0):
        assert quantile_of_size(tensors, quantile) == pytest.approx(
            float(torch.quantile(everything, quantile)), rel=1e-6
        )


def test_nothing_gets_one_rank():
    assert RankRule(4).choose(torch.zeros(4), (8, 8)) == RankRule(4, "sv_fro", 0.9).choose(torch.zeros(4), (8, 8)) == 1
