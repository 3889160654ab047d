"""The options of flux_train_network.py: the frozen set, what each of them does, and that nothing is accepted and ignored."""

import ast
import json
from pathlib import Path

import pytest

from library.errors import ConfigError
from library.options import allows_none, is_bool_option, value_type
from library.training import cli
from library.training.parser_common import parse, parse_command, script

ROOT = Path(__file__).resolve().parents[3]
KNOWN = [json.loads(line) for line in (Path(__file__).parent / "flux_network_options.jsonl").read_text().splitlines()]
"""[name, type, nargs, default, choices] of every option that the known script of this name has"""
OWN_OPTIONS = {
    "overwrite", "skip_bad_images", "fail_on_missing_captions", "clip_l_tokenizer", "t5xxl_tokenizer",
}
"""options that only this project has; extend the set together with the documentation"""
OTHER_DEFAULTS = {"model_prediction_type": "raw"}
"""defaults that differ on purpose (a documented fault of the old one)"""
SCRIPT = script("flux", "network")


def status(name):
    spec = SCRIPT.spec(name)
    return "refused" if name in SCRIPT.refused else spec.status


def refused_names():
    return [name for name in SCRIPT.owners if status(name) == "refused"]


def test_the_set_of_options_is_the_known_one_and_our_own():
    known = {entry[0] for entry in KNOWN}
    assert known - set(SCRIPT.owners) == set()
    assert set(SCRIPT.owners) - known == OWN_OPTIONS


@pytest.mark.parametrize("name, kind, nargs, default, choices", KNOWN, ids=[entry[0] for entry in KNOWN])
def test_an_option_keeps_its_type_default_and_choices(name, kind, nargs, default, choices):
    owner = SCRIPT.owners[name]
    spec = SCRIPT.spec(name)
    assert SCRIPT.default(name) == OTHER_DEFAULTS.get(name, default)
    assert is_bool_option(owner, name) == (kind == "bool")
    if kind in ("int", "float") and spec.convert is None:
        assert value_type(owner, name).__name__ == kind
    assert (spec.nargs == "*") == (nargs == "*")
    if choices:
        assert spec.choices is None or set(choices) <= set(spec.choices)
    if default is None:
        assert allows_none(owner, name)


@pytest.mark.parametrize("name", refused_names())
def test_a_refused_option_is_refused_by_name_with_a_reason(name):
    owner, spec = SCRIPT.owners[name], SCRIPT.spec(name)
    if spec.choices:
        value = str(next(choice for choice in reversed(spec.choices) if choice is not None and choice != SCRIPT.default(name)))
    elif is_bool_option(owner, name):
        value = "true"
    else:
        value = {int: "7", float: "0.7"}.get(value_type(owner, name), "something")
    extra = {"multires_noise_discount": ["--multires_noise_iterations", "6"], "adaptive_noise_scale": ["--noise_offset", "0.1"],
             "noise_offset_random_strength": ["--noise_offset", "0.1"], "sample_sampler": ["--sample_prompts", "p.txt"]}
    with pytest.raises(ConfigError) as caught:
        parse([f"--{name}", value, *extra.get(name, [])], "flux", "network")
    mine = [problem for problem in caught.value.problems if problem.startswith(f"--{name} ")]
    reason = SCRIPT.refused.get(name) or spec.reason
    assert len(mine) == 1 and reason in mine[0]
    assert len(reason) > 15


@pytest.mark.parametrize("name", refused_names())
def test_the_default_of_a_refused_option_passes(name):
    default = SCRIPT.default(name)
    text = {None: "", True: "true", False: "false"}.get(default, str(default))
    if text == "" and not allows_none(SCRIPT.owners[name], name):
        pytest.skip("the default cannot be written")
    assert parse([f"--{name}={text}"], "flux", "network").value(name) == default


@pytest.mark.parametrize("name", [name for name in SCRIPT.owners if status(name) == "equivalent"])
def test_an_equivalent_option_is_answered_with_one_line(name):
    parsed = parse_command([f"--{name}"], "flux", "network")
    assert [note.text for note in parsed.notes] == [SCRIPT.spec(name).reason]


def names_read(tree):
    """Attributes and whole string constants of a module, outside the range checks of option groups."""
    skipped = {
        id(node) for function in ast.walk(tree) if isinstance(function, ast.FunctionDef) and function.name == "__post_init__"
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_every_option_that_works_is_read_somewhere():
    not_use = {"known_options_table.py", "known_options.py", "checks.py"}
    read = {"overwrite"}                                            # its whole job is a check
    for folder in ("library", "networks"):
        for path in (ROOT / folder).rglob("*.py"):
            if path.name not in not_use:
                read |= set(names_read(ast.parse(path.read_text(encoding="utf-8"))))
    metadata = {name for name in SCRIPT.owners if name.startswith("metadata_")} if "metadata_" in read else set()
    assert [name for name in SCRIPT.owners if status(name) == "works" and name not in read | metadata] == []


def test_names_in_the_lists_of_the_family_are_options():
    assert set(SCRIPT.refused) <= set(SCRIPT.owners)
    assert set(SCRIPT.defaults) <= set(SCRIPT.owners)


def test_setup_parser_gives_a_namespace_with_every_option():
    namespace = cli.build_parser("flux", "network").parse_args(["--network_dim", "8", "--cache_latents"])
    assert set(SCRIPT.owners) <= set(vars(namespace))
    assert (namespace.network_dim, namespace.cache_latents, namespace.max_train_steps) == (8, True, 1600)


def test_every_option_is_in_the_documentation():
    page = (ROOT / "docs" / "flux_train_network.md").read_text(encoding="utf-8")
    assert [name for name in SCRIPT.owners if f"`--{name}`" not in page] == []
