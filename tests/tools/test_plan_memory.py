"""tools/plan_memory.py: the tables of a command, for every family, with nothing read and nothing written."""

from __future__ import annotations

from pathlib import Path

import pytest

from library.families.registry import script_name
from tests.families import CASES
from tests.runs.families import Tinies
from tools import plan_memory
from tools.model_tools.memory_plan import scripts, what_it_trains


@pytest.fixture(scope="module")
def tinies(tmp_path_factory: pytest.TempPathFactory) -> Tinies:
    return Tinies(tmp_path_factory)


KINDS = ("sd1", "flux", "anima", "wan")
"""a U-Net, a transformer of two rows and one of one, clips"""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in KINDS else [pytest.mark.full]) for name in CASES]
)
def test_every_family_has_a_plan(
    name: str, tinies: Tinies, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    work = tinies.work(name, tmp_path)
    options = ("--mixed_precision=bf16", "--gradient_checkpointing", *work.case.caches(on_disk=True))
    options = options if work.case.caches_text else options[:3]
    dataset, before = work.dataset(), set(tmp_path.rglob("*"))
    monkeypatch.setattr(
        "library.safetensors_utils._mapped_tensors", lambda *_: pytest.fail("weights are read")
    )
    command = ["accelerate", "launch", f"{script_name(work.family)}.py", *work.argv("out", *options, dataset=dataset)]
    assert plan_memory.main(["--device", "cuda", *command]) == 0, capsys.readouterr().err
    shown = capsys.readouterr().out
    assert "batch of 2 at 64x64, gradient checkpointing" in shown and " on cuda, in: " in shown
    rows = {line.split()[0]: line for line in shown.splitlines() if line.startswith("  ")}
    assert {"forward", "backward", "update", "main", "predicted"} <= set(rows)
    assert all(part in rows["backward"] for part in ("denoiser", "adapter", "optimizer", "gradients", "activations"))
    assert set(tmp_path.rglob("*")) == before


def test_a_command_names_its_script(capsys: pytest.CaptureFixture) -> None:
    known = dict(scripts())
    assert known["flux_train"] == ("flux", "full") and known["train_network"] == ("sd", "network")
    assert what_it_trains(["python", "/somewhere/sdxl_train_network.py", "--a"]) == ("sdxl", "network", ["--a"])
    assert what_it_trains(["train.py", "flux", "network", "--a", "b"]) == ("flux", "network", ["--a", "b"])
    assert plan_memory.main(["flux_train_networks.py"]) == 2
    assert "flux_train_networks.py is no training script; did you mean 'flux_train_network'" in capsys.readouterr().err
    assert plan_memory.main([]) == 2
    assert "no training script is named" in capsys.readouterr().err
