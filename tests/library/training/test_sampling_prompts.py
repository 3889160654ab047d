"""Reading prompt files: what people write by hand."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from PIL import Image

from library.core.errors import ConfigError
from library.training.prompt_files import check_files
from library.training.sampling_prompts import (
    SAMPLE_DEFAULTS,
    VIDEO_LINE_OPTIONS,
    SamplePrompt,
    is_sample_due,
    load_prompts,
    parse_line,
    unused_settings,
    with_defaults,
)


def test_all_problems_of_a_file_come_together(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a --w x --zz 1\nfine\nb --l much\n", encoding="utf-8")
    with pytest.raises(ConfigError) as error:
        load_prompts(path)
    assert [p.split(":")[0] for p in error.value.problems] == [
        "prompts.txt line 1",
        "prompts.txt line 1",
        "prompts.txt line 3",
    ]


def test_windows_text_files(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeff# note\r\na cat --w 64\r\n\r\nkatze --n h\u00e4sslich\r\n".encode())
    assert [p.to_dict() for p in load_prompts(path)] == [
        {"prompt": "a cat", "width": 64, "enum": 0}, {"prompt": "katze", "negative_prompt": "h\u00e4sslich", "enum": 1},
    ]


def test_tabs_separate_as_well():
    assert parse_line("a cat\t--w\t64").to_dict() == {"prompt": "a cat", "width": 64}


def test_a_single_toml_table_is_one_prompt(tmp_path):
    path = tmp_path / "one.toml"
    path.write_text('[prompt]\nprompt = "x"\nseed = 3\n', encoding="utf-8")
    assert [p.to_dict() for p in load_prompts(path)] == [{"prompt": "x", "seed": 3, "enum": 0}]


@pytest.mark.parametrize(("content", "words"), [
    ('[{"prompt": "x", "widht": 5}]', "did you mean 'width'"),
    ('[{"prompt": "x", "seed": true}]', "seed is True"),
    ('[{"width": 64}]', "prompt"),
    ('{"prompt": "x"}', "list"),
    ('[{"prompt": "x", "sample_sampler": "eulr"}]', "did you mean 'euler'"),
    ("[", "not valid JSON"),
])
def test_bad_json(tmp_path, content, words):
    path = tmp_path / "prompts.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=words):
        load_prompts(path)


def test_a_side_that_rounds_to_nothing_is_an_error():
    with pytest.raises(ConfigError, match="width 8"):
        with_defaults(SamplePrompt(prompt="x", width=8), SAMPLE_DEFAULTS["flux"])


def test_settings_that_a_family_does_not_read_are_told():
    prompts = [
        SamplePrompt(prompt="x", sample_sampler="euler", guidance_scale=2.0),
        SamplePrompt(prompt="y", renorm_cfg=1.0),
    ]
    assert unused_settings(prompts, SAMPLE_DEFAULTS["flux"]) == ["renorm_cfg"]
    assert unused_settings(prompts, SAMPLE_DEFAULTS["sd"]) == ["guidance_scale", "renorm_cfg"]


@pytest.mark.parametrize(
    "line", ["a cat -- w 512", "a cat -- 5", "a cat --", "a cat --5 years old", "a cat --- asleep"]
)
def test_dashes_without_a_letter_are_text(line):
    assert parse_line(line).to_dict() == {"prompt": line}
    assert parse_line(f"{line} --w 64 --n worse -- ugly").to_dict() == {
        "prompt": line,
        "width": 64,
        "negative_prompt": "worse -- ugly",
    }


def test_minus_one_draws_a_seed(tmp_path):
    assert parse_line("a cat --d -1").seed is None
    with pytest.raises(ConfigError, match="--d is '-2'"):
        parse_line("a cat --d -2")
    (tmp_path / "p.toml").write_text(
        '[prompt]\nprompt = "x"\nseed = 3\n[[prompt.subset]]\nseed = -1\n[[prompt.subset]]\n', encoding="utf-8"
    )
    assert [prompt.seed for prompt in load_prompts(tmp_path / "p.toml")] == [None, 3]


def test_bad_prompts_can_be_left_out_while_one_is_good(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a --w x\nfine\nb --l much\n", encoding="utf-8")
    left_out = []
    assert [prompt.prompt for prompt in load_prompts(path, left_out=left_out)] == ["fine"]
    assert [problem.split(":")[0] for problem in left_out] == ["prompts.txt line 1", "prompts.txt line 3"]
    path.write_text("a --w x\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="prompts.txt line 1"):
        load_prompts(path, left_out=[])


@pytest.mark.parametrize("at", ["step", "epoch"])
@pytest.mark.parametrize("interval", [0, -1])
def test_an_interval_of_none_or_less_makes_no_samples(at, interval):
    options = SimpleNamespace(sample_at_first=False, sample_every_n_steps=interval, sample_every_n_epochs=interval)
    assert not is_sample_due(options, at, 4, 2)


def test_pictures_and_clips_of_prompts_are_looked_at_before_the_run(tmp_path):
    """Each that cannot be read, by its letter; of a first frame for each section too."""
    good = tmp_path / "good.png"
    Image.new("RGB", (8, 8)).save(good)
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no picture")
    first, controls = f"{good};;;{tmp_path}/none.png", f"--ci {good} --ci {tmp_path}/gone.png"
    text = f"a cat --i {first} --ei {bad} {controls} --cn {tmp_path}/no.mp4"
    prompt = parse_line(text, options=VIDEO_LINE_OPTIONS)
    with pytest.raises(ConfigError) as caught:
        check_files(prompt, VIDEO_LINE_OPTIONS, lambda paths: paths.split(";;;"))
    told = caught.value.problems
    for message, words in zip(told, ("--i: ", "--ei: ", "--ci: ", "--cn: "), strict=True):
        assert message.startswith(f"the sample prompt 'a cat': {words}{tmp_path}")
    assert "none.png does not exist" in told[0] and "bad.png is not an image" in told[1]
    check_files(parse_line(f"a cat --i {good}", options=VIDEO_LINE_OPTIONS), VIDEO_LINE_OPTIONS, lambda path: [path])
    check_files(parse_line("a cat", options=VIDEO_LINE_OPTIONS), VIDEO_LINE_OPTIONS, lambda path: [path])
