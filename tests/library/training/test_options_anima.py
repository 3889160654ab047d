"""The options of anima_train_network.py: the frozen set, and that each is documented."""

import json
from pathlib import Path

import pytest

from library.errors import ConfigError
from library.options import allows_none, is_bool_option, value_type
from library.training.parser_common import parse, script

ROOT = Path(__file__).resolve().parents[3]
KNOWN = [json.loads(line) for line in (Path(__file__).parent / "anima_network_options.jsonl").read_text().splitlines()]
"""[name, type, nargs, default, choices] of every option that the known script of this name has"""
OWN_OPTIONS = {"overwrite", "skip_bad_images", "fail_on_missing_captions", "qwen3_tokenizer"}
"""options that only this project has; extend the set together with the documentation"""
SCRIPT = script("anima", "network")


def test_the_set_of_options_is_the_known_one_and_our_own():
    known = {entry[0] for entry in KNOWN}
    assert known - set(SCRIPT.owners) == set()
    assert set(SCRIPT.owners) - known == OWN_OPTIONS


@pytest.mark.parametrize("name, kind, nargs, default, choices", KNOWN, ids=[entry[0] for entry in KNOWN])
def test_an_option_keeps_its_type_default_and_choices(name, kind, nargs, default, choices):
    owner, spec = SCRIPT.owners[name], SCRIPT.spec(name)
    assert SCRIPT.default(name) == default
    assert is_bool_option(owner, name) == (kind == "bool")
    if kind in ("int", "float") and spec.convert is None:
        assert value_type(owner, name).__name__ == kind
    assert (spec.nargs == "*") == (nargs == "*")
    if choices:
        assert spec.choices is None or set(choices) <= set(spec.choices)
    if default is None:
        assert allows_none(owner, name)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--unsloth_offload_checkpointing"], "--gradient_checkpointing --cpu_offload_checkpointing"),
        (["--vae_chunk_size=3"], "an even number"), (["--vae_chunk_size=0"], "an even number"), (["--mlp_lr=-1"], "0 or more"),
        (["--t5_max_token_length=0"], "1 or more"), (["--noise_offset=0.1"], "flow matching"), (["--v2"], "Stable Diffusion"),
    ],
)  # fmt: skip
def test_what_is_refused(words, message):
    with pytest.raises(ConfigError, match=message):
        parse(words, "anima", "network")


def test_names_in_the_lists_of_the_family_are_options():
    assert set(SCRIPT.refused) <= set(SCRIPT.owners)
    assert set(SCRIPT.defaults) <= set(SCRIPT.owners)


def test_every_option_is_in_the_documentation():
    page = (ROOT / "docs" / "anima_train_network.md").read_text(encoding="utf-8")
    assert [name for name in SCRIPT.owners if f"`--{name}`" not in page] == []
