"""The notebook that shows the library runs from top to bottom, for every family, and is kept with the outputs of one
such run."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from library.tiny_models import TINY_SETS

NOTEBOOK = Path(__file__).resolve().parents[2] / "examples" / "library_tour.ipynb"
CONTENT = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
CODE = ["".join(cell["source"]) for cell in CONTENT["cells"] if cell["cell_type"] == "code"]
TEXT = ["".join(cell["source"]) for cell in CONTENT["cells"] if cell["cell_type"] == "markdown"]


@pytest.fixture(autouse=True)
def root_logger_as_before():
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    yield
    root.setLevel(level)
    root.handlers[:] = handlers


def run_cells(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Execute all cells in one namespace, with everything they write in `folder`; the namespace."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr("tempfile.mkdtemp", lambda: str(folder / "tour"))
    monkeypatch.setattr("sys.path", list(__import__("sys").path))
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for number, source in enumerate(CODE):
        source = re.sub(r'^NAME = ".*"$', f'NAME = "{name}"', source, flags=re.MULTILINE)
        exec(compile(source, f"{NOTEBOOK.name}, code cell {number + 1}", "exec"), namespace)
    return namespace


@pytest.mark.parametrize("name", TINY_SETS)
def test_the_cells_run_from_top_to_bottom(name: str, tmp_path: Path, monkeypatch) -> None:
    found = run_cells(name, tmp_path, monkeypatch)
    assert found["NAME"] == name
    assert found["loss_by_hand"].item() == pytest.approx(found["loss_of_step"], rel=1e-6)
    assert found["pictures"].size == (128, 64) and found["picture"].size == (64, 64)
    assert len(found["picture"].getcolors(64 * 64)) > 16
    state = load_file(found["lora"])
    assert any(tensor.any() for key, tensor in state.items() if key.endswith("lora_up.weight"))
    trained = load_file(tmp_path / "tour" / "output" / "tour.safetensors")
    assert all(torch.equal(tensor, state[key]) for key, tensor in trained.items()) and trained.keys() == state.keys()
    assert [path.name for path in tmp_path.iterdir()] == ["tour"]


def test_the_file_is_a_notebook_with_the_outputs_of_one_run() -> None:
    assert (CONTENT["nbformat"], CONTENT["nbformat_minor"]) == (4, 5) and CONTENT["metadata"]["kernelspec"][
        "name"
    ] == "python3"
    ids = [cell["id"] for cell in CONTENT["cells"]]
    assert len(set(ids)) == len(ids) and all(re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", name) for name in ids)
    code = [cell for cell in CONTENT["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    assert any("loss " in "".join(output.get("text", ())) for output in outputs) and len(json.dumps(CONTENT)) < 200_000
    for cell in CONTENT["cells"]:
        assert isinstance(cell["source"], list) and isinstance(cell["metadata"], dict)
        if cell["cell_type"] == "code":
            assert isinstance(cell["outputs"], list)
        else:
            assert cell["cell_type"] == "markdown" and set(cell) == {"cell_type", "id", "metadata", "source"}


def test_it_offers_every_tiny_model_and_its_links_lead_to_files() -> None:
    assert all(f"`{name}`" in TEXT[0] for name in TINY_SETS)
    targets = [target for text in TEXT for target in re.findall(r"\]\(([^)#\s]+)", text)]
    assert targets and all((NOTEBOOK.parent / target).exists() for target in targets)
