"""Models and numeric parts against the reference files: relative error below 1e-4 in float32 for every output
tensor."""

from __future__ import annotations

import pytest

from tests.golden_cases import CASES
from tests.golden_dir import load_golden

TOLERANCE = 1e-4
PARTIAL = {"numeric", "clip_g"}
"""files that hold more than the families here use; only the outputs computed here are compared"""


@pytest.mark.parametrize("name", CASES)
def test_outputs_agree_with_the_reference(name: str) -> None:
    weights, inputs, expected, config = load_golden(name)
    outputs = CASES[name](weights, inputs, config)
    compared = expected if name not in PARTIAL else {key: expected[key] for key in outputs}
    assert set(compared) == set(outputs)
    errors = {}
    for key, reference in compared.items():
        assert outputs[key].shape == reference.shape, key
        result, wanted = outputs[key].double(), reference.double()
        if name.startswith("te_") and not key.endswith("_no_mask"):  # padded positions are not defined
            valid = inputs["mask"].bool()
            result, wanted = result[valid], wanted[valid]
        errors[key] = ((result - wanted).norm() / wanted.norm().clamp(min=1e-30)).item()
    assert max(errors.values()) < TOLERANCE, errors
