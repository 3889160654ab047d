"""`python -m benchmarks`: one table, JSON beside it, and sides that compute the same."""

from __future__ import annotations

import json
import sys

import pytest

from benchmarks import command
from benchmarks.bounds import flops_of
from benchmarks.first_step import measured
from benchmarks.merge import check_room
from benchmarks.processes import used_by

pytest.importorskip("diffusers")
pytest.importorskip("peft")


@pytest.mark.parametrize("family", ["flux", "sdxl", pytest.param("sd1", marks=pytest.mark.full)])
def test_the_step_beside_its_baselines(tmp_path, capsys, family):
    """That the model of diffusers is the same function as ours is asked by the command itself."""
    path = tmp_path / "figures.json"
    words = ["step", "--quick", "--families", family, "--rounds", "2", "--steps", "1", "--json", str(path)]
    assert command.main(words) == 0
    (figure,) = json.loads(path.read_text())["figures"]
    assert [side["name"] for side in figure["baselines"]] == ["bare loop", "diffusers + peft loop", "its multiplications"]
    assert all(len(side["values"]) == 2 and min(side["values"]) > 0 for side in (figure["ours"], *figure["baselines"]))
    notes = figure["notes"]
    if family == "sdxl":  # the same layers under other names; those of FLUX.1 are split in diffusers
        assert notes["trained numbers, ours"] == notes["trained numbers, peft"]
        assert notes["layers with an adapter, ours"] == notes["layers with an adapter, peft"]
    told = capsys.readouterr().out
    assert f"{family} LoRA" in told and "diffusers + peft loop" in told and str(path) in told


def test_help_beside_a_bare_interpreter(tmp_path, capsys):
    path = tmp_path / "figures.json"
    assert command.main(["help", "--quick", "--scripts", "tools/convert_lora.py", "--json", str(path)]) == 0
    figures = json.loads(path.read_text())["figures"]
    assert [figure["baselines"][0]["name"] for figure in figures] == ["bare interpreter"] * 2
    assert "--help of tools/convert_lora.py" in capsys.readouterr().out


def test_caching_beside_the_encoder_alone(tmp_path):
    path = tmp_path / "figures.json"
    assert command.main(["caching", "--quick", "--families", "sdxl", "--json", str(path)]) == 0
    figures = json.loads(path.read_text())["figures"]
    assert [figure["case"] for figure in figures] == [
        "sdxl, latents: encoder busy", "sdxl, latents", "sdxl, text: encoder busy", "sdxl, text",
    ]  # fmt: skip
    assert all(0 < figures[k]["ours"]["median"] <= 1 for k in (0, 2))
    assert all(0 < figures[k]["baselines"][0]["median"] for k in (1, 3))


def test_loading_from_caches_of_real_sizes(tmp_path):
    path = tmp_path / "figures.json"
    assert command.main(["loading", "--quick", "--workers", "0", "--json", str(path)]) == 0
    waits, alone = json.loads(path.read_text())["figures"]
    assert 0 <= waits["ours"]["median"] < 1 and alone["ours"]["median"] > 0


@pytest.mark.full
def test_merging_beside_a_copy(tmp_path):
    path = tmp_path / "figures.json"
    assert command.main(["merge", "--quick", "--sparse", "--folder", str(tmp_path), "--json", str(path)]) == 0
    memory, seconds = json.loads(path.read_text())["figures"]
    assert memory["baselines"][0]["at_most"] == 0.25 and seconds["baselines"][0]["name"] == "copy of the file"
    assert list(tmp_path.iterdir()) == [path]


def test_too_little_room_for_the_model(tmp_path):
    with pytest.raises(SystemExit, match="give a smaller --gigabytes"):
        check_room(tmp_path, 1 << 60)


@pytest.mark.full
def test_the_first_step_of_the_demo(tmp_path):
    path = tmp_path / "figures.json"
    assert command.main(["first", "--quick", "--json", str(path)]) == 0
    wall, cpu = json.loads(path.read_text())["figures"]
    assert wall["baselines"][0]["at_most"] == 1.5 and 0 < cpu["baselines"][0]["median"] < cpu["ours"]["median"]


def test_a_process_that_reports_nothing_is_told(tmp_path):
    with pytest.raises(SystemExit, match="no such thing"):
        measured([sys.executable, "-c", "raise SystemExit('no such thing')"], str(tmp_path))


