"""Options that train_network.py and sdxl_train_network.py refuse or ignore: those of other families."""

from __future__ import annotations

import pytest

from library.core.errors import ConfigError
from library.training.parser_common import parse


@pytest.mark.parametrize(("family", "argument"), [
    ("sd", "--cache_text_encoder_outputs"), ("sd", "--blocks_to_swap=2"), ("sd", "--timestep_sampling=sigmoid"),
    ("sdxl", "--v2"), ("sdxl", "--weighting_scheme=mode"),
])  # fmt: skip
def test_what_the_known_script_refuses_is_refused_by_name(family: str, argument: str) -> None:
    with pytest.raises(ConfigError, match=argument[2:].split("=")[0]):
        parse([argument], family, "network")


def test_the_layer_that_sdxl_takes_anyway_is_no_wish_and_another_one_is_ignored() -> None:
    assert parse(["--clip_skip=2"], "sdxl", "network").ignored == ()
    (item,) = parse(["--clip_skip=1"], "sdxl", "network").ignored
    assert item.written == "--clip_skip 1"
    assert parse(["--clip_skip=2"], "sd", "network").value("clip_skip") == 2


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_the_usual_length_of_captions_may_be_said(family: str) -> None:
    assert parse(["--max_token_length=75"], family, "network").value("max_token_length") is None
    with pytest.raises(ConfigError, match="--max_token_length is '100'; needed: one of 150, 225"):
        parse(["--max_token_length=100"], family, "network")
