"""Text, JSON and TOML of any origin: read, or one message that names the file."""

from __future__ import annotations

import pytest

from library.core.errors import CheckpointError, ConfigError
from library.core.text_files import MOST_NESTED, parse_json, parse_toml, read_json, read_text


def test_what_can_be_read(tmp_path):
    path = tmp_path / "ü.json"
    path.write_bytes(b"\xef\xbb\xbf" + '{"a": [1e-4, 0, "é"]}'.encode())
    assert read_json(path, needed=dict) == {"a": [1e-4, 0, "é"]}
    assert parse_toml("a = [1e-4, 0]\nb = 'x'", "t") == {"a": [1e-4, 0], "b": "x"}
    deep = "[" * (MOST_NESTED - 1) + "]" * (MOST_NESTED - 1)
    assert parse_json(deep, "t") and parse_toml(f"a = {deep[2:-2]}", "t")


@pytest.mark.parametrize(
    "text", ["", "{", "[" * 300 + "]" * 300, "[" * 200_000, "9" * 10_000, '{"a":' * 200_000, "\ud800", "NaNx"]
)
def test_json_that_cannot_be_used(text: str):
    with pytest.raises(ConfigError, match="^the file is not valid JSON") as caught:
        parse_json(text, "the file")
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "text",
    [
        "a",
        "a = ",
        "a = " + "[" * 300 + "]" * 300,
        "a = " + "[" * 200_000,
        "a = 1\na = 2",
        "a = 1\r\x00",
        "[a]\n[a]",
        "a." * 3000 + "b = 1",
        "a = 99-99-99",
    ],
)
def test_toml_that_cannot_be_used(text: str):
    with pytest.raises(CheckpointError, match="^the file is not valid TOML") as caught:
        parse_toml(text, "the file", CheckpointError)
    assert len(str(caught.value)) < 400


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "latin").write_bytes("caf\xe9".encode("latin-1"))
    (tmp_path / "list").write_text("[]")
    for name, told in (
        ("none", "does not exist"),
        ("", "cannot be read"),
        ("latin", "is not UTF-8 text"),
        ("a\0b", "cannot be read"),
    ):
        with pytest.raises(ConfigError, match=told):
            read_text(str(tmp_path / name))
    with pytest.raises(ConfigError, match="list holds list; an object is needed"):
        read_json(tmp_path / "list", needed=dict)
