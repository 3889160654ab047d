"""Prompt lines and files, defaults, file names and occasions against the reference file sample_prompts.json."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest

from library.core.errors import ConfigError
from library.training import sampling_prompts
from library.training.new_words import words_of as vector_words
from library.training.sampling_prompts import IMAGE_LINE_OPTIONS, VIDEO_LINE_OPTIONS, SamplePrompt
from tests.golden_dir import behaviour, behaviour_cases

FILE = "sample_prompts.json"
BY_FIELD = {option.field for option in IMAGE_LINE_OPTIONS.values()}


def written(case, tmp_path):
    path = tmp_path / case["name"]
    path.write_text(case["content"], encoding="utf-8", newline="")
    return path


@pytest.mark.parametrize("case", behaviour_cases(FILE, "image_lines"))
def test_image_lines(case):
    assert sampling_prompts.parse_line(case["line"], options=IMAGE_LINE_OPTIONS).to_dict() == case["record"]


@pytest.mark.parametrize("case", behaviour_cases(FILE, "video_lines"))
def test_video_lines(case):
    assert sampling_prompts.parse_line(case["line"], options=VIDEO_LINE_OPTIONS).to_dict() == case["record"]


@pytest.mark.parametrize("case", behaviour_cases(FILE, "bad_lines"))
def test_bad_lines(case):
    if case["line"] == "a cat --d -1":  # known scripts take it for a seed that is drawn
        assert sampling_prompts.parse_line(case["line"]).to_dict() == {"prompt": "a cat"}
        return
    options = "|".join(re.escape(piece.split(" ")[0]) for piece in case["line"].split(" --")[1:])
    with pytest.raises(ConfigError, match=f"prompts.txt line 7: .*--({options})"):
        sampling_prompts.parse_line(case["line"], "prompts.txt line 7")


@pytest.mark.parametrize("case", behaviour_cases(FILE, "files"))
def test_files(case, tmp_path):
    prompts = sampling_prompts.load_prompts(written(case, tmp_path))
    assert [prompt.to_dict() for prompt in prompts] == case["records"]


def words_of(error: str) -> list[str]:
    """What a message has to match by the text of a recorded error: the line, options, suffixes, and the keys it
    names."""
    ordinals = {"first": "(entry 1|subset.0.)", "second": "(entry 2|subset.1.)", "third": "(entry 3|subset.2.)"}
    words = [re.escape(word) for word in re.findall(r"line \d+|--\w+|(?<!\w)\.\w+", error)]
    if error.startswith("names"):
        words += [
            ordinals.get(word, word) for word in re.findall(r"\w+", error) if word in ordinals or word in BY_FIELD
        ]
    return words


@pytest.mark.parametrize("case", behaviour_cases(FILE, "file_errors"))
def test_file_errors(case, tmp_path):
    with pytest.raises(ConfigError) as error:
        sampling_prompts.load_prompts(written(case, tmp_path))
    text = str(error.value)
    assert case["name"] in text
    for word in words_of(case["error"]):
        assert re.search(word, text), word


@pytest.mark.parametrize("case", behaviour_cases(FILE, "resolved"))
def test_defaults_of_families(case):
    defaults = sampling_prompts.SAMPLE_DEFAULTS[case["family"]]
    used = sampling_prompts.with_defaults(SamplePrompt(**case["record"]), defaults).to_dict()
    assert {key: used[key] for key in case["used"]} == case["used"]


@pytest.mark.parametrize("case", behaviour_cases(FILE, "file_names"))
def test_file_names(case):
    name = sampling_prompts.sample_file_name(
        case["output_name"], *case["when"], enum=case["enum"], seed=case["seed"], timestamp=case["timestamp"]
    )
    assert name == case["file"]


@pytest.mark.parametrize("case", behaviour_cases(FILE, "when"))
def test_occasions(case):
    options = SimpleNamespace(
        **{"sample_every_n_steps": None, "sample_every_n_epochs": None, "sample_at_first": False, **case["options"]}
    )
    assert sampling_prompts.is_sample_due(options, case["at"], case["step"], case["epoch"]) is case["samples"]


def test_token_vectors():
    case = behaviour(FILE)["token_vectors"]
    prompt = SamplePrompt(prompt=case["prompt"], negative_prompt=case["negative_prompt"])
    words = vector_words(case["token"], case["count"])
    assert sampling_prompts.replace_words(prompt, case["token"], words).to_dict() == case["expected"]