@pytest.mark.full
def test_starts(tmp_path):
    path = tmp_path / "figures.json"
    assert command.main(["start", "--quick", "--counts", "2", "4", "--family", "sd1", "--json", str(path)]) == 0
    figures = json.loads(path.read_text())["figures"]
    assert [figure["wanted"] for figure in figures] == [None, 10.0, 1024, None]
    assert figures[-1]["ours"]["median"] == figures[-1]["baselines"][0]["median"] == 2


def test_a_process_that_fails_shows_its_log(tmp_path):
    with pytest.raises(SystemExit, match="something is wrong"):
        used_by([sys.executable, "-c", "raise ValueError('something is wrong')"], tmp_path / "log.txt")


def test_options_of_a_subject_need_it_alone(capsys):
    with pytest.raises(SystemExit):
        command.read(["--families", "flux"])
    assert "--families is not known here; an option of a subject needs that subject" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command.read(["stepp"])
    assert "unknown subject stepp; known: step, first" in capsys.readouterr().err


def test_values_that_cannot_be_are_told_before_anything_is_measured(tmp_path, capsys):
    nowhere = str(tmp_path / "nowhere")
    for words, told in (
        (["help", "--json", f"{nowhere}/figures.json"], "there is no such folder"),
        (["help", "--json", str(tmp_path)], "is a folder; needed: a file"),
        (["step", "--rounds", "0"], "--rounds: '0' is given; needed: a whole number of 1 or more"),
        (["step", "--steps", "-1"], "needed: a whole number of 1 or more"),
        (["first", "--runs", "x"], "'x' is given; needed: a whole number of 1 or more"),
        (["help", "--runs", "0"], "needed: a whole number of 1 or more"),
        (["forms", "--epochs", "0"], "needed: a whole number of 1 or more"),
        (["start", "--counts", "0", "9"], "needed: a whole number of 1 or more"),
        (["start", "--family", "sdxxl"], "did you mean 'sdxl'"),
        (["caching", "--families", "fluxx"], "did you mean 'flux'"),
        (["caching", "--count", "0"], "needed: a whole number of 1 or more"),
        (["loading", "--workers", "-1"], "needed: a whole number of 0 or more"),
        (["merge", "--gigabytes", "0"], "needed: a number above 0"),
        (["merge", "--folder", nowhere], "there is no such folder"),
        (["gpu", "--cells", "-1"], "needed: a whole number of 1 or more"),
        (["gpu", "--minutes", "nan"], "needed: a number above 0"),
        (["gpu", "--folder", nowhere], "there is no such folder"),
    ):
        with pytest.raises(SystemExit):
            command.read(words)
        assert told in capsys.readouterr().err, words


def test_what_cannot_be_measured_is_told_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    words = ["step", "--families", "flux", "sd1", "--model_settings", "hiden=64", "--json", str(tmp_path / "f.json")]
    with pytest.raises(SystemExit, match="diffusers and peft missing(.|\n)*hiden: the tiny model flux has no such size"):
        command.main(words)


def test_flops_are_counted_forward_and_backward():
    import torch

    layer, x = torch.nn.Linear(8, 4, bias=False), torch.randn(16, 8)
    assert flops_of(lambda: layer(x).sum().backward()) == 2 * (2 * 16 * 8 * 4)  # x needs no gradient
    query = torch.randn(2, 3, 16, 8, requires_grad=True)
    attend = torch.nn.functional.scaled_dot_product_attention
    products = 2 + 5  # scores and outputs; scores once more and four gradients
    assert flops_of(lambda: attend(query, query, query).sum().backward()) == products * (2 * 2 * 3 * 16 * 16 * 8)


def test_forms_of_weights():
    """Fewer bits move the output of the reference model further, and take less room."""
    from benchmarks import weight_forms

    errors = weight_forms.output_errors(["bf16", "int8", "fp8_scaled", "nf4"])
    assert list(errors.values()) == sorted(errors.values()) and 0 < errors["int8"] < 0.01 < errors["nf4"] < 0.2
    sizes = [weight_forms.flux_gigabytes(form) for form in ("bf16", "int8", "nf4")]
    assert [round(size, 1) for size in sizes] == [23.8, 12.0, 6.8]


def test_packs_beside_buckets(tmp_path):
    path = tmp_path / "figures.json"
    assert command.main(["packing", "--quick", "--json", str(path)]) == 0
    (figure,) = json.loads(path.read_text())["figures"]
    assert [side["name"] for side in figure["baselines"]] == ["sizes of a pack alone", "buckets"]
    assert figure["notes"]["steps of an epoch, packs"] < figure["notes"]["steps of an epoch, buckets"]
