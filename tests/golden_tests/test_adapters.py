"""Every recorded adapter file, merged into its layer by the formula that forward, merging and the tools share."""

import json

import pytest
import torch
from safetensors import safe_open

from networks.files.parameter_names import layer_tensors
from networks.kinds.registry import weight_change
from tests.golden_dir import GOLDEN_DIR

PATH = GOLDEN_DIR / "adapters.safetensors"


def cases():
    if not PATH.is_file():
        return [pytest.param("missing", "", id="missing-adapters")]
    with safe_open(PATH, "pt") as file:
        outputs = [key.split("/")[1:] for key in file.keys() if key.startswith("output/")]
    return [
        pytest.param(case, name, id=f"{case}-{name}") for case, name in sorted(outputs) if not name.endswith("_lycoris")
    ]


@pytest.mark.parametrize(("case", "name"), cases())
def test_merged_weight(case, name):
    if case == "missing":
        pytest.fail(f"reference file {PATH} is missing")
    with safe_open(PATH, "pt") as file:
        prefix = f"input/{case}/"
        tensors = {key[len(prefix) :]: file.get_tensor(key) for key in file.keys() if key.startswith(prefix)}
        expected = file.get_tensor(f"output/{case}/{name}")
        config = json.loads(file.metadata()["golden"])["config"][case]
    weight = tensors.pop("base_weight")
    if case.startswith("peft_") and "alpha" not in tensors:
        tensors["alpha"] = torch.tensor(float(config["alpha"]))  # PEFT keeps it in a configuration file
    merged = weight + weight_change(layer_tensors(tensors), weight, float(name.removeprefix("merged_multiplier_")))
    torch.testing.assert_close(merged, expected, rtol=1e-5, atol=1e-5)
