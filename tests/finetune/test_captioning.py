"""Captions by tiny random models, on small images, through the command lines."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from finetune import make_captions, make_captions_by_git
from tests.library.dataset.images import make_image
from tests.tiny_captioners import build_tiny_blip, build_tiny_git
from tools.caption_tools.captioning import CLIP_MEAN, CLIP_STD, normalized
from tools.caption_tools.text_rules import without_written_words


@pytest.fixture(scope="module")
def blip(tmp_path_factory) -> Path:
    return build_tiny_blip(tmp_path_factory.mktemp("blip"))


@pytest.fixture(scope="module")
def git(tmp_path_factory) -> Path:
    return build_tiny_git(tmp_path_factory.mktemp("git"))


@pytest.fixture
def pictures(tmp_path) -> Path:
    folder = tmp_path / "pictures"
    (folder / "deeper").mkdir(parents=True)
    for number, size in enumerate([(40, 30), (20, 50), (64, 64)]):
        make_image(folder / f"{number}.png", size, seed=number)
    make_image(folder / "deeper" / "3.png", seed=3)
    (folder / "broken.png").write_bytes(b"no")
    return folder


def captions(folder: Path, ending: str = ".caption") -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8")
        for path in sorted(folder.rglob(f"*{ending}"))
    }


def blip_command(folder: Path, model: Path, *more: str) -> list[str]:
    return [str(folder), f"--caption_weights={model}", "--max_length=14", *more]


def test_captions_by_blip(blip, pictures, caplog):
    caplog.set_level("INFO")
    assert make_captions.main(blip_command(pictures, blip, "--beam_search", "--num_beams=2", "--batch_size=2")) == 0
    found = captions(pictures)
    assert list(found) == ["0.caption", "1.caption", "2.caption"]
    assert all(
        text.endswith("\n") and text.strip() and not text.startswith("a picture of") and "[" not in text
        for text in found.values()
    )
    assert "3 done, 0 skipped, 1 failed" in caplog.text and "broken.png" in caplog.text


def test_beams_agree_with_the_model_called_by_itself(blip, pictures):
    from transformers import AutoTokenizer, BlipForConditionalGeneration

    from library.dataset.image_files import read_on_white

    assert (
        make_captions.main(blip_command(pictures, blip, "--beam_search", "--num_beams=3", "--caption_extension=txt"))
        == 0
    )
    model, tokenizer = BlipForConditionalGeneration.from_pretrained(blip).eval(), AutoTokenizer.from_pretrained(blip)
    pixels = normalized(read_on_white(str(pictures / "1.png")), 32, whole=True)[None]
    ids = tokenizer("a picture of", return_tensors="pt").input_ids
    tokens = model.generate(
        pixel_values=pixels, input_ids=ids, num_beams=3, max_length=14, min_length=5, do_sample=False
    )
    text = tokenizer.decode(tokens[0], skip_special_tokens=True)
    assert text.startswith("a picture of ")
    assert captions(pictures, ".txt")["1.txt"] == text.removeprefix("a picture of ").strip() + "\n"


def test_drawn_captions_follow_the_seed_and_existing_ones_stay(blip, pictures, capsys):
    assert make_captions.main(blip_command(pictures, blip, "--seed=1", "--recursive")) == 0
    first = captions(pictures)
    assert "deeper/3.caption" in first
    torch.manual_seed(5)
    assert make_captions.main(blip_command(pictures, blip, "--seed=2", "--recursive")) == 1
    assert captions(pictures) == first and "--overwrite" in capsys.readouterr().err
    state = torch.get_rng_state()
    assert make_captions.main(blip_command(pictures, blip, "--seed=2", "--recursive", "--overwrite")) == 0
    assert captions(pictures) != first and torch.equal(torch.get_rng_state(), state)
    assert (
        make_captions.main(
            blip_command(pictures, blip, "--seed=1", "--recursive", "--overwrite", "--max_data_loader_n_workers=2")
        )
        == 0
    )
    assert captions(pictures) == first


def test_captions_by_git(git, pictures, caplog):
    caplog.set_level("INFO")
    command = [str(pictures), f"--model_id={git}", "--max_length=8", "--remove_words", "--debug"]
    assert make_captions_by_git.main([*command, "--batch_size=3"]) == 0
    together = captions(pictures)
    assert len(together) == 3 and all(text.strip() for text in together.values()) and "0.png: " in caplog.text
    assert make_captions_by_git.main([*command, "--overwrite"]) == 0
    assert captions(pictures) == together


def test_pixels_are_those_of_the_models_own_processor():
    transformers = pytest.importorskip("transformers")
    image = np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8)
    sizes = {"size": {"height": 24, "width": 24}, "do_center_crop": False}
    for whole, options in (
        (True, sizes),
        (False, {"size": {"shortest_edge": 24}, "crop_size": {"height": 24, "width": 24}}),
    ):
        processor = transformers.CLIPImageProcessor
        expected = processor(image_mean=CLIP_MEAN, image_std=CLIP_STD, resample=3, **options)(
            image, return_tensors="pt"
        ).pixel_values[0]
        torch.testing.assert_close(normalized(image, 24, whole=whole), expected, atol=0.03, rtol=0)


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ('a cat with the word "hello" on the wall', "a cat"),
        ("a girl and the letters abc is on her shirt and a dog", "a girl and a dog"),
        ("a man with a sign that says 'no parking' on it", "a man"),
        ("a shirt that says hello", "a shirt"),
        ("a car with the number 12 on it in the rain", "a car in the rain"),
        ("a car with the number 12 painted white", "a car"),
        ("a book with the words \"", "a book"),
        ("a bag that says the word go on it", "a bag"),
        ("a crossword puzzle, wordless", "a crossword puzzle, wordless"),
        ("a dog has the name rex, on grass", "a dog, on grass"),
        ("a cup that says'the word \" on it", "a cup"),
    ],
)  # fmt: skip
def test_phrases_about_letters_are_left_out(text, cleaned):
    assert without_written_words(text) == cleaned


def test_every_problem_is_told_before_a_model_is_loaded(pictures, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert (
        make_captions.main(
            [
                str(tmp_path / "none"),
                "--caption_weights=model_large_caption.pth",
                "--top_p=2",
                "--num_beams=2",
                "--min_length=9",
                "--max_length=3",
            ]
        )
        == 2
    )
    told = capsys.readouterr().err
    assert all(
        text in told for text in ("does not exist", "single file", "--top_p is 2", "--beam_search", "--min_length is 9")
    )
    assert make_captions.main([str(tmp_path / "empty"), f"--caption_weights={tmp_path / 'empty'}"]) == 2
    assert "without a config.json" in capsys.readouterr().err
    assert (
        make_captions_by_git.main([str(tmp_path / "empty"), "--model_id=./nowhere", "--batch_size=0", "--max_length=0"])
        == 2
    )
    told = capsys.readouterr().err
    assert all(text in told for text in ("--model_id is ./nowhere", "--batch_size is 0", "--max_length is 0"))
    (tmp_path / "empty" / "config.json").write_text("{}")
    assert make_captions_by_git.main([str(pictures), f"--model_id={tmp_path / 'empty'}"]) == 2
    assert "cannot be loaded" in capsys.readouterr().err
