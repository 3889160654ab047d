"""Gathering and cleaning captions and tags of metadata files, through the command lines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from finetune import clean_captions_and_tags, merge_captions_to_metadata, merge_dd_tags_to_metadata
from tests.library.dataset.images import make_image
from tools.caption_tools.text_rules import clean_caption, clean_tags


@pytest.fixture
def pictures(tmp_path) -> Path:
    folder = tmp_path / "pictures"
    (folder / "deeper").mkdir(parents=True)
    for name in ("a", "b", "c", "deeper/d"):
        make_image(folder / f"{name}.png", (8, 8))
    (folder / "a.caption").write_text("  a café \n", encoding="utf-8")
    (folder / "deeper" / "d.caption").write_text("a deep one", encoding="utf-8")
    (folder / "a.txt").write_text("1girl, red_hair\n", encoding="utf-8")
    (folder / "b.txt").write_bytes(b"\xff\xfe\xff")
    return folder


def content(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def test_captions_then_tags_in_one_file(pictures, tmp_path, caplog):
    caplog.set_level("INFO")
    out = tmp_path / "meta.json"
    assert merge_captions_to_metadata.main([str(pictures), str(out)]) == 0
    assert content(out) == {"a": {"caption": "a café"}} and "café" in out.read_text(encoding="utf-8")
    assert "1 done, 2 skipped (2 without a .caption file), 0 failed" in caplog.text
    assert merge_dd_tags_to_metadata.main([str(pictures), str(out), "--debug"]) == 0
    assert content(out) == {"a": {"caption": "a café", "tags": "1girl, red_hair"}}
    assert "not UTF-8" in caplog.text and "1 failed" in caplog.text


def test_full_paths_and_another_file_to_begin_with(pictures, tmp_path, capsys):
    first, out = tmp_path / "first.json", tmp_path / "new" / "meta.json"
    first.write_text(json.dumps({"z": {"tags": "old"}, str(pictures / "a.png"): {"caption": "old"}}))
    command = [
        str(pictures),
        str(out),
        f"--in_json={first}",
        "--full_path",
        "--recursive",
        "--caption_extention=.caption",
    ]
    assert merge_captions_to_metadata.main(command) == 0
    assert content(out) == {
        "z": {"tags": "old"}, str(pictures / "a.png"): {"caption": "a café"},
        str(pictures / "deeper" / "d.png"): {"caption": "a deep one"},
    }  # fmt: skip
    assert merge_captions_to_metadata.main(command) == 2 and "--overwrite" in capsys.readouterr().err
    assert merge_captions_to_metadata.main([*command, "--overwrite"]) == 0
    assert merge_captions_to_metadata.main([str(pictures), str(first), f"--in_json={first}"]) == 0


def test_nothing_to_gather_and_wrong_commands(pictures, tmp_path, capsys):
    out = tmp_path / "meta.json"
    assert (
        merge_captions_to_metadata.main([str(pictures), str(out), "--caption_extension=.none"]) == 1
        and not out.exists()
    )
    assert (
        merge_captions_to_metadata.main([str(tmp_path / "none"), str(out), "--recursive", "--in_json=nowhere.json"])
        == 2
    )
    told = capsys.readouterr().err
    assert all(text in told for text in ("train_data_dir is", "--recursive needs --full_path", "nowhere.json"))
    out.write_text("{")
    assert merge_captions_to_metadata.main([str(pictures), str(out)]) == 2
    assert "not valid JSON" in capsys.readouterr().err and out.read_text() == "{"


@pytest.mark.parametrize(
    ("tags", "cleaned"),
    [
        ("1girl, long_hair, ^_^", "1girl, long hair, ^_^"),
        ("1girl, blue eyes, red eyes, rating:safe, x", "1girl, blue eyes, red eyes"),
        ("2girls, blue eyes, red eyes, smile", "2girls, smile"),
        ("2girls, blue eyes, smile", "2girls, blue eyes, smile"),
        ("2girls, long hair, short hair", "2girls"),
        ("2girls, blonde hair, long hair, black hair", "2girls, long hair"),
        ("2girls, blonde hair, long hair", "2girls, blonde hair, long hair"),
        ("multiple boys, bob cut, hime cut, long sleeves, sleeveless", "multiple boys"),
        ("2girls, ponytail, single hair bun, side braid", "2girls"),
        ("1girl, shirt, white shirt, skirt", "1girl, white shirt, skirt"),
        ("hair ornament, star hair ornament, ornament", "star hair ornament"),
        ("1girl, t-shirt, shirt", "1girl, t-shirt, shirt"),
        ("", ""),
    ],
)
def test_tags(tags, cleaned):
    assert clean_tags(tags) == cleaned


@pytest.mark.parametrize(
    ("caption", "cleaned"),
    [
        ("a young woman in a personal space", "a girl in a personal space"),
        ("a group of people and one person", "a group of girls and one girl"),
        ("anime anime anime girl", "girl"),
        ("a cartoon female girl", "a girl"),
        ("an anime cartoon image of a cat", "an image of a cat"),
        ("a cartoon anime drawing of women", "a drawing of girls"),
        ("the younger lady is townspeople", "the younger girl is townspeople"),
    ],
)
def test_captions(caption, cleaned):
    assert clean_caption(caption) == cleaned


def test_a_file_is_cleaned(tmp_path, caplog, capsys):
    source, out = tmp_path / "meta.json", tmp_path / "clean.json"
    source.write_text(json.dumps({
        "a": {"tags": "2girls, red_eyes, blue_eyes", "caption": "a woman", "train_resolution": [64, 64]},
        "b": {"caption": "a lady"}, "c": {"x": 1}, "d": {"tags": ["shirt", "red_shirt"]},
    }))  # fmt: skip
    assert clean_captions_and_tags.main([str(source), str(out), "--debug"]) == 0
    assert content(out) == {
        "a": {"tags": "2girls", "caption": "a girl", "train_resolution": [64, 64]},
        "b": {"caption": "a girl"}, "c": {"x": 1}, "d": {"tags": ["red shirt"]},
    }  # fmt: skip
    errors = [record.message for record in caplog.records if record.levelname == "ERROR"]
    assert errors == ["b has no tags", "c has no tags", "c has no caption", "d has no caption"]
    assert clean_captions_and_tags.main([str(source), str(out)]) == 2 and "--overwrite" in capsys.readouterr().err
    assert clean_captions_and_tags.main([str(tmp_path), str(source), str(out), "--overwrite"]) == 0
    assert "is not needed" in caplog.text
    assert (
        clean_captions_and_tags.main([str(tmp_path / "none.json"), str(tmp_path / "x.json")]) == 2
        and not (tmp_path / "x.json").exists()
    )
