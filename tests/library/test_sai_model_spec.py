"""modelspec.* metadata."""

from __future__ import annotations

import pytest

from library.sai_model_spec import ModelSpec, build_model_spec


def spec(**values) -> dict[str, str]:
    return build_model_spec(
        ModelSpec(
            **{
                "architecture": "flux-1-dev",
                "implementation": "url",
                "implementation_version": "x",
                "timestamp": 1e9,
                **values,
            }
        )
    )


@pytest.mark.parametrize(
    ("kind", "title"), [("lora", "LoRA"), ("textual-inversion", "TextualInversion"), ("", "Checkpoint")]
)
def test_the_title_of_a_file_without_a_name_tells_no_time(kind, title):
    early, late = spec(kind=kind), spec(kind=kind, timestamp=2e9)
    assert early["modelspec.title"] == late["modelspec.title"] == title
    assert {key for key in early if early[key] != late[key]} == {"modelspec.date"}


def test_values_that_are_not_given_are_left_out():
    keys = spec(title="a", optional={"author": "me", "license": None})
    assert keys["modelspec.author"] == "me"
    assert not {"modelspec.license", "modelspec.prediction_type", "modelspec.timestep_range"} & set(keys)
