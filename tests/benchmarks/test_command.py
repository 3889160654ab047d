"""`python -m benchmarks`: one table, JSON beside it, and sides that compute the same."""

from __future__ import annotations

import json

import pytest

from benchmarks import command
from benchmarks.bounds import flops_of

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


def test_options_of_a_subject_need_it_alone(capsys):
    with pytest.raises(SystemExit):
        command.read(["--families", "flux"])
    assert "--families is not known here; an option of a subject needs that subject" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command.read(["stepp"])
    assert "unknown subject stepp; known: step" in capsys.readouterr().err


def test_flops_are_counted_forward_and_backward():
    import torch

    layer, x = torch.nn.Linear(8, 4, bias=False), torch.randn(16, 8)
    assert flops_of(lambda: layer(x).sum().backward()) == 2 * (2 * 16 * 8 * 4)  # x needs no gradient
