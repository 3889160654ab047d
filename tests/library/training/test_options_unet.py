"""Options that train_network.py and sdxl_train_network.py refuse: those of other families."""

from __future__ import annotations

import pytest

from library.errors import ConfigError
from library.training.parser_common import parse


@pytest.mark.parametrize(("family", "argument"), [
    ("sd", "--cache_text_encoder_outputs"), ("sd", "--blocks_to_swap=2"), ("sd", "--timestep_sampling=sigmoid"),
    ("sdxl", "--clip_skip=2"), ("sdxl", "--v2"), ("sdxl", "--weighting_scheme=mode"), ("sdxl", "--fp8_base"),
])  # fmt: skip
def test_what_has_no_meaning_is_refused_by_name(family: str, argument: str) -> None:
    with pytest.raises(ConfigError, match=argument[2:].split("=")[0]):
        parse([argument], family, "network")
