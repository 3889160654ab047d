"""The options of train_network.py and sdxl_train_network.py: all that the known scripts have, and our own, by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from library.errors import ConfigError
from library.training.parser_common import parse, script

OWN_OPTIONS = {"overwrite", "skip_bad_images", "fail_on_missing_captions", "clip_tokenizer"}
REFUSED_BEYOND = {
    "blocks_to_swap", "discrete_flow_shift", "logit_mean", "logit_std", "mode_scale", "sigmoid_scale", "text_encoder_batch_size",
    "timestep_sampling", "weighting_scheme", "cache_text_encoder_outputs", "cache_text_encoder_outputs_to_disk",
    "disable_mmap_load_safetensors",
}  # fmt: skip
"""options of other families' scripts, refused here or harmless"""


def known(family: str) -> set[str]:
    lines = (Path(__file__).parent / f"{family}_network_options.jsonl").read_text(encoding="utf-8").splitlines()
    return {json.loads(line)[0] for line in lines}


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_the_set_of_options_is_the_known_one_and_our_own(family: str) -> None:
    owners = set(script(family, "network").owners)
    assert known(family) - owners == set()
    assert owners - known(family) - REFUSED_BEYOND == OWN_OPTIONS


@pytest.mark.parametrize(("family", "argument"), [
    ("sd", "--cache_text_encoder_outputs"), ("sd", "--blocks_to_swap=2"), ("sd", "--timestep_sampling=sigmoid"),
    ("sdxl", "--clip_skip=2"), ("sdxl", "--v2"), ("sdxl", "--weighting_scheme=mode"), ("sdxl", "--fp8_base"),
])  # fmt: skip
def test_what_has_no_meaning_is_refused_by_name(family: str, argument: str) -> None:
    with pytest.raises(ConfigError, match=argument[2:].split("=")[0]):
        parse([argument], family, "network")
